"""What a run on many prompts takes at its start: drawing its steps, encoding the first windows, disk.

    python -m opd.bench.text                               # 40,000 prompts, four windows: 13 GB are written
    python -m opd.bench.text --prompts 400 --size tiny     # seconds
    python -m opd.bench.text --company --size tiny         # a kill in the middle, then two runs at once

Random numbers of the right shapes stand in for the encoders, whose own time comes on top. --company keeps all
prompts, so use it with tiny texts: packs then hold as many prompts as those of SD3.5 and are as many.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from opd import conditioning, errors
from opd.bench.model import SIZES, text_shapes
from opd.conditioning import Conditioning
from opd.data import load_tasks, prompts_of_step
from opd.errors import require
from opd.families import Condition
from opd.rewards import prompts
from opd.text_cache import GB, PACK, key_of

PER_STEP = 40  # as in the preset sd35
PER_PACK = 160  # prompts of SD3.5 in a pack


def main(arguments: list[str] | None = None) -> None:
    about = argparse.ArgumentParser(prog="python -m opd.bench.text", description=__doc__.split("\n")[0])
    about.add_argument("--prompts", type=int, default=40_000)
    about.add_argument("--size", default="sd35-medium", help=", ".join(SIZES))
    about.add_argument("--windows", type=int, default=4)
    about.add_argument("--cache-gb", type=float, default=10.0)
    about.add_argument("--company", action="store_true", help="a kill in the middle, and two runs at once")
    about.add_argument("--out", default="runs/bench-text", help="folder that is made, and deleted in the end")
    args = about.parse_args(arguments)
    with errors.in_one_line(ValueError):
        require(args.size in SIZES, f"--size {args.size!r} is unknown; choose from {', '.join(SIZES)}")
        new = f"--out {args.out!r} exists, and would be deleted in the end; name another"
        require(not Path(args.out).exists(), new)
    shown = measure
    if args.company:
        shown = company
    try:
        for line in shown(args, Path(args.out)):
            print(line, flush=True)
    finally:
        shutil.rmtree(args.out, ignore_errors=True)


def measure(args: argparse.Namespace, out: Path):
    """A line for what was drawn, and one for each window."""
    started = time.perf_counter()
    steps = drawn(args.prompts, out)
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


def drawn(count: int, out: Path) -> list[list[str]]:
    """The prompts of every step."""
    file = out / "ocr.txt"
    if not file.exists():
        prompts.main(["ocr", "--count", str(count), "--out", str(file)])
    pools = load_tasks({"ocr": str(file)})
    steps = []
    for step in range(count // PER_STEP):
        steps.append([prompt.text for prompt in prompts_of_step(pools, {"ocr": 1}, PER_STEP, 0, step)])
    return steps


def stand_in(size: str) -> SimpleNamespace:
    """What a family has of text encoders."""
    shapes = text_shapes(SIZES[size])

    def encode_prompts(text, texts: list[str], device: torch.device) -> list[Condition]:
        made = []
        for prompt in texts:
            chance = torch.Generator().manual_seed(int(key_of(prompt)[:15], 16))
            condition = {}
            for name, shape in shapes.items():
                condition[name] = torch.randn(shape, generator=chance).bfloat16()
            made.append(condition)
        return made

    return SimpleNamespace(TEXT=(), load_text=lambda *_: None, encode_prompts=encode_prompts)


# ---- a kill, and company -----------------------------------------------------------------------------------


def company(args: argparse.Namespace, out: Path):
    """A line for a run that is killed when half of the prompts are on disk, one for two that go on from there
    at once, and one for reading all prompts in the end."""
    steps = drawn(args.prompts, out)
    everything = {prompt for step in steps for prompt in step}
    first = Alone(args, out)
    while 2 * PER_PACK * len(packs(out)) < len(everything):
        time.sleep(0.05)
        assert first.process.is_alive(), "it ended before it could be killed"
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    kept = len(kept_of(args, out, everything))
    encoded = f"{first.encoded.value} of {len(everything)} prompts were encoded"
    yield f"killed: {encoded}, {kept} are kept, in {len(packs(out))} packs"

    started = time.perf_counter()
    both = [Alone(args, out), Alone(args, out)]
    for run in both:
        run.process.join()
        assert run.process.exitcode == 0, "a run failed"
    seconds = time.perf_counter() - started
    counts = " and ".join(str(run.encoded.value) for run in both)
    lacked = f"{len(everything) - kept} prompts were lacking"
    yield f"two at once: {seconds:.0f} s; {lacked}, of which they encoded {counts}"

    started = time.perf_counter()
    texts, family = conditions_of(args, out), stand_in(args.size)
    texts.cache.refresh()
    for prompt in everything:
        found, (made,) = texts.cache.read(prompt), family.encode_prompts(None, [prompt], CPU)
        assert all(torch.equal(found[name], made[name]) for name in made), f"{prompt!r} is another's"
    disk = sum(pack.stat().st_size for pack in packs(out))
    left = len(list(out.rglob("*.tmp")))
    seconds = time.perf_counter() - started
    found = f"{len(packs(out))} packs, {disk / GB:.3g} GB, {left} half files"
    yield f"all {len(everything)} are right, in {found}; read and made anew in {seconds:.0f} s"


class Alone:
    """A run's encoding, along all of its steps, in a process of its own; `encoded` counts its prompts."""

    def __init__(self, args: argparse.Namespace, out: Path):
        self.encoded = PROCESSES.Value("q", 0, lock=False)
        self.process = PROCESSES.Process(target=encode_along, args=(args, out, self.encoded))
        self.process.start()


PROCESSES = multiprocessing.get_context("forkserver")


def encode_along(args: argparse.Namespace, out: Path, encoded) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the bars of two runs
    texts = conditions_of(args, out)
    encode = texts.family.encode_prompts

    def counted(text, texts: list[str], device: torch.device) -> list[Condition]:
        encoded.value += len(texts)
        return encode(text, texts, device)

    texts.family.encode_prompts = counted
    steps = drawn(args.prompts, out)
    texts.follow(steps)
    for step in range(len(steps)):
        texts.ahead(step)


def conditions_of(args: argparse.Namespace, out: Path) -> Conditioning:
    """With packs of PER_PACK prompts, whatever the size of their conditions."""
    (made,) = stand_in(args.size).encode_prompts(None, [""], CPU)
    conditioning.PACK = min(PACK, PER_PACK * conditioning.size(made))
    return Conditioning(stand_in(args.size), out, str(out), torch.bfloat16, CPU, cache_gb=args.cache_gb)


def kept_of(args: argparse.Namespace, out: Path, prompts: set[str]) -> set[str]:
    texts = conditions_of(args, out)
    texts.cache.refresh()
    return {prompt for prompt in prompts if prompt in texts.cache}


def packs(out: Path) -> list[Path]:
    return list(out.rglob("*.safetensors"))


if __name__ == "__main__":
    main()
