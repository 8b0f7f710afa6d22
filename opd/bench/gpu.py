"""Every figure of a GPU by one command, what is missed most first.

    pip install -e .                        # what a bare machine lacks
    timeout 540 python -m opd.bench gpu     # runs/gpu.json, written anew after every part
    python -m opd.bench gpu --rehearse      # the same path on a CPU at a tiny size: seconds that say nothing

The fused ops must agree with the eager ones; then their speed beside a copy's; then the loop on SD3.5's
shapes at 512 px, 1 and 4 teachers: ours, our emulation of the released structure, ours compiled, with memory
predicted and measured; ours at 1024 px; and the README's first command. Exits 2 without a GPU, 1 where a part
is missing.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro

from opd import compiled
from opd.bench import kernels
from opd.bench.clock import about, matmul_rate, measure
from opd.bench.model import WORKS, with_teachers
from opd.config import DistillationConfig
from opd.files import read_metrics, write_json
from opd.model import compute_dtype


@dataclass(frozen=True)
class Arguments:
    out: str = "runs/gpu.json"
    rehearse: bool = False


def main(arguments: list[str]) -> int:
    """Exit status."""
    args = tyro.cli(Arguments, args=arguments, prog="python -m opd.bench gpu", description=__doc__)
    device, latents = torch.device("cuda", 0), (256, 16, 128, 128)
    work = replace(WORKS["sd35-medium"], prompts_per_step=4)
    if args.rehearse:
        device, latents = torch.device("cpu"), (2, 4, 8, 8)
        work = replace(WORKS["tiny"], prompts_per_step=2, group=1, micro_batch=2, steps=1)
        compiled.BACKEND = "eager"  # a CPU's own takes minutes
    elif not torch.cuda.is_available():
        print("error: no GPU: nothing was measured; --rehearse tries the path on a CPU", file=sys.stderr)
        return 2
    result = {"about": about(device, compute_dtype(work.dtype, device)), "work": vars(work)}
    for name, part in parts(device, latents, work):
        try:
            result[name] = part()
        except (RuntimeError, ValueError) as error:
            result[name] = {"error": str(error).split("\n")[0]}
        write_json(Path(args.out), result)
        print(f"{name}: {result[name]}", flush=True)
    return int(any("error" in numbers for numbers in result.values()))


def parts(
    device: torch.device, latents: tuple, work: DistillationConfig
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, what measures it), in order."""
    yield "agreement", partial(kernels.agreement, device)
    for op in kernels.OPS:
        yield op, partial(kernels.measure, op, latents, 2, device)
    rate = matmul_rate(compute_dtype(work.dtype, device), device)
    for structure, compile in (("ours", False), ("released", False), ("ours", True)):
        for teachers in (1, 4):
            own = with_teachers(replace(work, compile=compile), teachers)
            name = f"{structure}, compile {compile}, teachers {teachers}"
            yield name, partial(measure, structure, own, device, 3, rate)
    wide = str(2 * int(work.resolution))
    twice = replace(work, resolution=wide, micro_batch=min(2, work.micro_batch))
    yield "ours, twice as wide", partial(measure, "ours", twice, device, 3, rate)
    yield "first command", first_command


def first_command() -> dict[str, float]:
    """Seconds from the start of `python train.py` to the end of its first step, and of a step after it."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"train.py --iterations 5 --save-every 1 --no-evaluate --sample-every 0 --out {folder}/run"
        started = time.time()
        subprocess.run([sys.executable, *command.split()], check=True, stdout=subprocess.DEVNULL)
        first = (Path(folder) / "run/checkpoints/000001").stat().st_mtime - started
        rows = read_metrics(Path(folder) / "run/metrics.jsonl")
    seconds = [row["effective_batch"] / row["samples_per_second"] for row in rows[1:]]
    return {"first step": first, "a step": median(seconds)}
