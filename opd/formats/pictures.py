"""Pictures: files, tensors, and labelled grids of them."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from opd.files import reading, replace

# Of a grid, in pixels.
TOP = 48  # for three lines of caption
GAP = 4  # between images
LETTER = 7  # width of one in a row's name


def read_image(file: Path) -> Image.Image:
    """RGB. ValueError naming a file that is no picture."""
    with reading(f"image {str(file)!r}"):
        return Image.open(file).convert("RGB")


def save_image(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    replace(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB -> (3, H, W) float32 in [0, 1]."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float() / 255


def to_pil(image_3HW: torch.Tensor, pixels: int) -> Image.Image:
    """[0, 1] float -> RGB, enlarged by a whole factor (nearest) to at least `pixels` per side."""
    bytes_3HW = (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(rearrange(bytes_3HW, "c h w -> h w c").numpy()))
    factor = max(1, -(-pixels // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def labelled_grid(rows: dict[str, list[torch.Tensor]], columns: list[str], pixels: int = 120) -> Image.Image:
    """One picture: a row of images (3, H, W) per name, a caption above every column."""
    tiles = {name: [to_pil(image, pixels) for image in images] for name, images in rows.items()}
    first_row = next(iter(tiles.values()))
    width, height = first_row[0].size
    left = 12 + LETTER * max(len(name) for name in rows)
    right = left + len(columns) * (width + GAP)
    bottom = TOP + len(rows) * (height + GAP)
    canvas = Image.new("RGB", (right, bottom), "white")
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(columns):
        x = left + column * (width + GAP)
        lines = textwrap.wrap(caption, max(6, width // 6))[:3]
        draw.multiline_text((x, 4), "\n".join(lines), fill="black", spacing=1)
    for row, (name, images) in enumerate(tiles.items()):
        y = TOP + row * (height + GAP)
        draw.text((6, y + height // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            canvas.paste(image, (left + column * (width + GAP), y))
    return canvas
