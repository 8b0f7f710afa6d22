"""On-policy distillation of flow-matching image models."""

import os

# Read when torch loads OpenMP, so this package is imported before it. Threads that wait for work would else
# spin, and on a CPU that does something else a step takes twice to twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Read with the first tensor on a GPU. Texts and teachers' shares differ in size from micro-batch to
# micro-batch; segments that can grow leave no gaps that nothing fits.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
