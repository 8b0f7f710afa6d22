"""The FLUX.2-klein family: Flux2KleinPipeline. `CONTRACT` says what each name is for.

Shapes: B batch, C channels of a patch, H x W patches, L text tokens, D text width.
A Condition holds `embeds` (L, D).

Latents here are what the pipeline's own `latents` are: 2 x 2 patches of the VAE's latents, normalised, so
that a position is a token. Guidance is a second pass, v_u + g (v - v_u); the pipeline of a step-distilled
klein ignores any, so leave --guidance 1 there, or the student cannot be sampled by it. (FLUX.2-dev, a
Flux2Pipeline with another text encoder, is no member.)
"""

import re
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from einops import rearrange
from torch import Tensor

from opd import flow
from opd.families import JOINT_ATTENTION, Condition
from opd.families import _parts as parts
from opd.families._parts import PATCH, default_resolution, patches_along, transformer_config  # noqa: F401

PIPELINE = "Flux2KleinPipeline"
# The attention of both streams; in the single blocks it is one projection with the MLP.
LORA_TARGETS = (
    *JOINT_ATTENTION,
    "attn.to_qkv_mlp_proj",
    "single_transformer_blocks.*.attn.to_out",
)
TOKENS = 512  # the pipeline's own: it pads every prompt, and the transformer sees the padding
NEGATIVE = ""
STEPS = 50  # the pipeline's default: its shift depends on the number of steps


# ---------------------------------------------------------------- weights


skeleton = partial(parts.skeleton, Flux2Transformer2DModel)
load_transformer = partial(parts.load_transformer, Flux2Transformer2DModel)
load_vae = partial(parts.load_vae, AutoencoderKLFlux2)
load_text = partial(parts.load_text, Flux2KleinPipeline)


def blocks(transformer: Flux2Transformer2DModel) -> list[torch.nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


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
    return {}, {"guidance_scale": guidance, "max_sequence_length": TOKENS}


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    return {"embeds": (TOKENS, transformer_config(folder)["joint_attention_dim"])}


@torch.no_grad()
def encode_prompts(text: Flux2KleinPipeline, prompts: list[str], device: torch.device) -> list[Condition]:
    embeds_BLD, _ = text.encode_prompt(prompts, device=device, max_sequence_length=TOKENS)
    return [{"embeds": embeds_LD} for embeds_LD in embeds_BLD]


def collate(conditions: list[Condition]) -> Tensor:
    """(B, L, D)."""
    return torch.stack([condition["embeds"] for condition in conditions])


# ---------------------------------------------------------------- velocity


def velocity(
    transformer: Flux2Transformer2DModel, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor
) -> Tensor:
    """The model's time is sigma."""
    device, rows = x_BCHW.device, x_BCHW.shape[2]
    (v_BTC,) = transformer(
        hidden_states=rearrange(x_BCHW, "b c h w -> b (h w) c").to(text_BLD.dtype),
        timestep=parts.time_of(sigma_B, text_BLD.dtype),
        guidance=None,
        encoder_hidden_states=text_BLD,
        # Frame 0, row, column, place in the text, of every token.
        txt_ids=parts.positions(1, 1, 1, text_BLD.shape[1], device=device),
        img_ids=parts.positions(1, rows, x_BCHW.shape[3], 1, device=device),
        return_dict=False,
    )
    return rearrange(v_BTC, "b (h w) c -> b c h w", h=rows).contiguous()


guide = flow.guided


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
    """Latents -> images (B, 3, height, width) float32 in [0, 1]."""
    mean_C11, std_C11 = statistics(vae)
    patches = latents_BCHW.float() * std_C11 + mean_C11
    return parts.decode_raw(vae, rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=PATCH, q=PATCH))


@torch.no_grad()
def encode_images(vae: AutoencoderKLFlux2, images_B3HW: Tensor) -> Tensor:
    """Images in [0, 1] -> latents float32, the posterior's mean, scaled as the transformer sees them."""
    mean_C11, std_C11 = statistics(vae)
    z = parts.encode_raw(vae, images_B3HW)
    return (rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=PATCH, q=PATCH) - mean_C11) / std_C11


def statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of a patch's channels, (C, 1, 1) each: those of the VAE's batch norm."""
    mean_C, var_C = vae.bn.running_mean, vae.bn.running_var
    return mean_C[:, None, None], (var_C[:, None, None] + vae.config.batch_norm_eps).sqrt()


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    """ValueError where a side is not made of whole patches."""
    rows, columns = (patches_along(side, pixels(folder)) for side in (height, width))
    return transformer_config(folder)["in_channels"], rows, columns
