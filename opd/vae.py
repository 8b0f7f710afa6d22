"""Images and latents of pipelines whose VAE is diffusers' AutoencoderKL: a part that several families
share."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def load_vae(folder: Path) -> AutoencoderKL:
    """The frozen VAE in float32."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    return vae.requires_grad_(False).eval()


def pixels(folder: Path) -> int:
    """Pixels of the image per pixel of the latents: each of the VAE's stages but the last halves the
    picture."""
    config = AutoencoderKL.load_config(folder / "vae")
    return 2 ** (len(config["block_out_channels"]) - 1)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Latents -> images (B, 3, height, width) float32 in [0, 1]."""
    z = latents_BCHW.float() / vae.config.scaling_factor + vae.config.shift_factor
    (images,) = vae.decode(z, return_dict=False)  # in [-1, 1]
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images_B3HW: Tensor) -> Tensor:
    """Images in [0, 1] -> latents float32, the posterior's mean, scaled as the transformer sees them."""
    z = vae.encode(images_B3HW.float() * 2 - 1).latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor
