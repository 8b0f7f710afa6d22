"""Closed forms: every equation of opd/flow.py against a number known without it. The walk from state to
state: tests/test_train.py, sample by sample; flow matching: tests/test_sft.py."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from opd import flow, trajectory
from opd.trajectory import Path
from tests.tiny import cps_by_formula, sde_by_formula

MEAN, STD = 1.5, 0.6  # the Gaussian "data set": N(MEAN, STD^2 I)


def random_step(batch=4, dims=6):
    """States, velocities and noise (B, D) at four steps of a grid, the first and the last among them;
    float64."""
    g = torch.Generator().manual_seed(0)
    x, v, v_teacher, z = torch.randn(4, batch, dims, generator=g, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.7, 0.4, 0.0], dtype=torch.float64)
    return x, v, v_teacher, z, sigma, sigma_next


# ---------------------------------------------------------------- sampling a Gaussian exactly
def marginal_variance(sigma):
    return (1 - sigma) ** 2 * STD**2 + sigma**2


def exact_velocity(x, sigma):
    """E[eps - data | x] for Gaussian data."""
    slope = (sigma - (1 - sigma) * STD**2) / marginal_variance(sigma)
    return slope * (x - (1 - sigma) * MEAN) - MEAN


# The relative error of the variance. Steps are first-order: the local error of order D^2 accumulates to a few
# D = 1/400, relative to a variance of at least 0.26. They start below sigma = 1, where the SDE's s changes by
# O(1) in a step. CPS adds up a deficit of sigma^2 (1 - cos(a pi/2))^2 per step, negligible at a = 0.1.
WALKS = [("ode", 0.7, 0.01), ("sde", 0.7, 0.01), ("cps", 0.1, 0.02)]


@pytest.mark.parametrize("name, noise_level, most", WALKS)
def test_sampling_reproduces_the_marginals(name, noise_level, most):
    """A step is affine in the state and in the noise, so +-1 std of each give its moments to rounding. The
    mean has no error of discretisation: v has mean -MEAN at every sigma."""
    grid = torch.linspace(0.9, 0, 401, dtype=torch.float64)
    centre, variance = 0.1 * MEAN, marginal_variance(grid[0])
    for sigma, sigma_next in zip(grid[:-1, None], grid[1:, None], strict=True):
        x = centre + variance.sqrt() * torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
        z = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
        step = flow.TRANSITIONS[name](sigma, sigma_next, noise_level)
        x = flow.step_mean(x, exact_velocity(x, sigma), step) + step.std * z
        centre, variance = x.mean(), x.var(correction=0)
        assert abs(centre - (1 - sigma_next) * MEAN) <= 1e-12
        assert abs(variance - marginal_variance(sigma_next)) <= most * marginal_variance(sigma_next)


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


# ---------------------------------------------------------------- likelihood, KL and the weights
def gaussian(mean, std, *_):
    return Independent(Normal(mean, std.expand_as(mean)), 1)


@pytest.mark.parametrize("name, by_formula", [("sde", sde_by_formula), ("cps", cps_by_formula)])
@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
def test_kl_weight_equals_torch_distributions(name, by_formula, noise_level):
    """Each sampler's own KL, at every state with noise; that of the SDE would be wrong for CPS."""
    steps = 3 if name == "cps" else 4  # its last step has none
    x, v, v_teacher, _, *levels = (each[:steps] for each in random_step())
    student, teacher = (gaussian(*by_formula(x, u, *levels, noise_level)) for u in (v, v_teacher))
    transition = flow.TRANSITIONS[name](*levels, noise_level)
    kl = flow.WEIGHTS["kl"](transition, None, None) * ((v - v_teacher) ** 2).sum(1)
    assert torch.allclose(kl, kl_divergence(student, teacher), rtol=1e-10, atol=1e-10)


def test_the_last_cps_step_has_no_finite_kl():
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    weight_T = flow.cps_transition(grid[:-1], grid[1:], 0.7).kl_weight()
    assert weight_T[:-1].isfinite().all() and weight_T[-1] == math.inf


def test_the_released_weight_divides_by_the_square_of_s():
    """The other weights: tests/test_train.py."""
    x, v, v_teacher, _, sigma, sigma_next = random_step()
    mean, _, s = sde_by_formula(x, v, sigma, sigma_next, 0.7)
    mean_teacher, *_ = sde_by_formula(x, v_teacher, sigma, sigma_next, 0.7)
    released = ((mean - mean_teacher) ** 2).sum(1) / (2 * s[:, 0] ** 2)
    transition = flow.sde_transition(sigma, sigma_next, 0.7)
    weight = flow.WEIGHTS["kl_released"](transition, sigma, sigma - sigma_next)
    assert torch.allclose(weight * ((v - v_teacher) ** 2).sum(1), released, rtol=1e-10)


# ---------------------------------------------------------------- targets, precision, the walk
def test_extrapolated_goes_on_along_what_was_learned():
    v, reference = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    assert flow.extrapolated(v, reference, 1.5).tolist() == [[4.0, -1.5]]


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


def test_a_state_must_be_left_and_its_step_carries_no_gradient():
    path = Path([1.0, 0.0], [flow.ode_transition(torch.tensor(1.0), torch.tensor(0.0), 0.0)], [0])
    walk = trajectory.walk(torch.zeros(1, 2), path, torch.arange(1))
    state = next(walk)
    with pytest.raises(AssertionError, match="state 0 was left without a step"):
        next(walk)
    state.step(torch.ones(1, 2, requires_grad=True))
    assert not state.x_next.requires_grad
