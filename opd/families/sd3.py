"""The SD3 family: StableDiffusion3Pipeline, for SD3 and SD3.5. `CONTRACT` says what each name is for.

Shapes: B batch, C latent channels, H x W latent size, L text tokens, D text width, P pooled width.
A Condition holds `embeds` (L, D), `pooled` (P,) and, without T5, `blank` (1, D): a token that stands for L.
"""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from opd.families import JOINT_ATTENTION, Condition, has_t5
from opd.families import _parts as parts
from opd.families._parts import *  # noqa: F403 (what is not said here)
from opd.families._sd3_attention import attend_to_copies
from opd.families._sd3_names import convert_lora  # noqa: F401 (the contract's)
from opd.files import read_json

PIPELINE = "StableDiffusion3Pipeline"
LORA_TARGETS = JOINT_ATTENTION
T5_TOKENS = 128  # sequence length of the T5 prompt in training and evaluation
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def load_transformer(folder: Path, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Under the meta device its table of positions is not computed, some ten seconds for SD3.5: it is in the
    file."""
    with torch.device("meta"):
        return parts.load_transformer(folder, dtype)


# ---------------------------------------------------------------- text


def load_text(folder: Path, dtype: torch.dtype, device: torch.device, t5: bool) -> StableDiffusion3Pipeline:
    """A pipeline that can only encode prompts. `t5=False` leaves out the third, largest encoder."""
    absent, _ = arguments(folder, t5, 1.0)
    pipe = parts.load_text(folder, dtype, device, t5, **absent)
    pipe.register_modules(transformer=parts.skeleton(folder))  # encode_prompt reads its config
    return pipe


def arguments(folder: Path, t5: bool, guidance: float) -> tuple[dict, dict]:
    """Without T5 the pipeline appends zeros, 256 unless told: here they are as many as CLIP's tokens."""
    if t5 and has_t5(folder):
        return {}, {"guidance_scale": guidance, "max_sequence_length": T5_TOKENS}
    clip, _ = text_shapes(folder, False)["embeds"]
    return NO_T5, {"guidance_scale": guidance, "max_sequence_length": clip}


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    """CLIP's 77 tokens and T5's, or one for as many zeros as CLIP has."""
    config = parts.transformer_config(folder)
    width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    clip = read_json(folder / "text_encoder" / "config.json")["max_position_embeddings"]
    if t5 and has_t5(folder):
        return {"embeds": (clip + T5_TOKENS, width), "pooled": (pooled,)}
    return {"embeds": (clip, width), "pooled": (pooled,), "blank": (1, width)}


@torch.no_grad()
def encode_prompts(
    text: StableDiffusion3Pipeline, prompts: list[str], device: torch.device
) -> list[Condition]:
    """L = CLIP tokens + T5 tokens. Without T5 the pipeline puts zeros in its place, which SD3 knows: here
    L = CLIP tokens then, and `blank` is one of the zeros, of which there are as many."""
    clip = text.tokenizer_max_length
    embeds_BLD, _, pooled_BP, _ = text.encode_prompt(
        prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    conditions = []
    for embeds_LD, pooled_P in zip(embeds_BLD, pooled_BP, strict=True):
        condition = {"embeds": embeds_LD, "pooled": pooled_P}
        if text.text_encoder_3 is None:
            condition = {"embeds": embeds_LD[:clip], "pooled": pooled_P, "blank": embeds_LD[clip : clip + 1]}
        conditions.append(condition)
    return conditions


# ---------------------------------------------------------------- velocity


def velocity(
    transformer: SD3Transformer2DModel, x_BCHW: Tensor, sigma_B: Tensor, text: dict[str, Tensor]
) -> Tensor:
    """The model's timestep is 1000 sigma; it stays float32, as 901 in bfloat16 is 900."""
    embeds_BLD, attention = text["embeds"], None
    if "blank" in text:
        attend_to_copies(transformer)
        attention = {"copies": embeds_BLD.shape[1]}
        embeds_BLD = torch.cat([embeds_BLD, text["blank"]], dim=1)
    (v_BCHW,) = transformer(
        hidden_states=x_BCHW.to(embeds_BLD.dtype),
        timestep=1000.0 * sigma_B.float(),
        encoder_hidden_states=embeds_BLD,
        pooled_projections=text["pooled"],
        joint_attention_kwargs=attention,
        return_dict=False,
    )
    return v_BCHW


# ---------------------------------------------------------------- noise levels


def sigmas(folder: Path, shape_CHW: tuple[int, int, int], steps: int) -> list[float]:
    """The scheduler's own."""
    mu = parts.linear_mu(folder, image_tokens(folder, shape_CHW))
    return parts.noise_levels(folder, steps, mu)


def log_shift(folder: Path, shape_CHW: tuple[int, int, int]) -> float:
    return parts.log_of_shift(folder, parts.linear_mu(folder, image_tokens(folder, shape_CHW)))


def image_tokens(folder: Path, shape_CHW: tuple[int, int, int]) -> int:
    """Number of patches."""
    patch = parts.transformer_config(folder)["patch_size"]
    return (shape_CHW[1] // patch) * (shape_CHW[2] // patch)


# ---------------------------------------------------------------- images and latents


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    config = parts.transformer_config(folder)
    patch = config["patch_size"]
    unit, most = patch * parts.pixels(folder), config["pos_embed_max_size"]
    rows, columns = parts.patches_along(height, unit, most), parts.patches_along(width, unit, most)
    return config["in_channels"], patch * rows, patch * columns


def default_resolution(folder: Path) -> int:
    return parts.transformer_config(folder)["sample_size"] * parts.pixels(folder)
