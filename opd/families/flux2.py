"""The FLUX.2-klein family: Flux2KleinPipeline. `CONTRACT` says what each name is for.

Shapes: B batch, C channels of a patch, H x W patches, L text tokens, D text width.
A Condition holds `embeds` (L, D).

Latents here are what the pipeline's own `latents` are: 2 x 2 patches of the VAE's latents, normalised, so
that a position is a token. Guidance is a second pass, v_u + g (v - v_u); the pipeline of a step-distilled
klein ignores any, so leave --guidance 1 there, or the student cannot be sampled by it. (FLUX.2-dev, a
Flux2Pipeline with another text encoder, is no member.)
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from einops import rearrange
from torch import Tensor

from opd import flow
from opd.families import JOINT_ATTENTION, Condition
from opd.families import _parts as parts
from opd.families._parts import PATCH, patches_along

PIPELINE = "Flux2KleinPipeline"
# The attention of both streams; in the single blocks it is one projection with the MLP.
LORA_TARGETS = (
    *JOINT_ATTENTION,
    "attn.to_qkv_mlp_proj",
    "single_transformer_blocks.*.attn.to_out",
)
TEXT = ("text_encoder", "tokenizer")
T5_TOKENS = 0
TOKENS = 512  # the pipeline's own: it pads every prompt, and the transformer sees the padding
NEGATIVE = ""
STEPS = 50  # the pipeline's default: its shift depends on the number of steps


# ---------------------------------------------------------------- weights


def skeleton(folder: Path) -> Flux2Transformer2DModel:
    """The transformer without storage (meta device)."""
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(transformer_config(folder))


def load_transformer(folder: Path, dtype: torch.dtype) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    return transformer.requires_grad_(False).eval()


def blocks(transformer: Flux2Transformer2DModel) -> list[torch.nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return Flux2KleinPipeline.lora_state_dict(tensors)


# ---------------------------------------------------------------- text


def load_text(folder: Path, dtype: torch.dtype, device: torch.device, t5: bool) -> Flux2KleinPipeline:
    """A pipeline that can only encode prompts. There is no T5 to leave out: `t5` changes nothing."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype)
    pipe.text_encoder.to(device)
    return pipe


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
        timestep=sigma_B.float(),
        guidance=None,
        encoder_hidden_states=text_BLD,
        txt_ids=positions(1, 1, text_BLD.shape[1], device),
        img_ids=positions(rows, x_BCHW.shape[3], 1, device),
        return_dict=False,
    )
    return rearrange(v_BTC, "b (h w) c -> b c h w", h=rows).contiguous()


def guide(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """v_u + g (v - v_u)."""
    return flow.guided(v, v_uncond, scale)


def positions(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """(T, 4): frame 0, row, column, place in the text, of every token of an image or of a text."""
    sizes = (1, rows, columns, tokens)
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


# ---------------------------------------------------------------- noise levels


def sigmas(folder: Path, shape_CHW: tuple[int, int, int], steps: int) -> list[float]:
    """The scheduler's, from the pipeline's 1, 1 - 1/N, ... 1/N."""
    mu = empirical_mu(shape_CHW[1] * shape_CHW[2], steps)
    return parts.noise_levels(folder, steps, mu, parts.even_levels(steps))


def log_shift(folder: Path, shape_CHW: tuple[int, int, int]) -> float:
    return parts.log_of_shift(folder, empirical_mu(shape_CHW[1] * shape_CHW[2], STEPS))


def empirical_mu(tokens: int, steps: int) -> float:
    """mu by image tokens and steps: linear in the tokens at 10 and at 200 steps, and between and beyond them
    linear in the steps; above 4300 tokens that of 200 steps for any number."""
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


# ---------------------------------------------------------------- images and latents


def load_vae(folder: Path) -> AutoencoderKLFlux2:
    """The frozen VAE in float32."""
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", dtype=torch.float32)
    return vae.requires_grad_(False).eval()


def pixels(folder: Path) -> int:
    """Of a patch: each of the VAE's stages but the last halves the picture."""
    stages = vae_config(folder)["block_out_channels"]
    return PATCH * 2 ** (len(stages) - 1)


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, latents_BCHW: Tensor) -> Tensor:
    """Latents -> images (B, 3, height, width) float32 in [0, 1]."""
    mean_C11, std_C11 = statistics(vae)
    patches = latents_BCHW.float() * std_C11 + mean_C11
    z = rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=PATCH, q=PATCH)
    (images,) = vae.decode(z, return_dict=False)  # in [-1, 1]
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_images(vae: AutoencoderKLFlux2, images_B3HW: Tensor) -> Tensor:
    """Images in [0, 1] -> latents float32, the posterior's mean, scaled as the transformer sees them."""
    mean_C11, std_C11 = statistics(vae)
    z = vae.encode(images_B3HW.float() * 2 - 1).latent_dist.mode()
    return (rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=PATCH, q=PATCH) - mean_C11) / std_C11


def statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of a patch's channels, (C, 1, 1) each: those of the VAE's batch norm."""
    mean_C, var_C = vae.bn.running_mean, vae.bn.running_var
    return mean_C[:, None, None], (var_C[:, None, None] + vae.config.batch_norm_eps).sqrt()


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    """ValueError where a side is not made of whole patches."""
    rows, columns = (patches_along(side, pixels(folder)) for side in (height, width))
    return transformer_config(folder)["in_channels"], rows, columns


def default_resolution(folder: Path) -> int:
    """The VAE's: the transformer's config names none."""
    return vae_config(folder)["sample_size"]


def vae_config(folder: Path) -> dict:
    return AutoencoderKLFlux2.load_config(folder / "vae")


def transformer_config(folder: Path) -> dict:
    return Flux2Transformer2DModel.load_config(folder / "transformer")
