"""The distillation loss: a weighted squared velocity difference to K teachers, anchor included (eq. 12, 15, 16)."""

import torch
from torch import Tensor

from kernels.checks import check_guidance, check_targets, check_velocity, target_list
from opd import flow


def velocity_mse(v: Tensor, targets, alpha: Tensor, w: Tensor, *, v_uncond: Tensor | None = None, guidance: float = 1.0,
                 targets_uncond=None, target_guidance=None) -> tuple[Tensor, Tensor]:
    """loss = mean_b w_b sum_k alpha_bk mean_d (v - v_k)^2, of guided velocities v_u + g (v - v_u).

    v, v_uncond: (B, ...) float32, bf16 or fp16, differentiable.
    targets, targets_uncond: (K, B, ...) or a sequence of K tensors (B, ...), K >= 1, constants. An entry of targets
    may be None if alpha[:, k] is 0 for the whole batch; one of targets_uncond may be None where the guidance is 1.
    alpha: (B, K) float32, non-negative, routing and anchor weights.  w: (B,) float32, per-step weight (`flow.WEIGHTS`).
    guidance: a number.  target_guidance: a number, K numbers or a (K,) tensor (whose values are read on the host).
    Returns loss, a float32 scalar, and per_teacher (B, K) float32, the unweighted mean squares for logging, no gradient.
    A teacher with alpha 0 for a sample is not read for it, and per_teacher is 0 there: not measured, not "no distance".
    ValueError: a wrong shape, dtype, device or layout, K = 0, guidance without the unconditional velocity.
    """
    check_velocity("v", v)
    check_guidance(v_uncond, guidance, v)
    targets = target_list("targets", targets)
    targets_uncond = None if targets_uncond is None else target_list("targets_uncond", targets_uncond)
    target_guidance = check_targets(v, targets, alpha, w, targets_uncond, target_guidance)
    return velocity_mse_reference(v, targets, alpha, w, v_uncond, guidance, targets_uncond, target_guidance)


def velocity_mse_reference(v, targets, alpha, w, v_uncond, guidance, targets_uncond, target_guidance):
    """The equations, on any device, in any precision."""
    v = flow.guided(v, v_uncond, guidance)
    alpha_BK, w_B = alpha.detach().to(v.dtype), w.detach().to(v.dtype)
    columns = []
    for k, target in enumerate(targets):
        if target is None:
            columns.append(v.new_zeros(v.shape[0]))
            continue
        uncond = None if targets_uncond is None or targets_uncond[k] is None else targets_uncond[k].detach()
        target = flow.guided(target.detach(), uncond, target_guidance[k]).to(v.dtype)
        used_B1 = (alpha_BK[:, k] != 0)[:, None]
        difference_BD = torch.where(used_B1, (v - target).flatten(1), 0)  # an unused teacher may hold anything, NaN included
        columns.append((difference_BD**2).mean(1))
    per_teacher_BK = torch.stack(columns, dim=1)
    loss = (w_B * (alpha_BK * per_teacher_BK).sum(1)).mean()
    return loss, per_teacher_BK.detach()
