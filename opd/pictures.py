"""Pictures: images as files, and labelled grids of them."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from opd.files import replace


def save_image(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    replace(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def to_pil(image_3HW: torch.Tensor, pixels: int) -> Image.Image:
    """[0, 1] float -> RGB, enlarged by a whole factor (nearest) to at least `pixels` per side."""
    bytes_3HW = (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(rearrange(bytes_3HW, "c h w -> h w c").numpy()))
    factor = max(1, -(-pixels // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def labelled_grid(rows: dict[str, list[torch.Tensor]], columns: list[str], pixels: int = 120) -> Image.Image:
    """One picture: a row of images (3, H, W) per name, a caption above every column."""
    tiles = {name: [to_pil(image, pixels) for image in images] for name, images in rows.items()}
    width, height = next(iter(tiles.values()))[0].size
    left, top, gap = 12 + 7 * max(map(len, rows)), 48, 4
    size = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for c, caption in enumerate(columns):
        lines = wrap(caption, max(6, width // 6))
        draw.multiline_text((left + c * (width + gap), 4), lines, fill="black", spacing=1)
    for r, (name, images) in enumerate(tiles.items()):
        y = top + r * (height + gap)
        draw.text((6, y + height // 2 - 6), name, fill="black")
        for c, image in enumerate(images):
            canvas.paste(image, (left + c * (width + gap), y))
    return canvas


def wrap(text: str, width: int) -> str:
    """At most three lines of `width` characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(line[:width] for line in lines[:3])
