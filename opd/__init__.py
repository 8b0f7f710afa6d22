"""On-policy distillation of flow-matching image models."""

import os

# Read when torch loads OpenMP, so this package is imported before it. Threads that wait for work would else
# spin, and on a CPU that does something else a step takes twice to twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
