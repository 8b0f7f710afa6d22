"""What several families share: loading, the VAE, the scheduler's noise levels, pictures as 2 x 2 patches.

Noise levels are those of diffusers' FlowMatchEulerDiscreteScheduler. mu is the log of a resolution-dependent
shift; a scheduler with a static shift does not look at it.
"""

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.models.normalization import RMSNorm
from einops import rearrange
from PIL import Image
from torch import Tensor

from opd import flow
from opd.errors import require
from opd.files import read_json
from opd.formats.hub import variant_of

# What a family has that does not say otherwise: AutoencoderKL's scaling, FLUX's schedule. Who adds a family
# looks at each of these, since nothing else would notice that one does not fit.
__all__ = ["NEGATIVE", "EDITING", "blocks", "collate", "decode", "default_resolution", "encode_images"]
__all__ += ["guide", "load_text", "load_transformer", "load_vae", "log_shift", "pixels", "sigmas", "skeleton"]
NEGATIVE = ""
EDITING = None
guide = flow.guided

# ---- loading, by the classes that model_index.json names ---------------------------------------------------


def skeleton(folder: Path) -> ModelMixin:
    """The transformer without storage (meta device)."""
    with torch.device("meta"):
        return with_fused_norms(class_of(folder, "transformer").from_config(transformer_config(folder)))


def load_transformer(folder: Path, dtype: torch.dtype) -> ModelMixin:
    """The frozen transformer on the CPU."""
    return with_fused_norms(load_part(folder, "transformer", dtype))


def load_vae(folder: Path) -> ModelMixin:
    """The frozen VAE in float32."""
    return load_part(folder, "vae", torch.float32)


def vae_skeleton(folder: Path) -> ModelMixin:
    """The VAE without storage (meta device)."""
    with torch.device("meta"):
        return class_of(folder, "vae").from_config(vae_config(folder))


def load_part(folder: Path, name: str, dtype: torch.dtype) -> ModelMixin:
    part, kind = folder / name, class_of(folder, name)
    return kind.from_pretrained(part, variant=variant_of(part), dtype=dtype).requires_grad_(False).eval()


def class_of(folder: Path, name: str) -> type[ModelMixin]:
    return getattr(diffusers, read_json(folder / "model_index.json")[name][1])


def load_text(
    folder: Path, dtype: torch.dtype, device: torch.device, t5: bool, **absent: None
) -> DiffusionPipeline:
    """A pipeline that can only encode prompts, without the parts named in `absent`. `t5`: for families with
    one."""
    absent |= {"transformer": None, "vae": None}
    variant = variant_of(folder / "text_encoder", "model")
    return DiffusionPipeline.from_pretrained(folder, variant=variant, dtype=dtype, **absent).to(device)


def blocks(transformer: ModelMixin) -> list[torch.nn.Module]:
    """Those of two streams, then those of one, where there are such."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]


def with_fused_norms(transformer: ModelMixin) -> ModelMixin:
    """PyTorch's RMSNorm in place of diffusers', in the same place with the same weight: on a GPU one kernel
    for eight, no float32 copy kept for backward, and in bfloat16 one rounding for two."""
    for parent, name, norm in children_of(transformer, RMSNorm):
        if norm.bias is None:
            fused = torch.nn.RMSNorm(norm.dim, norm.eps, elementwise_affine=norm.weight is not None)
            fused.weight = norm.weight
            setattr(parent, name, fused)
    return transformer


def children_of(root: torch.nn.Module, kind: type) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """(parent, its name for it, module) of every module of a class below `root`."""
    pairs = [(parent, *child) for parent in root.modules() for child in parent.named_children()]
    return [found for found in pairs if isinstance(found[2], kind)]


def transformer_config(folder: Path) -> dict:
    return read_json(folder / "transformer" / "config.json")


def vae_config(folder: Path) -> dict:
    return read_json(folder / "vae" / "config.json")


# ---- pictures ----------------------------------------------------------------------------------------------


def default_resolution(folder: Path) -> int:
    """The VAE's, of families whose transformer's config names none."""
    return vae_config(folder)["sample_size"]


def pixels(folder: Path) -> int:
    """Pixels of the image per pixel of the latents: each of the VAE's stages but the last halves the
    picture."""
    return 2 ** (len(vae_config(folder)["block_out_channels"]) - 1)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Latents -> images (B, 3, height, width) float32 in [0, 1]."""
    return decode_raw(vae, latents_BCHW.float() / vae.config.scaling_factor + vae.config.shift_factor)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images_B3HW: Tensor) -> Tensor:
    """Images in [0, 1] -> latents float32, the posterior's mean, scaled as the transformer sees them."""
    return (encode_raw(vae, images_B3HW) - vae.config.shift_factor) * vae.config.scaling_factor


def decode_raw(vae: ModelMixin, z: Tensor) -> Tensor:
    """The VAE's own latents -> images in [0, 1]."""
    (images,) = vae.decode(z, return_dict=False)  # in [-1, 1]
    return (images / 2 + 0.5).clamp(0, 1)


def encode_raw(vae: ModelMixin, images: Tensor) -> Tensor:
    """Images in [0, 1] -> the VAE's own latents, the posterior's mean."""
    return vae.encode(images.float() * 2 - 1).latent_dist.mode()


# ---- noise levels ------------------------------------------------------------------------------------------


def noise_levels(folder: Path, steps: int, mu: float, even: list[float] | None = None) -> list[float]:
    """The scheduler's `steps` + 1 levels, from 1 down to 0.

    `even`: the levels that the pipeline hands to its scheduler before the shift; None where it leaves them to
    the scheduler. ValueError for a schedule that does not fall strictly to 0.
    """
    scheduler = load_scheduler(folder)
    last = scheduler.config.shift_terminal  # the level before 0: of one step that is 1
    require(steps > 1 or not last, f"{folder}/scheduler has shift_terminal {last}; it needs 2 steps or more")
    scheduler.set_timesteps(steps, sigmas=even, mu=mu)
    levels = scheduler.sigmas
    if levels[-1] != 0 or not (levels.diff() < 0).all():
        first, shift = levels[:4].tolist(), scheduler.config.shift
        raise ValueError(f"{folder}/scheduler, shift {shift}: sigmas must fall strictly to 0, not {first}")
    return levels.tolist()


def even_levels(steps: int, dtype: torch.dtype = torch.float64) -> list[float]:
    """1, 1 - 1/N, ... 1/N, computed in `dtype`."""
    return torch.linspace(1.0, 1 / steps, steps, dtype=dtype).tolist()


def log_of_shift(folder: Path, mu: float) -> float:
    """Log of the factor on sigma / (1 - sigma)."""
    scheduler = load_scheduler(folder)
    if not scheduler.config.use_dynamic_shifting:
        return math.log(scheduler.config.shift)
    half = scheduler.time_shift(mu, 1.0, 0.5)
    return math.log(half / (1 - half))  # at sigma = 1/2 the odds are the shift


def linear_mu(folder: Path, tokens: int) -> float:
    """mu, linear in the number of image tokens through the two points that the scheduler's config names."""
    config = load_scheduler(folder).config
    rise = config.max_shift - config.base_shift
    run = config.max_image_seq_len - config.base_image_seq_len
    return config.base_shift + rise / run * (tokens - config.base_image_seq_len)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """ValueError for a scheduler of another process, whose settings would not be read."""
    kind = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    if not kind.startswith("FlowMatch"):
        raise ValueError(f"{kind} is not for flow matching; put a FlowMatchEulerDiscreteScheduler there")
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")


# ---- text and patches --------------------------------------------------------------------------------------


def collate(conditions: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of one length, name by name in a batch, the source pictures too."""
    return {name: torch.stack([condition[name] for condition in conditions]) for name in conditions[0]}


def resized(size: Callable, folder: Path, picture: Image.Image) -> Image.Image:
    """A source picture of size(folder, width, height) pixels."""
    return picture.resize(size(folder, *picture.size), Image.Resampling.LANCZOS)


PATCH = 2  # the pipelines take no other


def pack(x_BCHW: Tensor) -> Tensor:
    """A token per patch (B, T, 4 C)."""
    return rearrange(x_BCHW, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens_BTC: Tensor, rows: int) -> Tensor:
    return rearrange(tokens_BTC, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH, q=PATCH)


def positions(*sizes: int, device: torch.device) -> Tensor:
    """(T, len(sizes)): where each token of a grid stands, along every axis."""
    return torch.cartesian_prod(*[torch.arange(size, device=device) for size in sizes])


def image_tokens(shape_CHW: tuple[int, int, int]) -> int:
    """Number of patches."""
    return (shape_CHW[1] // PATCH) * (shape_CHW[2] // PATCH)


def sigmas(folder: Path, shape_CHW: tuple[int, int, int], steps: int) -> list[float]:
    """The scheduler's, from the pipeline's 1, 1 - 1/N, ... 1/N."""
    mu = linear_mu(folder, image_tokens(shape_CHW))
    return noise_levels(folder, steps, mu, even_levels(steps))


def log_shift(folder: Path, shape_CHW: tuple[int, int, int]) -> float:
    return log_of_shift(folder, linear_mu(folder, image_tokens(shape_CHW)))


def patches_along(side: int, unit: int, most: int | None = None) -> int:
    """Of one side of an image, `unit` pixels to a patch. ValueError where it is not made of whole patches, or
    of more than `most`."""
    way_out = f"use a multiple of {unit}"
    if most is not None:
        way_out = f"{way_out} up to {unit * most}"
    count, rest = divmod(side, unit)
    if rest != 0 or count < 1 or (most is not None and count > most):
        raise ValueError(f"resolution {side} does not fit this model: {way_out}")
    return count


def packed_shape(folder: Path, unit: int, height: int, width: int) -> tuple[int, int, int]:
    """(C, H, W) where a token of the transformer is a patch of `unit` pixels per side."""
    rows, columns = patches_along(height, unit), patches_along(width, unit)
    return transformer_config(folder)["in_channels"] // PATCH**2, PATCH * rows, PATCH * columns


def time_of(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """sigma as a pipeline hands it to a network that computes in `dtype`: it rounds 1000 sigma, and divides
    by 1000 then, which in bfloat16 is another number than sigma itself."""
    return (1000 * sigma_B).to(dtype) / 1000
