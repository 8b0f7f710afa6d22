"""Estimators of the gradient: many samples of a tiny linear model against the closed form, in float64."""

import pytest
import torch

from opd import flow
from opd.estimators import ESTIMATORS, pathwise
from opd.trajectory import State

DIMENSIONS, SAMPLES = 3, 60_000


class Tiny:
    """v = x W at one state x, two teachers, and SAMPLES steps from there."""

    def __init__(self, sampler="sde", scale=1.0):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        sigma, sigma_next = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
        self.transition = flow.TRANSITIONS[sampler](sigma, sigma_next, 0.7)
        self.x = draw(1, DIMENSIONS).expand(SAMPLES, DIMENSIONS)
        self.W = draw(DIMENSIONS, DIMENSIONS).requires_grad_()
        self.targets = [scale * draw(1, DIMENSIONS).expand_as(self.x) for _ in range(2)]
        self.alpha_BK = torch.tensor([[1.0, 0.3]], dtype=torch.float64).expand(SAMPLES, 2)
        self.w_B = torch.full((SAMPLES,), 0.7, dtype=torch.float64)

    def state(self):
        index = torch.arange(len(self.x))
        return State(0, self.x.contiguous(), torch.full((len(self.x),), 0.6), self.transition, 7, index)

    def gradients(self, name):
        """(mean over samples of the gradient in W, its standard error, summed variance of a sample's)."""
        v = (self.x @ self.W).detach().requires_grad_()
        loss_B, *_ = ESTIMATORS[name](self.state(), v, self.targets, self.alpha_BK, self.w_B)
        (by_v_BD,) = torch.autograd.grad(loss_B.sum(), v)
        each = torch.einsum("bi,bj->bij", self.x, by_v_BD)  # dv/dW is x, for every sample by itself
        return each.mean(0), each.std(0) / SAMPLES**0.5, float(each.var(0).sum())


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_pg_averages_to_the_pathwise_gradient_and_pg_state_to_zero(sampler, capsys):
    tiny = Tiny(sampler)
    exact, _, none = tiny.gradients("pathwise")
    pg, error, variance = tiny.gradients("pg")
    zero, error_of_zero, variance_of_zero = tiny.gradients("pg_state")
    assert exact.norm() > 20 * error.norm()  # else agreement within errors would say nothing
    assert ((pg - exact).abs() < 4 * error).all()
    assert (zero.abs() < 4 * error_of_zero).all() and ((zero - exact).abs() > 4 * error_of_zero).any()
    assert none < 1e-12 < variance
    with capsys.disabled():
        print(f"\n{sampler}, variance of a sample's gradient: pg {variance:.3g}", end="")
        print(f", pg_state {variance_of_zero:.3g}; exact, squared: {float(exact.norm()) ** 2:.3g}")


def test_pg_live_is_pathwise_and_a_score_of_mean_zero_until_it_clamps():
    tiny = Tiny()
    exact, *_ = tiny.gradients("pathwise")
    live, error, _ = tiny.gradients("pg_live")
    assert ((live - exact).abs() < 4 * error + 1e-12).all()
    far = Tiny(scale=30.0)  # distances of hundreds: the clamp cuts the pathwise part off
    clamped, error, _ = far.gradients("pg_live")
    assert (clamped.abs() < 4 * error).all() and far.gradients("pathwise")[0].norm() > 100 * error.norm()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_step_alike_and_log_the_same_distances(name):
    """The draw does not depend on how the gradient is made."""
    tiny = Tiny()
    v = (tiny.x @ tiny.W).detach().requires_grad_()
    arguments = (tiny.state(), v, tiny.targets, tiny.alpha_BK, tiny.w_B)
    _, squares, x_next = pathwise(*arguments)
    _, same, other = ESTIMATORS[name](*arguments)
    assert torch.equal(x_next, other) and torch.allclose(squares, same, rtol=1e-12)
    assert not other.requires_grad
