"""Make the miniature: a genuine StableDiffusion3Pipeline directory, its data, and its shipped weights.

    P=runs/mini-pipeline
    python -m opd.mini.build pipeline $P                       # encoders, trained VAE, untrained transformer
    python -m opd.mini.build data runs/mini-data/base $P       # its latents and captions
    torchrun train.py mini-base                                # pretrain the base
    python -m opd.mini.build base $P runs/mini-base/student    # install it in weights/base
    for t in compose text quality; do
        torchrun train.py mini-$t                              # grow the teachers by GRPO
        python -m opd.mini.build teacher runs/mini-$t $t       # install them in weights/
    done
    python -m opd.mini.build sha256                            # write weights/SHA256SUMS

What the shipped ones are: opd/mini/weights/README.md.
"""

import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from einops import rearrange
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from opd.families import sd3
from opd.files import digest, replace, write_safetensors
from opd.formats.latents import write_samples
from opd.mini import drawing, world

WEIGHTS = Path(__file__).parent / "weights"
RESOLUTION, TOKENS, WIDTH = 24, 12, 64
# The base's data: kinds of prompts and their shares, so many pictures. Without a share of its own, left and
# right are learned long after above and below (opd/mini/weights/README.md).
MIX = {"compose": 0.45, "side by side": 0.15, "text": 0.2, "quality": 0.2}
IMAGES = 240_000


def make_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A CLIP BPE tokenizer in which each of `words` is one token and all else falls apart into characters."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    tokens += dict.fromkeys(a + b for a, b in merges)
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TOKENS)


def learn_merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Byte pair encoding until every word, given as its characters, is one token. Ties go by the alphabet;
    the library's trainer breaks them at random."""
    pieces, merges = [list(word) for word in sorted(set(map(tuple, words)))], []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == best:
                    word[i - 1 : i + 1] = ["".join(best)]
    return merges


def make_text_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModelWithProjection:
    """A frozen random CLIP text encoder. Wide embeddings, so that every word keeps its own direction."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    embeddings = next(m for n, m in model.named_modules() if n.endswith("embeddings"))
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.7)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.4)
    return model.eval()


def make_vae(channels: tuple[int, int] = (16, 32)) -> AutoencoderKL:
    """Factor 2, 8 latent channels: light compression, so that pixel noise and small glyphs survive it."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_transformer(latent: int = RESOLUTION // 2, patch: int = 2) -> SD3Transformer2DModel:
    """An MMDiT whose adaLN modulations and output start at zero; diffusers leaves them random. `latent`:
    latent pixels per side."""
    model = SD3Transformer2DModel(
        sample_size=latent,
        patch_size=patch,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=latent // patch * 2,
        qk_norm="rms_norm",
    )
    zero = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for linear in zero:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def draw(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """`count` training pairs, kinds of prompts with probabilities MIX: images uint8 (count, 3, 24, 24),
    captions."""
    rng = np.random.default_rng(seed)
    pools = {task: world.split(task)[0] for task in world.TASKS}
    pools["side by side"] = [prompt for prompt in pools["compose"] if {"left", "right"} & {*prompt.split()}]
    images, captions = [], []
    for kind in rng.choice(list(MIX), size=count, p=list(MIX.values())).tolist():
        image, caption = drawing.training_pair(pools[kind][rng.integers(len(pools[kind]))], rng)
        images.append(image)
        captions.append(caption)
    return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w").contiguous(), captions


def train_vae(vae: torch.nn.Module, images_u8: torch.Tensor, steps: int, batch: int = 64) -> torch.Tensor:
    """Reconstruction (L1 + L2) with a light KL. Returns latents of the first 4,096 images."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = images_u8[torch.randint(len(images_u8), (batch,), generator=generator)].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=generator), return_dict=False)[0]
        loss = (y - x).abs().mean() + 4 * (y - x).square().mean() + 1e-4 * posterior.kl().mean() / 100
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            error = (y - x).square().mean()
            print(f"vae step {step} loss {loss.item():.4f} mse {error.item():.5f}", flush=True)
    with torch.no_grad():
        batches = images_u8[:4096].split(256)
        return torch.cat([vae.encode(batch.float() / 127.5 - 1).latent_dist.mode() for batch in batches])


def set_statistics(vae: AutoencoderKL, z_BCHW: torch.Tensor) -> None:
    """Mean and spread of latents become the VAE's shift and scale."""
    vae.register_to_config(scaling_factor=1 / z_BCHW.std().item(), shift_factor=z_BCHW.mean().item())


def build_pipeline(folder: Path) -> None:
    """Save the whole pipeline; its transformer is untrained (`train.py mini-base` trains it)."""
    torch.manual_seed(0)
    prompts = world.all_prompts("compose") + world.all_prompts("quality") + ["sign that says"]
    words = {word for prompt in prompts for word in prompt.split()}
    tokenizer = make_tokenizer(sorted(words))
    vae = make_vae()
    images, _ = draw(12_000, seed=1)
    set_statistics(vae, train_vae(vae, images, steps=2000))
    torch.manual_seed(1)
    transformer = make_transformer()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        text_encoder=make_text_encoder(tokenizer, 2),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer, 3),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)


def write_data(folder: Path, vae: AutoencoderKL, images_u8: torch.Tensor, captions: list[str]) -> None:
    """Latents and captions, as stage sft reads them."""
    latents = torch.cat([sd3.encode_images(vae, batch / 255).half() for batch in images_u8.split(256)])
    write_samples(folder, latents, [{"prompt": caption} for caption in captions])
    print(f"{folder}: {len(captions)} latents, std {latents.float().std():.3f}", flush=True)


def sums() -> str:
    """sha256 of every shipped weights file, in sha256sum's format."""
    files = sorted(WEIGHTS.rglob("*.safetensors"))
    return "".join(f"{digest(p)}  {p.relative_to(WEIGHTS)}\n" for p in files)


def install(source: Path, folder: Path, weights: str, config: str) -> None:
    """Weights in bfloat16, and their configuration."""
    tensors = {name: w.bfloat16() for name, w in load_file(source / f"{weights}.safetensors").items()}
    write_safetensors(folder / f"{weights}.safetensors", tensors)
    shutil.copy(source / config, folder / config)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["pipeline", folder]:
            build_pipeline(Path(folder))
        case ["data", folder, pipeline]:
            write_data(Path(folder), sd3.load_vae(Path(pipeline)), *draw(IMAGES, seed=10))
        case ["base", pipeline, transformer, *others] if len(others) <= 1:
            folder = Path(*others or [WEIGHTS / "base"])
            shutil.copytree(pipeline, folder, dirs_exist_ok=True)
            install(Path(transformer), folder / "transformer", "diffusion_pytorch_model", "config.json")
        case ["teacher", run, task]:
            student = Path(run) / "student"
            install(student, WEIGHTS / task, "adapter_model", "adapter_config.json")
        case ["sha256"]:
            replace(WEIGHTS / "SHA256SUMS", lambda p: p.write_text(sums()))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
