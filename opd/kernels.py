"""The memory-bound ops of the training loop: noise, the stochastic step, the distillation loss, both in one
pass, and the log-probability of a step. The code is the repository's folder `kernels/`.

That folder is no package of its own: on the path, a top-level `kernels` would hide the Hub's package of that
name from transformers. It holds this module's submodules instead, here and in an installed wheel.
"""

from pathlib import Path

_installed = Path(__file__).with_suffix("")
_in_the_repository = Path(__file__).parents[1] / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _in_the_repository)]

from opd.kernels.noise import normal  # noqa: E402
from opd.kernels.ops import log_prob, opd_step, sde_step, velocity_mse  # noqa: E402

__all__ = ["log_prob", "normal", "opd_step", "sde_step", "velocity_mse"]
