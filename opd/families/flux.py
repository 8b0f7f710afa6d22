"""The FLUX.1 family: FluxPipeline, for FLUX.1-dev and its kin. `CONTRACT` says what each name is for.

Shapes: B batch, C latent channels, H x W latent size, L text tokens, D text width, P pooled width.
A Condition holds `embeds` (L, D) of T5 and `pooled` (P,) of CLIP.

Guidance is distilled into the network, which is told the scale: --guidance 3.5 costs one forward pass, and 1
is a scale like any other. FLUX.1-schnell has no such input and is run at 1.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from opd.errors import require
from opd.families import JOINT_ATTENTION, Condition, pictures_of
from opd.families import _parts as parts
from opd.families._parts import *  # noqa: F403 (what is not said here)
from opd.families._parts import PATCH

PIPELINE = "FluxPipeline"
# The single blocks have some of them too.
LORA_TARGETS = JOINT_ATTENTION
T5_TOKENS = 512  # the pipeline's own; all of them are seen, there is no mask


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter knows every tool's names in kohya's spelling, and wants an alpha, here r."""
    kohya = {}
    for name, factor in tensors.items():
        kohya[name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")] = factor
    for name in list(kohya):
        if name.endswith(".lora_down.weight"):
            rank = torch.tensor(float(kohya[name].shape[0]))
            kohya[name.removesuffix(".lora_down.weight") + ".alpha"] = rank
    return FluxPipeline.lora_state_dict(kohya)


# ---------------------------------------------------------------- text


def load_text(folder: Path, dtype: torch.dtype, device: torch.device, t5: bool) -> DiffusionPipeline:
    """ValueError for `t5=False`: all tokens are T5's."""
    if not t5:
        raise ValueError("--no-t5: FLUX.1 reads its prompts with T5 and cannot do without")
    return parts.load_text(folder, dtype, device, t5)


def arguments(folder: Path, t5: bool, guidance: float) -> tuple[dict, dict]:
    check_guidance(parts.transformer_config(folder).get("guidance_embeds"), guidance)
    return {}, {"guidance_scale": guidance, "max_sequence_length": T5_TOKENS}


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    config = parts.transformer_config(folder)
    return {
        "embeds": (T5_TOKENS, config["joint_attention_dim"]),
        "pooled": (config["pooled_projection_dim"],),
    }


@torch.no_grad()
def encode_prompts(text: FluxPipeline, prompts: list[str], device: torch.device) -> list[Condition]:
    embeds_BLD, pooled_BP, _ = text.encode_prompt(prompts, device=device, max_sequence_length=T5_TOKENS)
    pairs = zip(embeds_BLD, pooled_BP, strict=True)
    return [{"embeds": embeds_LD, "pooled": pooled_P} for embeds_LD, pooled_P in pairs]


# ---------------------------------------------------------------- velocity


def velocity(
    transformer: FluxTransformer2DModel,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    text: dict[str, Tensor],
    guidance: float,
) -> Tensor:
    """The model's time is sigma. ValueError where it takes no guidance and is given one other than 1."""
    embeds = text["embeds"]
    told = None
    check_guidance(transformer.config.guidance_embeds, guidance)
    if transformer.config.guidance_embeds:
        told = torch.full_like(sigma_B, guidance, dtype=torch.float32)
    # The source picture's tokens stand behind those of x, and their velocity is nobody's.
    images = [x_BCHW, *pictures_of(text).values()]
    ids = [patch_ids(number, image) for number, image in enumerate(images)]
    (v_BTC,) = transformer(
        hidden_states=torch.cat([parts.pack(image).to(embeds.dtype) for image in images], dim=1),
        timestep=parts.time_of(sigma_B, embeds.dtype),
        guidance=told,
        encoder_hidden_states=embeds,
        pooled_projections=text["pooled"],
        txt_ids=torch.zeros(embeds.shape[1], 3, device=x_BCHW.device),
        img_ids=torch.cat(ids),
        return_dict=False,
    )
    rows, tokens = x_BCHW.shape[2] // PATCH, len(ids[0])
    return parts.unpack(v_BTC[:, :tokens], rows)


def check_guidance(told: bool | None, guidance: float) -> None:
    """ValueError for a scale other than 1 where the network is not told it."""
    way_out = "use 1 (--guidance, --deploy-guidance, --teacher-guidance)"
    require(told or guidance == 1.0, f"guidance {guidance:g}: this FLUX.1 takes none; {way_out}")


def patch_ids(number: int, image_BCHW: Tensor) -> Tensor:
    """(T, 3): number of the image, row, column of every patch; text stands at 0, 0, 0."""
    rows, columns = image_BCHW.shape[2] // PATCH, image_BCHW.shape[3] // PATCH
    ids_T3 = parts.positions(1, rows, columns, device=image_BCHW.device).float()
    ids_T3[:, 0] = number
    return ids_T3


# The network is told the scale: there is no second pass to combine with.
guide = None


# ---------------------------------------------------------------- images and latents


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    return parts.packed_shape(folder, PATCH * parts.pixels(folder), height, width)
