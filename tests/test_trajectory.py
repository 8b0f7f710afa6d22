"""The walk: every sampler's steps in float64, noise by sample. That steps are the papers': test_flow.py."""

import pytest
import torch

from opd import flow, kernels, trajectory
from opd.trajectory import Path

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


def test_a_path_may_end_early_and_a_state_must_be_left():
    visited = []
    for state in trajectory.walk(torch.zeros(1, 2), path_of("ode").until(2), torch.arange(1)):
        state.step(state.x)
        visited.append(state.i)
    assert visited == [0, 1]
    walk = trajectory.walk(torch.zeros(1, 2), path_of("ode"), torch.arange(1))
    next(walk)
    with pytest.raises(AssertionError, match="state 0 was left without a step"):
        next(walk)


def test_the_velocity_carries_no_gradient_into_the_next_state():
    v = torch.ones(1, 2, requires_grad=True)
    state = next(trajectory.walk(torch.zeros(1, 2), path_of("sde"), torch.arange(1)))
    state.step(v)
    assert not state.x_next.requires_grad
