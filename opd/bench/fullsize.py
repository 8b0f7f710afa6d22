"""SD3.5-Medium at full size with random weights, through the real commands, on whatever machine this is.

    python -m opd.bench.fullsize                                      # hours of a core, 20 GB of memory
    python -m opd.bench.fullsize --size tiny --out runs/fullsize-tiny # a rehearsal in seconds

It makes a pipeline directory of SD3.5-Medium's transformer and VAE, with text encoders of its widths but two
layers deep, four teachers as PEFT directories, and prompts by opd/rewards/prompts.py. Then, each in
a process of its own: an update of the preset sd35-24gb and one of sd35-grpo-geneval, with the size of a JPEG
as reward, on fewer samples and states than the presets have, whose micro-batches they keep; pictures by
sample.py; and the student's file in diffusers' pipeline, whose velocity must be ours. The table is printed
and written to OUT/table.md. Run it in the repository's root, where train.py is.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import sample
import train
from opd import adapters, errors, memory
from opd.bench.clock import alive, parts, resident
from opd.bench.model import PATCH, SIZES, in_dtype, random_lora
from opd.cli import parse
from opd.config import GRPOConfig, RunConfig
from opd.errors import require
from opd.families import sd3
from opd.files import write_json
from opd.formats import lora_files
from opd.memory import LiveTensors
from opd.mini import build as mini
from opd.model import Model
from opd.presets import PRESETS, SD35_TEACHERS
from opd.rewards import prompts

GB = 10**9
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Outside:
    """What opd.bench leaves out of a size: the VAE, the widths of CLIP's two encoders, the picture."""

    vae_channels: tuple[int, ...]
    vae_groups: int
    clip: tuple[int, int]
    pixels: int


OUTSIDE = {
    "tiny": Outside((8, 8, 8, 8), 4, (32, 32), 64),
    "sd35-medium": Outside((128, 256, 512, 512), 32, (768, 1280), 512),
}
ONE_UPDATE = "--iterations 1 --sample-every 0 --prompts-per-step"
# A micro-batch of the preset's two samples, at the first of its ten states.
DISTIL = f"{ONE_UPDATE} 2 --group 1 --query-range 0 1".split()
# One prompt's two pictures, of two steps; the last is not trained on.
GROW = f"{ONE_UPDATE} 1 --updates 1 --group 2 --micro-batch 2 --steps 2".split()
REWARD = "geneval=jpeg_compressibility"


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    out = Path(args.out) / args.size
    with errors.in_one_line(ValueError):
        require(args.size in OUTSIDE, f"--size {args.size!r} is unknown; choose from {', '.join(OUTSIDE)}")
    usual = OUTSIDE[args.size].pixels
    pixels = args.pixels or usual
    alone(make, out, args.size)
    lines = [f"{args.size}, {pixels} px, random weights"]
    for preset in ("sd35-24gb", "sd35-grpo-geneval"):
        given, file = command(out, pixels, preset), out / f"{preset}-{pixels}.json"
        if not file.exists():
            shutil.rmtree(out / preset, ignore_errors=True)  # a run that is done would do nothing
            alone(measured_run, given, file)
        lines += update_table(given, usual, json.loads(file.read_text()))
    for step in (take_pictures, load_into_diffusers):
        started = time.perf_counter()
        alone(step, out, pixels)
        lines.append(f"{step.__name__.replace('_', ' ')}: {time.perf_counter() - started:.0f} s")
    table = "\n".join(lines)
    print(table)
    (out / "table.md").write_text(table + "\n")


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m opd.bench.fullsize", description=__doc__.split("\n")[0])
    about.add_argument("--size", default="sd35-medium", help=", ".join(OUTSIDE))
    about.add_argument("--pixels", type=int, help="per side; by default as in the presets")
    about.add_argument("--out", default="runs/fullsize", help="folder for the model, the runs and the table")
    return about


def alone(function, *arguments) -> None:
    """Call it in a process of its own, which takes its memory along; what it fails with ends this one."""
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"error: {function.__name__} ended with status {process.exitcode}")


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "sample"])


# ---- what there is to train on -----------------------------------------------------------------------------


def make(out: Path, size: str) -> None:
    """`pipeline/`, a folder per teacher and a file of prompts per task; nothing where they are made."""
    if (out / "done").exists():
        return
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(patch_size=PATCH, **SIZES[size].transformer)
    make_pipeline(out / "pipeline", size, in_dtype(transformer, torch.bfloat16))
    skeleton = sd3.skeleton(out / "pipeline")
    cfg = PRESETS["sd35"]
    for number, name in enumerate(SD35_TEACHERS):
        lora = random_lora(skeleton, cfg, number)
        weights = {f"{layer}.lora_A.x.weight": factor for layer, factor in lora.A.items()}
        weights |= {f"{layer}.lora_B.x.weight": factor for layer, factor in lora.B.items()}
        adapters.save_lora(out / name, weights, "x", cfg.rank, cfg.alpha)
    for task, kind in (("geneval", "geneval"), ("ocr", "ocr"), ("pickscore", "ocr")):
        prompts.main([kind, "--count", "64", "--out", str(prompt_file(out, task)), "--seed", str(len(task))])
    (out / "done").touch()


def prompt_file(out: Path, task: str) -> Path:
    ending = "txt"
    if task == "geneval":
        ending = "jsonl"
    return out / f"{task}.{ending}"


def make_pipeline(folder: Path, size: str, transformer: SD3Transformer2DModel) -> None:
    outside, config = OUTSIDE[size], transformer.config
    tokenizer = mini.make_tokenizer(["a", "photo", "of"])
    tokenizer.model_max_length = CLIP_TOKENS
    clips = [make_clip(width, len(tokenizer)) for width in outside.clip]
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.joint_attention_dim,
        d_kv=64,
        d_ff=64,
        num_layers=2,
        num_heads=1,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=outside.vae_channels,
        layers_per_block=2,
        latent_channels=config.in_channels,
        norm_num_groups=outside.vae_groups,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SIZES[size].shift),
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer,
    ).save_pretrained(folder)


def make_clip(width: int, vocabulary: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def command(out: Path, pixels: int, preset: str) -> list[str]:
    """The arguments of train.py."""
    given = [preset, *common(out, pixels), "--out", str(out / preset), "--prompts"]
    given += [f"{task}={prompt_file(out, task)}" for task in PRESETS[preset].prompts]
    if preset == "sd35-grpo-geneval":
        return [*given, *GROW, "--train-rewards", REWARD]
    return [*given, *DISTIL, "--teachers", *(f"{name}={out / name}" for name in SD35_TEACHERS)]


def common(out: Path, pixels: int) -> list[str]:
    """What every command is told of the model."""
    return ["--model", str(out / "pipeline"), "--cache", str(out / "cache"), "--resolution", str(pixels)]


# ---- one update --------------------------------------------------------------------------------------------


def measured_run(arguments: list[str], file: Path) -> None:
    """`train.py ARGUMENTS`, and what its loop took into a file: seconds, bytes by what they hold."""
    loop, began = train.train, time.perf_counter()

    def counted(cfg, stage, trained, folder, report) -> bool:
        started = time.perf_counter()
        live = LiveTensors()
        live.add(alive())
        with live:
            finished = loop(cfg, stage, trained, folder, report)
        found = parts(stage, live.peak)
        found["vae"] = sum(weight.nbytes for weight in stage.model.vae.parameters())
        found["average"] = sum(average.nbytes for average in trained.average.values())
        found["activations"] -= found["vae"] + found["average"]
        found["start"], found["update"] = started - began, time.perf_counter() - started
        found["process"] = resident("VmHWM")
        write_json(file, found)
        return finished

    sys.argv = ["train.py", *arguments]
    with patch.object(train, "train", counted):
        train.main()


def update_table(arguments: list[str], usual: int, measured: dict) -> list[str]:
    """Markdown: bytes by what they hold, measured beside predicted, and predicted for the preset itself, at
    `usual` pixels in bfloat16."""
    cfg = parse(arguments, PRESETS)
    own = PRESETS[arguments[0]]
    whole = replace(cfg, dtype="bfloat16", resolution=(str(usual),), steps=own.steps)
    whole = replace(whole, prompts_per_step=own.prompts_per_step, group=own.group)
    whole = replace(whole, micro_batch=own.micro_batch)
    here, there = predicted(cfg), predicted(whole)
    seconds = f"start {measured['start']:.0f} s, update {measured['update']:.0f} s"
    lines = [f"\n`train.py {arguments[0]}`: {seconds}\n"]
    lines += ["| GB | measured | predicted | predicted, the whole preset in bfloat16 |", "|---|---|---|---|"]
    for name, size in here.items():
        cells = [measured[name], size, there[name]]
        lines.append(f"| {name} | {' | '.join(f'{cell / GB:.3g}' for cell in cells)} |")
    lines.append(f"| process | {measured['process'] / GB:.3g} | | |\n")
    return lines


def predicted(cfg: RunConfig) -> dict[str, int]:
    """In the parts that are measured."""
    place = torch.device("cpu")
    model = Model.plan(sd3, cfg.model, cfg.dtype, cfg.resolution, cfg.cache, place, cfg.t5, cfg.cache_gb)
    found = memory.predict_run(cfg, model, memory.assumed_teachers(cfg, model))
    sizes = dict.fromkeys(("base", "adapters", "optimizer", "gradients", "average", "vae", "activations"), 0)
    for name, size in found.items():
        if name in INSIDE:
            name = INSIDE[name]
        if name != "decoding":  # a grid's, and no picture is shown
            sizes[name] += size
    if isinstance(cfg, GRPOConfig):  # in turn with training it decodes its own pictures, not a grid's
        own = found["decoding"] * cfg.micro_batch // max(cfg.micro_batch, memory.GRID)
        sizes["activations"] = max(sizes["activations"], own)
    return sizes | {"peak": sum(sizes.values())}


INSIDE = {"teachers": "adapters", "trajectories": "activations"}
"""A part that is predicted -> the part that it is measured in."""


# ---- the student afterwards --------------------------------------------------------------------------------


def student(out: Path) -> str:
    return str(out / "sd35-24gb" / "student")


def take_pictures(out: Path, pixels: int) -> None:
    given = ["--adapters", f"student={student(out)}", "--prompts", "a photo of a dog", "--steps", "2"]
    sample.main([*common(out, pixels), *given, "--out", str(out / "images")])


def load_into_diffusers(out: Path, pixels: int) -> None:
    """AssertionError unless the student's file does in diffusers' pipeline what it does here."""
    place = torch.device("cpu")
    model = Model.plan(sd3, str(out / "pipeline"), "float32", (str(pixels),), str(out / "cache"), place, True)
    model.prepare(["a photo of a dog"])
    model.load()
    x, sigma = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    text = sd3.collate(model.text(["a photo of a dog"]))
    pipe = StableDiffusion3Pipeline.from_pretrained(
        out / "pipeline",
        transformer=model.transformer,
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    with torch.no_grad():
        base = sd3.velocity(model.transformer, x, sigma, text)
        pipe.load_lora_weights(student(out), weight_name="pytorch_lora_weights.safetensors")
        theirs = sd3.velocity(model.transformer, x, sigma, text)
        pipe.unload_lora_weights()
        adapters.attach(model.transformer, "mine", lora_files.read_lora(student(out)), torch.float32)
        with adapters.use(model.transformer, "mine"):
            ours = sd3.velocity(model.transformer, x, sigma, text)
    moved = (base - ours).norm()
    assert (theirs - ours).norm() < 1e-3 * moved, "diffusers reads another student out of its file"


if __name__ == "__main__":
    main()
