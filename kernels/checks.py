"""Argument checks shared by the ops: a ValueError that names the argument, what it is and what is expected."""

import math
import numbers

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.noise import check_index, check_seed

_HALF_TO_FULL = (torch.float32, torch.bfloat16, torch.float16)


def check_state(name: str, x: Tensor) -> None:
    """States are (B, ...) float32 (float64 in the eager reference), never empty, each sample contiguous."""
    _check_batched(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {x.dtype}: expected float32; rounding a state changes its likelihood")
    _check_layout(name, x)


def check_velocity(name: str, v: Tensor, like: Tensor | None = None, like_name: str = "x") -> None:
    """Velocities are (B, ...) float32, bf16 or fp16, of the shape and on the device of `like`."""
    if like is None:
        _check_batched(name, v)
    else:
        check_same(name, v, like, like_name)
    if v.dtype not in (*_HALF_TO_FULL, torch.float64):
        raise ValueError(f"{name} has dtype {v.dtype}: expected float32, bfloat16 or float16")
    _check_layout(name, v)


def _check_batched(name: str, t: Tensor) -> None:
    if t.ndim < 2 or t.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected (B, ...) with at least one trailing dimension and "
                         f"no empty one")


def check_same(name: str, t: Tensor, like: Tensor, like_name: str) -> None:
    if t.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected {tuple(like.shape)}, the shape of {like_name}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}: expected {like.device}, the device of {like_name}")


def _check_layout(name: str, t: Tensor) -> None:
    """Any stride over the batch (a slice, an expanded sample) is fine; inside a sample the elements must lie in order."""
    if not t[0].is_contiguous():
        raise ValueError(f"{name} with shape {tuple(t.shape)} has strides {t.stride()}: each sample must be contiguous, "
                         f"call {name}.contiguous()")


def check_per_sample(name: str, t: Tensor, like: Tensor, like_name: str, shape: tuple | None = None) -> None:
    """Per-sample numbers, (B,) or the given shape, float32 or float64, on the device of `like`."""
    shape = (like.shape[0],) if shape is None else shape
    if not isinstance(t, Tensor) or tuple(t.shape) != shape:
        got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"type {type(t).__name__}"
        raise ValueError(f"{name} has {got}: expected a tensor of shape {shape} for {like_name} of shape {tuple(like.shape)}")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {t.dtype}: expected float32")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}: expected {like.device}, the device of {like_name}")


def readable(t: Tensor) -> bool:
    """Whether looking at the values costs nothing: not on an accelerator (a host sync), not while tracing."""
    return t.device.type == "cpu" and not isinstance(t, FakeTensor) and not torch.compiler.is_compiling()


def check_schedule(x: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor, positive_s: bool = False) -> None:
    """0 <= sigma_next < sigma <= 1 and s >= 0 (or > 0) per sample. Values are looked at on the CPU only: on an
    accelerator that would wait for the device, and a bad value gives NaN instead."""
    for name, t in (("sigma", sigma), ("sigma_next", sigma_next), ("s", s)):
        check_per_sample(name, t, x, "x")
    if not (readable(sigma) and readable(sigma_next) and readable(s)):
        return
    if not ((sigma_next >= 0) & (sigma > sigma_next) & (sigma <= 1)).all():
        raise ValueError(f"sigma = {sigma.tolist()}, sigma_next = {sigma_next.tolist()}: expected 0 <= sigma_next < sigma <= 1")
    if not ((s > 0) if positive_s else (s >= 0)).all():
        raise ValueError(f"s = {s.tolist()}: expected s {'> 0' if positive_s else '>= 0'}")


def check_guidance(v_uncond: Tensor | None, guidance: float, v: Tensor) -> None:
    if not isinstance(guidance, numbers.Real) or not math.isfinite(guidance):
        raise ValueError(f"guidance = {guidance!r}: expected a finite number")
    if v_uncond is None:
        if guidance != 1:
            raise ValueError(f"guidance = {guidance} needs v_uncond; without it only guidance = 1.0 makes sense")
    else:
        check_velocity("v_uncond", v_uncond, v, "v")
        if v_uncond.dtype != v.dtype:
            raise ValueError(f"v_uncond has dtype {v_uncond.dtype}: expected {v.dtype}, the dtype of v")


def check_noise(x: Tensor, noise: Tensor | None, seed: int | None, index: Tensor | None) -> None:
    """Exactly one of `noise` (like x) and `seed` (with or without `index`)."""
    if (noise is None) == (seed is None):
        raise ValueError(f"noise is {'None' if noise is None else 'given'} and seed is {seed}: expected exactly one of them")
    if noise is not None:
        if index is not None:
            raise ValueError("index is given but noise is too: index only addresses the noise drawn from seed")
        check_same("noise", noise, x, "x")
        if noise.dtype != x.dtype:
            raise ValueError(f"noise has dtype {noise.dtype}: expected {x.dtype}, the dtype of x")
        _check_layout("noise", noise)
        return
    check_seed(seed)
    if index is not None:
        check_index(index, x.shape[0])
        if index.device != x.device:
            raise ValueError(f"index is on {index.device}: expected {x.device}, the device of x")


def check_targets(v: Tensor, targets, alpha: Tensor, w: Tensor, targets_uncond,
                  target_guidance) -> tuple[list[Tensor | None], list[Tensor | None], list[float]]:
    """Shapes, dtypes and devices of the teachers and their weights.

    Returns three lists of length K >= 1: the targets (detached, or None), their unconditional velocities (None where
    the guidance is 1, which needs none) and their guidance.
    """
    targets = _constants(targets)
    teachers = len(targets)
    if not targets:
        raise ValueError("targets is empty (K = 0): expected at least one teacher")
    check_per_sample("alpha", alpha, v, "v", (v.shape[0], teachers))
    check_per_sample("w", w, v, "v")
    for k, target in enumerate(targets):
        if target is not None:
            check_velocity(f"targets[{k}]", target, v, "v")
        elif readable(alpha) and (alpha[:, k] != 0).any():
            raise ValueError(f"targets[{k}] is None but alpha[:, {k}] = {alpha[:, k].tolist()}: only a teacher whose alpha "
                             f"is 0 for every sample may be left out")
    if readable(alpha) and not (alpha >= 0).all():
        raise ValueError(f"alpha = {alpha.tolist()}: expected non-negative weights")
    guidance = _target_guidance(target_guidance, targets_uncond, teachers)
    unconds = [None] * teachers if targets_uncond is None else _constants(targets_uncond)
    if len(unconds) != teachers:
        raise ValueError(f"targets_uncond has {len(unconds)} entries: expected {teachers}, one per teacher")
    for k, uncond in enumerate(unconds):
        if uncond is not None:
            check_velocity(f"targets_uncond[{k}]", uncond, v, "v")
        elif guidance[k] != 1 and targets[k] is not None:
            raise ValueError(f"target_guidance[{k}] = {guidance[k]} needs targets_uncond[{k}]; without it only 1.0 makes sense")
    return targets, [u if g != 1 else None for u, g in zip(unconds, guidance)], guidance


def _constants(targets) -> list[Tensor | None]:
    """A (K, B, ...) tensor or a sequence of K tensors (B, ...) or None -> a list of K, without gradients."""
    targets = targets.unbind(0) if isinstance(targets, Tensor) else targets
    return [None if t is None else t.detach() for t in targets]


def _target_guidance(target_guidance, targets_uncond, teachers: int) -> list[float]:
    if target_guidance is None:
        if targets_uncond is not None:
            raise ValueError("targets_uncond is given without target_guidance: expected the teachers' guidance, a number "
                             "or one per teacher")
        return [1.0] * teachers
    if isinstance(target_guidance, numbers.Real):
        target_guidance = [target_guidance] * teachers
    guidance = target_guidance.tolist() if isinstance(target_guidance, Tensor) else list(target_guidance)
    if len(guidance) != teachers or not all(isinstance(g, numbers.Real) and math.isfinite(g) for g in guidance):
        raise ValueError(f"target_guidance = {guidance}: expected one finite number or {teachers}, one per teacher")
    return [float(g) for g in guidance]
