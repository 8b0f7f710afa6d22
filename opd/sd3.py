"""The SD3 family: everything the rest of the code needs to know about StableDiffusion3Pipeline.

A family is one file with these functions. To support another pipeline write a sibling (`opd/flux.py`, say)
with the same names and pass `--family flux`; nothing else changes.

Shapes: B batch, C latent channels, H x W latent size, L text tokens, D text width, P pooled width.
A conditioning is the pair `(embeds_BLD, pooled_BP)`.
"""

import json
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)

PIPELINE = "StableDiffusion3Pipeline"
# The joint attention's projections of image and text stream: what Flow-GRPO adapts.
LORA_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
T5_TOKENS = 128  # sequence length of the T5 prompt in training and evaluation


def skeleton(folder: Path) -> SD3Transformer2DModel:
    """The transformer without storage (meta device): module names, shapes and config, before any weight loads."""
    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder / "transformer"))


def load_transformer(folder: Path, dtype: torch.dtype) -> SD3Transformer2DModel:
    """The frozen base in `dtype`, on the CPU, in eval mode."""
    model = SD3Transformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    return model.requires_grad_(False).eval()


def load_vae(folder: Path) -> AutoencoderKL:
    """The frozen VAE in float32."""
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).requires_grad_(False).eval()


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")


def load_text_encoders(folder: Path, dtype: torch.dtype, device: torch.device, t5: bool) -> StableDiffusion3Pipeline:
    """A pipeline that can only encode prompts. `t5=False` leaves the third, by far the largest encoder out."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {"text_encoder_3": None, "tokenizer_3": None} if not (t5 and has_t5(index)) else {}
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder, transformer=skeleton(folder), vae=None, dtype=dtype, **absent)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if encoder is not None:
            encoder.to(device)
    return pipe


def has_t5(model_index: dict) -> bool:
    """Whether the pipeline directory ships the T5 encoder."""
    return "text_encoder_3" in model_index and model_index["text_encoder_3"][0] is not None


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion3Pipeline, prompts: list[str], device: torch.device):
    """`prompts` (n) -> conditioning (n, L, D), (n, P).

    L = CLIP tokens + T5 tokens. Without T5 its part is zeros, as many as CLIP has tokens: what SD3 was trained with.
    """
    tokens = T5_TOKENS if pipe.text_encoder_3 is not None else pipe.tokenizer_max_length
    embeds_BLD, _, pooled_BP, _ = pipe.encode_prompt(
        prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=tokens)
    return embeds_BLD, pooled_BP


def velocity(transformer, x_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning) -> torch.Tensor:
    """dx/dsigma at (x, sigma), shape of x, in the conditioning's dtype. The model's timestep is 1000 sigma, float32."""
    embeds_BLD, pooled_BP = conditioning
    return transformer(hidden_states=x_BCHW.to(embeds_BLD.dtype), timestep=1000.0 * sigma_B.float(),
                       encoder_hidden_states=embeds_BLD, pooled_projections=pooled_BP, return_dict=False)[0]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Latents -> images (B, 3, 8H, 8W) float32 in [0, 1] (8 = the VAE's factor)."""
    z = latents_BCHW.float() / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] -> latents (B, C, H/8, W/8) float32, the posterior's mean, scaled as the transformer sees them."""
    z = vae.encode(images_B3HW.float() * 2 - 1).latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def latent_shape(folder: Path, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a square image of `resolution` pixels. ValueError where patches do not fit."""
    vae, transformer = AutoencoderKL.load_config(folder / "vae"), SD3Transformer2DModel.load_config(folder / "transformer")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    unit, limit = factor * transformer["patch_size"], transformer["pos_embed_max_size"] * factor * transformer["patch_size"]
    if resolution <= 0 or resolution % unit or resolution > limit:
        raise ValueError(f"resolution {resolution} does not fit this model: use a multiple of {unit} up to {limit}")
    return transformer["in_channels"], resolution // factor, resolution // factor


def default_resolution(folder: Path) -> int:
    """Pixels per side that the model was made for."""
    vae, transformer = AutoencoderKL.load_config(folder / "vae"), SD3Transformer2DModel.load_config(folder / "transformer")
    return transformer["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def image_tokens(folder: Path, shape_CHW: tuple[int, int, int]) -> int:
    """Number of patches: what schedulers with dynamic shifting want to know."""
    patch = SD3Transformer2DModel.load_config(folder / "transformer")["patch_size"]
    return shape_CHW[1] * shape_CHW[2] // patch**2


def blocks(transformer: SD3Transformer2DModel) -> list[torch.nn.Module]:
    """The blocks to shard and to checkpoint, in order."""
    return list(transformer.transformer_blocks)
