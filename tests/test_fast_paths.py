"""Every fast path finds the losses and gradients of the plain one: a sample at a time, eager. Several ranks:
tests/test_ranks.py.

float32: sums in another order, a relative 1e-5. bfloat16: the same sums may end in another last bit of a
number, which has 8 of them, a difference of 2^-8. A loss is a mean of squared differences of two such
numbers, each about as large as their difference: 2 * 2 * 2^-8 = 2^-6 bounds it, and a gradient, a product of
two.

Graphs are captured, counted and run as they are, which skips what takes a compiler minutes: the backend
"eager" has those of the forward pass, and "aot_eager", where losses are compared, the backward ones too.
opd/bench/BENCHMARKS.md has losses of real kernels.
"""

import pytest
import torch

from opd import compiled, lora
from opd.families import z_image
from tests import tiny, tiny_families

DTYPES = {"float32": 1e-5, "bfloat16": 2**-6}
PATHS = {"batched": {"micro_batch": 8}, "recomputed": {"checkpointing": True}}


def numbers(world, dtype, **changes):
    """[loss and gradient norm of two steps]; 5 samples of two teachers and an anchor, 3 states, guided."""
    settings = {"prompts_per_step": 5, "group": 1, "steps": 3, "guidance": 2.0, "micro_batch": 1}
    return steps(world, 2, dtype=dtype, **settings | changes)[0]


@pytest.fixture(scope="module")
def plain(world):
    return {dtype: numbers(world, dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_on_one_rank(world, plain, path, dtype):
    assert numbers(world, dtype, **PATHS[path]) == pytest.approx(plain[dtype], rel=DTYPES[dtype])


@pytest.mark.slow
def test_compiled_in_bfloat16(world, plain, monkeypatch):
    """In float32: below. The graphs are those of --compile, run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    found = numbers(world, "bfloat16", micro_batch=8, checkpointing=True, compile=True)
    torch._dynamo.reset()
    assert found == pytest.approx(plain["bfloat16"], rel=DTYPES["bfloat16"])


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
GRAPHS = [
    ("aot_eager", {"guidance": 2.0, "teacher_guidance": 3.0, "checkpointing": True}, 4),
    ("eager", {"queries": 1, "mix": {"red": 3}, "micro_batch": 3, "anchor": "base", "steps": 3}, 12),
]


@pytest.mark.parametrize("backend, changes, most", GRAPHS, ids=str)
def test_losses_are_eager_and_nothing_recompiles_later(world, captured, monkeypatch, backend, changes, most):
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


@pytest.mark.slow
def test_z_image_compiles(tmp_path, captured):
    """Masks, rotary embeddings in complex numbers, texts of several lengths."""
    tiny_families.make_z_image(tmp_path / "pipeline")
    world = tiny.furnish(tmp_path, z_image)
    changes = {"steps": 1, "anchor": "", "anchor_weight": 0.0}
    plain, _ = steps(world, count=2, **changes)
    fast, graphs = steps(world, count=2, compile=True, **changes)
    assert fast == pytest.approx(plain, rel=1e-5)
    assert graphs[0] == graphs[1] > 0


def test_no_count_of_rows_and_no_rank_of_a_teacher_needs_a_graph_of_its_own(world, tmp_path, captured):
    """Four tokens of image and 24 of text a sample, layers of 32 inputs: fewer rows than inputs, and more."""
    sources = {"red": str(world / "red")}
    for rank in (2, 8):
        adapter = tiny.random_lora(world / "pipeline", seed=rank, rank=rank)
        sources[f"of {rank}"] = str(tiny.save(adapter, tmp_path / str(rank)))
    cfg = tiny.config(world, teachers=sources, routes={"blue": "red"}, anchor="red", compile=True)
    model = tiny.build(cfg)[1]
    before, graphs = compiled.graphs(), []
    for rows in (1, 2, 3, 5, 8, 9, 16):
        x, sigma_B = torch.randn(rows, *model.shape), torch.full((rows,), 0.5)
        text = model.text(["a red dot"] * rows)
        with torch.no_grad():
            for name in (*sources, "base", "student"):
                with lora.use(model.transformer, name):
                    model.velocity(x, sigma_B, text, guidance=1.0)
        with lora.use(model.transformer, "student"):
            model.velocity(x, sigma_B, text, guidance=1.0).sum().backward()
        graphs.append(compiled.graphs() - before)
    assert graphs == [4] + [8] * 6  # two kinds of blocks, with a gradient and without; one row, and several


def test_a_graph_too_many_is_told_and_runs_eagerly(world, captured, monkeypatch, capsys):
    plain, _ = steps(world, count=2)
    monkeypatch.setattr(compiled, "GRAPHS", 1)
    fast, graphs = steps(world, count=2, compile=True)
    assert fast == pytest.approx(plain, rel=1e-5) and graphs == [1, 1]
    assert capsys.readouterr().out.count("the rest is eager") == 1


@pytest.mark.slow
def test_real_kernels_compute_what_the_block_computes():
    torch._dynamo.reset()
    block = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(approximate="tanh"))
    x = torch.randn(5, 8)
    expected = block(x).detach()
    compiled.compile_blocks([block])
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    torch._dynamo.reset()
