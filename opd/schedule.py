"""Noise levels of pipelines whose scheduler is diffusers' FlowMatchEulerDiscreteScheduler: shared by
families.

mu, the log of a resolution-dependent shift, is linear in the number of image tokens, through the two points
that the scheduler's config names; a scheduler with a static shift does not look at it.
"""

import math
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler


def noise_levels(folder: Path, tokens: int, steps: int, even: list[float] | None = None) -> list[float]:
    """The scheduler's `steps` + 1 levels, from 1 down to 0, for `tokens` image tokens.

    `even`: the levels that the pipeline hands to its scheduler before the shift; None where it leaves them to
    the scheduler. ValueError for less than one step and for a schedule that does not fall strictly to 0.
    """
    scheduler = load_scheduler(folder)
    mu = None
    if scheduler.config.use_dynamic_shifting or even is not None:
        mu = dynamic_shift(scheduler, tokens)
    if even is None:
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=even, mu=mu)
    levels = scheduler.sigmas
    if levels[-1] != 0 or (levels.diff() >= 0).any():
        raise ValueError(f"{folder}/scheduler: the sigmas must fall strictly to 0, got {levels.tolist()}")
    return levels.tolist()


def log_of_shift(folder: Path, tokens: int) -> float:
    """Log of the factor on sigma / (1 - sigma)."""
    scheduler = load_scheduler(folder)
    if not scheduler.config.use_dynamic_shifting:
        return math.log(scheduler.config.shift)
    half = scheduler.time_shift(dynamic_shift(scheduler, tokens), 1.0, 0.5)
    return math.log(half / (1 - half))  # at sigma = 1/2 the odds are the shift


def dynamic_shift(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """mu for so many image tokens."""
    config = scheduler.config
    rise = config.max_shift - config.base_shift
    run = config.max_image_seq_len - config.base_image_seq_len
    return config.base_shift + rise / run * (tokens - config.base_image_seq_len)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")


def require_a_step(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps = {steps}: a walk from noise to data needs at least 1 step")
