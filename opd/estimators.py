"""How a gradient comes from the distance to the teachers: eq. 15 in closed form, eq. 14 in three readings.

    pathwise   w sum_k alpha_k |v - v_k|^2, the weighted KL itself (eq. 12, 15, 16); exact, the default
    pg         score function: an advantage of the step that was drawn, A = log p_k(x') - log p(x'), a
               constant; its mean gradient is pathwise's, with more variance
    pg_state   the same with the KL of the state as advantage, a constant: eq. 14 as it is written. Given the
               state, E[A grad log p] = A grad 1 = 0: it teaches nothing, and is here to be seen to
    pg_live    the released code's: the advantage -KL is NOT a constant, so that pathwise's gradient flows
               through it, and it is clamped at +-5 nats per dimension, where that gradient stops

All have one signature, (state, v, targets, alpha_BK, w_B) -> (loss_B, |v_b - v_k,b|^2 (B, K) for the log, the
next state of v's own step, a constant). Likelihoods are means over the d dimensions, as everywhere; where two
of them meet in a product, one factor d makes up for it. The released code multiplies advantages (B, 1) by
ratios (B,) to a (B, B) matrix, which ties the samples of a micro-batch together; that is not repeated here.
"""

from collections.abc import Callable

from torch import Tensor

from opd import flow, kernels
from opd.trajectory import State

Targets = list[Tensor | None]
Estimate = tuple[Tensor, Tensor, Tensor]
Estimator = Callable[[State, Tensor, Targets, Tensor, Tensor], Estimate]

LARGEST_ADVANTAGE = 5.0  # of the released code, nats per dimension


def pathwise(state: State, v: Tensor, targets: Targets, alpha_BK: Tensor, w_B: Tensor) -> Estimate:
    """Eq. 16 at one state: loss, its gradient, and the next state in one pass over memory."""
    loss_B, squares_BK, x_next, _ = kernels.opd_step(
        state.x, v, targets, alpha_BK, w_B, state.transition, seed=state.seed, index=state.index
    )
    return loss_B, squares_BK, x_next


def pg(state: State, v: Tensor, targets: Targets, alpha_BK: Tensor, w_B: Tensor) -> Estimate:
    """-d A log p(x'), A = w / w_kl sum_k alpha_k (log p_k(x') - log p(x')): the constants of the two
    log-probabilities cancel, and what is left are distances to the velocity that was taken."""
    _, squares_BK = kernels.velocity_mse(v.detach(), targets, alpha_BK, w_B)
    log_prob_B, x_next = own_step(state, v)
    taken = flow.velocity_taken(x_next, state.x, state.transition)
    theirs_B, _ = kernels.velocity_mse(taken, targets, alpha_BK, w_B)
    own_B, _ = kernels.velocity_mse(taken, [v.detach()], alpha_BK.sum(1, keepdim=True), w_B)
    advantage_B = own_B - theirs_B
    return -dimensions(v) * advantage_B * log_prob_B, squares_BK, x_next


def pg_state(state: State, v: Tensor, targets: Targets, alpha_BK: Tensor, w_B: Tensor) -> Estimate:
    """-d A log p(x'), A = -w sum_k alpha_k |v - v_k|^2, a constant given the state."""
    distance_B, squares_BK = kernels.velocity_mse(v.detach(), targets, alpha_BK, w_B)
    log_prob_B, x_next = own_step(state, v)
    return dimensions(v) * distance_B * log_prob_B, squares_BK, x_next


def pg_live(state: State, v: Tensor, targets: Targets, alpha_BK: Tensor, w_B: Tensor) -> Estimate:
    """-A p(x') / p_old(x'), A = -w sum_k alpha_k |v - v_k|^2 with its gradient, clamped at +-5."""
    distance_B, squares_BK = kernels.velocity_mse(v, targets, alpha_BK, w_B)
    log_prob_B, x_next = own_step(state, v)
    ratio_B = (log_prob_B - log_prob_B.detach()).exp()
    advantage_B = -distance_B.clamp(max=LARGEST_ADVANTAGE)
    return -advantage_B * ratio_B, squares_BK, x_next


SAMPLED: dict[str, Estimator] = {"pg": pg, "pg_state": pg_state, "pg_live": pg_live}
"""Those that need the likelihood of the student's own steps, and so their noise."""
ESTIMATORS: dict[str, Estimator] = {"pathwise": pathwise} | SAMPLED


def own_step(state: State, v: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(x' | x) under v (B,), differentiable in v; the next state x' that v draws, a constant)."""
    x_next, _ = kernels.sde_step(state.x, v.detach(), state.transition, seed=state.seed, index=state.index)
    return kernels.log_prob(x_next, state.x, v, state.transition), x_next


def dimensions(v: Tensor) -> int:
    """d: how many numbers a sample has."""
    return v[0].numel()
