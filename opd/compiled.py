"""torch.compile, one transformer block at a time: minutes once, then fewer and larger kernels at every step.

Blocks of one kind share their graphs, since what a graph depends on is the kind of block, whether there are
gradients, and the dtype and rank of the adapter in the slot: a handful in all, however many blocks, teachers
and row counts. A graph that cannot be captured whole is an error, and so is one too many: the usual silent
return to eager code would only look like a slow run.
"""

import functools
import shutil
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from opd.flags import require

BACKEND = "inductor"
GRAPHS = 32
"""At most so many for the forward pass of one class of blocks. SD3.5 has four kinds of blocks (the first,
whose input has no gradient; dual attention; plain; the last), each with student, teacher, base or without
gradient, in a batch of one row or of several."""


def check_compiler() -> None:
    """ValueError where PyTorch would find no compiler to build its kernels with, on a CPU or for a GPU."""
    found = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    require(len(found) > 0, "--compile needs a C++ compiler (g++) and there is none; leave out --compile")


def compile_blocks(blocks: list[nn.Module]) -> None:
    """From outside, after checkpointing is set and before weights are sharded: both wrap compiled code."""
    # On a CPU, tanh as an exponential takes a third of the time. Its error is absolute (1e-7), and GELU adds
    # one to it.
    torch._inductor.config.cpp.use_decompose_tanh = True
    torch._inductor.config.post_grad_custom_post_pass = BiasAsAddition()
    for block in blocks:
        block.forward = with_any_rows(
            torch.compile(block.forward, backend=BACKEND, fullgraph=True, recompile_limit=GRAPHS)
        )


class BiasAsAddition(CustomGraphPass):
    """x W + b as a product and an addition, on a CPU: there the product with a bias first copies the bias to
    every row, whereas an addition joins the pass over the activations that comes next. For GPUs inductor does
    so by itself."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        aten = torch.ops.aten
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, left, right = node.args
            of_rows = bias.meta["val"].dim() == 1 and not node.kwargs
            if not of_rows or node.meta["val"].device.type != "cpu":
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (left, right))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta["val"] = total.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What the compiler's cache knows this version by."""
        return get_hash_for_files((__file__,))


def with_any_rows(forward: Callable) -> Callable:
    """`forward` with the number of rows left open in every tensor: teachers see other numbers of samples than
    the student, and guidance doubles them."""

    @functools.wraps(forward)
    def marked(*arguments, **keywords):
        for value in [*arguments, *keywords.values()]:
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return forward(*arguments, **keywords)

    return marked


def graphs() -> int:
    """How many graphs this process has compiled so far."""
    return counters["stats"]["unique_graphs"]
