"""Latents with captions, the data of stage sft: read from images or from latents.safetensors, and written."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from opd.data import Asked, Prompt, seed_of
from opd.errors import require
from opd.files import path_of, reading, replace, write_safetensors
from opd.formats.pictures import read_image, to_tensor
from opd.formats.prompts import load_prompts


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
    prompts = load_captions(folder)
    captions = [prompt.asked for prompt in prompts]
    log_shift = model.family.log_shift(model.folder, model.shape)
    if (folder / "latents.safetensors").is_file():
        latents = read_latents(folder / "latents.safetensors", (len(prompts), *model.shape))
    else:
        latents = encode_files(find_files(folder, prompts), model)
    return Images(latents, captions, log_shift)


def load_captions(folder: Path) -> list[Prompt]:
    """The lines of a folder's metadata.jsonl."""
    file = folder / "metadata.jsonl"
    wanted = 'one line {"file_name", "prompt"} per image, or {"prompt"} per latent of latents.safetensors'
    require(file.is_file(), f"{str(folder)!r} holds no metadata.jsonl; give {wanted}")
    return load_prompts(str(file), "pictures", None)


def read_latents(file: Path, wanted: tuple[int, ...]) -> Tensor:
    """The tensor `latents`, which must have the shape `wanted`."""
    with reading(str(file)):
        latents = load_file(file)["latents"]
    if latents.shape != wanted:
        fitting = f"with {wanted[0]} captions and this model and --resolution it must be {wanted}"
        raise ValueError(f"{file} has shape {tuple(latents.shape)}; {fitting}")
    bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{file}: {len(bad)} latents hold NaN or infinity, first: number {bad[0]}")
    return latents


def find_files(folder: Path, prompts: list[Prompt]) -> list[Path]:
    """The image of every prompt. ValueError or FileNotFoundError naming one that has none, or one elsewhere:
    whoever made the data would choose which of the user's files are read."""
    for prompt in prompts:
        named = isinstance(prompt.metadata.get("file_name"), str)
        require(named, f'{prompt.source} has no "file_name", and there is no latents.safetensors')
        file = folder / prompt.metadata["file_name"]
        inside = file.resolve().is_relative_to(folder.resolve())
        require(inside, f"{prompt.source}: {str(file)!r} leads out of the folder; keep the images inside it")
    files = [folder / prompt.metadata["file_name"] for prompt in prompts]
    missing = [file for file in files if not file.is_file()]
    if missing:
        named = f"{folder}/metadata.jsonl names {len(missing)} images"
        raise FileNotFoundError(f"{named} that do not exist, first: {str(missing[0])!r}")
    return files


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
