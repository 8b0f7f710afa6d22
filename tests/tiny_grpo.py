"""Stage grpo on the tiny pipeline: rewards, runs, and the gradients of its updates."""

import torch

from tests import tiny

BRIGHT, DARK = "tests.tiny_grpo:brightness", "-1*tests.tiny_grpo:brightness"


def brightness(images, prompts, metadata):
    """Mean pixel: something a random tiny model can change."""
    return images.mean((1, 2, 3))


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.25)


def too_long(images, prompts, metadata):
    return torch.ones(len(images) + 1)


def nothing(images, prompts, metadata):
    return torch.full((len(images),), torch.nan)


def build(world, **changes):
    return tiny.build(tiny.grpo_config(world, **changes))


def advantages_by_hand(images: list, prompts: list) -> list[float]:
    """Of brightness: less the group's mean, in units of the task's spread."""
    rewards = torch.stack([image.mean() for image in images]).double().view(len(prompts), -1)
    advantages = []
    for own, prompt in zip(rewards, prompts, strict=True):
        same = rewards[[p for p, other in enumerate(prompts) if other.task == prompt.task]]
        advantages += ((own - own.mean()) / (same.numpy().std() + 1e-4)).tolist()
    return advantages


def recorded(world, turn: int = 0, **changes):
    return update_of(build(world, **changes), turn)


def update_of(built, turn: int = 0):
    """(gradient of optimizer step number `turn` of one iteration, the iteration's metrics)."""
    *_, trained, stage = built
    gradients, original = [], trained.update

    def update(*arguments):
        gradients.append(tiny.gradient_of(trained))
        return original(*arguments)

    trained.update = update
    metrics, _ = stage.step(0)
    return gradients[turn], metrics
