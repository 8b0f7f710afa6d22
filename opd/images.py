"""Images with captions for flow-matching fine-tuning, held as latents."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from opd.data import numbered_lines, seed_of

CAPTION_KEYS = ("prompt", "text", "caption")


@dataclass
class Images:
    latents: torch.Tensor
    """(N, C, H, W), scaled as the transformer sees them."""
    captions: list[str]
    log_shift: float
    """Mean of logit(sigma) in training: log of the scheduler's shift."""

    def of_step(self, count: int, seed: int, step: int) -> list[int]:
        """Which `count` images step `step` trains on: endless shuffled epochs, a pure function."""
        chosen, size = [], len(self.captions)
        for epoch in range(step * count // size, ((step + 1) * count - 1) // size + 1):
            order = np.random.default_rng(seed_of(seed, "images", epoch)).permutation(size)
            lo, hi = max(step * count - epoch * size, 0), min((step + 1) * count - epoch * size, size)
            chosen += order[lo:hi].tolist()
        return chosen


def read_metadata(folder: Path) -> tuple[list[str], list[dict]]:
    """Captions and rows of metadata.jsonl. FileNotFoundError / ValueError naming the line."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"--data {str(folder)!r}: no metadata.jsonl; give one line {{\"file_name\", \"prompt\"}} per "
                                "image, or {\"prompt\"} per latent of latents.safetensors")
    rows, captions = [], []
    for number, line in numbered_lines(file):
        try:
            row = json.loads(line)
            captions.append(next(row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)))
        except (json.JSONDecodeError, StopIteration, AttributeError) as error:
            raise ValueError(f"{file}:{number}: expected an object with one of {CAPTION_KEYS}, got {line[:60]!r}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} is empty")
    return captions, rows


def load_images(source: str, model) -> Images:
    """Read a data directory. Latents are taken as they are; images are encoded by the model's VAE, once."""
    folder = Path(source).expanduser()
    captions, rows = read_metadata(folder)
    shift = math.log(model.family.load_scheduler(model.folder).config.shift)
    if (folder / "latents.safetensors").is_file():
        try:
            with safe_open(folder / "latents.safetensors", "pt") as file:
                shape = tuple(file.get_slice("latents").get_shape())
        except SafetensorError as error:
            raise ValueError(f"{folder}/latents.safetensors holds no tensor 'latents' ({error})") from error
        if shape != (len(rows), *model.shape):
            raise ValueError(f"{folder}/latents.safetensors has shape {shape}; with {len(rows)} captions and this "
                             f"model and --resolution it must be {(len(rows), *model.shape)}")
        return Images(load_file(folder / "latents.safetensors")["latents"], captions, shift)
    nameless = [n for n, row in enumerate(rows, 1) if "file_name" not in row]
    if nameless:
        raise ValueError(f"{folder}/metadata.jsonl: line {nameless[0]} has no \"file_name\", and there is no latents.safetensors")
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}/metadata.jsonl names {len(missing)} images that do not exist, first: {missing[0]!r}")
    return Images(encode_files([folder / r["file_name"] for r in rows], model), captions, shift)


def encode_files(files: list[Path], model, batch: int = 16) -> torch.Tensor:
    """Image files -> latents (N, C, H, W) in the model's dtype: shorter side resized to the resolution, centre cropped."""
    vae = model.family.load_vae(model.folder).to(model.device)
    pixels = model.shape[1] * 2 ** (len(vae.config.block_out_channels) - 1)
    latents = []
    for i in range(0, len(files), batch):
        images = torch.stack([read_image(f, pixels) for f in files[i:i + batch]])
        latents.append(model.family.encode_images(vae, images.to(model.device)).to("cpu", model.dtype))
    return torch.cat(latents)


def read_image(file: Path, pixels: int) -> torch.Tensor:
    """RGB (3, pixels, pixels) float32 in [0, 1]."""
    image = Image.open(file).convert("RGB")
    scale = pixels / min(image.size)
    if scale != 1:
        image = image.resize((max(pixels, round(image.width * scale)), max(pixels, round(image.height * scale))), Image.Resampling.LANCZOS)
    left, top = (image.width - pixels) // 2, (image.height - pixels) // 2
    array = np.asarray(image.crop((left, top, left + pixels, top + pixels)), dtype=np.float32)
    return torch.from_numpy(array / 255).permute(2, 0, 1)
