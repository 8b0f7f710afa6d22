"""Closed forms: every equation of opd/flow.py against a number known without it."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from opd import flow

MEAN, STD = 1.5, 0.6  # the Gaussian "data set": N(MEAN, STD^2 I)


def marginal_variance(sigma, std):
    return (1 - sigma) ** 2 * std**2 + sigma**2


def exact_velocity(x, sigma, std):
    """E[eps - data | x] for Gaussian data."""
    slope = (sigma - (1 - sigma) * std**2) / marginal_variance(sigma, std)
    return slope * (x - (1 - sigma) * MEAN) - MEAN


def random_step(batch=4, dims=6):
    """States, velocities and noise (B, D) at four steps of a grid, the first and the last among them;
    float64."""
    g = torch.Generator().manual_seed(0)
    x, v, v_teacher, z = torch.randn(4, batch, dims, generator=g, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.7, 0.4, 0.0], dtype=torch.float64)
    return x, v, v_teacher, z, sigma, sigma_next


def sde_by_formula(x, v, sigma, sigma_next, noise_level):
    """(mean, std of the step, s) of eq. 5-6 as the paper writes them, with one sigma per sample."""
    sigma, sigma_next = sigma[:, None], sigma_next[:, None]
    denominator = torch.where(sigma == 1, 1 - sigma_next, 1 - sigma)
    s = noise_level * torch.sqrt(sigma / denominator)
    dt = sigma - sigma_next
    mean = x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * -dt
    return mean, s * dt.sqrt(), s


def cps_by_formula(x, v, sigma, sigma_next, noise_level):
    """(mean, std of the step) of Flow-CPS as its paper writes them."""
    sigma, sigma_next = sigma[:, None], sigma_next[:, None]
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * x0 + torch.sqrt(sigma_next**2 - std**2) * x1, std


# ---------------------------------------------------------------- sampling a Gaussian exactly


def step_of(name, x, v, sigma, sigma_next, noise_level, z):
    transition = flow.TRANSITIONS[name](sigma, sigma_next, noise_level)
    return flow.step_mean(x, v, transition) + transition.std * z


def walked(name, noise_level, std, start, steps):
    """[(sigma, mean, variance)] of a walk from the marginal at `start`. A step is affine in the state and in
    the noise, so +-1 std of each give its moments to rounding, without any Monte Carlo."""
    grid, rows = torch.linspace(start, 0, steps + 1, dtype=torch.float64), []
    centre, variance = (1 - start) * MEAN, marginal_variance(grid[0], std)
    for sigma, sigma_next in zip(grid[:-1, None], grid[1:, None], strict=True):
        x = centre + variance.sqrt() * torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
        z = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
        x = step_of(name, x, exact_velocity(x, sigma, std), sigma, sigma_next, noise_level, z)
        centre, variance = x.mean(), x.var(correction=0)
        rows.append((sigma_next, centre, variance))
    return rows


# (sampler, noise level, std of the data, start, relative error of the variance allowed at 400 steps). ODE and
# SDE are first-order: the local variance error of order D^2 accumulates to a few D = 1/400, relative to a
# variance of at least 0.26. The SDE starts below sigma = 1, where s changes by O(1) in one step. Small-noise
# CPS adds up a deficit of sigma^2 (1 - cos(a pi/2))^2 per step, negligible at a = 0.1; on a point mass CPS is
# exact at any a.
WALKS = [
    ("ode", 0.7, STD, 1.0, 0.01),
    ("sde", 0.7, STD, 0.9, 0.01),
    ("sde", 0.3, STD, 0.9, 0.01),
    ("cps", 0.1, STD, 1.0, 0.02),
    ("cps", 0.0, STD, 1.0, 0.01),
    ("cps", 0.7, 0.0, 1.0, 0.0),
]


@pytest.mark.parametrize("name, noise_level, std, start, discretisation", WALKS)
def test_sampling_reproduces_the_marginals(name, noise_level, std, start, discretisation):
    for sigma, mean, variance in walked(name, noise_level, std, start, 400):
        exact = marginal_variance(sigma, std)
        # The mean is propagated without discretisation error: v has mean -MEAN at every sigma.
        assert abs(mean - (1 - sigma) * MEAN) <= 1e-12
        assert abs(variance - exact) <= discretisation * exact + 1e-12


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_discretisation_error_is_first_order(noise_level):
    coarse, fine = (abs(walked("sde", noise_level, STD, 0.9, n)[-1][2] - STD**2) for n in (400, 800))
    assert 1.8 < coarse / fine < 2.2 and fine < 0.005 * STD**2


# ---------------------------------------------------------------- a step


def test_every_step_is_the_papers():
    """Eq. 5-6, Euler and Flow-CPS as they are written there, from one linear formula; float64 to rounding."""
    x, v, _, _, sigma, sigma_next = random_step()
    nothing = torch.zeros(4, 1, dtype=torch.float64)
    expected = {
        "sde": sde_by_formula(x, v, sigma, sigma_next, 0.7)[:2],
        "cps": cps_by_formula(x, v, sigma, sigma_next, 0.7),
        "ode": (x - (sigma - sigma_next)[:, None] * v, nothing),
    }
    assert expected.keys() == flow.TRANSITIONS.keys()
    for name, (mean, std) in expected.items():
        transition = flow.TRANSITIONS[name](sigma, sigma_next, 0.7)
        assert torch.allclose(flow.step_mean(x, v, transition), mean, rtol=1e-14, atol=1e-14)
        assert torch.allclose(transition.std, std[:, 0], rtol=1e-14)


@pytest.mark.parametrize("name", ["sde", "cps"])
def test_without_noise_every_step_is_the_ode(name):
    *_, sigma, sigma_next = random_step()
    quiet = flow.TRANSITIONS[name](sigma, sigma_next, 0.0)
    euler = flow.ode_transition(sigma, sigma_next, 0.0)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(quiet, euler, strict=True))


def test_coefficients_of_one_state_of_a_grid():
    *_, sigma, sigma_next = random_step()
    grid = flow.sde_transition(sigma, sigma_next, 0.7)
    alone = flow.sde_transition(sigma[2], sigma_next[2], 0.7)
    assert [float(a) for a in grid.at(2)] == [float(a) for a in alone] and alone.keep.ndim == 0


# ---------------------------------------------------------------- likelihood, KL and the weights


def gaussian(mean, std):
    return Independent(Normal(mean, std.expand_as(mean)), 1)


def transitions_of(name, noise_level):
    """(the transition, its law given x and v by the paper's own formula), at every step with noise."""
    x, v, v_teacher, z, sigma, sigma_next = random_step()
    by_formula = {"sde": sde_by_formula, "cps": cps_by_formula}[name]
    if name == "cps":  # its last step has none
        x, v, v_teacher, z, sigma, sigma_next = (t[:3] for t in (x, v, v_teacher, z, sigma, sigma_next))
    student, teacher = (by_formula(x, u, sigma, sigma_next, noise_level)[:2] for u in (v, v_teacher))
    return x, v, v_teacher, z, flow.TRANSITIONS[name](sigma, sigma_next, noise_level), student, teacher


@pytest.mark.parametrize("name", ["sde", "cps"])
def test_log_prob_equals_torch_distributions(name):
    """A log-probability is a distillation loss with one teacher, the velocity that was taken."""
    x, v, _, z, transition, (mean, std), _ = transitions_of(name, 0.7)
    x_next = mean + std * z
    square_B = flow.mean_square(v - flow.velocity_taken(x_next, x, transition))
    expected = gaussian(mean, std).log_prob(x_next) / x.shape[1]
    assert torch.allclose(flow.log_prob_mean(square_B, transition), expected, rtol=0, atol=1e-10)


def test_a_step_without_noise_is_infinitely_likely():
    *_, sigma, sigma_next = random_step()
    quiet = flow.ode_transition(sigma, sigma_next, 0.7)
    assert (flow.log_prob_mean(torch.zeros(4), quiet) == math.inf).all()


@pytest.mark.parametrize("name", ["sde", "cps"])
@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
def test_kl_weight_equals_torch_distributions(name, noise_level):
    """Each sampler's own KL, at every state; that of the SDE would be wrong for CPS."""
    x, v, v_teacher, _, transition, student, teacher = transitions_of(name, noise_level)
    kl = flow.WEIGHTS["kl"](transition, None, None) * ((v - v_teacher) ** 2).sum(1)
    expected = kl_divergence(gaussian(*student), gaussian(*teacher))
    assert torch.allclose(kl, expected, rtol=1e-10, atol=1e-10)


def test_the_last_cps_step_has_no_finite_kl():
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    weight_T = flow.cps_transition(grid[:-1], grid[1:], 0.7).kl_weight()
    assert weight_T[:-1].isfinite().all() and weight_T[-1] == math.inf


def test_the_other_weights_follow_their_definitions():
    x, v, v_teacher, _, sigma, sigma_next = random_step()
    transition, dt = flow.sde_transition(sigma, sigma_next, 0.7), sigma - sigma_next
    difference = ((v - v_teacher) ** 2).sum(1)
    (mean, _, s), (mean_teacher, _, _) = (
        sde_by_formula(x, u, sigma, sigma_next, 0.7) for u in (v, v_teacher)
    )
    released = ((mean - mean_teacher) ** 2).sum(1) / (2 * s[:, 0] ** 2)
    assert torch.allclose(
        flow.WEIGHTS["kl_released"](transition, sigma, dt) * difference, released, rtol=1e-10
    )
    ode_kl = ((dt[:, None] * (v - v_teacher)) ** 2).sum(1) / 2
    assert torch.allclose(flow.WEIGHTS["ode_kl"](transition, sigma, dt) * difference, ode_kl, rtol=1e-10)
    assert torch.equal(flow.WEIGHTS["uniform"](transition, sigma, dt), torch.ones(4, dtype=torch.float64))
    assert len(flow.WEIGHTS) == 4


# ---------------------------------------------------------------- guidance, flow matching, precision


def test_guided():
    v, v_uncond = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.allclose(flow.guided(v, v_uncond, 1.0), v)
    assert torch.allclose(flow.guided(v, v_uncond, 0.0), v_uncond)
    assert torch.allclose(flow.guided(v, v_uncond, 4.5), 4.5 * v - 3.5 * v_uncond)


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


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32(dtype, expected):
    x, v, _, z, sigma, sigma_next = random_step()
    x, v, z = x.to(dtype), v.to(dtype), z.to(dtype)
    transition = flow.sde_transition(sigma, sigma_next, 0.7)
    outputs = [
        flow.guided(v, x, 4.5),
        flow.step_mean(x, v, transition),
        flow.velocity_taken(z, x, transition),
        flow.noised(x, z, sigma),
        flow.velocity_target(x, z),
        flow.flow_matching_loss(v, x, z),
    ]
    x, v = x.to(expected), v.to(expected)
    wide = [flow.guided(v, x, 4.5), flow.step_mean(x, v, transition)]
    assert [o.dtype for o in outputs] == [expected] * len(outputs)
    assert torch.equal(outputs[0], wide[0]) and torch.equal(outputs[1], wide[1])
