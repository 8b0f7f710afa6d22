"""Closed forms: every equation of opd/flow.py against a number known without it; and the walk from state to
state, sample by sample."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from opd import flow, kernels, trajectory
from opd.trajectory import Path
from tests.tiny import cps_by_formula, sde_by_formula

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


# ---------------------------------------------------------------- sampling a Gaussian exactly
def walked(name, noise_level, std, start, steps):
    """[(sigma, mean, variance)] of a walk from the marginal at `start`. A step is affine in the state and in
    the noise, so +-1 std of each give its moments to rounding, without any Monte Carlo."""
    grid, rows = torch.linspace(start, 0, steps + 1, dtype=torch.float64), []
    centre, variance = (1 - start) * MEAN, marginal_variance(grid[0], std)
    for sigma, sigma_next in zip(grid[:-1, None], grid[1:, None], strict=True):
        x = centre + variance.sqrt() * torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
        z = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
        step = flow.TRANSITIONS[name](sigma, sigma_next, noise_level)
        x = flow.step_mean(x, exact_velocity(x, sigma, std), step) + step.std * z
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
    mean, _, s = sde_by_formula(x, v, sigma, sigma_next, 0.7)
    mean_teacher, *_ = sde_by_formula(x, v_teacher, sigma, sigma_next, 0.7)
    released = ((mean - mean_teacher) ** 2).sum(1) / (2 * s[:, 0] ** 2)
    weight = flow.WEIGHTS["kl_released"](transition, sigma, dt)
    assert torch.allclose(weight * difference, released, rtol=1e-10)
    ode_kl = ((dt[:, None] * (v - v_teacher)) ** 2).sum(1) / 2
    assert torch.allclose(flow.WEIGHTS["ode_kl"](transition, sigma, dt) * difference, ode_kl, rtol=1e-10)
    assert torch.equal(flow.WEIGHTS["uniform"](transition, sigma, dt), torch.ones(4, dtype=torch.float64))
    assert len(flow.WEIGHTS) == 4


# ---------------------------------------------------------------- guidance, flow matching, precision
def test_extrapolated_goes_on_along_what_was_learned():
    v, reference = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    assert flow.extrapolated(v, reference, 1.5).tolist() == [[4.0, -1.5]]


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


HALVES = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@pytest.mark.parametrize("dtype, expected", [*HALVES.items(), (torch.float64, torch.float64)])
def test_half_precision_is_computed_in_float32(dtype, expected):
    x, v, _, z, sigma, sigma_next = random_step()
    x, v, z = x.to(dtype), v.to(dtype), z.to(dtype)
    transition = flow.sde_transition(sigma, sigma_next, 0.7)
    outputs = [flow.guided(v, x, 4.5), flow.step_mean(x, v, transition)]
    outputs += [flow.velocity_taken(z, x, transition)]
    outputs += [flow.noised(x, z, sigma), flow.velocity_target(x, z), flow.flow_matching_loss(v, x, z)]
    x, v = x.to(expected), v.to(expected)
    assert [o.dtype for o in outputs] == [expected] * len(outputs)
    assert torch.equal(outputs[0], flow.guided(v, x, 4.5))
    assert torch.equal(outputs[1], flow.step_mean(x, v, transition))


SIGMAS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]


def path_of(name, noise_level=0.7, sigmas=SIGMAS):
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    grid = flow.TRANSITIONS[name](sigma[:-1], sigma[1:], noise_level)
    steps = len(sigmas) - 1
    return Path(sigmas, [grid.at(i) for i in range(steps)], list(range(100, 100 + steps)))


@pytest.mark.parametrize("name", flow.TRANSITIONS)
def test_a_walk_takes_the_steps_of_its_sampler(name):
    index = torch.tensor([7, 2, 5])
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted, visited = x.double(), []
    for state in trajectory.walk(x, path_of(name), index):
        visited.append((state.i, float(state.sigma_B[0])))
        v = torch.sin(state.x)
        state.step(v)
        z = kernels.normal(x.shape, 100 + state.i, index).double()
        transition = path_of(name).transitions[state.i]
        wanted = flow.step_mean(wanted, torch.sin(wanted), transition) + transition.std * z
    assert visited == [(i, pytest.approx(sigma)) for i, sigma in enumerate(SIGMAS[:-1])]
    assert state.x_next.dtype == torch.float32
    assert torch.allclose(state.x_next.double(), wanted, atol=1e-5)


def test_a_sample_walks_alone_as_in_company():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([3, 1, 4, 8])
    for together in trajectory.walk(x, path_of("sde"), index):
        together.step(together.x.cos())
    for alone in trajectory.walk(x[2:3], path_of("sde"), index[2:3]):
        alone.step(alone.x.cos())
    assert torch.equal(together.x_next[2:3], alone.x_next)


def test_a_state_must_be_left():
    walk = trajectory.walk(torch.zeros(1, 2), path_of("ode"), torch.arange(1))
    next(walk)
    with pytest.raises(AssertionError, match="state 0 was left without a step"):
        next(walk)


def test_the_velocity_carries_no_gradient_into_the_next_state():
    v = torch.ones(1, 2, requires_grad=True)
    state = next(trajectory.walk(torch.zeros(1, 2), path_of("sde"), torch.arange(1)))
    state.step(v)
    assert not state.x_next.requires_grad
