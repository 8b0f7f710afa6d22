"""Stage grpo on the tiny pipeline: a reward, a configuration, and the gradients of its updates."""

from dataclasses import replace

import torch

import train
from opd import config, grpo, ranks
from opd.runfolder import RunFolder
from tests import tiny

BRIGHT = "tests.tiny_grpo:brightness"


def brightness(images, prompts, metadata):
    """Mean pixel: something a random tiny model can change."""
    return images.mean((1, 2, 3))


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.25)


def grpo_config(world, **changes):
    return replace(tiny.config(world, stage="grpo", teachers={}, anchor_weight=0.0, group=4, micro_batch=8, iterations=2, steps=4,
                               train_rewards={"red": BRIGHT, "blue": BRIGHT}, beta=0.0), **changes)


def build(world, **changes):
    cfg = grpo_config(world, **changes)
    config.check(cfg, 1)
    m, data = train.build(cfg, ranks.start())
    return cfg, m, data, train.Trained(cfg, m)


def run(cfg):
    config.check(cfg, 1)
    m, data = train.build(cfg, ranks.start())
    folder = RunFolder(cfg, True)
    return folder, m, train.train(cfg, m, data, folder)


def flat(tensors):
    return torch.cat([ranks.full(t).flatten() for t in tensors])


def recorded(world, turn: int = 0, **changes):
    """(gradient of optimizer step number `turn` of one iteration, the iteration's metrics)."""
    cfg, m, data, trained = build(world, **changes)
    gradients, original = [], trained.update
    def update(*args):
        gradients.append(flat(p.grad for p in trained.parameters.values()))
        return original(*args)
    trained.update = update
    row, _ = grpo.iteration(cfg, m, data, trained, 0, True)
    return gradients[turn], row


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())
