"""Every fast path finds the losses and gradients of the plain one: a sample at a time, eager, on one rank.

float32: sums in another order, a relative 1e-5. bfloat16: the same sums may end in another last bit of a
number, which has 8 of them, a difference of 2^-8. A loss is a mean of squared differences of two such
numbers, each about as large as their difference: 2 * 2 * 2^-8 = 2^-6 bounds it, and a gradient, a product of
two.
"""

import json

import pytest
import torch

import train
from opd import compiled, ranks
from opd.optim import Trained
from opd.setup import set_up
from tests import forked, tiny

DTYPES = {"float32": 1e-5, "bfloat16": 2**-6}
PATHS = {"batched": {"micro_batch": 8}, "recomputed": {"checkpointing": True}}


def numbers(world, dtype, **changes):
    """[loss and gradient norm of two steps]; 5 samples of two teachers and an anchor, 3 states, guided."""
    settings = {"prompts_per_step": 5, "group": 1, "steps": 3, "guidance": 2.0, "micro_batch": 1}
    cfg = tiny.config(world, dtype=dtype, **settings | changes)
    cfg.check(ranks.declared_world())
    model, data, rewards = set_up(cfg, ranks.start())
    stage = train.choose_stage(cfg, model, data, rewards, Trained(cfg, model))
    found = []
    for step in range(2):
        metrics, norm = stage.step(step)
        found += [metrics["loss"], norm]
    return found


@pytest.fixture(scope="module")
def plain(world):
    return {dtype: numbers(world, dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_on_one_rank(world, plain, path, dtype):
    assert numbers(world, dtype, **PATHS[path]) == pytest.approx(plain[dtype], rel=DTYPES[dtype])


@pytest.mark.slow
def test_compiled_in_bfloat16(world, plain, monkeypatch):
    """In float32: tests/test_compiled.py. The graphs are those of --compile, run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    found = numbers(world, "bfloat16", micro_batch=8, checkpointing=True, compile=True)
    torch._dynamo.reset()
    assert found == pytest.approx(plain["bfloat16"], rel=DTYPES["bfloat16"])


@pytest.mark.slow
def test_on_two_ranks_replicated_and_sharded(world, tmp_path, plain):
    printed = forked.finished(forked.ranks(tmp_path, 2, [str(world)], "tests.fast_paths_run"))
    (line,) = [line for line in printed.splitlines() if line.startswith("FOUND ")]
    for key, found in json.loads(line.removeprefix("FOUND ")).items():
        dtype = key.partition(",")[0]
        assert found == pytest.approx(plain[dtype], rel=DTYPES[dtype]), key
