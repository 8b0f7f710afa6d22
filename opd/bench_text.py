"""What a run on many prompts takes at its start: drawing its steps, encoding the first windows, disk.

    python -m opd.bench_text                               # 40,000 prompts, four windows: 13 GB are written
    python -m opd.bench_text --prompts 400 --size tiny     # seconds

Random numbers of the right shapes stand in for the encoders, whose own time comes on top.
"""

import argparse
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from opd import errors, prompts
from opd.bench_model import SIZES, text_shapes
from opd.conditioning import Conditioning
from opd.data import load_tasks, prompts_of_step
from opd.families import Condition
from opd.flags import require
from opd.text_cache import GB

PER_STEP = 40  # as in the preset sd35


def main(arguments: list[str] | None = None) -> None:
    about = argparse.ArgumentParser(prog="python -m opd.bench_text", description=__doc__.split("\n")[0])
    about.add_argument("--prompts", type=int, default=40_000)
    about.add_argument("--size", default="sd35-medium", help=", ".join(SIZES))
    about.add_argument("--windows", type=int, default=4)
    about.add_argument("--cache-gb", type=float, default=10.0)
    about.add_argument("--out", default="runs/bench-text", help="folder that is made, and deleted in the end")
    args = about.parse_args(arguments)
    with errors.in_one_line(ValueError):
        require(args.size in SIZES, f"--size {args.size!r} is unknown; choose from {', '.join(SIZES)}")
        new = f"--out {args.out!r} exists, and would be deleted in the end; name another"
        require(not Path(args.out).exists(), new)
    try:
        for line in measure(args, Path(args.out)):
            print(line, flush=True)
    finally:
        shutil.rmtree(args.out, ignore_errors=True)


def measure(args: argparse.Namespace, out: Path):
    """A line for what was drawn, and one for each window."""
    prompts.main(["ocr", "--count", str(args.prompts), "--out", str(out / "ocr.txt")])
    started = time.perf_counter()
    pools = load_tasks({"ocr": str(out / "ocr.txt")})
    steps = []
    for step in range(args.prompts // PER_STEP):
        steps.append([prompt.text for prompt in prompts_of_step(pools, {"ocr": 1}, PER_STEP, 0, step)])
    yield f"{len(steps)} steps of {PER_STEP} prompts drawn in {time.perf_counter() - started:.1f} s"

    texts = Conditioning(stand_in(args.size), out, str(out), torch.bfloat16, CPU, cache_gb=args.cache_gb)
    texts.prepare([""])
    texts.follow(steps)
    for _ in range(args.windows):
        if texts.end == len(steps):
            return
        first, started = texts.end, time.perf_counter()
        texts.ahead(first)
        seconds = time.perf_counter() - started
        disk = sum(pack.stat().st_size for pack in out.rglob("*.safetensors"))
        yield f"steps {first} to {texts.end}: {seconds:.1f} s, then {disk / GB:.3g} GB on disk"


CPU = torch.device("cpu")


def stand_in(size: str) -> SimpleNamespace:
    """What a family has of text encoders."""
    shapes = text_shapes(SIZES[size])

    def encode_prompts(text, texts: list[str], device: torch.device) -> list[Condition]:
        made = []
        for _ in texts:
            made.append({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()})
        return made

    return SimpleNamespace(TEXT=(), load_text=lambda *_: None, encode_prompts=encode_prompts)


if __name__ == "__main__":
    main()
