"""The equations of flow matching and of on-policy distillation, one small pure function each.

Conventions (README, "Notation"):
    sigma   noise level in [0, 1]; 1 = pure noise, 0 = data
    x       state, x = (1 - sigma) data + sigma eps, eps ~ N(0, I)
    v       velocity dx/dsigma = eps - data
    D       step size sigma - sigma_next, positive
    s       diffusion coefficient, std per sqrt(unit sigma); s sqrt(D) is the std of one whole step ("step_std")

Shape suffixes: B batch, C channels, H height, W width; `x_BCHW` stands for any (B, ...) shape.
Sigmas and everything derived from them have one value per sample, (B,), and broadcast over x's trailing dimensions.
States are computed in float32 whatever the model's dtype (bf16 and fp16 inputs are cast up first); float64 stays float64.
Per-sample coefficients are computed in the dtype of the sigmas, then cast to that of the state.
"""

import copy
import math

import torch
from torch import Tensor


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _per_sample(value_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) in the dtype of x, so that it broadcasts over x's trailing dimensions."""
    return value_B.to(x_BCHW.dtype).reshape(-1, *[1] * (x_BCHW.ndim - 1))


def _mean_over_dims(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(1).mean(1)


# ---------------------------------------------------------------- the noise schedule


def sigma_grid(scheduler, steps: int, image_tokens: int | None = None) -> Tensor:
    """The scheduler's own noise levels, float64 (steps + 1,): strictly decreasing, the last one 0.

    scheduler: a diffusers FlowMatchEulerDiscreteScheduler; a copy is used, the caller's is left as it is.
    image_tokens: number of image tokens; needed only if the scheduler shifts by resolution (`use_dynamic_shifting`).
    ValueError: steps < 1, image_tokens missing, or a schedule that does not fall to 0.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: a sigma grid needs at least 1 step")
    scheduler = copy.deepcopy(scheduler)
    if scheduler.config.use_dynamic_shifting:
        if image_tokens is None:
            raise ValueError("image_tokens is missing: this scheduler shifts its sigmas by resolution "
                             "(use_dynamic_shifting), so the number of image tokens must be given")
        scheduler.set_timesteps(steps, mu=dynamic_shift(scheduler.config, image_tokens))
    else:
        scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.to("cpu", torch.float64)
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"the scheduler's sigmas must fall strictly to 0, got {sigmas.tolist()}")
    return sigmas


def dynamic_shift(config, image_tokens: int) -> float:
    """mu, the log of the shift: linear in the number of image tokens between the two points in the scheduler's config."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (image_tokens - config.base_image_seq_len)


def diffusion_coefficient(sigma_B: Tensor, sigma_second: float | Tensor, noise_level: float) -> Tensor:
    """s = a sqrt(sigma / (1 - sigma)), std per sqrt(unit sigma). At sigma = 1 the denominator is 1 - sigma_second,
    the grid's second value, so that s is finite (Flow-GRPO)."""
    one_minus_sigma_B = torch.where(sigma_B == 1, 1 - sigma_second, 1 - sigma_B)
    return noise_level * (sigma_B / one_minus_sigma_B).sqrt()


def logit_normal_sigma(normal_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training noise levels: sigmoid(mean + std n) of standard normal draws n."""
    return torch.sigmoid(mean + std * normal_B)


# ---------------------------------------------------------------- guidance and one step


def guided(v: Tensor, v_uncond: Tensor | None, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance, v_u + g (v - v_u), g a number or (B,). Part of the policy, and written only here.
    Without v_uncond the velocity is returned as it is."""
    v = _at_least_float32(v)
    if v_uncond is None:
        return v
    v_uncond = _at_least_float32(v_uncond)
    if isinstance(guidance, Tensor):
        guidance = _per_sample(guidance, v)
    return v_uncond + guidance * (v - v_uncond)


def sde_mean(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor) -> Tensor:
    """Eq. 5-6, mean of the transition: x (1 - s^2 D / (2 sigma)) - v D (1 + s^2 (1 - sigma) / (2 sigma))."""
    x, v = _at_least_float32(x), _at_least_float32(v)
    dt = sigma - sigma_next
    keep_B = 1 - s**2 * dt / (2 * sigma)
    move_B = dt * (1 + s**2 * (1 - sigma) / (2 * sigma))
    return x * _per_sample(keep_B, x) - v * _per_sample(move_B, x)


def step_std(sigma: Tensor, sigma_next: Tensor, s: Tensor) -> Tensor:
    """s sqrt(D) (B,): std of the noise added in the whole step, in units of the state."""
    return s * (sigma - sigma_next).sqrt()


def log_prob_mean(x_next: Tensor, mean: Tensor, step_std: Tensor) -> Tensor:
    """Eq. 11, log N(x_next; mean, step_std^2 I) as the MEAN over the d dimensions (B,), nats per dimension."""
    squared_error_B = _mean_over_dims((_at_least_float32(x_next) - _at_least_float32(mean)) ** 2)
    step_std = step_std.to(squared_error_B.dtype)
    return -squared_error_B / (2 * step_std**2) - step_std.log() - 0.5 * math.log(2 * math.pi)


def ode_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Deterministic Euler step, x - D v: the SDE step at s = 0."""
    x, v = _at_least_float32(x), _at_least_float32(v)
    return x - _per_sample(sigma - sigma_next, x) * v


def cps_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, noise: Tensor) -> Tensor:
    """Flow-CPS: put the predicted data and noise together again with the coefficients of sigma' = sigma_next:
    (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1 + std z, where std = sigma' sin(a pi / 2),
    x0 = x - sigma v and x1 = x + (1 - sigma) v."""
    x, v, noise = _at_least_float32(x), _at_least_float32(v), _at_least_float32(noise)
    x0 = x - _per_sample(sigma, x) * v
    x1 = x + _per_sample(1 - sigma, x) * v
    std_B = sigma_next * math.sin(noise_level * math.pi / 2)
    old_noise_B = sigma_next * math.cos(noise_level * math.pi / 2)
    return _per_sample(1 - sigma_next, x) * x0 + _per_sample(old_noise_B, x) * x1 + _per_sample(std_B, x) * noise


# ---------------------------------------------------------------- per-step weights of |v - v_teacher|^2


def kl_weight(sigma_B: Tensor, sigma_next_B: Tensor, s_B: Tensor) -> Tensor:
    """Eq. 12: w = D/2 (s (1 - sigma) / (2 sigma) + 1/s)^2; w |dv|^2 is the KL of the two transitions, in nats."""
    dt_B = sigma_B - sigma_next_B
    return dt_B / 2 * (s_B * (1 - sigma_B) / (2 * sigma_B) + 1 / s_B) ** 2


def kl_released_weight(sigma_B: Tensor, sigma_next_B: Tensor, s_B: Tensor) -> Tensor:
    """D times eq. 12: Flow-OPD's released code divides |mean - mean'|^2 by 2 s^2 instead of by 2 s^2 D."""
    return (sigma_B - sigma_next_B) * kl_weight(sigma_B, sigma_next_B, s_B)


def ode_kl_weight(sigma_B: Tensor, sigma_next_B: Tensor, s_B: Tensor) -> Tensor:
    """D^2 / 2: half the squared distance of two ODE steps (DiffusionOPD). s is not used."""
    return (sigma_B - sigma_next_B) ** 2 / 2


def uniform_weight(sigma_B: Tensor, sigma_next_B: Tensor, s_B: Tensor) -> Tensor:
    """1: the plain squared difference of velocities (DanceOPD, Qwen-Image-2.0-RL). Only the shape is used."""
    return torch.ones_like(sigma_B)


WEIGHTS = {"kl": kl_weight, "kl_released": kl_released_weight, "ode_kl": ode_kl_weight, "uniform": uniform_weight}


# ---------------------------------------------------------------- supervised flow matching


def noised(data: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) data + sigma eps."""
    data, eps = _at_least_float32(data), _at_least_float32(eps)
    return _per_sample(1 - sigma, data) * data + _per_sample(sigma, data) * eps


def velocity_target(data: Tensor, eps: Tensor) -> Tensor:
    """v = dx/dsigma = eps - data."""
    return _at_least_float32(eps) - _at_least_float32(data)


def flow_matching_loss(v: Tensor, data: Tensor, eps: Tensor) -> Tensor:
    """Eq. 1 with sigma for its time: mean over dimensions of (v - (eps - data))^2, one value per sample (B,)."""
    return _mean_over_dims((_at_least_float32(v) - velocity_target(data, eps)) ** 2)
