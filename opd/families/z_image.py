"""The Z-Image family: ZImagePipeline. `CONTRACT` says what each name is for.

Shapes: B batch, C latent channels, H x W latent size, L_b text tokens of sample b, D text width.
A Condition holds `embeds` (L_b, D).

Guidance: the pipeline's is v + g (v - v_u), off at g = 0. That is ours, v_u + s (v - v_u), at s = 1 + g: its
guidance_scale 4 is --guidance 5 here, its 0, which distilled models want, is --guidance 1. Its options
cfg_normalization and cfg_truncation stay off, as they are by default.
"""

from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from opd.families import Condition
from opd.families import _parts as parts
from opd.families._parts import *  # noqa: F403 (what is not said here)
from opd.families._parts import PATCH

PIPELINE = "ZImagePipeline"
# The attention of the joint layers; an adapter from elsewhere may adapt the refiners too.
LORA_TARGETS = (
    "layers.*.attention.to_q",
    "layers.*.attention.to_k",
    "layers.*.attention.to_v",
    "layers.*.attention.to_out.0",
)
TOKENS = 512  # where the pipeline cuts a prompt off


def blocks(transformer: ZImageTransformer2DModel) -> list[torch.nn.Module]:
    """Image tokens and text tokens each have refiners of their own before the joint layers."""
    return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter, and the authors' attention, whose q, k and v are one layer: it knows that in
    kohya's flat names alone."""
    converted = ZImagePipeline.lora_state_dict(tensors)
    for key in [key for key in converted if ".attention.qkv." in key]:
        factor = converted.pop(key)
        thirds = factor.chunk(3) if "lora_B" in key else [factor] * 3
        for name, third in zip("qkv", thirds, strict=True):
            converted[key.replace(".qkv.", f".to_{name}.")] = third
    return {key.replace(".attention.out.", ".attention.to_out.0."): converted[key] for key in converted}


# ---------------------------------------------------------------- text


def arguments(folder: Path, t5: bool, guidance: float) -> tuple[dict, dict]:
    return {}, {"guidance_scale": round(guidance - 1, 6), "max_sequence_length": TOKENS}


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    return {"embeds": (TOKENS, parts.transformer_config(folder)["cap_feat_dim"])}


@torch.no_grad()
def encode_prompts(text: ZImagePipeline, prompts: list[str], device: torch.device) -> list[Condition]:
    """L_b = tokens of the chat template around the prompt, cut off at the pipeline's 512."""
    asked = list(prompts)  # the pipeline writes its template into the list that it is given
    embeds, _ = text.encode_prompt(asked, device=device, do_classifier_free_guidance=False)
    return [{"embeds": embeds_LD} for embeds_LD in embeds]


def collate(conditions: list[Condition]) -> list[Tensor]:
    """B texts (L_b, D): the transformer pads and masks by itself."""
    return [condition["embeds"] for condition in conditions]


# ---------------------------------------------------------------- velocity


def velocity(
    transformer: ZImageTransformer2DModel, x_BCHW: Tensor, sigma_B: Tensor, text: list[Tensor]
) -> Tensor:
    """The model's time runs from noise, 0, to data, 1, and its output points that way: the sign turns.

    Time stays float32: the model multiplies it by 1000 before it rounds.
    """
    frames = x_BCHW.to(text[0].dtype).unsqueeze(2)  # a picture is a film of one frame
    (toward_data,) = transformer(
        list(frames.unbind(0)), (1000 - 1000 * sigma_B.float()) / 1000, text, return_dict=False
    )
    return -torch.stack(toward_data).squeeze(2)


# ---------------------------------------------------------------- noise levels


def sigmas(folder: Path, shape_CHW: tuple[int, int, int], steps: int) -> list[float]:
    """The scheduler's, from the pipeline's 1, 1 - 1/N, ... 1/N, which it computes in float32."""
    mu = parts.linear_mu(folder, parts.image_tokens(shape_CHW))
    return parts.noise_levels(folder, steps, mu, parts.even_levels(steps, torch.float32))


# ---------------------------------------------------------------- images and latents


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    config = parts.transformer_config(folder)
    _, most_rows, most_columns = config["axes_lens"]  # positions that the model knows: text, down, across
    unit = PATCH * parts.pixels(folder)
    rows = parts.patches_along(height, unit, most_rows)
    columns = parts.patches_along(width, unit, most_columns)
    return config["in_channels"], PATCH * rows, PATCH * columns
