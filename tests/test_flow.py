"""Closed forms: every equation of opd/flow.py against a number known without it."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Independent, Normal, kl_divergence

from opd import flow

MEAN, STD = 1.5, 0.6  # the Gaussian "data set": N(MEAN, STD^2 I)


def marginal_variance(sigma):
    return (1 - sigma) ** 2 * STD**2 + sigma**2


def velocity_slope(sigma, std=STD):
    """E[eps - data | x] = slope (x - E x) - MEAN for Gaussian data."""
    return (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)


def exact_velocity(x, sigma, std=STD):
    return velocity_slope(sigma, std) * (x - (1 - sigma) * MEAN) - MEAN


def random_transition(batch=4, dims=6, noise_level=0.7):
    g = torch.Generator().manual_seed(0)
    x, v, v_teacher, z = torch.randn(4, batch, dims, generator=g, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.7, 0.4, 0.0], dtype=torch.float64)
    return x, v, v_teacher, z, sigma, sigma_next, flow.diffusion_coefficient(sigma, 0.9, noise_level)


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 40])
def test_sigma_grid_is_the_schedulers_and_leaves_it_alone(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    before = scheduler.sigmas.clone()
    grid = flow.sigma_grid(scheduler, steps)
    assert torch.equal(scheduler.sigmas, before)
    scheduler.set_timesteps(steps)
    assert grid.dtype == torch.float64 and grid.shape == (steps + 1,)
    assert torch.equal(grid, scheduler.sigmas.double())
    assert grid[0] == 1 and grid[-1] == 0


def test_sigma_grid_of_shift_3_by_hand():
    """The scheduler spaces sigma evenly between its ends (1 and the shifted 1/1000), then shifts: 3 u / (1 + 2 u)."""
    low = 3 * 0.001 / (1 + 2 * 0.001)
    u = torch.linspace(1, low, 8, dtype=torch.float64)
    expected = torch.cat([3 * u / (1 + 2 * u), torch.zeros(1, dtype=torch.float64)])
    grid = flow.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 8)
    assert torch.allclose(grid, expected, atol=1e-7, rtol=0)  # the scheduler stores float32


def test_sigma_grid_with_dynamic_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens, mu in [(256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)]:
        u = torch.linspace(1, 0.001, 5, dtype=torch.float64)
        expected = math.exp(mu) / (math.exp(mu) + 1 / u - 1)
        assert torch.allclose(flow.sigma_grid(scheduler, 5, tokens)[:-1], expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="image_tokens"):
        flow.sigma_grid(scheduler, 5)


def test_sigma_grid_refuses_bad_input():
    with pytest.raises(ValueError, match="steps = 0"):
        flow.sigma_grid(FlowMatchEulerDiscreteScheduler(), 0)
    with pytest.raises(ValueError, match="fall strictly to 0"):
        flow.sigma_grid(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4)


def test_diffusion_coefficient():
    sigma = torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
    s = flow.diffusion_coefficient(sigma, 0.8, 0.7)
    expected = [0.7 * math.sqrt(q) for q in (1 / (1 - 0.8), 0.8 / 0.2, 1.0, 0.2 / 0.8)]
    assert torch.isfinite(s).all()
    assert torch.allclose(s, torch.tensor(expected, dtype=torch.float64), rtol=1e-14)


# ---------------------------------------------------------------- sampling a Gaussian exactly


def propagate(step, steps, std=STD, start=1.0, samples=20_000):
    """Draw at `start` from the marginal, then walk the grid; returns per sigma the sample mean and variance."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    x = torch.randn(1, samples, generator=generator, dtype=torch.float64)
    x = (1 - start) * MEAN + math.sqrt((1 - start) ** 2 * std**2 + start**2) * x
    rows = []
    for sigma, sigma_next in zip(grid[:-1, None], grid[1:, None]):
        z = torch.randn(1, samples, generator=generator, dtype=torch.float64)
        x = step(x, exact_velocity(x, sigma, std), sigma, sigma_next, grid[1], z)
        rows.append((sigma_next.item(), x.mean().item(), x.var().item()))
    return rows


def sde(noise_level):
    def step(x, v, sigma, sigma_next, second, z):
        s = flow.diffusion_coefficient(sigma, second, noise_level)
        return flow.sde_mean(x, v, sigma, sigma_next, s) + flow.step_std(sigma, sigma_next, s)[:, None] * z
    return step


def ode(x, v, sigma, sigma_next, second, z):
    return flow.ode_step(x, v, sigma, sigma_next)


def cps(noise_level):
    def step(x, v, sigma, sigma_next, second, z):
        return flow.cps_step(x, v, sigma, sigma_next, noise_level, z)
    return step


# (step, std of the data, start, relative discretisation error of the variance allowed at 400 steps)
# ODE and SDE are first-order: the local variance error of order D^2 accumulates to a few D = 1/400, relative to a
# variance of at least 0.26. The SDE starts below sigma = 1, where s changes by O(1) in one step. Small-noise CPS adds
# up a deficit of sigma^2 (1 - cos(a pi/2))^2 per step, negligible at a = 0.1; on a point mass CPS is exact at any a.
WALKS = [(ode, STD, 1.0, 0.01), (sde(0.7), STD, 0.9, 0.01), (sde(0.3), STD, 0.9, 0.01),
         (cps(0.1), STD, 1.0, 0.02), (cps(0.0), STD, 1.0, 0.01), (cps(0.7), 0.0, 1.0, 0.0)]


@pytest.mark.parametrize("step, std, start, discretisation", WALKS)
def test_sampling_reproduces_the_marginals(step, std, start, discretisation):
    """5 standard errors of Monte Carlo (sqrt(V/n) of a mean, sqrt(2/n) V of a variance) plus the discretisation."""
    samples = 20_000
    for sigma, mean, variance in propagate(step, 400, std, start, samples):
        exact = (1 - sigma) ** 2 * std**2 + sigma**2
        # The mean is propagated without discretisation error: v has mean -MEAN at every sigma.
        assert abs(mean - (1 - sigma) * MEAN) <= 5 * math.sqrt(exact / samples) + 1e-12
        assert abs(variance - exact) <= (5 * math.sqrt(2 / samples) + discretisation) * exact + 1e-12


def variance_recursion(sigma, sigma_next, s, variance):
    """Exact variance after one Euler-Maruyama step; x_next is linear in x: keep x - move slope (x - E x) + const + s sqrt(D) z."""
    dt = sigma - sigma_next
    keep = 1 - s**2 * dt / (2 * sigma)
    move = dt * (1 + s**2 * (1 - sigma) / (2 * sigma))
    return (keep - move * velocity_slope(sigma)) ** 2 * variance + s**2 * dt


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_one_step_is_affine_with_the_exact_moments(noise_level):
    """No Monte Carlo: +-1 std of the state and of the noise give the mean and variance of one step to rounding."""
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    for sigma, sigma_next in zip(grid[:-1, None], grid[1:, None]):
        s = flow.diffusion_coefficient(sigma, grid[1], noise_level)
        centre, variance = (1 - sigma) * MEAN, marginal_variance(sigma)
        x = centre + variance.sqrt() * torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
        z = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
        x_next = sde(noise_level)(x, exact_velocity(x, sigma), sigma, sigma_next, grid[1], z)
        assert torch.allclose(x_next.mean(), (1 - sigma_next) * MEAN, rtol=1e-12)
        assert torch.allclose(x_next.var(correction=0), variance_recursion(sigma, sigma_next, s, variance), rtol=1e-12)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_discretisation_error_is_first_order(noise_level):
    def final_error(steps):
        grid = torch.linspace(0.9, 0, steps + 1, dtype=torch.float64)
        variance = marginal_variance(grid[0])
        for sigma, sigma_next in zip(grid[:-1], grid[1:]):
            s = flow.diffusion_coefficient(sigma, grid[1], noise_level)
            variance = variance_recursion(sigma, sigma_next, s, variance)
        return (variance - STD**2).abs().item()
    assert 1.8 < final_error(400) / final_error(800) < 2.2
    assert final_error(800) < 0.005 * STD**2


def test_ode_step_is_the_sde_step_without_noise():
    x, v, _, _, sigma, sigma_next, s = random_transition()
    assert torch.allclose(flow.sde_mean(x, v, sigma, sigma_next, 0 * s), flow.ode_step(x, v, sigma, sigma_next), rtol=1e-14)


def test_cps_at_zero_noise_is_the_ode():
    x, v, _, z, sigma, sigma_next, _ = random_transition()
    assert torch.allclose(flow.cps_step(x, v, sigma, sigma_next, 0.0, z), flow.ode_step(x, v, sigma, sigma_next), rtol=1e-12)


# ---------------------------------------------------------------- likelihood, KL and the weights


def transition(x, v, sigma, sigma_next, s):
    mean, std = flow.sde_mean(x, v, sigma, sigma_next, s), flow.step_std(sigma, sigma_next, s)
    return Independent(Normal(mean, std[:, None].expand_as(mean)), 1), mean, std


def test_log_prob_equals_torch_distributions():
    x, v, _, z, sigma, sigma_next, s = random_transition()
    gaussian, mean, std = transition(x, v, sigma, sigma_next, s)
    x_next = mean + std[:, None] * z
    expected = gaussian.log_prob(x_next) / x.shape[1]
    assert torch.allclose(flow.log_prob_mean(x_next, mean, std), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
def test_kl_weight_equals_torch_distributions(noise_level):
    x, v, v_teacher, _, sigma, sigma_next, s = random_transition(noise_level=noise_level)
    student, _, _ = transition(x, v, sigma, sigma_next, s)
    teacher, _, _ = transition(x, v_teacher, sigma, sigma_next, s)
    kl = flow.kl_weight(sigma, sigma_next, s) * ((v - v_teacher) ** 2).sum(1)
    expected = kl_divergence(student, teacher)
    assert torch.allclose(kl, expected, rtol=1e-10, atol=1e-10)


def test_the_other_weights_follow_their_definitions():
    x, v, v_teacher, _, sigma, sigma_next, s = random_transition()
    difference = ((v - v_teacher) ** 2).sum(1)
    means = [flow.sde_mean(x, u, sigma, sigma_next, s) for u in (v, v_teacher)]
    released = ((means[0] - means[1]) ** 2).sum(1) / (2 * s**2)
    assert torch.allclose(flow.WEIGHTS["kl_released"](sigma, sigma_next, s) * difference, released, rtol=1e-10)
    steps = [flow.ode_step(x, u, sigma, sigma_next) for u in (v, v_teacher)]
    ode_kl = ((steps[0] - steps[1]) ** 2).sum(1) / 2
    assert torch.allclose(flow.WEIGHTS["ode_kl"](sigma, sigma_next, s) * difference, ode_kl, rtol=1e-10)
    assert torch.equal(flow.WEIGHTS["uniform"](sigma, sigma_next, s), torch.ones(4, dtype=torch.float64))
    assert flow.WEIGHTS["kl"] is flow.kl_weight and len(flow.WEIGHTS) == 4


# ---------------------------------------------------------------- guidance, flow matching, precision


def test_guided():
    v, v_uncond = torch.randn(2, 3, 4, dtype=torch.float64)
    assert flow.guided(v, None, 1.0) is v
    assert torch.allclose(flow.guided(v, v_uncond, 1.0), v)
    assert torch.allclose(flow.guided(v, v_uncond, 0.0), v_uncond)
    assert torch.allclose(flow.guided(v, v_uncond, 4.5), 4.5 * v - 3.5 * v_uncond)
    per_sample = flow.guided(v, v_uncond, torch.tensor([0.0, 1.0, 4.5]))
    assert torch.allclose(per_sample, torch.stack([v_uncond[0], v[1], 4.5 * v[2] - 3.5 * v_uncond[2]]))


def test_flow_matching_loss():
    data, eps, error = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.25, 1.0], dtype=torch.float64)
    x = flow.noised(data, eps, sigma)
    assert torch.allclose(x[0], 0.75 * data[0] + 0.25 * eps[0]) and torch.equal(x[1], eps[1])
    velocity = (flow.noised(data, eps, sigma) - flow.noised(data, eps, sigma - 0.1)) / 0.1
    assert torch.allclose(flow.velocity_target(data, eps), velocity)
    loss_B = flow.flow_matching_loss(eps - data + error, data, eps)
    assert torch.allclose(loss_B, (error**2).mean((1, 2, 3)))


def test_logit_normal_sigma_has_its_quantiles():
    quantiles = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    sigma = flow.logit_normal_sigma(quantiles, mean=0.5, std=1.5)
    assert torch.allclose(torch.logit(sigma), 0.5 + 1.5 * quantiles)


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                             (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_half_precision_is_computed_in_float32(dtype, expected):
    x, v, _, z, sigma, sigma_next, s = random_transition()
    x, v, z = x.to(dtype), v.to(dtype), z.to(dtype)
    outputs = [flow.guided(v, x, 4.5), flow.sde_mean(x, v, sigma, sigma_next, s), flow.ode_step(x, v, sigma, sigma_next),
               flow.cps_step(x, v, sigma, sigma_next, 0.7, z), flow.noised(x, z, sigma), flow.velocity_target(x, z),
               flow.flow_matching_loss(v, x, z), flow.log_prob_mean(x, v, s)]
    x, v = x.to(expected), v.to(expected)
    wide = [flow.guided(v, x, 4.5), flow.sde_mean(x, v, sigma, sigma_next, s)]
    assert [o.dtype for o in outputs] == [expected] * len(outputs)
    assert torch.equal(outputs[0], wide[0]) and torch.equal(outputs[1], wide[1])
