"""Measure the training loop on a model with random weights: no file is read, nothing is downloaded.

    python -m opd.bench                                          # the size "tiny": seconds on a CPU
    python -m opd.bench sd35-medium --structure both             # and our emulation of the released loop
    python -m opd.bench mini --queries 2 --query-range 0 4 --json runs/bench.json
    python -m opd.bench gpu                                      # every figure of a GPU (gpu.py)

Per structure: seconds per update and trajectories per second (median, without instruments), where the time
goes, forward and backward passes counted by adapter, FLOPs as a share of a large matrix product's rate in the
same run, peak memory and what holds it. BENCHMARKS.md says how each is measured and keeps the numbers.
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

EMULATED = "released: OUR EMULATION of the released loop's structure from our modules, not the released code"
GIB, MIB = 2**30, 2**20


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
        print(table(result))
        if args.json:
            write_json(Path(args.json), result)
    return 0


def run(args: Arguments) -> dict:
    """Everything that is printed and written."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = compute_dtype(args.work.dtype, device)
    rate = matmul_rate(dtype, device)
    result = {"about": about(device, dtype), "work": vars(args.work), "matmul_flops_per_second": rate}
    names = [args.structure]
    if args.structure == "both":
        names = ["ours", "released"]
    result["structures"] = {}
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        result["structures"][name] = measure(name, args.work, device, args.updates, rate)
    return result | {"ratio": ratio(result["structures"])}


def ratio(structures: dict) -> dict:
    """Ours over released, where both were measured."""
    if len(structures) < 2 or any("error" in numbers for numbers in structures.values()):
        return {}
    ours, released = structures["ours"], structures["released"]
    speeds = ours["trajectories_per_second"] / released["trajectories_per_second"]
    peaks = ours["memory"]["peak"] / released["memory"]["peak"]
    difference = abs(ours["loss"] - released["loss"]) / abs(ours["loss"])
    return {"trajectories_per_second": speeds, "peak_memory": peaks, "loss_difference": difference}


# ---- showing -----------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    place, structures = result["about"], result["structures"]
    rate = result["matmul_flops_per_second"] * 1e-9
    lines = [
        ", ".join(f"{name} {value}" for name, value in place.items()),
        ", ".join(f"{name} {value}" for name, value in result["work"].items()),
        f"matrix product in {place['dtype']}: {rate:.4g} GFLOP/s",
    ]
    if "released" in structures:
        lines.append(EMULATED)
    for name, numbers in structures.items():
        lines += ["", f"== {name}"]
        if "error" in numbers:
            lines.append(f"not measured: {numbers['error']}")
        else:
            lines += rows(numbers)
    found = result["ratio"]
    if found:
        lines += ["", f"ours / released: {found['trajectories_per_second']:.3f} x trajectories/s"]
        lines.append(f"ours / released: {found['peak_memory']:.3f} x peak memory")
        lines.append(f"loss of the first update differs by {found['loss_difference']:.1e} of itself")
    return "\n".join(lines)


def rows(numbers: dict) -> list[str]:
    """The lines of one structure."""
    updates = numbers["updates"]
    spread = f"{min(updates):.4g} to {max(updates):.4g}, {len(updates)} updates"
    lines = [
        f"{'seconds per update':26}{numbers['seconds_per_update']:10.4g}   ({spread})",
        f"{'trajectories/s':26}{numbers['trajectories_per_second']:10.4g}",
        f"{'GFLOP per update':26}{numbers['flops_per_update'] * 1e-9:10.4g}",
        f"{'share of matrix product':26}{numbers['matmul_share']:10.3f}",
        f"{'first update: loss':26}{numbers['loss']:10.4g}   gradient norm {numbers['grad_norm']:.4g}",
        f"{'compiled graphs':26}{numbers['graphs']:10}",
    ]
    total = sum(numbers["phases"].values())
    for name, seconds in numbers["phases"].items():
        lines.append(f"  {name:24}{seconds / total:10.1%}")
    for name, passes in numbers["passes"].items():
        lines.append(f"  {name:24}{passes['calls']:10} passes{passes['rows']:8} rows")
    scale, unit = MIB, "MiB"
    if numbers["memory"]["peak"] >= GIB:
        scale, unit = GIB, "GiB"
    for name, size in numbers["memory"].items():
        line = f"  {name:24}{size / scale:11.3f} {unit}"
        if name in numbers["predicted"]:
            line += f"   predicted {numbers['predicted'][name] / scale:.3f}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
