"""The memory-bound ops of the training loop: the stochastic step, its log-probability, the distillation loss, and
step + loss in one pass."""

from kernels.noise import normal
from kernels.opd_step import opd_step
from kernels.sde_log_prob import sde_log_prob
from kernels.sde_step import sde_step
from kernels.velocity_mse import velocity_mse

__all__ = ["normal", "opd_step", "sde_log_prob", "sde_step", "velocity_mse"]
