"""Rewards without a model (DDPO, arXiv 2305.13301): how small or how large an image is as a JPEG."""

import io
import math

import torch
from PIL import Image
from torch import Tensor

QUALITY = 95


def compressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Minus the size in kB of the JPEG at quality 95, (B,); NaN for an image with a NaN."""
    return -incompressibility(images_BCHW, prompts, metadata)


def incompressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Size in kB of the JPEG at quality 95, (B,); NaN for an image with a NaN."""
    return torch.tensor([_size_in_kB(image_CHW) for image_CHW in images_BCHW])


def _size_in_kB(image_CHW: Tensor) -> float:
    if image_CHW.isnan().any():
        return math.nan
    pixels_HWC = (image_CHW * 255).round().clamp(0, 255).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.to("cpu", torch.uint8).numpy()).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
