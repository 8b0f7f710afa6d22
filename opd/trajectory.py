"""The one walk from noise to data: distillation, GRPO and sampling all go this way, state by state.

    for state in walk(x, path, index):
        v = ...                       # whatever the caller wants to know at state.x
        state.step(v)                 # the walk goes on from state.x_next

The caller's body decides what happens at a state (a loss, a backward pass, nothing). Stage grpo keeps states:
a kept state says where the sample was, where it went, and how likely that was.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import kernels
from opd.flow import Transition


@dataclass(frozen=True)
class Path:
    """T steps: the T + 1 noise levels between them, each step's coefficients, and the seed of its noise."""

    sigmas: list[float]
    transitions: list[Transition]
    seeds: list[int]


@dataclass
class State:
    """State number `i` of a batch of trajectories: x (B, ...) float32 at noise level sigma (B,)."""

    i: int
    x: Tensor
    sigma_B: Tensor
    transition: Transition
    seed: int
    index: Tensor
    """(B,) int64, the samples' numbers in the global batch: with `seed` they determine the step's noise."""
    x_next: Tensor | None = None
    log_prob_B: Tensor | None = None
    """log p(x_next | x), mean over dimensions; +inf for a step without noise."""

    def step(self, v: Tensor) -> None:
        """Take the step with velocity v (B, ...), as a constant: sets x_next (float32) and log_prob_B."""
        self.x_next, self.log_prob_B = kernels.sde_step(
            self.x, v.detach(), self.transition, seed=self.seed, index=self.index
        )


def walk(x: Tensor, path: Path, index: Tensor) -> Iterator[State]:
    """Visit the states of `path` from x (B, ...) float32 on. The body of the loop must call `state.step` or
    set `state.x_next` before it asks for the next state."""
    for i, transition in enumerate(path.transitions):
        sigma_B = torch.full((len(x),), path.sigmas[i], device=x.device)
        state = State(i, x, sigma_B, transition, path.seeds[i], index)
        yield state
        assert state.x_next is not None, f"state {i} was left without a step"
        x = state.x_next
