"""Latents with captions, the data of stage sft: read from images or from latents.safetensors, and written."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from opd.data import Asked, asked_of, seed_of
from opd.files import path_of, replace, write_safetensors
from opd.formats.pictures import read_image, to_tensor
from opd.formats.prompts import read_jsonl, require_prompt
from opd.formats.sources import source_pictures

CAPTION_KEYS = ("prompt", "text", "caption")


@dataclass
class Images:
    latents: Tensor  # (N, C, H, W), scaled as the transformer sees them
    captions: list[Asked]
    log_shift: float  # mean of logit(sigma) in training: log of the family's shift

    def of_step(self, count: int, seed: int, step: int) -> list[int]:
        """Which `count` images step `step` trains on: endless shuffled epochs, a pure function."""
        first, size = step * count, len(self.captions)
        chosen = []
        while len(chosen) < count:
            epoch, place = divmod(first + len(chosen), size)
            order = np.random.default_rng(seed_of(seed, "images", epoch)).permutation(size)
            chosen += order[place : place + count - len(chosen)].tolist()
        return chosen


# ---- reading ---------------------------------------------------------------------------------------


def load_images(source: str, model) -> Images:
    """Read a data directory. Latents are taken as they are; images are encoded by the model's VAE, once."""
    folder = path_of(source)
    captions, rows = read_metadata(folder)
    sources = [
        source_pictures(row, folder, f"{folder}/metadata.jsonl: line {n}") for n, row in enumerate(rows, 1)
    ]
    captions = [asked_of(*pair) for pair in zip(captions, sources, strict=True)]
    log_shift = model.family.log_shift(model.folder, model.shape)
    if (folder / "latents.safetensors").is_file():
        latents = read_latents(folder / "latents.safetensors", (len(rows), *model.shape))
    else:
        latents = encode_files(find_files(folder, rows), model)
    return Images(latents, captions, log_shift)


def read_metadata(folder: Path) -> tuple[list[str], list[dict]]:
    """Captions, the first text under one of CAPTION_KEYS, and rows of metadata.jsonl."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        wanted = 'one line {"file_name", "prompt"} per image, or {"prompt"} per latent of latents.safetensors'
        raise FileNotFoundError(f"{str(folder)!r} holds no metadata.jsonl; give {wanted}")
    lines = list(read_jsonl(file))
    if not lines:
        raise ValueError(f"{file} is empty")
    captions = []
    for number, row in lines:
        texts = [row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)]
        if not texts:
            wanted = f"expected a text under one of {', '.join(CAPTION_KEYS)}"
            raise ValueError(f"{file}:{number}: no caption; {wanted}")
        require_prompt(texts[0], f"{file}:{number}")
        captions.append(texts[0])
    return captions, [row for _, row in lines]


def read_latents(file: Path, wanted: tuple[int, ...]) -> Tensor:
    """The tensor `latents`, which must have the shape `wanted`; it is checked before the data is read."""
    try:
        with safe_open(file, "pt") as content:
            shape = tuple(content.get_slice("latents").get_shape())
    except SafetensorError as error:
        raise ValueError(f"{file} holds no tensor 'latents' ({error})") from error
    if shape != wanted:
        fitting = f"with {wanted[0]} captions and this model and --resolution it must be {wanted}"
        raise ValueError(f"{file} has shape {shape}; {fitting}")
    latents = load_file(file)["latents"]
    bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{file}: {len(bad)} latents hold NaN or infinity, first: number {bad[0]}")
    return latents


def find_files(folder: Path, rows: list[dict]) -> list[Path]:
    """The image of every row. ValueError for one that is no path below `folder`: whoever made the data would
    choose which of the user's files are read."""
    for number, row in enumerate(rows, 1):
        line = f"{folder}/metadata.jsonl: line {number}"
        if "file_name" not in row:
            raise ValueError(f'{line} has no "file_name", and there is no latents.safetensors')
        name = row["file_name"]
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f'{line}: "file_name" is {name!r:.60}; expected the path of an image')
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            way_out = "keep the images inside it"
            raise ValueError(f'{line}: "file_name" {name!r} leads out of the folder; {way_out}')
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        named = f"{folder}/metadata.jsonl names {len(missing)} images"
        raise FileNotFoundError(f"{named} that do not exist, first: {missing[0]!r}")
    return [folder / row["file_name"] for row in rows]


def encode_files(files: list[Path], model, batch: int = 16) -> Tensor:
    """Image files, their middles in the model's resolution -> latents (N, C, H, W) in the model's dtype."""
    height, width = model.pixels
    vae = model.family.load_vae(model.folder).to(model.device)
    latents = []
    for i in range(0, len(files), batch):
        pictures = [read_image(file) for file in files[i : i + batch]]
        pictures = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) for image in pictures]
        images_BCHW = torch.stack([to_tensor(picture) for picture in pictures])
        encoded = model.family.encode_images(vae, images_BCHW.to(model.device))
        latents.append(encoded.to("cpu", model.dtype))
    return torch.cat(latents)


# ---- writing ---------------------------------------------------------------------------------------


def write_samples(folder: Path, latents: Tensor, rows: list[dict]) -> None:
    """A data directory of latents (N, C, H, W) with a row of metadata each, the caption under "prompt"."""
    write_safetensors(folder / "latents.safetensors", {"latents": latents.contiguous()})
    # Last: without it the folder is no data.
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace(folder / "metadata.jsonl", lambda path: path.write_text(lines))
