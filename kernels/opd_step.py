"""Distillation loss and stochastic step from one velocity: what single-pass distillation does at a queried state."""

from torch import Tensor

from kernels.checks import check_guidance, check_noise, check_schedule, check_state, check_targets, check_velocity, target_list
from kernels.sde_step import sde_step_reference
from kernels.velocity_mse import velocity_mse_reference


def opd_step(x: Tensor, v: Tensor, targets, alpha: Tensor, w: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor,
             noise: Tensor | None = None, *, seed: int | None = None, index: Tensor | None = None,
             v_uncond: Tensor | None = None, guidance: float = 1.0, targets_uncond=None,
             target_guidance=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`velocity_mse` and `sde_step` in one: (loss, per_teacher, x_next, log_prob).

    Arguments, shapes, dtypes, units and errors are those of the two. The loss carries a gradient to v and v_uncond;
    x_next and log_prob come from the detached velocity, so the state stays a constant. s = 0 makes it an ODE step.
    """
    check_state("x", x)
    check_velocity("v", v, x)
    check_schedule(x, sigma, sigma_next, s)
    check_noise(x, noise, seed, index)
    check_guidance(v_uncond, guidance, v)
    targets = target_list("targets", targets)
    targets_uncond = None if targets_uncond is None else target_list("targets_uncond", targets_uncond)
    target_guidance = check_targets(v, targets, alpha, w, targets_uncond, target_guidance)
    return opd_step_reference(x, v, targets, alpha, w, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance,
                              targets_uncond, target_guidance)


def opd_step_reference(x, v, targets, alpha, w, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance,
                       targets_uncond, target_guidance):
    """The equations, on any device, in any precision."""
    loss, per_teacher = velocity_mse_reference(v, targets, alpha, w, v_uncond, guidance, targets_uncond, target_guidance)
    x_next, log_prob = sde_step_reference(x, v, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance)
    return loss, per_teacher, x_next, log_prob
