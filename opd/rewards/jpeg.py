"""Rewards without a model (DDPO, arXiv 2305.13301): how small or how large an image is as a JPEG."""

import io

import torch
from torch import Tensor

from opd.rewards.inputs import pictures


def compressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Minus the size in kB of the JPEG at quality 95, (B,)."""
    return -incompressibility(images_BCHW, prompts, metadata)


def incompressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Size in kB of the JPEG at quality 95, (B,)."""
    sizes = []
    for picture in pictures(images_BCHW):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)
