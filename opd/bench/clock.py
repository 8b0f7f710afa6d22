"""How `opd.bench` measures a stage: seconds and memory, then FLOPs in an update of its own, so that counting
slows nothing that is timed."""

import datetime
import gc
import math
import os
import platform
import statistics
import time

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from opd import compiled
from opd.bench.model import make_stage, predicted
from opd.config import DistillationConfig
from opd.model import Model
from train import Distillation


def measure(structure: str, cfg: DistillationConfig, device: torch.device, updates: int, rate: float) -> dict:
    """What `updates` updates of a structure, "ours" or "released", cost, the first for warming up, and one
    more whose FLOPs are counted. `rate`: of a large matrix product, FLOP/s. On a CPU nobody measures the peak
    of memory."""
    before, graphs, peak = forget_peak(device), compiled.graphs(), 0
    stage = make_stage(structure, cfg, device)
    forget_peak(device)  # making it is not measured
    first, norm = stage.step(0)
    if not math.isfinite(norm):
        raise ValueError(f"the first update's gradient norm is {norm}")
    seconds = [timed_step(stage, step) for step in range(1, updates)]
    usual = statistics.median(seconds)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    graphs = compiled.graphs() - graphs
    flops = flops_of(stage, updates)
    return {
        "loss": first["loss"],
        "grad_norm": norm,
        "updates": seconds,
        "seconds_per_update": usual,
        "trajectories_per_second": cfg.samples_per_step() / usual,
        "graphs": graphs,
        "flops_per_update": flops,
        "matmul_share": flops / usual / rate,
        "memory": parts(stage, peak) if peak > 0 else {},
        "predicted": predicted(cfg, device) if structure == "ours" else {},
    }


def timed_step(stage: Distillation, step: int) -> float:
    wait(stage.model.device)
    started = time.perf_counter()
    stage.step(step)
    wait(stage.model.device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what the host asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The FLOP/s of a large product in `dtype`, the best of several."""
    side = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(timer.blocked_autorange(min_run_time=0.2).times)


def about(device: torch.device, dtype: torch.dtype) -> dict:
    """Where and with what it is measured."""
    name = platform.processor() or platform.machine()
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


def flops_of(stage: Distillation, step: int) -> int:
    """Of matrix products and attention in one update."""
    # The counter sees operators, which a compiled kernel has none of; it knows no attention of CPUs.
    with FlopCounterMode(display=False) as flops, torch.compiler.set_stance("force_eager"):
        stage.step(step)
    return flops.get_total_flops()


# ---- memory ------------------------------------------------------------------------------------------------


def parts(stage: Distillation, peak: int) -> dict[str, int]:
    """Bytes by what they hold; activations are what remains of the peak."""
    sizes = {"base": 0, "copies": 0, "adapters": 0}
    for name, tensor in stored(stage.model):
        sizes["adapters" if ".lora_" in name else "base"] += tensor.nbytes
    for teacher in stage.model.teachers.values():
        sizes["copies"] += sum(tensor.nbytes for _, tensor in stored(teacher))
    states = stage.trained.optimizer.state.values()
    sizes["optimizer"] = sum(value.nbytes for state in states for value in state.values())
    sizes["gradients"] = sum(parameter.nbytes for parameter in stage.trained.parameters.values())
    sizes["activations"] = peak - sum(sizes.values())
    return {"peak": peak} | sizes


def stored(model: Model) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of its transformer by name."""
    return [*model.transformer.named_parameters(), *model.transformer.named_buffers()]


def forget_peak(device: torch.device) -> int:
    """Give back what is free, start CUDA's peak anew, and return the bytes in use; 0 on a CPU."""
    gc.collect()
    if device.type == "cpu":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
