"""Make the miniature: a genuine StableDiffusion3Pipeline directory, its data, and its shipped weights.

    P=runs/mini-pipeline
    python -m opd.mini.build pipeline $P                       # shipped encoders and VAE, new transformer
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
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from einops import rearrange
from safetensors.torch import load_file

from opd.families import sd3
from opd.files import digest, replace, write_safetensors
from opd.formats.latents import write_samples
from opd.mini import drawing, world

WEIGHTS = Path(__file__).parent / "weights"
# The base's data: kinds of prompts and their shares, so many pictures. Without a share of its own, left and
# right are learned long after above and below (opd/mini/weights/README.md).
MIX = {"compose": 0.45, "side by side": 0.15, "text": 0.2, "quality": 0.2}
IMAGES = 240_000


def make_transformer(latent: int, patch: int) -> SD3Transformer2DModel:
    """The base's, untrained, for `latent` latent pixels per side. Its adaLN modulations and output start at
    zero; diffusers leaves them random."""
    config = SD3Transformer2DModel.load_config(WEIGHTS / "base", subfolder="transformer")
    sizes = {"sample_size": latent, "patch_size": patch, "pos_embed_max_size": latent // patch * 2}
    model = SD3Transformer2DModel.from_config(config | sizes)
    zero = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for linear in zero:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def build_pipeline(folder: Path, latent: int = world.SIZE // 2, patch: int = 2) -> None:
    """Save the whole pipeline: the shipped text encoders and VAE, and a transformer that is untrained
    (`train.py mini-base` trains it)."""
    torch.manual_seed(0)
    parts = {"transformer": make_transformer(latent, patch), "text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "base", **parts)
    pipeline.to(torch.bfloat16).save_pretrained(folder)


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
