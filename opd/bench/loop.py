"""Measure the training loop on a model with random weights: no file is read, nothing is downloaded.

    python -m opd.bench --size tiny                              # seconds on a CPU
    python -m opd.bench --size sd35-medium --structure both      # and our emulation of the released loop
    python -m opd.bench --size mini --json runs/bench.json --picture runs/bench.png
    python -m opd.bench --size mini --queries 2 --query-range 0 4                # fewer states trained on

Per structure: seconds per update and trajectories per second (median, without instruments), where the time
goes, forward and backward passes counted by adapter, FLOPs as a share of a large matrix product's rate in the
same run, peak memory and what holds it. BENCHMARKS.md says how each is measured and keeps the numbers.
Exits 1 on bad input, 2 where --device cuda finds none. Run it in the repository's root, where train.py is.
"""

import argparse
import datetime
import gc
import os
import platform
import sys
from dataclasses import fields
from pathlib import Path

import torch

from opd import compiled
from opd.bench.clock import PHASES, forget_peak, matmul_rate, measure
from opd.bench.model import SIZES, Work, make_world, our_stage, predicted
from opd.bench.released import Released
from opd.errors import require
from opd.files import write_json
from opd.grpo import GRPO
from opd.model import compute_dtype
from train import Distillation

STRUCTURES = ("ours", "released", "both")
EMULATED = "released: OUR EMULATION of the released loop's structure from our modules, not the released code"
STAND_IN = "stage grpo: decoding is a stand-in without a VAE, the reward a random number"
LABELS = {
    "peak": "peak memory",
    "base": "  base",
    "copies": "  copies of teachers",
    "adapters": "  adapters",
    "optimizer": "  optimizer",
    "gradients": "  gradients",
    "activations": "  activations, the rest",
    "resident": "growth of the process",
}
GIB, MIB = 2**30, 2**20


def main(arguments: list[str] | None = None) -> int:
    """Exit status; `arguments` are the command line's unless given."""
    args = parser().parse_args(arguments)
    try:
        work = work_of(args)
        check(args, work)
        if args.device == "cuda" and not torch.cuda.is_available():
            print("error: --device cuda, but there is none: nothing was measured", file=sys.stderr)
            return 2
        result = run(args, work)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if args.json:
        write_json(Path(args.json), result)
    if args.picture:
        draw(result, Path(args.picture))
    return 0


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m opd.bench", description=__doc__.split("\n")[0])
    about.add_argument("--size", default="tiny", help=", ".join(SIZES))
    about.add_argument("--structure", default="ours", help="ours, released (our emulation of it), both")
    about.add_argument("--stage", default="opd", help="opd, grpo")
    about.add_argument("--teachers", type=int, default=3, help="tasks, each with a teacher")
    about.add_argument("--anchor", default="further", help="further (one more adapter), teacher, base, none")
    about.add_argument("--rank", type=int, help="of every LoRA")
    about.add_argument("--pixels", type=int, help="per side of the image")
    about.add_argument("--guidance", type=float, default=1.0, help="of the student; 1 is one forward row")
    about.add_argument("--prompts-per-step", type=int)
    about.add_argument("--group", type=int, help="trajectories per prompt")
    about.add_argument("--micro-batch", type=int, help="samples per forward pass")
    about.add_argument("--states", "--steps", type=int, help="of a trajectory")
    about.add_argument("--queries", type=int, default=0, help="states that are trained on; 0 = all")
    about.add_argument("--query-range", type=int, nargs=2, default=(0, 0), help="the states to draw from")
    about.add_argument("--dtype", default="auto", help="auto, bfloat16, float32")
    about.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    about.add_argument("--compile", action="store_true", help="our structure, compiled")
    about.add_argument("--device", default="auto", help="auto, cpu, cuda")
    about.add_argument("--updates", type=int, default=3, help="the first one warms up")
    about.add_argument("--json", help="write everything that was measured to this file")
    about.add_argument("--picture", help="draw the phases into this PNG (needs matplotlib)")
    return about


def work_of(args: argparse.Namespace) -> Work:
    """The flags that say what an update does; those that are not given are the size's."""
    require(args.size in SIZES, f"--size {args.size!r} is unknown; choose from {', '.join(SIZES)}")
    values = {}
    for setting in fields(Work):
        value = getattr(args, setting.name)
        if value is None:
            value = SIZES[args.size].work[setting.name]
        values[setting.name] = value
    values["query_range"] = tuple(values["query_range"])
    return Work(**values)


def check(args: argparse.Namespace, work: Work) -> None:
    """ValueError in words for whatever does not suit."""
    known = ", ".join(STRUCTURES)
    require(args.structure in STRUCTURES, f"--structure {args.structure!r} is unknown; choose from {known}")
    devices = ("auto", "cpu", "cuda")
    require(args.device in devices, f"--device {args.device!r} is unknown; choose from {', '.join(devices)}")
    work.check()
    if work.compile:
        compiled.check_compiler()
    ours_only = work.stage == "opd" or args.structure == "ours"
    require(ours_only, f"--structure {args.structure} emulates distillation; use --structure ours with grpo")
    enough = "the first warms up, so at least 2 are needed"
    require(args.updates >= 2, f"--updates is {args.updates}; {enough}")


# ---- measuring ---------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, work: Work) -> dict:
    """Everything that is printed, written and drawn."""
    device = device_of(args.device)
    dtype = compute_dtype(work.dtype, device)
    rate = matmul_rate(dtype, device)
    result = {"about": about(device, dtype), "work": vars(work), "matmul_flops_per_second": rate}
    result["structures"] = {}
    names = [args.structure]
    if args.structure == "both":
        names = ["ours", "released"]
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        result["structures"][name] = measure_structure(name, work, device, args.updates, rate)
        gc.collect()
    result["ratio"] = ratio(result["structures"])
    return result


def measure_structure(name: str, work: Work, device: torch.device, updates: int, rate: float) -> dict:
    """One structure from its model to its numbers; {"error": words} where memory ran out."""
    before = forget_peak(device)
    try:
        stage = build(name, work, device)
        forget_peak(device)  # building is not measured
        numbers = measure(stage, updates, rate, before)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).split("\n")[0]}
    numbers["predicted"] = {}
    if name == "ours":
        numbers["predicted"] = predicted(work, device)
    return numbers


def build(name: str, work: Work, device: torch.device) -> Distillation | GRPO | Released:
    """The stage; the adapters that it was made from are freed on return, as train.py frees them."""
    world = make_world(work, device)
    if name == "ours":
        return our_stage(world)
    return Released(world)


def device_of(name: str) -> torch.device:
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def about(device: torch.device, dtype: torch.dtype) -> dict:
    """Where and with what it was measured."""
    name = processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "date": str(datetime.date.today()),
        "device": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The CPU's name as Linux gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


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
    place, work, structures = result["about"], result["work"], result["structures"]
    settings = ", ".join(f"{name} {value}" for name, value in work.items())
    lines = [", ".join(f"{name} {value}" for name, value in place.items()), settings]
    rate = result["matmul_flops_per_second"] * 1e-9
    lines.append(f"matrix product in {place['dtype']}: {rate:.4g} GFLOP/s")
    if work["stage"] == "grpo":
        lines.append(STAND_IN)
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
    updates, memory = numbers["updates"], numbers["memory"]
    spread = f"{min(updates):.4g} to {max(updates):.4g}, {len(updates)} updates"
    lines = [
        f"{'seconds per update':26}{numbers['seconds_per_update']:10.4g}   ({spread})",
        f"{'trajectories/s':26}{numbers['trajectories_per_second']:10.4g}",
        f"{'GFLOP per update':26}{numbers['flops_per_update'] * 1e-9:10.4g}",
        f"{'share of matrix product':26}{numbers['matmul_share']:10.3f}",
        f"{'first update: loss':26}{numbers['loss']:10.4g}   gradient norm {numbers['grad_norm']:.4g}",
    ]
    if numbers["graphs"] > 0:
        later = numbers["graphs_later"]
        lines.append(f"{'compiled graphs':26}{numbers['graphs']:10}   after the second update {later}")
    total = sum(numbers["phases"].values())
    for name, seconds in numbers["phases"].items():
        lines.append(f"  {name:24}{seconds / total:10.1%}")
    for name, passes in numbers["passes"].items():
        lines.append(f"  {name:24}{passes['calls']:10} passes{passes['rows']:8} rows")
    scale, unit = scale_of(memory["peak"])
    for name, size in memory.items():
        line = f"  {LABELS[name]:24}{size / scale:11.3f} {unit}"
        if name in numbers["predicted"]:
            line += f"   predicted {numbers['predicted'][name] / scale:.3f}"
        if size != 0:
            lines.append(line)
    return lines


def scale_of(size: int) -> tuple[int, str]:
    if size >= GIB:
        return GIB, "GiB"
    return MIB, "MiB"


def draw(result: dict, path: Path) -> None:
    """A bar per structure, seconds of one update by phase."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install -e '.[plot]')", file=sys.stderr)
        return
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    measured = {name: n for name, n in result["structures"].items() if "error" not in n}
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.6 * len(measured)), layout="constrained")
    left = [0.0] * len(measured)
    for phase in PHASES:
        widths = [numbers["phases"][phase] for numbers in measured.values()]
        axes.barh(list(measured), widths, left=left, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds of one update, {result['work']['size']}, {result['about']['device']}")
    figure.legend(fontsize="small", ncols=3, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
