"""Time the fused ops on a GPU against the memory's own speed, the eager equations and torch.compile of them.

    python -m opd.bench.kernels [--quick] | tee runs/bench.csv

Per op and size: median time, bytes moved per second, share of the copy bandwidth measured in the same run,
speed relative to eager and to torch.compile, and peak memory beyond the arguments. BENCHMARKS.md says how the
bytes are counted and keeps the numbers. Exits 2 where there is no GPU.
"""

import argparse
import datetime
import itertools
import sys

import torch

from opd import flow, kernels
from opd.kernels.common import backend

OPS = ("sde_step", "log_prob", "velocity_mse", "opd_step")
LATENTS = {512: (16, 64, 64), 1024: (16, 128, 128)}  # an 8x VAE with 16 channels
BATCHES = (8, 32, 128, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size per op")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("opd.bench.kernels needs a GPU and there is none: nothing was measured", file=sys.stderr)
        return 2
    torch.set_default_device("cuda")
    source, target = torch.empty(2, 2**30, dtype=torch.int8)
    copy_ms, _ = time_and_memory("auto", lambda: target.copy_(source))
    copy = 2 * source.numel() / (copy_ms * 1e-3)  # bytes per second, read and written
    where = f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{where}, copy {copy * 1e-9:.0f} GB/s", file=sys.stderr)
    print("op,pixels,batch,K,ms,GB/s,share of copy,x eager,x compile,peak MiB")
    for op, pixels, batch, teachers in itertools.product(OPS, LATENTS, BATCHES, (1, 2, 3, 4)):
        if op in ("sde_step", "log_prob") and teachers > 1:
            continue
        if quick and (pixels, batch, teachers) != (1024, 256, 1):
            continue
        numbers = measure(op, (batch, *LATENTS[pixels]), teachers, copy)
        print(op, pixels, batch, teachers, *(f"{number:.3g}" for number in numbers), sep=",", flush=True)
    return 0


def measure(op: str, shape: tuple, teachers: int, copy: float) -> tuple[float, ...]:
    forward, v = workload(op, shape, teachers)
    ms, peak = time_and_memory("triton", forward, v)
    eager_ms, _ = time_and_memory("eager", forward, v)
    compiled_ms, _ = time_and_memory("eager", torch.compile(forward, dynamic=False), v)
    torch.compiler.reset()
    speed = v.numel() * bytes_per_element(op, teachers) / (ms * 1e-3)
    return ms, speed * 1e-9, speed / copy, eager_ms / ms, compiled_ms / ms, peak / 2**20


def workload(op: str, shape: tuple, teachers: int):
    """A function without arguments that runs the op once, and the velocity to differentiate it by."""
    x, x_next = torch.randn(2, *shape)
    v = torch.randn(shape, requires_grad=op != "sde_step")
    loss_inputs = (torch.randn(teachers, *shape), torch.ones(shape[0], teachers), torch.ones(shape[0]))
    transition = flow.sde_transition(*torch.tensor([0.8, 0.7], device="cpu"), 0.7)
    calls = {
        "sde_step": lambda: kernels.sde_step(x, v, transition, seed=1)[0],
        "log_prob": lambda: kernels.log_prob(x_next, x, v, transition),
        "velocity_mse": lambda: kernels.velocity_mse(v, *loss_inputs)[0],
        "opd_step": lambda: kernels.opd_step(x, v, *loss_inputs, transition, seed=1)[0],
    }
    return calls[op], v


def bytes_per_element(op: str, teachers: int) -> int:
    """Forward and backward, all float32, each input read once and each output written once."""
    loss = 4 + 4 * teachers + 12  # v, targets; the direction written and read, the gradient written
    step = 4 + 4  # x, x_next
    taken = 28  # x keep, - x_next, / move: three eager ops
    return {"sde_step": step + 4, "log_prob": taken + loss, "velocity_mse": loss, "opd_step": step + loss}[op]


def time_and_memory(mode: str, forward, v=None, repeats: int = 30) -> tuple[float, int]:
    """Median milliseconds on the device of single runs with their backward pass, and the peak of extra bytes.
    A run follows a write of 1 GiB, which empties the caches and lasts long enough for the host to queue the
    whole run: launch overhead on the host is not counted."""
    flush = torch.empty(2**30, dtype=torch.int8)
    times = []
    with backend(mode):
        for i in range(repeats + 3):
            if i == 3:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            output = forward()
            if v is not None and v.requires_grad:
                torch.autograd.grad(output.sum(), v)
            end.record()
            del output
            times.append((start, end))
    torch.cuda.synchronize()
    milliseconds = sorted(start.elapsed_time(end) for start, end in times[3:])
    return milliseconds[repeats // 2], torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    sys.exit(main())
