"""Our emulation of the STRUCTURE of the released Flow-OPD loop, from our own modules: not the released code.

What is emulated: trajectories are rolled out to their end without gradients, and all their states are kept;
then the student's forward pass runs a second time over the kept states. Every teacher, and the anchor unless
it is the base, is a whole float32 transformer of its own, that computes under autocast in the run's dtype.
What is left out: the VAE and the rewards of the rollout, data loading, the released loss; micro-batches are
ours. The loss is ours (eq. 16) on the same samples with the same noise, so that both structures must find the
same gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from opd.teachers import Teacher
from opd.trajectory import State
from train import Distillation


class Released(Distillation):
    """The loop of train.py on trajectories that were made before, taught by the whole transformers of
    `model.teachers`."""

    def __init__(self, cfg, model, *others):
        super().__init__(cfg, model, *others)
        for name in model.teachers:
            self.teachers[name] = in_mixed_precision(self.teachers[name], model.device, model.dtype)

    def walk(self, step: int, index: list[int]) -> Iterator[State]:
        """The states that are trained on, of trajectories that the student has walked to their end."""
        plan, kept = self.plan(step), []
        text = self.model.text([plan.prompts_N[n].asked for n in index])
        with torch.no_grad():
            for state in super().walk(step, index):
                state.step(self.model.velocity(state.x, state.sigma_B, text, self.cfg.guidance))
                kept.append(state)
        return (state for state in kept if state.i in plan.queried)


def in_mixed_precision(teacher: Teacher, device: torch.device, dtype: torch.dtype) -> Teacher:
    def velocity(x_BCHW: Tensor, sigma_B: Tensor, prompts: list[str]) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return teacher(x_BCHW, sigma_B, prompts)

    return velocity
