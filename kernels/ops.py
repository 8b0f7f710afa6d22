"""The ops: argument checks, then the fused kernels or the eager equations."""

import torch
from torch import Tensor

from opd import flow
from opd.kernels.checks import FULL, check_batch, check_like, check_noise, check_step, check_targets
from opd.kernels.common import use_triton
from opd.kernels.fused import fused
from opd.kernels.noise import normal


@torch.no_grad()
def sde_step(x: Tensor, v: Tensor, transition: flow.Transition, noise=None, *, seed=None, index=None):
    """x_next = keep x - move v + std z, and log p(x_next | x) (eq. 5, 6, 11).

    x: (B, ...) float32.  v: (B, ...) float32, bf16 or fp16, guided already.
    transition: (B,) or 0-dim, float32 or float64, on x's device; 0-dim coefficients may stay on the CPU.
    noise: (B, ...) float32; or seed (0 <= seed < 2**63), from which z is drawn as `normal` does, sample b
    being number index[b] ((B,) int64, default 0 .. B-1).
    Returns x_next (B, ...) float32 and log_prob (B,) float32, that of `log_prob` to the bit: nats per
    dimension, +inf where std = 0, an ODE step. No gradient. With x and v in float64, so is everything.
    ValueError: a wrong shape, dtype, device, layout or coefficient, not exactly one of noise and seed.
    """
    check_step(x, v, transition)
    check_noise(x, noise, seed, index)
    transition = on_device(transition, x)
    if use_triton(x):
        _, square_B1, x_next = fused(v, [], x.new_empty(len(x), 0), x, transition, noise, seed, index)
        return x_next, flow.log_prob_mean(square_B1[:, 0], transition)
    if noise is None:
        noise = normal(x.shape, seed, index, device=x.device)
    x_next = flow.step_mean(x, v, transition) + flow.per_sample(transition.std, x) * noise
    return x_next, log_prob(x_next, x, v, transition)


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
    check_batch("v", v, (*FULL, *flow.HALF))
    targets, alpha_BK, w_B = check_targets(v, targets, alpha, w)
    distance_B, per_teacher_BK = weighted_distance(v, targets, alpha_BK)
    return w_B * distance_B, per_teacher_BK


def opd_step(x, v, targets, alpha, w, transition, noise=None, *, seed=None, index=None):
    """`velocity_mse` and `sde_step` in one pass: (loss, per_teacher, x_next, log_prob).

    Arguments, shapes, dtypes, units and errors are those of the two. The loss carries a gradient to v; x_next
    and log_prob come from the detached velocity, so the state stays a constant.
    """
    if not use_triton(x):
        step = sde_step(x, v, transition, noise, seed=seed, index=index)
        return (*velocity_mse(v, targets, alpha, w), *step)
    check_step(x, v, transition)
    check_noise(x, noise, seed, index)
    targets, alpha_BK, w_B = check_targets(v, targets, alpha, w)
    transition = on_device(transition, x)
    distance_B, squares_BC, x_next = fused(v, targets, alpha_BK, x.detach(), transition, noise, seed, index)
    log_prob_B = flow.log_prob_mean(squares_BC[:, -1], transition)
    return w_B * distance_B, squares_BC[:, :-1], x_next, log_prob_B


def log_prob(x_next: Tensor, x: Tensor, v: Tensor, transition: flow.Transition) -> Tensor:
    """log p(x_next | x) under velocity v: (B,) float32, mean over dimensions, nats per dimension (eq. 11).

    x_next, x: (B, ...) float32, constants.  v: (B, ...) float32, bf16 or fp16, differentiable.
    transition: as in `sde_step`; +inf where std = 0, with no meaningful gradient.
    It is a distillation loss whose one teacher is the velocity that would have led to x_next without noise.
    ValueError: a wrong shape, dtype, device, layout or coefficient.
    """
    check_step(x, v, transition)
    check_like("x_next", x_next, x, (x.dtype,))
    transition = on_device(transition, x)
    v_taken = flow.velocity_taken(x_next.detach(), x.detach(), transition)
    square_B, _ = weighted_distance(v, [v_taken], x.new_ones(len(x), 1))
    return flow.log_prob_mean(square_B, transition)


def weighted_distance(v: Tensor, targets: list[Tensor], alpha_BK: Tensor) -> tuple[Tensor, Tensor]:
    """sum_k alpha_bk mean_d (v_b - v_bk)^2 (B,), differentiable in v, and the K means (B, K), constants."""
    if use_triton(v):
        return fused(v, targets, alpha_BK)[:2]
    v = flow.at_least_float32(v)
    means = []
    for k, target in enumerate(targets):
        used_B1 = (alpha_BK[:, k] != 0)[:, None]
        # An unused teacher may even hold NaN, which a product with 0 would keep.
        difference_BD = torch.where(used_B1, (v - target).flatten(1), 0)
        means.append(flow.mean_square(difference_BD))
    means_BK = torch.stack(means, dim=1)
    return (alpha_BK * means_BK).sum(1), means_BK.detach()


def on_device(transition: flow.Transition, x: Tensor) -> flow.Transition:
    """Coefficients (B,) in the state's dtype, on its device. In a product, a 0-dim CPU tensor is an argument
    of the launch: the host does not wait for the device, as it would for a copy."""
    ones_B = x.new_ones(len(x))
    return flow.Transition(*(ones_B * value.detach().to(x.dtype) for value in transition))
