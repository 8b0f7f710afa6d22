"""Measure the training loop on a model with random weights: no file is read, nothing is downloaded.

    python -m opd.bench                                          # the size "tiny": seconds on a CPU
    python -m opd.bench sd35-medium --structure both             # and our emulation of the released loop
    python -m opd.bench mini --queries 2 --query-range 0 4 --json runs/bench.json
    python -m opd.bench gpu                                      # every figure of a GPU (gpu.py)

Per structure: seconds per update and trajectories per second (median, without instruments), where the time
goes, forward and backward passes counted by adapter, FLOPs as a share of a large matrix product's rate in the
same run, peak memory and what holds it; sizes in bytes, times in seconds. BENCHMARKS.md says how each is
measured and keeps the numbers. "released" is our emulation of the released loop's structure.
It takes the GPU if there is one. Run it in the repository's root, where train.py is.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from opd import errors
from opd.bench import gpu
from opd.bench.clock import about, matmul_rate, measure
from opd.bench.model import WORKS, Work
from opd.cli import Range, check_bounds
from opd.files import write_json
from opd.model import compute_dtype


@dataclass(frozen=True)
class Arguments:
    work: tyro.conf.OmitArgPrefixes[Work] = field(default_factory=lambda: WORKS["tiny"])
    structure: Literal["ours", "released", "both"] = "ours"
    updates: Annotated[int, Range(2, 10**6)] = 3
    """The first one warms up."""
    json: str = ""
    """Write everything that was measured to this file."""

    def check(self) -> None:
        """ValueError in words for whatever does not suit."""
        check_bounds(self)
        self.work.check()


def main(arguments: list[str]) -> int:
    """Exit status."""
    if arguments[:1] == ["gpu"]:
        return gpu.main(arguments[1:])
    size, flags = "tiny", arguments
    if arguments and not arguments[0].startswith("-"):
        size, *flags = arguments
    with errors.in_one_line(ValueError, OSError):
        if size not in WORKS:
            raise ValueError(f"size {size!r} is unknown; choose from {', '.join(WORKS)}, or gpu")
        start, prog = Arguments(WORKS[size]), f"python -m opd.bench {size}"
        args = tyro.cli(Arguments, args=flags, default=start, prog=prog, description=__doc__)
        args.check()
        result = run(args)
        print("\n".join(lines_of(result)))
        if args.json:
            write_json(Path(args.json), result)
    return 0


def run(args: Arguments) -> dict:
    """Everything that is printed and written; sizes in bytes."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = compute_dtype(args.work.dtype, device)
    rate = matmul_rate(dtype, device)
    result = {"about": about(device, dtype), "work": vars(args.work), "matmul_flops_per_second": rate}
    names = ["ours", "released"] if args.structure == "both" else [args.structure]
    result["structures"] = {}
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        result["structures"][name] = measure(name, args.work, device, args.updates, rate)
    return result


def lines_of(numbers: dict, indent: str = "") -> list[str]:
    """A line for each number or list, those of a group below its name."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *lines_of(value, indent + "  ")]
        else:
            values = value if isinstance(value, list | tuple) else [value]
            lines.append(f"{indent}{name:24}{', '.join(map(in_words, values))}")
    return lines


def in_words(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if type(value) is int:
        return f"{value:,}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
