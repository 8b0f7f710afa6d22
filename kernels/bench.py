"""Time the fused ops on a GPU against the memory's own speed, the eager references and torch.compile of them.

    python -m kernels.bench [--csv runs/bench.csv] [--quick]

Per op and size: median time, bytes moved per second (every input read once, every output written once), share of the copy
bandwidth measured in the same run, speed relative to eager and to torch.compile, and peak memory beyond the arguments.
`kernels/BENCHMARKS.md` says how the bytes are counted and keeps the numbers. Exits 2 where there is no GPU.
"""

import argparse
import csv
import datetime
import platform
import sys
from pathlib import Path

import torch

import kernels
from kernels.common import backend
from opd import flow

DEVICE = "cuda"
LATENTS = {512: (16, 64, 64), 1024: (16, 128, 128)}  # an 8x VAE with 16 channels
BATCHES = (8, 32, 128, 256)
FLOAT, HALF = 4, 2  # bytes of a float32 state and of a bf16 velocity


def bytes_per_element(op: str, teachers: int) -> int:
    """Forward and backward, bf16 velocities, no guidance, noise drawn in the kernel. Per-sample numbers and partial sums
    are below 1 %. The direction that the loss keeps for its gradient is written in forward and read in backward."""
    backward = HALF + HALF + HALF  # write the direction, read it, write the gradient
    return {"sde_step": FLOAT + HALF + FLOAT,
            "sde_log_prob": (FLOAT + FLOAT + HALF) * 2 + HALF,
            "velocity_mse": HALF + HALF * teachers + backward,
            "opd_step": FLOAT + HALF + HALF * teachers + FLOAT + backward}[op]


def workload(op: str, shape: tuple, teachers: int):
    """A function without arguments that runs the op once, with its backward pass if it has one, and drops the gradient."""
    x, x_next = torch.randn(2, *shape, device=DEVICE).unbind(0)
    v = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_(op != "sde_step")
    targets = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(teachers)]
    batch = shape[0]
    sigma, sigma_next = torch.full((batch,), 0.8, device=DEVICE), torch.full((batch,), 0.7, device=DEVICE)
    s = flow.diffusion_coefficient(sigma, 0.9, 0.7)
    alpha, w = torch.ones(batch, teachers, device=DEVICE), flow.kl_weight(sigma, sigma_next, s)

    def once():
        if op == "sde_step":
            return kernels.sde_step(x, v, sigma, sigma_next, s, seed=1)
        if op == "sde_log_prob":
            return kernels.sde_log_prob(x_next, x, v, sigma, sigma_next, s).sum()
        if op == "velocity_mse":
            return kernels.velocity_mse(v, targets, alpha, w)[0]
        return kernels.opd_step(x, v, targets, alpha, w, sigma, sigma_next, s, seed=1)[0]

    return once, (lambda out: None) if op == "sde_step" else lambda out: torch.autograd.grad(out, v)


def milliseconds(function, repeats: int = 30) -> float:
    """Median device time over single runs, each behind a write of 1 GiB: it empties the caches, and it lasts long enough
    for the host to queue the whole run, so that launch overhead on the host is not counted."""
    flush = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in times)[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a 1 GiB device copy: the speed that the ops are held against."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def measure(op: str, pixels: int, batch: int, teachers: int, copy: float) -> dict:
    shape = (batch, *LATENTS[pixels])
    once, backward = workload(op, shape, teachers)
    elements = torch.Size(shape).numel()
    compiled = torch.compile(once, dynamic=False)
    row = {"op": op, "pixels": pixels, "batch": batch, "K": teachers, "elements": elements}
    for name, mode, forward in (("ms", "triton", once), ("eager_ms", "eager", once), ("compile_ms", "eager", compiled)):
        with backend(mode):
            if name == "ms":
                forward()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                backward(forward())
                row["peak_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            row[name] = milliseconds(lambda: backward(forward()))
    torch.compiler.reset()
    row["GB/s"] = elements * bytes_per_element(op, teachers) / row["ms"] * 1e-6
    row["of_copy"] = row["GB/s"] * 1e9 / copy
    row["vs_eager"], row["vs_compile"] = row["eager_ms"] / row["ms"], row["compile_ms"] / row["ms"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, default=Path("runs/bench.csv"), help="where the table goes")
    parser.add_argument("--quick", action="store_true", help="one size per op")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels.bench measures a GPU and none is available here; nothing was measured.", file=sys.stderr)
        return 2
    import triton
    copy = copy_bandwidth()
    print(f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"Python {platform.python_version()}; copy {copy * 1e-9:.0f} GB/s")
    columns = ("op", "pixels", "batch", "K", "elements", "ms", "GB/s", "of_copy", "vs_eager", "vs_compile", "peak_MiB")
    print("".join(f"{c:>13}" for c in columns))
    rows = []
    for op in ("sde_step", "sde_log_prob", "velocity_mse", "opd_step"):
        for pixels in LATENTS:
            for batch in BATCHES:
                for teachers in (1, 2, 3, 4) if op in ("velocity_mse", "opd_step") else (1,):
                    if arguments.quick and (pixels, batch) != (1024, 256):
                        continue
                    rows.append(measure(op, pixels, batch, teachers, copy))
                    cells = [rows[-1][column] for column in columns]
                    print("".join(f"{c:>13.3g}" if isinstance(c, float) else f"{c:>13}" for c in cells), flush=True)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {arguments.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
