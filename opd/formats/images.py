"""Images with captions for flow-matching fine-tuning, held as latents."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from opd.data import numbered_lines, require_prompt, seed_of
from opd.files import reading, replace, write_safetensors

CAPTION_KEYS = ("prompt", "text", "caption")


@dataclass
class Images:
    latents: Tensor
    """(N, C, H, W), scaled as the transformer sees them."""
    captions: list[str]
    log_shift: float
    """Mean of logit(sigma) in training: log of the family's shift."""

    def of_step(self, count: int, seed: int, step: int) -> list[int]:
        """Which `count` images step `step` trains on: endless shuffled epochs, a pure function."""
        first, size = step * count, len(self.captions)
        chosen = []
        while len(chosen) < count:
            epoch, place = divmod(first + len(chosen), size)
            order = np.random.default_rng(seed_of(seed, "images", epoch)).permutation(size)
            chosen += order[place : place + count - len(chosen)].tolist()
        return chosen


def load_images(source: str, model) -> Images:
    """Read a data directory. Latents are taken as they are; images are encoded by the model's VAE, once.

    FileNotFoundError / ValueError naming the file or line for missing, unreadable or misshapen data.
    """
    folder = Path(source).expanduser()
    captions, rows = read_metadata(folder)
    log_shift = model.family.log_shift(model.folder, model.shape)
    if (folder / "latents.safetensors").is_file():
        latents = read_latents(folder / "latents.safetensors", (len(rows), *model.shape))
    else:
        latents = encode_files(find_files(folder, rows), model)
    return Images(latents, captions, log_shift)


def read_metadata(folder: Path) -> tuple[list[str], list[dict]]:
    """Captions and rows of metadata.jsonl. FileNotFoundError / ValueError naming the line."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f'--data {str(folder)!r}: no metadata.jsonl; give one line {{"file_name", "prompt"}} per image, '
            'or {"prompt"} per latent of latents.safetensors'
        )
    captions, rows = [], []
    for number, line in numbered_lines(file):
        try:
            row = json.loads(line)
            captions.append(caption_of(row))
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: expected an object with one of {CAPTION_KEYS}, got {line[:60]!r}"
            ) from error
        require_prompt(captions[-1], f"{file}:{number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} is empty")
    return captions, rows


def caption_of(row: dict) -> str:
    """The first text under one of CAPTION_KEYS. TypeError where there is none."""
    if isinstance(row, dict):
        for key in CAPTION_KEYS:
            if key in row and isinstance(row[key], str):
                return row[key]
    raise TypeError("no caption")


def read_latents(file: Path, wanted: tuple[int, ...]) -> Tensor:
    """The tensor `latents`, which must have the shape `wanted`; it is checked before the data is read."""
    try:
        with safe_open(file, "pt") as content:
            shape = tuple(content.get_slice("latents").get_shape())
    except SafetensorError as error:
        raise ValueError(f"{file} holds no tensor 'latents' ({error})") from error
    if shape != wanted:
        raise ValueError(
            f"{file} has shape {shape}; with {wanted[0]} captions and this model and --resolution "
            f"it must be {wanted}"
        )
    latents = load_file(file)["latents"]
    bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{file}: {len(bad)} latents hold NaN or infinity, first: number {bad[0]}")
    return latents


def write_samples(folder: Path, latents: Tensor, rows: list[dict]) -> None:
    """A data directory of latents (N, C, H, W) with a row of metadata each, the caption under "prompt"."""
    write_safetensors(folder / "latents.safetensors", {"latents": latents.contiguous()})
    # Last: without it the folder is no data.
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace(folder / "metadata.jsonl", lambda path: path.write_text(lines))


def find_files(folder: Path, rows: list[dict]) -> list[Path]:
    """The image of every row. ValueError for a row without, FileNotFoundError for one that is not there."""
    for number, row in enumerate(rows, 1):
        if "file_name" not in row:
            raise ValueError(
                f'{folder}/metadata.jsonl: line {number} has no "file_name", '
                "and there is no latents.safetensors"
            )
        require_inside(folder, row["file_name"], number)
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}/metadata.jsonl names {len(missing)} images that do not exist, first: {missing[0]!r}"
        )
    return [folder / row["file_name"] for row in rows]


def require_inside(folder: Path, name, number: int) -> None:
    """ValueError for a file_name that is no path below `folder`: whoever made the data would choose which of
    the user's files are read."""
    line = f"{folder}/metadata.jsonl: line {number}"
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f'{line}: "file_name" is {name!r:.60}; expected the path of an image')
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f'{line}: "file_name" {name!r} leads out of the folder; keep the images inside it')


def encode_files(files: list[Path], model, batch: int = 16) -> Tensor:
    """Image files -> latents (N, C, H, W) in the model's dtype.

    An image is resized until it just covers the picture, and what stands out is cropped on both sides alike.
    """
    vae = model.family.load_vae(model.folder).to(model.device)
    latents = []
    for i in range(0, len(files), batch):
        images = torch.stack([read_image(file, *model.pixels) for file in files[i : i + batch]])
        encoded = model.family.encode_images(vae, images.to(model.device))
        latents.append(encoded.to("cpu", model.dtype))
    return torch.cat(latents)


def read_image(file: Path, height: int, width: int) -> Tensor:
    """RGB (3, height, width) float32 in [0, 1]."""
    with reading(f"image {str(file)!r}"):
        image = Image.open(file).convert("RGB")
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        across, down = max(width, round(scale * image.width)), max(height, round(scale * image.height))
        image = image.resize((across, down), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    array_HWC = np.asarray(image, dtype=np.float32) / 255
    return rearrange(torch.from_numpy(array_HWC), "h w c -> c h w")
