"""Stage grpo on the tiny pipeline: rewards, runs, and the gradients of its updates."""

import torch

import train
from opd import ranks
from opd.report.report import Report
from opd.runfolder import RunFolder
from opd.setup import set_up
from tests import tiny

BRIGHT = "tests.tiny_grpo:brightness"


def brightness(images, prompts, metadata):
    """Mean pixel: something a random tiny model can change."""
    return images.mean((1, 2, 3))


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.25)


def build(world, **changes):
    """(cfg, model, data, trained, stage)."""
    return tiny.build(tiny.grpo_config(world, **changes))


def run(cfg):
    """(run folder, model, trained, report) of the whole loop."""
    cfg.check(1)
    model, data, rewards = set_up(cfg, ranks.start())
    trained = train.Trained(cfg, model)
    folder = RunFolder(cfg, True)
    report = Report(cfg, model, data, rewards, folder)
    train.train(cfg, train.choose_stage(cfg, model, data, rewards, trained), trained, folder, report)
    return folder, model, trained, report


def flat(tensors):
    return torch.cat([ranks.full(t).flatten() for t in tensors])


def recorded(world, turn: int = 0, **changes):
    """(gradient of optimizer step number `turn` of one iteration, the iteration's metrics)."""
    *_, trained, stage = build(world, **changes)
    gradients, original = [], trained.update

    def update(*arguments):
        gradients.append(flat(p.grad for p in trained.parameters.values()))
        return original(*arguments)

    trained.update = update
    metrics, _ = stage.step(0)
    return gradients[turn], metrics


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())
