"""On-policy distillation of flow-matching image models."""

import os
import sys

# Read when torch loads OpenMP, so this package is imported before it. Threads that wait for work spin a few
# microseconds and then sleep. If they slept at once, the thousands of small products of a step would wait for
# their waking, twice as long on idle cores; if they spun on, other work on the cores would make it so.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Read with the first tensor on a GPU. Texts and teachers' shares differ in size from micro-batch to
# micro-batch; segments that can grow leave no gaps that nothing fits.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def say_what_ended(kind, error, trace) -> None:
    """A Ctrl-C that nobody handles, such as one in the seconds of the imports, is a line and no traceback."""
    if kind is KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_what_ended
