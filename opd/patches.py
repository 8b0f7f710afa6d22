"""Pictures as sequences of 2 x 2 patches, which most families make of their latents, and the noise levels of
pipelines whose shift depends on the number of patches."""

from pathlib import Path

from einops import rearrange
from torch import Tensor

from opd import schedule

PATCH = 2  # the pipelines take no other


def pack(x_BCHW: Tensor) -> Tensor:
    """A token per patch (B, T, 4 C)."""
    return rearrange(x_BCHW, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens_BTC: Tensor, rows: int) -> Tensor:
    return rearrange(tokens_BTC, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH, q=PATCH)


def image_tokens(shape_CHW: tuple[int, int, int]) -> int:
    """Number of patches."""
    return (shape_CHW[1] // PATCH) * (shape_CHW[2] // PATCH)


def sigmas(folder: Path, shape_CHW: tuple[int, int, int], steps: int) -> list[float]:
    """The scheduler's, from the pipeline's 1, 1 - 1/N, ... 1/N."""
    mu = schedule.linear_mu(folder, image_tokens(shape_CHW))
    return schedule.noise_levels(folder, steps, mu, schedule.even_levels(steps))


def log_shift(folder: Path, shape_CHW: tuple[int, int, int]) -> float:
    return schedule.log_of_shift(folder, schedule.linear_mu(folder, image_tokens(shape_CHW)))


def patches_along(side: int, unit: int, most: int | None = None) -> int:
    """Of one side of an image, `unit` pixels to a patch. ValueError where it is not made of whole patches, or
    of more than `most`."""
    way_out = f"use a multiple of {unit}"
    if most is not None:
        way_out = f"{way_out} up to {unit * most}"
    count, rest = divmod(side, unit)
    if rest != 0 or count < 1 or (most is not None and count > most):
        raise ValueError(f"resolution {side} does not fit this model: {way_out}")
    return count
