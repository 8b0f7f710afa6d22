"""Families through the real command and the stages: runs, ranks, shards, kills.

SD3 is what most other tests run, and tests/test_edit.py runs FLUX.1, FLUX.2 and Qwen-Image on pictures.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from opd import lora
from opd.config import DistillationConfig
from opd.model import Sampling
from opd.report import memory
from tests import forked, tiny
from tests.forked import losses
from tests.test_families import PROMPTS, Theirs, made, noise, ours
from tests.tiny import run

WEIGHTS = "student/adapter_model.safetensors"


def goes_on_and_two_ranks_are_one(place: Path, command, micro_batch: int, module="train", **environment):
    """To the same bits after one of two steps; up to rounding on two ranks, which take the first step with
    the weights replicated, and the second one, resumed, with the weights sharded."""
    whole, parts, two = (place / name for name in ("whole", "parts", "two"))
    for out, iterations in ((whole, 2), (parts, 1), (parts, 2)):
        run = forked.main(module, place / "log", command(out, iterations=iterations), **environment)
        assert run.ended() == 0, run.printed()
    assert (parts / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for iterations, shard_size in ((1, 1), (2, 2)):
        given = command(two, iterations=iterations, shard_size=shard_size, micro_batch=micro_batch)
        forked.finished(forked.ranks(place / str(shard_size), 2, given, module, **environment))
    assert losses(two) == pytest.approx(losses(whole), rel=1e-4)
    assert len(set(losses(whole))) == 2 and min(losses(whole)) > 0


@pytest.fixture(scope="module", params=["z_image", pytest.param("qwen_image", marks=pytest.mark.slow)])
def case(request, tmp_path_factory):
    yield from made(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def own(case):
    """(row of FIXTURES, its world: pipeline, adapters, prompts)."""
    return case.fixture, tiny.furnish(case.pipeline.parent, case.family)


def settings(own, **changes):
    fixture, world = own
    return world, {"resolution": fixture.resolution} | changes


def distil(own, out, **changes) -> list[str]:
    world, all_of_them = settings(own, out=str(out), prompts_per_step=2, **changes)
    once = {"steps": 2, "save_every": 1}
    return forked.command_line(tiny.config(world, **once | all_of_them))


def test_a_run_goes_on_to_the_same_bits_and_two_ranks_are_one(own, tmp_path):
    goes_on_and_two_ranks_are_one(tmp_path, partial(distil, own), micro_batch=1)


def test_a_distillation_pulls_the_student_to_its_teachers(own, case, tmp_path):
    """Three iterations; what they saved is an adapter of the pipeline, in which it does what it does here."""
    guided = {"checkpointing": True, "queries": 2, "guidance": 2.0, "teacher_guidance": 3.0}
    world, changes = settings(own, out=str(tmp_path / "run"), sample_every=3, **guided)
    cfg = tiny.config(world, **changes)
    folder, model, trained, _ = run(cfg)
    rows = folder.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / "run" / "samples" / "000003.png").is_file()
    theirs = Theirs(case, lora=tmp_path / "run" / "student")
    images = theirs.run(noise(model), 3, cfg.guidance)
    with trained.averaged():
        mine = drawn(model, model.trained, cfg.guidance)
    assert (mine - images).abs().max() < 1e-4
    assert (mine - drawn(model, lora.BASE, cfg.guidance)).abs().max() > 1e-3


def drawn(model, adapter: str, guidance: float) -> torch.Tensor:
    model.prepare(PROMPTS)
    return model.images(adapter, PROMPTS, [5, 0, 17], Sampling(3, 4, guidance))


@pytest.mark.parametrize("stage, shared", [(tiny.grpo_config, {"shared_start": True}), (tiny.nft_config, {})])
def test_rewards_move_the_policy(own, tmp_path, stage, shared):
    world, changes = settings(own, out=str(tmp_path / "run"), guidance=2.0, beta=0.1, **shared)
    folder, model, *_ = run(stage(world, **changes))
    rows = folder.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert (drawn(model, model.trained, 2.0) - drawn(model, lora.BASE, 2.0)).abs().max() > 1e-3


def test_memory_is_predicted(case):
    """A guided pass runs without a weight."""
    model = ours(case)
    cfg = DistillationConfig(teachers={"a": "base"}, prompts_per_step=2, group=1, rank=2)
    parts = memory.predict_run(cfg, model)
    guided = memory.predict_run(replace(cfg, guidance=3.0), model)
    assert guided["activations"] >= parts["activations"] > 0
    assert parts["base"] == sum(t.nbytes for t in model.transformer.state_dict().values())
