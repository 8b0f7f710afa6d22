"""Pictures: files, tensors, labelled grids, and the source pictures that prompts name."""

import os
import textwrap
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from opd.data import Asked, Edit, Prompt
from opd.errors import require
from opd.files import path_of, reading, replace

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


# ---- of prompts ------------------------------------------------------------------------------------


def source_pictures(row: dict, folder: Path, where: str) -> tuple[str, ...]:
    """The paths under "image", seen from `folder`; they become "source", where rewards find them. A "mask" of
    theirs is seen from there too. ValueError or FileNotFoundError naming `where`."""
    given = row.pop("image", None) or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "image" is {given!r:.60}; expected a path or a list of paths')
    if given and None in row:  # of a .csv, what no column is for
        raise ValueError(f"{where}: more fields than columns; several pictures of a prompt need a .jsonl")
    with reading(f'{where}: "image"'):
        paths = [str((folder / path_of(name)).resolve()) for name in names]
    for path in paths:
        if not os.path.isfile(path):  # False too where the name is longer than any file's
            what = f"no source picture {path[:300]!r}"
            raise FileNotFoundError(f"{where}: {what}; paths are seen from {folder}")
    if paths and "source" in row:
        taken = '"source" is where rewards find the pictures of "image"'
        raise ValueError(f"{where}: {taken}; give this field another name")
    if paths:
        row["source"] = paths
    if paths and isinstance(row.get("mask"), str):
        row["mask"] = str((folder / path_of(row["mask"])).resolve())
    return tuple(paths)


def sizes(asked: Asked) -> str:
    """Width x height of a prompt's source pictures' files, such as 1024x768+512x512; "" without any."""
    pictures = asked.pictures if isinstance(asked, Edit) else ()
    return "+".join("{}x{}".format(*size_of_image(picture)) for picture in pictures)


def fitted_sizes(family: ModuleType, folder: Path, asked: Asked) -> str:
    """The same as the transformer sees them. ValueError for a prompt whose source pictures, or want of any,
    the pipeline cannot take."""
    editing, kind = family.EDITING, family.PIPELINE
    text, pictures = asked if isinstance(asked, Edit) else (asked, ())
    what = f"prompt {text[:60]!r}"
    if editing is None:
        way_out = "drop its field image, or take a pipeline that edits"
        require(not pictures, f"{what} has a source picture, and {kind} reads text alone; {way_out}")
        return ""
    wanted = f"{editing.fewest} to {editing.most} source pictures (field image, or --image)"
    fits = editing.fewest <= len(pictures) <= editing.most
    require(fits, f"{what} has {len(pictures)} source pictures; {kind} takes {wanted}")
    fitted = []
    for picture in pictures:
        with reading(f"source picture {picture!r}"):
            fitted.append("{}x{}".format(*editing.size(folder, *size_of_image(picture))))
    return "+".join(fitted)
