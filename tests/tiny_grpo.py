"""Stage grpo on the tiny pipeline: rewards, runs, and the gradients of its updates."""

import torch

from tests import tiny

BRIGHT = "tests.tiny_grpo:brightness"


def brightness(images, prompts, metadata):
    """Mean pixel: something a random tiny model can change."""
    return images.mean((1, 2, 3))


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.25)


def nothing(images, prompts, metadata):
    return torch.full((len(images),), torch.nan)


def build(world, **changes):
    return tiny.build(tiny.grpo_config(world, **changes))


def recorded(world, turn: int = 0, **changes):
    """(gradient of optimizer step number `turn` of one iteration, the iteration's metrics)."""
    *_, trained, stage = build(world, **changes)
    gradients, original = [], trained.update

    def update(*arguments):
        gradients.append(tiny.gradient_of(trained))
        return original(*arguments)

    trained.update = update
    metrics, _ = stage.step(0)
    return gradients[turn], metrics
