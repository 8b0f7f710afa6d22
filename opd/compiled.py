"""torch.compile, one transformer block at a time: minutes once, then fewer and larger kernels at every step.

Blocks of one kind share their graphs, since what a graph depends on is the kind of block and whether there
are gradients: a handful in all, however many blocks, teachers, ranks and row counts. A graph that cannot be
captured whole is an error, and one too many is told: the usual silent return to eager code would only look
like a slow run.
"""

import functools
import shutil
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from opd import lora
from opd.errors import require
from opd.ranks import say

BACKEND = "inductor"
GRAPHS = 32
"""At most so many for the forward pass of one class of blocks. SD3.5 has four kinds of blocks (the first,
whose input has no gradient; dual attention; plain; the last), each with a gradient, with the adapter in the
weight and with the student's beside it, in a batch of one row or of several."""


def check_compiler() -> None:
    """ValueError where PyTorch would find no compiler to build its kernels with, on a CPU or for a GPU."""
    found = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    require(len(found) > 0, "--compile needs a C++ compiler (g++) and there is none; leave out --compile")


def compile_blocks(blocks: list[nn.Module]) -> None:
    """From outside, after checkpointing is set and before weights are sharded: both wrap compiled code."""
    torch._dynamo.config.recompile_limit = GRAPHS
    # On a CPU, tanh as an exponential takes a third of the time. Its error is absolute (1e-7), and GELU adds
    # one to it.
    torch._inductor.config.cpp.use_decompose_tanh = True
    for block in blocks:
        block.forward = with_any_rows(block)


def with_any_rows(block: nn.Module) -> Callable:
    """The block's forward pass, compiled, with the number of rows left open in every tensor: teachers see
    other numbers of samples than the student, and guidance doubles them."""
    eager = block.forward
    fast = torch.compile(eager, backend=BACKEND, fullgraph=True)
    layers = [layer for layer in block.modules() if isinstance(layer, lora.LoraLinear)]

    @functools.wraps(eager)
    def forward(*arguments, **keywords):
        for value in [*arguments, *keywords.values()]:
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        with lora.merged(layers):
            try:
                return fast(*arguments, **keywords)
            except FailOnRecompileLimitHit:
                say_once(f"--compile: more than {GRAPHS} graphs of {type(block).__name__}; the rest is eager")
                return eager(*arguments, **keywords)

    return forward


say_once = functools.cache(say)


def graphs() -> int:
    """How many graphs this process has compiled so far."""
    return counters["stats"]["unique_graphs"]
