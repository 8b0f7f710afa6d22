"""The fused ops against the eager equations: whether they agree, and how near they come to the memory's own
speed. BENCHMARKS.md says how bytes are counted; `python -m opd.bench gpu` runs it."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from opd import compiled, flow, kernels
from opd.kernels.common import backend

OPS = ("sde_step", "log_prob", "velocity_mse", "opd_step")


def workload(
    op: str, shape: tuple, teachers: int, device: torch.device, dtype=torch.float32, drawn: bool = True
) -> Callable[[], list[Tensor]]:
    """Runs the op once on random arguments, the same in every dtype: its outputs, and the gradient of the
    first one's sum where it has one. The noise is drawn inside, or given."""
    random = torch.Generator(device).manual_seed(0)

    def numbers() -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    x, x_next, noise = numbers(), numbers(), {"noise": numbers()}
    v, targets = numbers().requires_grad_(op != "sde_step"), [numbers() for _ in range(teachers)]
    alpha_BK = torch.ones(shape[0], teachers, dtype=dtype, device=device)
    transition = flow.sde_transition(*torch.tensor([0.8, 0.7], dtype=torch.float64), 0.7)
    if drawn:
        noise = {"seed": 1}
    w_B = alpha_BK[:, 0]
    calls = {
        "sde_step": lambda: kernels.sde_step(x, v, transition, **noise),
        "log_prob": lambda: (kernels.log_prob(x_next, x, v, transition),),
        "velocity_mse": lambda: kernels.velocity_mse(v, targets, alpha_BK, w_B),
        "opd_step": lambda: kernels.opd_step(x, v, targets, alpha_BK, w_B, transition, **noise),
    }

    def run() -> list[Tensor]:
        outputs = calls[op]()
        gradient = ()
        if v.requires_grad:
            gradient = torch.autograd.grad(outputs[0].sum(), v)
        return [output.detach() for output in (*outputs, *gradient)]

    return run


def agreement(device: torch.device) -> dict[str, float]:
    """Of each op the fused one's largest error against float64, in units of what tests/test_kernels_fused.py
    allows: twice the eager op's error and one unit in the last place of the largest value. ValueError above
    1."""
    worst = dict.fromkeys(OPS, 0.0)
    for op, shape, teachers in product(OPS, ((3, 5, 33, 17), (8, 16, 64, 64)), (1, 4)):
        found = []
        for mode, dtype in (("auto", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
            with backend(mode):
                found.append(workload(op, shape, teachers, device, dtype, drawn=False)())
        for fused, eager, exact in zip(*found, strict=True):
            floor = torch.finfo(torch.float32).eps * exact.abs().max()
            allowed = 2 * (eager - exact).abs().max() + floor
            worst[op] = max(worst[op], float((fused - exact).abs().max() / allowed))
    if max(worst.values()) > 1:
        raise ValueError(f"fused and eager ops differ by more than is allowed, which is 1: {worst}")
    return worst


def measure(op: str, shape: tuple, teachers: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the op and its backward pass, bytes moved per second as a share of a copy's, and how
    many times as long the eager equations take, and torch.compile of them."""
    run = workload(op, shape, teachers, device)
    with backend("auto"):
        fused = milliseconds(run, device)
    with backend("eager"):
        eager = milliseconds(run, device)
        faster = torch.compile(run, dynamic=False, backend=compiled.BACKEND)
        compiled_eager = milliseconds(faster, device)
    source, target = torch.empty(2, *shape, device=device)
    copy = 2 * target.nbytes / milliseconds(lambda: target.copy_(source), device)
    speed = target.numel() * bytes_per_element(op, teachers) / fused
    return {
        "milliseconds": fused,
        "share_of_copy": speed / copy,
        "times_eager": eager / fused,
        "times_compiled": compiled_eager / fused,
    }


def bytes_per_element(op: str, teachers: int) -> int:
    """Forward and backward, all float32, each input read once and each output written once."""
    loss = 4 + 4 * teachers + 12  # v, targets; the direction written and read, the gradient written
    step = 4 + 4  # x, x_next
    taken = 28 + 4 + 4 + 12  # x keep, - x_next, / move: three eager ops; then the loss of one target
    return {"sde_step": step + 4, "log_prob": taken, "velocity_mse": loss, "opd_step": step + loss}[op]


def milliseconds(run: Callable, device: torch.device) -> float:
    """The median of single runs, on a GPU each with empty caches."""
    if device.type == "cpu":  # a rehearsal
        return 1e3 * Timer("run()", globals={"run": run}).timeit(1).median
    from triton.testing import do_bench  # not on every system

    return do_bench(run, return_mode="median")
