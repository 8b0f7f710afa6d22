"""Rewards without a model: how large a picture is as a JPEG, and whether an edit kept what it should."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opd.formats.pictures import to_tensor
from opd.rewards.inputs import picture_at, pictures, source_fault, sources_of

CELLS = 32  # per side, of the low frequencies that are compared
UNRELATED = 0.25
"""Mean difference at which the score is 0. Independent normal values of ImageNet's standard deviation,
0.225, differ by 2 * 0.225 / sqrt(pi) = 0.25."""


def compressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Minus the size in kB of the JPEG at quality 95, (B,) (DDPO, arXiv 2305.13301)."""
    return -incompressibility(images_BCHW, prompts, metadata)


def incompressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Size in kB of the JPEG at quality 95, (B,)."""
    sizes = []
    for picture in pictures(images_BCHW):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def preservation(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """How much of the first source picture is kept, (B,) in [0, 1]; 1 = all of it.

        score = max(0, 1 - d / 0.25)
        d = mean_cells,RGB |low(keep * (x - source))| / mean_cells low(keep)

    x: the picture in [0, 1]; source: resized by area to the size of x; low: means over 32 x 32 equal cells,
    so that grain and a shift by a pixel cost little; keep: 1, or with "mask" in the metadata 1 - mask. The
    mask is a picture, white where x may change, and resized as the source is. A result
    that equals its source scores 1: weigh this against a reward of the edit. ValueError for an all-white
    mask."""
    rows = zip(images_BCHW.float().cpu(), metadata, strict=True)
    return torch.stack([1 - difference(image_3HW, row) / UNRELATED for image_3HW, row in rows]).clamp(min=0)


def difference(image_3HW: Tensor, metadata: dict) -> Tensor:
    """d of the equation, a scalar."""
    size = image_3HW.shape[2], image_3HW.shape[1]
    source_3HW = to_tensor(sources_of(metadata)[0].resize(size, Image.Resampling.BOX))
    keep_1HW = torch.ones_like(image_3HW[:1])
    if metadata.get("mask"):
        mask = picture_at(metadata["mask"]).resize(size, Image.Resampling.BOX)
        keep_1HW = 1 - to_tensor(mask).mean(0, keepdim=True)
        if not keep_1HW.any():
            raise ValueError(f"mask {metadata['mask']!r} is white all over: nothing has to stay")
    return low(keep_1HW * (image_3HW - source_3HW)).abs().mean() / low(keep_1HW).mean()


def low(x_CHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x_CHW, CELLS)


def prompt_fault(text: str, metadata: dict) -> str:
    mask = metadata.get("mask")
    if mask and not Path(str(mask)).is_file():
        return f"no mask {mask!r}"
    return source_fault(text, metadata)


preservation.prompt_fault = prompt_fault
preservation.about = "no model: 1 - mean difference from the source in 32 x 32 cells / 0.25, at least 0"
