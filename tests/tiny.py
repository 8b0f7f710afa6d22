"""A tiny StableDiffusion3Pipeline and adapters for it, made and saved in a second: what the tests run on."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from opd import adapters, sd3
from opd.config import Config
from opd.mini import build

PROMPTS = {"red": ["a red circle", "two red circles", "a red square", "a red triangle", "a red dot"],
           "blue": ["a blue circle", "two blue squares", "a blue square", "a blue dot"]}


def make_pipeline(folder: Path) -> Path:
    """8 px images, 4x4x4 latents, two transformer blocks 32 wide, random (not zero) weights, float32."""
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer("a two red blue circle circles square squares triangle dot".split())
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * build.WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * build.WIDTH, pos_embed_max_size=4, qk_norm="rms_norm")
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
                        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
                        scaling_factor=0.8, shift_factor=0.1)
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=build.make_text_encoder(tokenizer, 1), tokenizer=tokenizer,
        text_encoder_2=build.make_text_encoder(tokenizer, 2), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None).save_pretrained(folder)
    return folder


def random_lora(pipeline: Path, seed: int, rank: int = 4, alpha: float = 8.0, size: float = 0.3) -> adapters.Lora:
    """An adapter that changes the velocity visibly."""
    lora = adapters.fresh_lora(sd3.skeleton(pipeline), sd3.LORA_TARGETS, rank, alpha, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    for module, b in lora.B.items():
        b.copy_(size * torch.randn(b.shape, generator=generator))
    return lora


def save(lora: adapters.Lora, folder: Path) -> Path:
    """`lora` as a PEFT directory."""
    weights = {f"{m}.lora_A.x.weight": a for m, a in lora.A.items()} | {f"{m}.lora_B.x.weight": b for m, b in lora.B.items()}
    rank = next(iter(lora.A.values())).shape[0]
    adapters.save_lora(folder, weights, "x", rank, next(iter(lora.scale.values())) * rank)
    return folder


def config(world: Path, **changes) -> Config:
    """A run on the tiny world: two teachers, red and blue; blue is the anchor."""
    base = Config(
        model=str(world / "pipeline"), dtype="float32", rank=4, alpha=8.0, cold_start="base",
        teachers={"red": str(world / "red"), "blue": str(world / "blue")}, anchor="blue", anchor_weight=0.1,
        prompts={"red": str(world / "red.txt"), "blue": str(world / "blue.txt")}, prompts_per_step=4, group=2, micro_batch=4,
        steps=4, iterations=3, lr=1e-2, warmup=0, decay="constant", out=str(world / "run"), cache=str(world / "cache"),
        evaluate=False, rewards={}, heldout={}, sample_every=0, save_every=100)
    return replace(base, **changes)
