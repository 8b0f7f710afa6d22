"""Pictures: files, tensors, and labelled grids of them."""

import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from opd.data import Prompt
from opd.files import reading, replace

# Of a grid, in pixels.
FONT = ImageFont.load_default(14)
LINE = 18  # height of a line of text
GAP = 4  # between images
CELL = 120  # least size of an image
MOST_PIXELS = 10**8  # of a source picture: 300 MB


def read_image(file: Path) -> Image.Image:
    """RGB, upright. ValueError naming a file that is no picture."""
    with reading(f"image {str(file)!r}"):
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


@cache
def size_of_image(path: str) -> tuple[int, int]:
    """(width, height) by the file's header. ValueError for a film, for what would fill the memory, and for
    greys of more than 8 bits, which as RGB would be white."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are greys of mode {image.mode}; save it with 8 bits of RGB")
        # Behind a camera's photo a .jpg may hold its preview or its depth.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"it has {image.n_frames} frames; save one of them as a picture of its own")
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it is {image.width} x {image.height}; make it smaller than 100 megapixels")
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # a camera held upright
        return image.size[::-1] if turned else image.size


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


def source_row(prompts: list[Prompt], pixels: tuple[int, int]) -> dict[str, list[torch.Tensor]]:
    """The row of a grid with each prompt's source pictures side by side, in cells of (height, width) pixels;
    {} where none has any."""
    if not any(prompt.pictures for prompt in prompts):
        return {}
    height, width = pixels
    cells = []
    for prompt in prompts:
        cell, share = Image.new("RGB", (width, height), "white"), width // max(1, len(prompt.pictures))
        for place, path in enumerate(prompt.pictures):
            cell.paste(ImageOps.contain(read_image(Path(path)), (share, height)), (place * share, 0))
        cells.append(to_tensor(cell))
    return {"source": cells}


def labelled_grid(
    rows: dict[str, list[torch.Tensor]],
    columns: list[str],
    notes: dict[str, list[str]] | None = None,
) -> Image.Image:
    """One picture: a row of images (3, H, W) per name, above every column three lines of its caption at most.
    `notes`: name -> what stands in a corner of each image, such as its score."""
    tiles = {name: [to_pil(image, CELL) for image in images] for name, images in rows.items()}
    width, height = next(iter(tiles.values()))[0].size
    letters = max(6, int(width / FONT.getlength("n")))
    captions = [textwrap.wrap(caption, letters)[:3] for caption in columns]
    top = 8 + LINE * max(len(lines) for lines in captions)
    left = 16 + int(max(FONT.getlength(part) for name in rows for part in name.split("\n")))
    size = left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(captions):
        draw.multiline_text((left + column * (width + GAP), 2), "\n".join(lines), fill="black", font=FONT)
    for row, (name, images) in enumerate(tiles.items()):
        y = top + row * (height + GAP)
        draw.multiline_text((8, y + height // 2 - LINE), name, fill="black", font=FONT)
        for column, image in enumerate(images):
            x = left + column * (width + GAP)
            canvas.paste(image, (x, y))
            if notes and notes[name][column]:
                place = x + width - 2, y + height - 2
                draw.text(
                    place, notes[name][column], "white", FONT, "rs", stroke_width=2, stroke_fill="black"
                )
    return canvas
