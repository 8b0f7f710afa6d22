"""Noise levels of pipelines whose scheduler is diffusers' FlowMatchEulerDiscreteScheduler: shared by
families.

mu is the log of a resolution-dependent shift; a scheduler with a static shift does not look at it.
"""

import math
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def noise_levels(folder: Path, steps: int, mu: float, even: list[float] | None = None) -> list[float]:
    """The scheduler's `steps` + 1 levels, from 1 down to 0.

    `even`: the levels that the pipeline hands to its scheduler before the shift; None where it leaves them to
    the scheduler. ValueError for less than one step and for a schedule that does not fall strictly to 0.
    """
    require_a_step(steps)
    scheduler = load_scheduler(folder)
    if even is None:
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=even, mu=mu)
    levels = scheduler.sigmas
    if levels[-1] != 0 or (levels.diff() >= 0).any():
        raise ValueError(f"{folder}/scheduler: the sigmas must fall strictly to 0, got {levels.tolist()}")
    return levels.tolist()


def even_levels(steps: int, dtype: torch.dtype = torch.float64) -> list[float]:
    """1, 1 - 1/N, ... 1/N, computed in `dtype`."""
    require_a_step(steps)
    return torch.linspace(1.0, 1 / steps, steps, dtype=dtype).tolist()


def log_of_shift(folder: Path, mu: float) -> float:
    """Log of the factor on sigma / (1 - sigma)."""
    scheduler = load_scheduler(folder)
    if not scheduler.config.use_dynamic_shifting:
        return math.log(scheduler.config.shift)
    half = scheduler.time_shift(mu, 1.0, 0.5)
    return math.log(half / (1 - half))  # at sigma = 1/2 the odds are the shift


def linear_mu(folder: Path, tokens: int) -> float:
    """mu, linear in the number of image tokens through the two points that the scheduler's config names."""
    config = load_scheduler(folder).config
    rise = config.max_shift - config.base_shift
    run = config.max_image_seq_len - config.base_image_seq_len
    return config.base_shift + rise / run * (tokens - config.base_image_seq_len)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")


def require_a_step(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps = {steps}: a walk from noise to data needs at least 1 step")
