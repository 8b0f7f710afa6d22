"""The equations of flow matching and of on-policy distillation, one small pure function each.

Conventions:
    sigma   noise level in [0, 1]; 1 = pure noise, 0 = data
    x       state, x = (1 - sigma) data + sigma eps, eps ~ N(0, I)
    v       velocity dx/dsigma = eps - data
    D       step size sigma - sigma_next, positive
    s       diffusion coefficient, std per sqrt(unit sigma); s sqrt(D) is the std of one whole step

Every step of every sampler is linear in the state, the velocity and the noise: x_next = keep x - move v + std
z. So one `Transition` holds all that a rollout, a likelihood or a loss weight needs to know of it.

Shape suffixes: B batch, C channels, H height, W width; `x_BCHW` stands for any (B, ...) shape. Coefficients
and weights are tensors: one number (0-dim), one per sample (B,), or one per state of a grid (T,); they
broadcast over a state's trailing dimensions. Schedules are computed in float64, states in float32 whatever
the model's dtype; float64 states stay float64.
"""

import math
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- one step


class Transition(NamedTuple):
    """The step x_next = keep x - move v + std z, z ~ N(0, I): three tensors of one shape, 0-dim, (B,) or
    (T,)."""

    keep: Tensor
    move: Tensor
    std: Tensor

    def at(self, state: int) -> "Transition":
        """The transition out of one state of a grid: 0-dim coefficients."""
        return Transition(self.keep[state], self.move[state], self.std[state])

    def kl_weight(self) -> Tensor:
        """Eq. 12: w = move^2 / (2 std^2). Two such steps with velocities v and v' share their covariance, so
        the KL of one from the other is w |v - v'|^2, in nats; infinite for a step without noise."""
        return self.move**2 / (2 * self.std**2)


def sde_transition(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """Eq. 5-6: mean = x (1 - s^2 D / (2 sigma)) - v D (1 + s^2 (1 - sigma) / (2 sigma)), std = s sqrt(D)."""
    dt = sigma - sigma_next
    s = diffusion_coefficient(sigma, sigma_next, noise_level)
    keep = 1 - s**2 * dt / (2 * sigma)
    move = dt * (1 + s**2 * (1 - sigma) / (2 * sigma))
    return Transition(keep, move, s * dt.sqrt())


def ode_transition(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """Deterministic Euler step, x - D v: the SDE step at s = 0. The noise level is not used."""
    return Transition(torch.ones_like(sigma), sigma - sigma_next, torch.zeros_like(sigma))


def cps_transition(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """Flow-CPS: put the predicted data and noise together again with the coefficients of sigma' = sigma_next,
    (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1 + std z, where std = sigma' sin(a pi / 2), x0 = x - sigma v
    and x1 = x + (1 - sigma) v. The last step, to sigma' = 0, has no noise."""
    old_noise = sigma_next * math.cos(noise_level * math.pi / 2)
    keep = (1 - sigma_next) + old_noise
    move = (1 - sigma_next) * sigma - old_noise * (1 - sigma)
    return Transition(keep, move, sigma_next * math.sin(noise_level * math.pi / 2))


TRANSITIONS = {"sde": sde_transition, "ode": ode_transition, "cps": cps_transition}


def diffusion_coefficient(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Tensor:
    """s = a sqrt(sigma / (1 - sigma)), std per sqrt(unit sigma). At sigma = 1, the start of a grid, the
    denominator is 1 - sigma_next, that of the grid's second value, so that s is finite (Flow-GRPO)."""
    one_minus_sigma = torch.where(sigma == 1, 1 - sigma_next, 1 - sigma)
    return noise_level * (sigma / one_minus_sigma).sqrt()


def step_mean(x_BCHW: Tensor, v_BCHW: Tensor, transition: Transition) -> Tensor:
    """keep x - move v, the mean of the next state."""
    x, v = at_least_float32(x_BCHW), at_least_float32(v_BCHW)
    return x * per_sample(transition.keep, x) - v * per_sample(transition.move, x)


def velocity_taken(x_next_BCHW: Tensor, x_BCHW: Tensor, transition: Transition) -> Tensor:
    """(keep x - x_next) / move: the velocity that would have led from x to x_next without noise."""
    x, x_next = at_least_float32(x_BCHW), at_least_float32(x_next_BCHW)
    return (x * per_sample(transition.keep, x) - x_next) / per_sample(transition.move, x)


def log_prob_mean(square_B: Tensor, transition: Transition) -> Tensor:
    """Eq. 11, log N(x_next; mean, std^2 I) as the MEAN over the d dimensions (B,), nats per dimension.

    `square_B` is the mean square of v - velocity_taken: a log-probability is a distillation loss with one
    teacher, the velocity that was taken, plus a constant. +inf for a step without noise.
    """
    weight = transition.kl_weight().to(square_B.dtype)
    std = transition.std.to(square_B.dtype)
    log_prob_B = -weight * square_B - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std == 0, torch.inf, log_prob_B)


def mean_square(difference_BCHW: Tensor) -> Tensor:
    """Mean over a sample's dimensions of the squares, (B,)."""
    return reduce(difference_BCHW**2, "b ... -> b", "mean")


def at_least_float32(x: Tensor) -> Tensor:
    if x.dtype in HALF:
        return x.float()
    return x


def per_sample(value: Tensor, like_BCHW: Tensor) -> Tensor:
    """A coefficient, 0-dim or (B,), so that it broadcasts over the trailing dimensions of a state, in its
    dtype."""
    value = value.to(like_BCHW.dtype)
    if value.ndim == 0:
        return value
    return value.reshape(-1, *[1] * (like_BCHW.ndim - 1))


# ---------------------------------------------------------------- guidance


def guided(v: Tensor, v_uncond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, v_u + g (v - v_u), at least float32. Part of the policy."""
    v, v_uncond = at_least_float32(v), at_least_float32(v_uncond)
    return v_uncond + guidance * (v - v_uncond)


# ---------------------------------------------------------------- targets


def extrapolated(v: Tensor, v_reference: Tensor, factor: float) -> Tensor:
    """v_T + (l - 1) (v_T - v_ref): past the teacher, along what it learned beyond its reference; l = 1 is the
    teacher (STEP-OPD, arXiv 2608.04887; GFD-OPD, arXiv 2609.39692). At least float32."""
    v, v_reference = at_least_float32(v), at_least_float32(v_reference)
    return v + (factor - 1) * (v - v_reference)


# ---------------------------------------------------------------- per-state weights of |v - v_teacher|^2


def kl_weight(transition: Transition, sigma: Tensor, dt: Tensor) -> Tensor:
    """Eq. 12: the exact KL of the two transitions (Flow-OPD)."""
    return transition.kl_weight()


def kl_released_weight(transition: Transition, sigma: Tensor, dt: Tensor) -> Tensor:
    """D times eq. 12: Flow-OPD's released code divides |mean - mean'|^2 by 2 s^2 instead of by 2 s^2 D."""
    return dt * transition.kl_weight()


def ode_kl_weight(transition: Transition, sigma: Tensor, dt: Tensor) -> Tensor:
    """D^2 / 2: half the squared distance of two ODE steps (DiffusionOPD)."""
    return dt**2 / 2


def uniform_weight(transition: Transition, sigma: Tensor, dt: Tensor) -> Tensor:
    """1: the plain squared difference of velocities (DanceOPD, Qwen-Image-2.0-RL)."""
    return torch.ones_like(dt)


WEIGHTS = {
    "kl": kl_weight,
    "kl_released": kl_released_weight,
    "ode_kl": ode_kl_weight,
    "uniform": uniform_weight,
}


def state_weights(name: str, sigmas: list[float], rollout: str, noise_level: float) -> list[float]:
    """w at each of the T states of a grid of T + 1 noise levels: a row of WEIGHTS for a rollout's steps.

    Deterministic steps have no KL; what weighs them is that of the SDE with the same noise level.
    """
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    transition = TRANSITIONS[rollout](sigma[:-1], sigma[1:], noise_level)
    if not transition.std.any():
        transition = sde_transition(sigma[:-1], sigma[1:], noise_level)
    return WEIGHTS[name](transition, sigma[:-1], -sigma.diff()).tolist()


# ---------------------------------------------------------------- supervised flow matching


def noised(data: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) data + sigma eps."""
    data, eps = at_least_float32(data), at_least_float32(eps)
    return per_sample(1 - sigma, data) * data + per_sample(sigma, data) * eps


def velocity_target(data: Tensor, eps: Tensor) -> Tensor:
    """v = dx/dsigma = eps - data."""
    return at_least_float32(eps) - at_least_float32(data)


def flow_matching_loss(v: Tensor, data: Tensor, eps: Tensor) -> Tensor:
    """Eq. 1 with sigma for its time: mean over dimensions of (v - (eps - data))^2, one value per sample
    (B,)."""
    return mean_square(at_least_float32(v) - velocity_target(data, eps))


def logit_normal_sigma(normal_B: Tensor, mean: float) -> Tensor:
    """Training noise levels: sigmoid(mean + n) of standard normal draws n."""
    return torch.sigmoid(mean + normal_B)
