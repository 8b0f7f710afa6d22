"""Log-probability of a stored transition under the current velocity, differentiable (eq. 11; GRPO's ratio)."""

from torch import Tensor

from kernels.checks import check_guidance, check_same, check_schedule, check_state, check_velocity
from opd import flow


def sde_log_prob(x_next: Tensor, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor, *,
                 v_uncond: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    """log p(x_next | x) under the guided velocity v_u + g (v - v_u): (B,) float32, mean over dimensions, nats per dimension.

    x_next, x: (B, ...) float32, constants.  v, v_uncond: (B, ...) float32, bf16 or fp16, differentiable.
    sigma, sigma_next, s: (B,) float32; s > 0 is the diffusion coefficient, std per sqrt(unit sigma).
    ValueError: a wrong shape, dtype, device, layout or schedule, guidance without v_uncond.
    """
    check_state("x", x)
    check_state("x_next", x_next)
    check_same("x_next", x_next, x, "x")
    check_velocity("v", v, x)
    check_schedule(x, sigma, sigma_next, s, positive_s=True)
    check_guidance(v_uncond, guidance, v)
    return sde_log_prob_reference(x_next, x, v, sigma, sigma_next, s, v_uncond, guidance)


def sde_log_prob_reference(x_next, x, v, sigma, sigma_next, s, v_uncond, guidance):
    """The equations, on any device, in any precision."""
    v = flow.guided(v, v_uncond, guidance).to(x.dtype)
    mean = flow.sde_mean(x.detach(), v, sigma, sigma_next, s)
    return flow.log_prob_mean(x_next.detach(), mean, flow.step_std(sigma, sigma_next, s))
