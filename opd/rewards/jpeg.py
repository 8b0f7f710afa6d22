"""Rewards without a model (DDPO, arXiv 2305.13301): how small or how large an image is as a JPEG."""

import io

import torch
from PIL import Image
from torch import Tensor

from opd.rewards.inputs import pictures

QUALITY = 95


def compressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Minus the size in kB of the JPEG at quality 95, (B,)."""
    return -incompressibility(images_BCHW, prompts, metadata)


def incompressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Size in kB of the JPEG at quality 95, (B,)."""
    return torch.tensor([_size_in_kB(picture) for picture in pictures(images_BCHW)])


def _size_in_kB(picture: Image.Image) -> float:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
