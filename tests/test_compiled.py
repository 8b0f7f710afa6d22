"""Compiled blocks against eager ones: same losses, few graphs, none later, never a silent return to eager.

The graphs are captured, counted and run as they are, which skips what takes a compiler minutes: the backend
"eager" has those of the forward pass, and "aot_eager", where losses are compared, the backward ones too.
tests/test_fast_paths.py does so in bfloat16; opd/bench/BENCHMARKS.md has losses of real kernels.
"""

import shutil

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from opd import compiled
from opd.families import z_image
from tests import tiny, tiny_families


@pytest.fixture
def captured(monkeypatch):
    """Graphs are captured and run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def steps(world, count=4, **changes):
    """([loss and gradient norm per step], [graphs compiled up to each])."""
    *_, stage = tiny.build(tiny.config(world, **changes))
    before = compiled.graphs()
    numbers, graphs = [], []
    for step in range(count):
        metrics, norm = stage.step(step)
        numbers += [metrics["loss"], norm]
        graphs.append(compiled.graphs() - before)
    return numbers, graphs


# Two kinds of blocks, the first and the last, for the student and for the teachers; then states without a
# gradient, the base, and micro-batches of 3, whose teachers see one row or several.
@pytest.mark.parametrize(
    "backend, changes, most",
    [
        ("aot_eager", {"guidance": 2.0, "teacher_guidance": 3.0, "checkpointing": True}, 4),
        ("eager", {"queries": 1, "mix": {"red": 3}, "micro_batch": 3, "anchor": "base", "steps": 3}, 12),
    ],
    ids=str,
)
def test_losses_are_those_of_eager_blocks_and_nothing_recompiles_later(
    world, captured, monkeypatch, backend, changes, most
):
    """Later: after the second update, though row counts and states change from update to update."""
    monkeypatch.setattr(compiled, "BACKEND", backend)
    plain, none = steps(world, **changes)
    fast, graphs = steps(world, compile=True, **changes)
    assert fast == pytest.approx(plain, rel=1e-5)
    assert none == [0] * 4
    assert 0 < graphs[1] <= most and graphs[1:] == [graphs[1]] * 3


def test_more_blocks_need_no_more_graphs(tmp_path, captured):
    """The first block, whose input has no gradient, all middle ones, the last one: a model of five blocks
    runs on the graphs of one of three."""
    counts = []
    for layers in (3, 5):
        world = tiny.make_world(tmp_path / str(layers), layers)
        counts += steps(world, count=1, compile=True, steps=1)[1]
    assert 0 < counts[0] <= 5 and counts[1] == 0


def test_a_graph_too_many_is_an_error(world, captured, monkeypatch):
    monkeypatch.setattr(compiled, "GRAPHS", 1)
    with pytest.raises(FailOnRecompileLimitHit):
        steps(world, count=1, compile=True)


def test_a_block_that_cannot_be_captured_is_an_error(captured):
    class Printing(torch.nn.Module):
        def forward(self, x):
            print(float(x.sum()))
            return x

    block = Printing()
    compiled.compile_blocks([block])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        block(torch.ones(2, 3))


def test_z_image_compiles(tmp_path, captured):
    """Masks, rotary embeddings in complex numbers, texts of several lengths."""
    tiny_families.make_z_image(tmp_path / "pipeline")
    world = tiny.furnish(tmp_path, z_image)
    changes = {"steps": 1, "anchor": "", "anchor_weight": 0.0}
    plain, _ = steps(world, count=2, **changes)
    fast, graphs = steps(world, count=2, compile=True, **changes)
    assert fast == pytest.approx(plain, rel=1e-5)
    assert graphs[0] == graphs[1] > 0


def test_real_kernels_compute_what_the_block_computes():
    torch._dynamo.reset()
    block = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(approximate="tanh"))
    x = torch.randn(5, 8)
    expected = block(x).detach()
    compiled.compile_blocks([block])
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    torch._dynamo.reset()


def test_without_a_compiler_the_flag_is_refused(world, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs a C.. compiler"):
        tiny.build(tiny.config(world, compile=True))
