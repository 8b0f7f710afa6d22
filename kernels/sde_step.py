"""One stochastic step of the rollout and the log-probability of the state it lands on (eq. 5, 6, 11)."""

import torch
from torch import Tensor

from kernels.checks import check_guidance, check_noise, check_schedule, check_state, check_velocity
from kernels.noise import normal
from opd import flow


def sde_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor, noise: Tensor | None = None, *,
             seed: int | None = None, index: Tensor | None = None, v_uncond: Tensor | None = None,
             guidance: float = 1.0) -> tuple[Tensor, Tensor]:
    """x_next = mean + s sqrt(D) z and log p(x_next | x), from the guided velocity v_u + g (v - v_u).

    x: (B, ...) float32.  v, v_uncond: (B, ...) float32, bf16 or fp16.
    sigma, sigma_next, s: (B,) float32; s is the diffusion coefficient, std per sqrt(unit sigma).
    noise: (B, ...) float32; or seed (0 <= seed < 2**63), from which z is drawn as `kernels.normal` does, sample b
    being number index[b] ((B,) int64, default 0 .. B-1).
    Returns x_next (B, ...) float32 and log_prob (B,) float32: mean over dimensions of the log-density of the x_next
    that is returned, nats per dimension; +inf where s = 0, an ODE step. Neither carries a gradient (`sde_log_prob` does).
    ValueError: a wrong shape, dtype, device, layout or schedule, guidance without v_uncond, not exactly one of noise and seed.
    """
    check_state("x", x)
    check_velocity("v", v, x)
    check_schedule(x, sigma, sigma_next, s)
    check_noise(x, noise, seed, index)
    check_guidance(v_uncond, guidance, v)
    return sde_step_reference(x, v, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance)


@torch.no_grad()
def sde_step_reference(x, v, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance):
    """The equations, on any device, in any precision."""
    if noise is None:
        noise = normal(x.shape, seed, index, device=x.device).to(x.dtype)
    v = flow.guided(v, v_uncond, guidance).to(x.dtype)
    mean = flow.sde_mean(x, v, sigma, sigma_next, s)
    std_B = flow.step_std(sigma, sigma_next, s).to(x.dtype)
    x_next = mean + std_B.reshape(-1, *[1] * (x.ndim - 1)) * noise
    log_prob_B = flow.log_prob_mean(x_next, mean, std_B)
    return x_next, torch.where(std_B == 0, torch.inf, log_prob_B)
