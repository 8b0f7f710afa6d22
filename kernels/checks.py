"""Argument checks of the ops: a ValueError that names the argument, what it is and what is expected."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opd.flow import HALF, Transition
from opd.kernels.noise import check_seed

FULL = (torch.float32, torch.float64)


def check_step(x: Tensor, v: Tensor, transition: Transition) -> None:
    """A state, in float32 because rounding changes its likelihood; a velocity; (B,) or 0-dim coefficients."""
    check_batch("x", x, FULL)
    check_velocity("v", v, x)
    for name, value in zip(Transition._fields, transition, strict=True):
        if isinstance(value, Tensor) and value.ndim == 0:
            device = value.device if value.device.type == "cpu" else x.device
            check_tensor(f"transition.{name}", value, (), FULL, device)
        else:
            check_tensor(f"transition.{name}", value, (len(x),), FULL, x.device)
    check_values("transition.std", transition.std, lambda std: std >= 0, "no negative value")
    check_values("transition.move", transition.move, lambda move: move != 0, "no 0")


def check_noise(x: Tensor, noise: Tensor | None, seed: int | None, index: Tensor | None) -> None:
    """Exactly one of `noise` (like x) and `seed` (with or without `index`)."""
    if (noise is None) == (seed is None):
        given = "None" if noise is None else "given"
        raise ValueError(f"noise is {given} and seed is {seed}: expected exactly one of them")
    if noise is None:
        check_seed(seed)
        if index is not None:
            check_tensor("index", index, (len(x),), (torch.int64,), x.device)
        return
    if index is not None:
        raise ValueError("index is given but noise is too: index only addresses the noise drawn from seed")
    check_like("noise", noise, x, (x.dtype,))


def check_targets(v: Tensor, targets, alpha: Tensor, w: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The K >= 1 teachers, without gradients; alpha (B, K) and w (B,) in the precision of the sums. An absent
    teacher becomes the student itself, which is not read where alpha is 0. Elsewhere alpha becomes NaN, and
    so does the loss: only the CPU can afford to look."""
    if isinstance(targets, Tensor):
        targets = targets.unbind(0)
    if len(targets) == 0:
        raise ValueError("targets is empty (K = 0): expected at least one teacher")
    check_tensor("alpha", alpha, (len(v), len(targets)), FULL, v.device)
    check_tensor("w", w, (len(v),), FULL, v.device)
    check_values("alpha", alpha, lambda alpha: alpha >= 0, "no negative weight")
    precision = torch.promote_types(v.dtype, torch.float32)
    alpha, w = alpha.detach().to(precision), w.detach().to(precision)
    present = []
    for k, target in enumerate(targets):
        if target is None:
            absent = f"targets[{k}] is None but alpha[:, {k}]"
            check_values(absent, alpha[:, k], lambda alpha: alpha == 0, "0 for every sample")
            alpha = alpha.clone()
            alpha[:, k] = torch.where(alpha[:, k] == 0, 0.0, torch.nan)
            target = v
        check_velocity(f"targets[{k}]", target, v)
        present.append(target.detach())
    return present, alpha, w


def check_velocity(name: str, v: Tensor, like: Tensor) -> None:
    """Velocities are float32, bf16 or fp16; or everything is float64, for the eager equations."""
    dtypes = (torch.float64,) if like.dtype == torch.float64 else (torch.float32, *HALF)
    check_like(name, v, like, dtypes)


def check_like(name: str, t: Tensor, like: Tensor, dtypes: tuple) -> None:
    check_tensor(name, t, like.shape, dtypes, like.device)
    check_batch(name, t, dtypes)


def check_batch(name: str, t: Tensor, dtypes: tuple) -> None:
    """(B, ...), not empty. Any stride over the batch (a slice, an expanded sample) is fine."""
    if t.ndim < 2 or t.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected (B, ...), no dimension of them 0")
    check_tensor(name, t, t.shape, dtypes, t.device)
    if not t[0].is_contiguous():
        raise ValueError(f"{name} has strides {t.stride()}: expected contiguous samples, call .contiguous()")


def check_tensor(name: str, t: Tensor, shape: tuple, dtypes: tuple, device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} has type {type(t).__name__}: expected a tensor of shape {tuple(shape)}")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected {tuple(shape)}")
    if t.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {t.dtype}: expected {' or '.join(map(str, dtypes))}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}: expected {device}")


def check_values(name: str, t: Tensor, good: Callable[[Tensor], Tensor], expected: str) -> None:
    if readable(t) and not good(t).all():
        raise ValueError(f"{name} = {t.tolist()}: expected {expected}")


def readable(t: Tensor) -> bool:
    """Whether looking at the values costs nothing: not on an accelerator (a host sync), not while tracing."""
    return t.device.type == "cpu" and not isinstance(t, FakeTensor) and not torch.compiler.is_compiling()
