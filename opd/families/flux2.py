"""The FLUX.2-klein family: Flux2KleinPipeline, which paints, and edits source pictures by the same weights.
`CONTRACT` says what each name is for.

Shapes: B batch, C channels of a patch, H x W patches, L text tokens, D text width.
A Condition holds `embeds` (L, D) and a `picture0`, `picture1`, ... (C, h, w) for each source picture.

Latents here are what the pipeline's own `latents` are: 2 x 2 patches of the VAE's latents, normalised, so
that a position is a token. Guidance is a second pass, v_u + g (v - v_u); the pipeline of a step-distilled
klein ignores any, so leave --guidance 1 there, or the student cannot be sampled by it. (FLUX.2-dev, a
Flux2Pipeline with another text encoder, is no member.)
"""

import math
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from einops import rearrange
from PIL import Image
from torch import Tensor

from opd.families import JOINT_ATTENTION, Condition, Editing, pictures_of
from opd.families import _parts as parts
from opd.families._parts import *  # noqa: F403 (what is not said here)
from opd.families._parts import PATCH
from opd.files import read_json

PIPELINE = "Flux2KleinPipeline"
# The attention of both streams; in the single blocks it is one projection with the MLP.
LORA_TARGETS = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out")
# The pipeline's own: it pads every prompt, and the transformer sees the padding. A tokenizer may allow fewer.
TOKENS = 512
LARGEST = 1024**2  # pixels of a source picture
STEPS = 50  # the pipeline's default: its shift depends on the number of steps


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter, except for the last modulation: (shift, scale) with BFL, (scale, shift) with
    diffusers, as its reader of checkpoints knows and this converter does not."""
    last = {key: tensors[key] for key in tensors if re.search(r"final_layer.adaLN_modulation.1\.", key)}
    rest = {key: tensors[key] for key in tensors.keys() - last.keys()}
    converted = Flux2KleinPipeline.lora_state_dict(rest) if rest else {}
    for key, factor in last.items():
        up = key.endswith((".lora_B.weight", ".lora_up.weight"))
        name = f"norm_out.linear.lora_{'B' if up else 'A'}.weight"
        converted[name] = torch.cat(factor.chunk(2)[::-1]) if up else factor
    return converted


# ---------------------------------------------------------------- text


def arguments(folder: Path, t5: bool, guidance: float) -> tuple[dict, dict]:
    return {}, {"guidance_scale": guidance, "max_sequence_length": tokens_of(folder)}


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    return {"embeds": (tokens_of(folder), parts.transformer_config(folder)["joint_attention_dim"])}


def tokens_of(folder: Path) -> int:
    settings = read_json(folder / "tokenizer" / "tokenizer_config.json")
    return min(TOKENS, settings["model_max_length"]) if "model_max_length" in settings else TOKENS


@torch.no_grad()
def encode_prompts(text: Flux2KleinPipeline, prompts: list[str], device: torch.device) -> list[Condition]:
    length = min(TOKENS, text.tokenizer.model_max_length)
    embeds_BLD, _ = text.encode_prompt(prompts, device=device, max_sequence_length=length)
    return [{"embeds": embeds_LD} for embeds_LD in embeds_BLD]


# ---------------------------------------------------------------- velocity


def velocity(
    transformer: Flux2Transformer2DModel, x_BCHW: Tensor, sigma_B: Tensor, text: dict[str, Tensor]
) -> Tensor:
    """The model's time is sigma."""
    embeds_BLD, device = text["embeds"], x_BCHW.device
    # The source pictures' tokens stand behind those of x, and their velocity is nobody's.
    images = [x_BCHW, *pictures_of(text).values()]
    tokens = [rearrange(image, "b c h w -> b (h w) c").to(embeds_BLD.dtype) for image in images]
    (v_BTC,) = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        timestep=parts.time_of(sigma_B, embeds_BLD.dtype),
        guidance=None,
        encoder_hidden_states=embeds_BLD,
        # Frame, row, column, place in the text, of every token.
        txt_ids=parts.positions(1, 1, 1, embeds_BLD.shape[1], device=device),
        img_ids=torch.cat([ids_of(number, image) for number, image in enumerate(images)]),
        return_dict=False,
    )
    v_BTC = v_BTC[:, : tokens[0].shape[1]]
    return rearrange(v_BTC, "b (h w) c -> b c h w", h=x_BCHW.shape[2]).contiguous()


def ids_of(number: int, image_BCHW: Tensor) -> Tensor:
    """(T, 4): where each token of an image stands; its frame is ten times its number, as in the pipeline."""
    ids_T4 = parts.positions(1, *image_BCHW.shape[2:], 1, device=image_BCHW.device)
    ids_T4[:, 0] = 10 * number
    return ids_T4


# ---------------------------------------------------------------- source pictures


def picture_size(folder: Path, width: int, height: int) -> tuple[int, int]:
    """Its own, cut to whole patches; one of more than LARGEST pixels is made smaller before. ValueError for
    one that the pipeline refuses."""
    if min(width, height) < 64 or max(width, height) > 8 * min(width, height):
        fits = "give it sides of 64 and more, one at most 8 times as long as the other"
        raise ValueError(f"it is {width} x {height} pixels; {fits}")
    unit = pixels(folder)
    wide, high = limited(width, height)
    return wide // unit * unit, high // unit * unit


def limited(width: int, height: int) -> tuple[int, int]:
    scale = math.sqrt(LARGEST / (width * height))
    return (int(width * scale), int(height * scale)) if scale < 1 else (width, height)


def fitted(folder: Path, picture: Image.Image) -> Image.Image:
    wide, high = picture_size(folder, *picture.size)
    picture = picture.resize(limited(*picture.size), Image.Resampling.LANCZOS)
    left, top = (picture.width - wide) // 2, (picture.height - high) // 2
    return picture.crop((left, top, left + wide, top + high))


EDITING = Editing(fewest=0, most=10, size=picture_size, fit=fitted, read=None)


# ---------------------------------------------------------------- noise levels


def sigmas(folder: Path, shape_CHW: tuple[int, int, int], steps: int) -> list[float]:
    """The scheduler's, from the pipeline's 1, 1 - 1/N, ... 1/N."""
    mu = compute_empirical_mu(shape_CHW[1] * shape_CHW[2], steps)
    return parts.noise_levels(folder, steps, mu, parts.even_levels(steps))


def log_shift(folder: Path, shape_CHW: tuple[int, int, int]) -> float:
    return parts.log_of_shift(folder, compute_empirical_mu(shape_CHW[1] * shape_CHW[2], STEPS))


# ---------------------------------------------------------------- images and latents


def pixels(folder: Path) -> int:
    """Of a patch."""
    return PATCH * parts.pixels(folder)


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, latents_BCHW: Tensor) -> Tensor:
    mean_C11, std_C11 = statistics(vae)
    patches = latents_BCHW.float() * std_C11 + mean_C11
    return parts.decode_raw(vae, rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=PATCH, q=PATCH))


@torch.no_grad()
def encode_images(vae: AutoencoderKLFlux2, images_B3HW: Tensor) -> Tensor:
    mean_C11, std_C11 = statistics(vae)
    z = parts.encode_raw(vae, images_B3HW)
    return (rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=PATCH, q=PATCH) - mean_C11) / std_C11


def statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of a patch's channels, (C, 1, 1) each: those of the VAE's batch norm."""
    mean_C, var_C = vae.bn.running_mean, vae.bn.running_var
    return mean_C[:, None, None], (var_C[:, None, None] + vae.config.batch_norm_eps).sqrt()


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    rows, columns = (parts.patches_along(side, pixels(folder)) for side in (height, width))
    return parts.transformer_config(folder)["in_channels"], rows, columns
