"""The Qwen-Image family: QwenImagePipeline. `CONTRACT` says what each name is for.

Shapes: B batch, C latent channels, H x W latent size, L_b text tokens of sample b, D text width.
A Condition holds `embeds` (L_b, D).

Guidance is the pipeline's true_cfg_scale: v_u + g (v - v_u), rescaled patch by patch to the norm of v.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd import flow
from opd.families import JOINT_ATTENTION, Condition, pictures_of
from opd.families import _parts as parts
from opd.families._parts import *  # noqa: F403 (what is not said here)
from opd.families._parts import PATCH

PIPELINE = "QwenImagePipeline"
LORA_TARGETS = JOINT_ATTENTION
NEGATIVE = " "  # what the model's card asks for
TOKENS = 512  # the pipeline cuts longer prompts off
SIZE = 1024  # pixels per side; no config says so
convert_lora = QwenImagePipeline.lora_state_dict


# ---------------------------------------------------------------- text


def arguments(folder: Path, t5: bool, guidance: float) -> tuple[dict, dict]:
    """Without a negative prompt the pipeline guides nothing."""
    call = {"true_cfg_scale": guidance, "negative_prompt": NEGATIVE, "max_sequence_length": TOKENS}
    return {}, call


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    return {"embeds": (TOKENS, parts.transformer_config(folder)["joint_attention_dim"])}


@torch.no_grad()
def encode_prompts(text: QwenImagePipeline, prompts: list[str], device: torch.device) -> list[Condition]:
    """L_b = tokens of the prompt and of the template after it."""
    embeds_BLD, mask_BL = text.encode_prompt(prompts, device=device, max_sequence_length=TOKENS)
    if mask_BL is None:  # all are equally long
        return [{"embeds": embeds_LD} for embeds_LD in embeds_BLD]
    lengths = mask_BL.sum(1).tolist()
    pairs = zip(embeds_BLD, lengths, strict=True)
    return [{"embeds": embeds_LD[:length].clone()} for embeds_LD, length in pairs]


def collate(conditions: list[Condition]) -> dict[str, Tensor | None]:
    """`embeds` (B, L, D), padded, and `mask` (B, L), true where there is text; None where there is no
    padding. And the source pictures."""
    embeds = [condition["embeds"] for condition in conditions]
    lengths = [len(embeds_LD) for embeds_LD in embeds]
    mask_BL = None
    if min(lengths) < max(lengths):
        mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        mask_BL = mask_BL.to(embeds[0].device, non_blocking=True)
    text = {"embeds": pad_sequence(embeds, batch_first=True), "mask": mask_BL}
    return text | parts.collate([pictures_of(condition) for condition in conditions])


# ---------------------------------------------------------------- velocity


def velocity(
    transformer: QwenImageTransformer2DModel,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    text: dict[str, Tensor | None],
) -> Tensor:
    """The model's time is sigma; the network sees patches, and their place by the picture's shape."""
    # The source pictures' tokens stand behind those of x, and their velocity is nobody's.
    images = [x_BCHW, *pictures_of(text).values()]
    shapes = [(1, image.shape[2] // PATCH, image.shape[3] // PATCH) for image in images]
    tokens = [parts.pack(image).to(text["embeds"].dtype) for image in images]
    (v_BTC,) = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        timestep=parts.time_of(sigma_B, text["embeds"].dtype),
        encoder_hidden_states=text["embeds"],
        encoder_hidden_states_mask=text["mask"],
        img_shapes=[shapes] * len(x_BCHW),
        return_dict=False,
    )
    return parts.unpack(v_BTC[:, : tokens[0].shape[1]], shapes[0][1])


def guide(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """u |v| / |u| with u = v_u + g (v - v_u), norms over the numbers of a patch; float32."""
    wanted_BTC = parts.pack(v.float())
    guided_BTC = parts.pack(flow.guided(v, v_uncond, scale))
    norm_BT1 = guided_BTC.norm(dim=-1, keepdim=True)
    rescaled_BTC = guided_BTC * (wanted_BTC.norm(dim=-1, keepdim=True) / norm_BT1)
    return parts.unpack(rescaled_BTC, v.shape[2] // PATCH)


# ---------------------------------------------------------------- images and latents


def pixels(folder: Path) -> int:
    return 2 ** len(parts.vae_config(folder)["temperal_downsample"])


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage, latents_BCHW: Tensor) -> Tensor:
    """Latents -> images (B, 3, height, width) float32 in [0, 1]. The VAE is one for films: a picture is a
    film of one frame."""
    mean_C11, std_C11 = statistics(vae)
    frames = (latents_BCHW.float() * std_C11 + mean_C11).unsqueeze(2)
    return parts.decode_raw(vae, frames).squeeze(2)


@torch.no_grad()
def encode_images(vae: AutoencoderKLQwenImage, images_B3HW: Tensor) -> Tensor:
    mean_C11, std_C11 = statistics(vae)
    frames = parts.encode_raw(vae, images_B3HW.unsqueeze(2))
    return (frames.squeeze(2) - mean_C11) / std_C11


def statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the VAE's own latents, (C, 1, 1) each."""
    pair = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device)
    mean_C11, std_C11 = pair[:, :, None, None]
    return mean_C11, std_C11


def latent_shape(folder: Path, height: int, width: int) -> tuple[int, int, int]:
    return parts.packed_shape(folder, PATCH * pixels(folder), height, width)


def default_resolution(folder: Path) -> int:
    return SIZE
