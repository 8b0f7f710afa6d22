"""How `opd.bench` measures a stage: seconds without instruments first, then FLOPs and memory, in updates of
their own, so that no instrument slows what is timed."""

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
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from opd import compiled
from opd.bench.model import Work, make_stage, predicted
from opd.model import Model
from opd.report.memory import LiveTensors
from train import Distillation


def measure(structure: str, work: Work, device: torch.device, updates: int, rate: float) -> dict:
    """One structure, "ours" or "released", from its model to its numbers; {"error": words} where memory runs
    out. `rate`: of a large matrix product, FLOP/s."""
    before = forget_peak(device)
    try:
        stage = make_stage(structure, work, device)
        forget_peak(device)  # making it is not measured
        numbers = measure_stage(stage, updates, rate, before)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).split("\n")[0]}
    numbers["predicted"] = {}
    if structure == "ours":
        numbers["predicted"] = predicted(work, device)
    return numbers


def measure_stage(stage: Distillation, updates: int, rate: float, before: int) -> dict:
    """What `updates` updates cost, the first for warming up, and two more under instruments. `before`: bytes
    in use before the stage was built."""
    graphs, device = compiled.graphs(), stage.model.device
    first, norm = stage.step(0)
    if not math.isfinite(norm):
        raise ValueError(f"the first update's gradient norm is {norm}")
    seconds = [timed_step(stage, step) for step in range(1, updates)]
    usual = statistics.median(seconds)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    graphs = compiled.graphs() - graphs
    flops = flops_of(stage, updates)
    if device.type == "cpu":
        peak = live_peak(stage, updates + 1)
    return {
        "loss": first["loss"],
        "grad_norm": norm,
        "updates": seconds,
        "seconds_per_update": usual,
        "trajectories_per_second": stage.cfg.samples_per_step() / usual,
        "graphs": graphs,
        "flops_per_update": flops,
        "matmul_share": flops / usual / rate,
        "memory": parts(stage, peak),
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
    # The counter sees operators, which a compiled kernel has none of.
    with flop_counter() as flops, torch.compiler.set_stance("force_eager"):
        stage.step(step)
    return flops.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """PyTorch's own, which knows the attention of accelerators alone, with that of CPUs."""
    counter, aten = FlopCounterMode(display=False), torch.ops.aten
    counter.flop_registry |= {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }
    return counter


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


def live_peak(stage: Distillation, step: int) -> int:
    """Peak bytes of live tensors in one update. Not in the one whose FLOPs are counted: PyTorch's counter
    holds on to activations that are recomputed."""
    live = LiveTensors()
    live.add(alive())
    with live, torch.compiler.set_stance("force_eager"):
        stage.step(step)
    return live.peak


def alive() -> list[Tensor]:
    """Every tensor that Python holds and that has storage."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return [tensor for tensor in tensors if tensor.device.type != "meta"]
