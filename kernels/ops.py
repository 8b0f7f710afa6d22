"""The ops: argument checks, then the fused kernels or the eager equations."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opd import flow
from opd.flow import HALF, Transition
from opd.kernels.common import use_triton
from opd.kernels.fused import forward_op
from opd.kernels.noise import check_seed, normal

FULL = (torch.float32, torch.float64)


@torch.no_grad()
def sde_step(x: Tensor, v: Tensor, transition: Transition, noise=None, *, seed=None, index=None):
    """x_next = keep x - move v + std z, and log p(x_next | x) (eq. 5, 6, 11).

    x: (B, ...) float32.  v: (B, ...) float32, bf16 or fp16, guided already.
    transition: (B,) or 0-dim, float32 or float64, on x's device; 0-dim coefficients may stay on the CPU.
    noise: (B, ...) float32; or seed (0 <= seed < 2**63), from which z is drawn as `normal` does, sample b
    being number index[b] ((B,) int64, default 0 .. B-1).
    Returns x_next (B, ...) float32 and log_prob (B,) float32, that of `log_prob` to the bit: nats per
    dimension, +inf where std = 0, an ODE step. No gradient. With x and v in float64, so is everything.
    ValueError: a wrong shape, dtype, device, layout or coefficient, not exactly one of noise and seed.
    """
    transition = check_step(x, v, transition)
    check_noise(x, noise, seed, index)
    nobody_B0 = x.new_empty(len(x), 0)
    _, square_B1, x_next = distances(v, [], nobody_B0, x, transition, noise, seed, index)
    return x_next, flow.log_prob_mean(square_B1[:, 0], transition)


def velocity_mse(v: Tensor, targets, alpha: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The distillation loss, anchor included: w_b sum_k alpha_bk mean_d (v_b - v_bk)^2 (eq. 12, 15, 16).

    v: (B, ...) float32, bf16 or fp16, differentiable.
    targets: (K, B, ...) or a sequence of K tensors (B, ...), K >= 1, constants. An entry may be None if
    alpha[:, k] is 0 for the whole batch; an accelerator does not look, and gives NaN where that is broken.
    alpha: (B, K) float32, non-negative, routing and anchor weights.  w: (B,) float32, per-step weight.
    Returns loss (B,) and per_teacher (B, K), float32: the unweighted mean squares for logging, no gradient.
    A teacher with alpha 0 for a sample is not read for it; per_teacher is 0 there, for "not measured".
    ValueError: a wrong shape, dtype, device or layout, K = 0.
    """
    check_samples("v", v, v)
    targets, alpha_BK, w_B = check_targets(v, targets, alpha, w)
    distance_B, per_teacher_BK, _ = distances(v, targets, alpha_BK)
    return w_B * distance_B, per_teacher_BK


def opd_step(x, v, targets, alpha, w, transition, noise=None, *, seed=None, index=None):
    """`velocity_mse` and `sde_step` in one pass: (loss, per_teacher, x_next, log_prob).

    Arguments, shapes, dtypes, units and errors are those of the two. The loss carries a gradient to v; x_next
    and log_prob come from the detached velocity, so the state stays a constant.
    """
    transition = check_step(x, v, transition)
    check_noise(x, noise, seed, index)
    targets, alpha_BK, w_B = check_targets(v, targets, alpha, w)
    step = (x.detach(), transition, noise, seed, index)
    distance_B, squares_BC, x_next = distances(v, targets, alpha_BK, *step)
    log_prob_B = flow.log_prob_mean(squares_BC[:, -1], transition)
    return w_B * distance_B, squares_BC[:, :-1], x_next, log_prob_B


def log_prob(x_next: Tensor, x: Tensor, v: Tensor, transition: Transition) -> Tensor:
    """log p(x_next | x) under velocity v: (B,) float32, mean over dimensions, nats per dimension (eq. 11).

    x_next, x: (B, ...) float32, constants.  v: (B, ...) float32, bf16 or fp16, differentiable.
    transition: as in `sde_step`; +inf where std = 0, with no meaningful gradient.
    It is a distillation loss whose one teacher is the velocity that would have led to x_next without noise.
    ValueError: a wrong shape, dtype, device, layout or coefficient.
    """
    transition = check_step(x, v, transition)
    check_samples("x_next", x_next, x, (x.dtype,))
    v_taken = flow.velocity_taken(x_next.detach(), x.detach(), transition)
    square_B, _, _ = distances(v, [v_taken], x.new_ones(len(x), 1))
    return flow.log_prob_mean(square_B, transition)


def distances(v, targets, alpha_BK, x=None, transition=(), noise=None, seed=None, index=None):
    """Distances of v to K >= 0 targets, and the step from x if it is given: sum_k alpha_k mean |v - v_k|^2
    (B,), differentiable in v; the means (B, K), or (B, K + 1) with |v - velocity_taken|^2 last; and x_next.
    By the fused kernels, or by the equations of `flow`."""
    if use_triton(v):
        need_grad = torch.is_grad_enabled() and v.requires_grad
        return forward_op(v, targets, alpha_BK, x, list(transition), noise, seed or 0, index, need_grad)[:3]
    v = flow.at_least_float32(v)
    means = []
    for k, target in enumerate(targets):
        used_B1 = (alpha_BK[:, k] != 0)[:, None]
        # An unused teacher may even hold NaN, which a product with 0 would keep.
        difference_BD = torch.where(used_B1, (v - target).flatten(1), 0)
        means.append(flow.mean_square(difference_BD))
    x_next = None
    if x is not None:
        if noise is None:
            noise = normal(x.shape, seed, index, device=x.device)
        v_drawn = v.detach()
        x_next = flow.step_mean(x, v_drawn, transition) + flow.per_sample(transition.std, x) * noise
        v_taken = flow.velocity_taken(x_next, x, transition)
        means.append(flow.mean_square((v_drawn - v_taken).flatten(1)))
    means_BC = torch.stack(means, dim=1)
    distance_B = (alpha_BK * means_BC[:, : len(targets)]).sum(1)
    return distance_B, means_BC.detach(), x_next


# ---- checks: a kernel would read whatever lies where a wrong shape or stride points ----


def check_step(x: Tensor, v: Tensor, transition: Transition) -> Transition:
    """A state, in float32 because rounding changes its likelihood; a velocity; (B,) or 0-dim coefficients.
    Returns these (B,) in the state's dtype, on its device."""
    check_samples("x", x, x, FULL)
    check_samples("v", v, x)
    for name, value in transition._asdict().items():
        shape, device = (len(x),), x.device
        if isinstance(value, Tensor) and value.ndim == 0:
            shape = ()
            if value.device.type == "cpu":
                device = value.device
        check_tensor(f"transition.{name}", value, shape, FULL, device)
    check_values("transition.std", transition.std, operator.ge, "no negative value")
    check_values("transition.move", transition.move, operator.ne, "no 0")
    # In a product, a 0-dim CPU tensor is an argument of the launch: the host does not wait for the device, as
    # it would for a copy.
    ones_B = x.new_ones(len(x))
    return Transition(*[ones_B * value.detach().to(x.dtype) for value in transition])


def check_noise(x: Tensor, noise: Tensor | None, seed: int | None, index: Tensor | None) -> None:
    """Exactly one of `noise` (like x) and `seed` (with or without `index`)."""
    if (noise is None) == (seed is None):
        raise ValueError(f"noise and seed = {seed} are both given, or neither: expected exactly one of them")
    if noise is not None:
        check_samples("noise", noise, x, (x.dtype,))
        if index is not None:
            raise ValueError(
                "index is given but noise is too: index only addresses the noise drawn from seed"
            )
        return
    check_seed(seed)
    if index is not None:
        check_tensor("index", index, (len(x),), (torch.int64,), x.device)


def check_targets(v: Tensor, targets, alpha: Tensor, w: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The K >= 1 teachers, without gradients; alpha (B, K) and w (B,) in the precision of the sums. An absent
    teacher becomes the student itself, which is not read where alpha is 0. Elsewhere alpha becomes NaN, and
    so does the loss: only the CPU can afford to look."""
    if len(targets) == 0:
        raise ValueError("targets is empty (K = 0): expected at least one teacher")
    check_tensor("alpha", alpha, (len(v), len(targets)), FULL, v.device)
    check_tensor("w", w, (len(v),), FULL, v.device)
    check_values("alpha", alpha, operator.ge, "no negative weight")
    precision = torch.promote_types(v.dtype, torch.float32)
    alpha, w = alpha.detach().to(precision), w.detach().to(precision)
    present = []
    for k, target in enumerate(targets):
        if target is None:
            absent = f"targets[{k}] is None but alpha[:, {k}]"
            check_values(absent, alpha[:, k], operator.eq, "0 for every sample")
            alpha = alpha.clone()
            alpha[:, k] = torch.where(alpha[:, k] == 0, 0.0, torch.nan)
            target = v
        check_samples(f"targets[{k}]", target, v)
        present.append(target.detach())
    return present, alpha, w


def check_samples(name: str, t: Tensor, like: Tensor, dtypes: tuple = ()) -> None:
    """(B, ...) like another, not empty. Any stride over the batch (a slice, an expanded sample) is fine. No
    dtypes: a velocity's, float32, bf16 or fp16; beside float64, which the eager equations take, that."""
    if not dtypes:
        dtypes = (torch.float64,) if like.dtype == torch.float64 else (torch.float32, *HALF)
    check_tensor(name, t, like.shape, dtypes, like.device)
    if t.ndim < 2 or t.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected (B, ...), no dimension of them 0")
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


def check_values(name: str, t: Tensor, compare: Callable, expected: str) -> None:
    """Every value compared with 0, where looking costs nothing: not on an accelerator, which the host would
    wait for, and not while tracing."""
    if t.device.type != "cpu" or isinstance(t, FakeTensor) or torch.compiler.is_compiling():
        return
    if not compare(t, 0).all():
        raise ValueError(f"{name} = {t.tolist()}: expected {expected}")
