"""One visit to a machine with a GPU: all that opd/bench/BENCHMARKS.md wants measured there, by one command.

    python -m opd.bench.visit                # at most 25 minutes; the same command again does what is left
    python -m opd.bench.visit --rehearse     # the whole path on a CPU, at sizes that say nothing
    python -m opd.bench.visit --parts loop-512-4 distil

Each part is a command of its own with a limit below 10 minutes. A part that succeeded is not run again; one
that failed or ran out of time is named, its output kept, and the visit goes on. What was measured is written
to OUT/tables.md as rows of BENCHMARKS.md after every part. Exits 2 without a GPU, 1 where a part failed.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from opd.bench import loop as bench
from opd.errors import require
from opd.files import read_json, replace, write_json

ROOT = Path(__file__).parents[2]
VISIT = 25 * 60
"""Seconds after which no further part is begun."""
HEADING = (
    "| size | px | teachers | structure | s per update | trajectories/s | share of matrix product "
    "| peak | where |"
)


@dataclass(frozen=True)
class Part:
    """One command of the visit."""

    name: str
    arguments: list[str]
    """What follows `python`."""
    limit: int
    """Seconds."""
    environment: dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opd.bench.visit", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/visit", help="folder of everything that is written")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at tiny sizes")
    parser.add_argument("--parts", nargs="+", default=[], help="these alone")
    args = parser.parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print("error: no GPU: nothing was measured; --rehearse tries the path on a CPU", file=sys.stderr)
        return 2
    out = Path(args.out).resolve()  # parts run in the repository's root
    try:
        parts = chosen(visit(out, args.rehearse), args.parts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return make(parts, out, VISIT)


def chosen(parts: list[Part], names: list[str]) -> list[Part]:
    known = [part.name for part in parts]
    for name in names:
        require(name in known, f"--parts {name!r} is unknown; choose from {', '.join(known)}")
    return [part for part in parts if not names or part.name in names]


# ---- the parts ---------------------------------------------------------------------------------------------


def visit(out: Path, rehearse: bool) -> list[Part]:
    """In the order of what is missed most."""
    if rehearse:
        size, pixels, extra = "tiny", (64, 128), ["--device", "cpu", "--updates", "2", "--states", "2"]
    else:
        size, pixels, extra = "sd35-medium", (512, 1024), ["--device", "cuda", "--prompts-per-step", "4"]
    parts = [kernel_tests(rehearse)]
    loops = []
    for side, px in zip((512, 1024), pixels, strict=True):
        for teachers in (1, 4):
            flags = ["--size", size, "--pixels", str(px), "--teachers", str(teachers), *extra]
            loops.append(loop(out, f"loop-{side}-{teachers}", [*flags, "--structure", "both"]))
            loops.append(loop(out, f"compiled-{side}-{teachers}", [*flags, "--compile"]))
    guided = ["--size", size, "--pixels", str(pixels[0]), "--guidance", "4.5", "--compile", *extra]
    parts += [*loops[:4], loop(out, "guided-512-3", guided), distil(out, rehearse), *loops[4:]]
    if not rehearse:  # opd.bench.kernels measures nothing on a CPU
        parts.append(Part("kernels", ["-m", "opd.bench.kernels", "--quick"], 300, {}))
    return parts


def kernel_tests(rehearse: bool) -> Part:
    test = ["-m", "pytest", "-q", "tests/test_kernels_fused.py"]
    if rehearse:
        return Part("kernel-tests", [*test, "-k", "philox"], 300, {"TRITON_INTERPRET": "1"})
    return Part("kernel-tests", test, 480, {})


def loop(out: Path, name: str, flags: list[str]) -> Part:
    files = ["--json", str(out / f"{name}.measured.json"), "--picture", str(out / f"{name}.png")]
    return Part(name, ["-m", "opd.bench", *flags, *files], 300, {})


def distil(out: Path, rehearse: bool) -> Part:
    """The miniature, as the README's first command makes it."""
    flags = ["--out", str(out / "mini")]
    if rehearse:
        flags += ["--iterations", "2", "--prompts-per-step", "3", "--no-evaluate", "--sample-every", "0"]
    return Part("distil", ["train.py", "mini", *flags], 480, {})


# ---- the visit ---------------------------------------------------------------------------------------------


def make(parts: list[Part], out: Path, seconds: float) -> int:
    """Run what has not succeeded yet; exit status."""
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    missing = []
    for part in parts:
        if succeeded(part, out):
            print(f"{part.name}: done before", flush=True)
            continue
        if time.monotonic() - begun + part.limit > seconds:
            print(f"{part.name}: left for another visit", flush=True)
            missing.append(part.name)
            continue
        status = run(part, out)
        print(f"{part.name}: {status}", flush=True)
        if status != "done":
            missing.append(part.name)
        replace(out / "tables.md", lambda file: file.write_text(tables(parts, out)))
    print(f"{out / 'tables.md'} has what was measured", flush=True)
    if missing:
        print(f"not measured: {', '.join(missing)}; the same command tries them again", file=sys.stderr)
        return 1
    return 0


def succeeded(part: Part, out: Path) -> bool:
    """Whether this very command has succeeded in this folder."""
    file = out / f"{part.name}.json"
    if not file.is_file():
        return False
    past = read_json(file)
    return past["status"] == "done" and past["arguments"] == part.arguments


def run(part: Part, out: Path) -> str:
    """How the part ended, in words. Its output goes to OUT/NAME.txt."""
    started = time.monotonic()
    with open(out / f"{part.name}.txt", "w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *part.arguments],
                cwd=ROOT,
                env=os.environ | part.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=part.limit,
            )
            status = "done"
            if done.returncode != 0:
                status = f"failed with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {part.limit} s"
    seconds = time.monotonic() - started
    write_json(out / f"{part.name}.json", {"status": status, "arguments": part.arguments, "seconds": seconds})
    return status


# ---- what was measured -------------------------------------------------------------------------------------


def tables(parts: list[Part], out: Path) -> str:
    """Rows of BENCHMARKS.md and, below them, what each part printed last."""
    loops, others = [], []
    for part in parts:
        if not succeeded(part, out):
            continue
        measured = out / f"{part.name}.measured.json"
        if measured.is_file():
            loops += loop_rows(read_json(measured))
        else:
            printed = (out / f"{part.name}.txt").read_text().strip().split("\n")
            others += [
                "",
                f"{part.name}: `python {' '.join(part.arguments)}`",
                "",
                "```",
                *printed[-12:],
                "```",
            ]
    if loops:
        loops = [HEADING, "|---" * 9 + "|", *loops]
    return "\n".join([*loops, *others]) + "\n"


def loop_rows(result: dict) -> list[str]:
    """A line per structure of one run of opd.bench, and where it was measured."""
    work, place = result["work"], result["about"]
    lines = []
    for name, numbers in result["structures"].items():
        label = name + ", compiled" * work["compile"] + f", guidance {work['guidance']:g}"
        cells = [work["size"], str(work["pixels"]), str(work["teachers"]), label]
        if "error" in numbers:
            cells += [f"not measured: {numbers['error']}", "", "", ""]
        else:
            scale, unit = bench.scale_of(numbers["memory"]["peak"])
            cells += [f"{numbers['seconds_per_update']:.4g}", f"{numbers['trajectories_per_second']:.4g}"]
            cells += [f"{numbers['matmul_share']:.3f}", f"{numbers['memory']['peak'] / scale:.4g} {unit}"]
        cells.append(f"{place['date']}, {place['device']}, torch {place['torch']}, {place['dtype']}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
