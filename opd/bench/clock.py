"""How `opd.bench` measures a stage: seconds without instruments first, then phases, then counts, each in an
update of its own, so that no instrument slows what another one reads."""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from opd import adapters, compiled, kernels
from opd.errors import require
from opd.memory import LiveTensors
from opd.model import Model

PHASES = ("student forward", "student backward", "teachers", "kernels", "optimizer", "rest")
RESTART = Path("/proc/self/clear_refs")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def measure(stage, updates: int, matmul_rate: float, before: int) -> dict:
    """What `updates` updates cost, the first for warming up, and two more under instruments.

    `stage` is any stage of train.py, or the emulation; `matmul_rate` in FLOP/s; `before`: bytes in use before
    the stage was built (CUDA: allocated by tensors; CPU: resident).
    """
    model = stage.model
    samples = stage.cfg.samples_per_step()
    graphs = compiled.graphs()
    first, norm = stage.step(0)
    finite = norm == norm and abs(norm) < float("inf")
    require(finite, f"the first update's gradient norm is {norm}: try --dtype float32")
    seconds = [timed_step(stage, 1)]
    settled = compiled.graphs()
    for step in range(2, updates):
        seconds.append(timed_step(stage, step))
    usual = statistics.median(seconds)
    peak, resident = peak_bytes(model.device, before)
    phases = measure_phases(stage, updates)
    later = compiled.graphs() - settled
    passes, flops = count(stage, updates + 1)
    if model.device.type == "cpu":
        peak = live_peak(stage, updates + 2)
    return {
        "loss": first["loss"],
        "grad_norm": norm,
        "updates": seconds,
        "seconds_per_update": usual,
        "trajectories_per_second": samples / usual,
        "graphs": settled - graphs,
        "graphs_later": later,
        "phases": phases,
        "passes": passes,
        "flops_per_update": flops,
        "matmul_share": flops / usual / matmul_rate,
        "memory": parts(stage, peak) | {"resident": resident},
    }


def timed_step(stage, step: int) -> float:
    wait(stage.model.device)
    started = time.perf_counter()
    stage.step(step)
    wait(stage.model.device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what the host asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def models_of(stage) -> dict[str, Model]:
    """The model that is trained, and, in the emulation, the teachers' copies by name."""
    models = {adapters.STUDENT: stage.model}
    if hasattr(stage, "copies"):
        models |= stage.copies
    return models


def adapter_in_use(transformer: torch.nn.Module) -> str:
    layers = adapters.lora_layers(transformer)
    if not layers or layers[0].slot is None:
        return adapters.BASE
    return layers[0].slot


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The FLOP/s of a large product in `dtype`, the best of several."""
    side, rounds = 512, 10
    if device.type == "cuda":
        side, rounds = 8192, 100
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(rounds):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


# ---- phases ------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by phase. Where a timed call makes another, the outer one gets the time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.running = False

    def around(self, phase: Callable[[], str], function: Callable) -> Callable:
        """`function`, timed; `phase()` says at each call what it counts for."""

        def timed(*arguments, **keywords):
            if self.running:
                return function(*arguments, **keywords)
            name = phase()
            self.running = True
            wait(self.device)
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                wait(self.device)
                self.seconds[name] += time.perf_counter() - started
                self.running = False

        return timed


def measure_phases(stage, step: int) -> dict[str, float]:
    """Seconds of one update by phase, waiting for the device around every timed call."""
    watch = Stopwatch(stage.model.device)
    with timing(stage, watch):
        total = timed_step(stage, step)
    watch.seconds["rest"] = total - sum(watch.seconds.values())
    return watch.seconds


@contextmanager
def timing(stage, watch: Stopwatch) -> Iterator[None]:
    """Inside, the calls that a phase is made of are timed."""
    with ExitStack() as stack:

        def time_call(owner, name: str, phase: Callable[[], str]) -> None:
            timed = watch.around(phase, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))

        def asked() -> str:
            if adapter_in_use(stage.model.transformer) == stage.model.trained:
                return "student forward"
            return "teachers"

        for name, model in models_of(stage).items():
            phase = asked
            if name != adapters.STUDENT:
                phase = constant("teachers")
            time_call(model, "velocity", phase)
        for name in kernels.__all__:
            time_call(kernels, name, constant("kernels"))
        time_call(stage.trained, "update", constant("optimizer"))
        backward = watch.around(constant("student backward"), Tensor.backward)
        stack.enter_context(patch.object(Tensor, "backward", backward))
        yield


def constant(name: str) -> Callable[[], str]:
    return lambda: name


# ---- counts ------------------------------------------------------------------------------------------------


def count(stage, step: int) -> tuple[dict, int]:
    """Of one update: passes by adapter, FLOPs of matrix products and attention."""
    passes, flops = {}, flop_counter()
    with ExitStack() as stack:
        for name, model in models_of(stage).items():
            hook = model.transformer.register_forward_hook(counting(passes, name), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(flops)
        # The counter sees operators, which a compiled kernel has none of.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stage.step(step)
    return passes, flops.get_total_flops()


def live_peak(stage, step: int) -> int:
    """Peak bytes of live tensors in one update. Not in the one whose FLOPs are counted: PyTorch's counter
    holds on to activations that are recomputed."""
    live = LiveTensors()
    live.add(alive())
    with live, torch.compiler.set_stance("force_eager"):
        stage.step(step)
    return live.peak


def counting(passes: dict, owner: str) -> Callable:
    """A hook that counts calls and rows, those with a gradient apart. A guided sample is two rows."""

    def add(name: str, rows: int) -> None:
        entry = passes.setdefault(name, {"calls": 0, "rows": 0})
        entry["calls"] += 1
        entry["rows"] += rows

    def hook(transformer, arguments, keywords, output) -> None:
        name = owner
        if owner == adapters.STUDENT:
            name = adapter_in_use(transformer)
        rows = len(keywords["hidden_states"])
        if not output[0].requires_grad:
            if name == adapters.STUDENT:
                name = f"{name}, no gradient"
            return add(name, rows)
        add(f"{name}, forward", rows)
        output[0].register_hook(lambda gradient: add(f"{name}, backward", rows))

    return hook


def flop_counter() -> FlopCounterMode:
    """PyTorch's own, which knows the attention of accelerators alone, with that of CPUs."""
    cpu = {ATTENTION: attention_flop, ATTENTION_BACKWARD: attention_backward_flop}
    return FlopCounterMode(display=False, custom_mapping=cpu)


def attention_flop(query, key, value, *arguments, out_shape=None, **keywords) -> int:
    return sdpa_flop(query, key, value)


def attention_backward_flop(gradient, query, key, value, *arguments, out_shape=None, **keywords) -> int:
    return sdpa_backward_flop(gradient, query, key, value)


def alive() -> list[Tensor]:
    """Every tensor that Python holds and that has storage."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return [tensor for tensor in tensors if tensor.device.type != "meta"]


# ---- memory ------------------------------------------------------------------------------------------------


def parts(stage, peak: int) -> dict[str, int]:
    """Bytes by what they hold; activations are what remains of the peak."""
    sizes = {"base": 0, "copies": 0, "adapters": 0}
    for name, model in models_of(stage).items():
        tensors = [*model.transformer.named_parameters(), *model.transformer.named_buffers()]
        for full_name, tensor in tensors:
            part = "base"
            if name != adapters.STUDENT:
                part = "copies"
            elif ".lora_" in full_name:
                part = "adapters"
            sizes[part] += tensor.nbytes
    states = stage.trained.optimizer.state.values()
    sizes["optimizer"] = sum(value.nbytes for state in states for value in state.values())
    sizes["gradients"] = sum(parameter.nbytes for parameter in stage.trained.parameters.values())
    sizes["activations"] = peak - sum(sizes.values())
    return {"peak": peak} | sizes


def forget_peak(device: torch.device) -> int:
    """Give back what is free, start the peak anew, and return the bytes that are in use: of tensors on CUDA,
    resident on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if os.access(RESTART, os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)
        RESTART.write_text("5")  # VmHWM restarts from VmRSS
    return resident("VmRSS")


def peak_bytes(device: torch.device, before: int) -> tuple[int, int]:
    """Bytes beyond `before` at the peak since `forget_peak`: of tensors on CUDA, and resident on a CPU; the
    other is 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before, 0
    return 0, resident("VmHWM") - before


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0
