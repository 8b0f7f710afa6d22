"""Tiny FLUX.1 and FLUX.2-klein pipelines, made and saved in a second."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3ForCausalLM

from opd.mini import build as mini
from tests import tiny, tiny_z_image

WIDTH = 32
WORDS = "a two red blue circle circles square squares triangle dot".split()


def make_flux(folder: Path) -> Path:
    """8 px images, 4x4x4 latents, one double and one single block 32 wide, told its guidance; float32."""
    torch.manual_seed(0)
    t5, t5_tokenizer = tiny.make_t5(WIDTH)
    tokenizer = mini.make_tokenizer(WORDS)
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=t5.config.d_model,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=tiny.make_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=make_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


def make_clip(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            initializer_factor=10.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def make_flux2(folder: Path) -> Path:
    """8 px images, 2x2 patches of 16 channels, one double and one single block 32 wide; float32."""
    torch.manual_seed(0)
    tokenizer = tiny_z_image.make_tokenizer()
    Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=make_flux2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=make_qwen3(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def make_flux2_vae() -> AutoencoderKLFlux2:
    """Factor 2, 4 latent channels, a batch norm that has seen something."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def make_qwen3(tokenizer) -> Qwen3ForCausalLM:
    """28 layers: the pipeline reads the 9th, 18th and 27th."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).eval()
