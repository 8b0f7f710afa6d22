"""Every family through the real command and through single steps: ranks, shards, kills, losses that fall,
and what it refuses."""

import shutil

import pytest
import torch

from opd import ranks
from opd.diagnostics import STATISTICS
from opd.families import load_family
from opd.runfolder import latest_state
from opd.setup import set_up
from tests import forked, tiny, tiny_grpo
from tests.test_families import FIXTURES
from tests.test_ranks import losses
from tests.test_signals import flags, steps_saved

WEIGHTS = "student/adapter_model.safetensors"


@pytest.fixture(scope="module", params=[name for name in FIXTURES if name != "sd3 with T5"])
def own(request, tmp_path_factory):
    """(row of FIXTURES, its world: pipeline, adapters, prompts)."""
    fixture = FIXTURES[request.param]
    folder = tmp_path_factory.mktemp(fixture.family)
    fixture.build(folder / "pipeline")
    return fixture, tiny.furnish(folder, load_family(fixture.family))


def settings(own, **changes):
    fixture, world = own
    return world, {"family": fixture.family, "resolution": fixture.resolution} | changes


def distil(own, out, **changes) -> list[str]:
    """Arguments of train.py: two steps, each of them saved."""
    world, all_of_them = settings(own, out=str(out), prompts_per_step=2, **changes)
    once = {"steps": 2, "iterations": 2, "save_every": 1}
    return flags(tiny.config(world, **once | all_of_them), "mini")


def test_a_killed_run_and_two_ranks_replicated_then_sharded_are_one_rank(own, tmp_path):
    """A run that is killed after its first checkpoint goes on to the same bits. Two ranks take the first
    step with the weights replicated, and the second one, resumed, with the weights sharded."""
    if own[0].family == "sd3":
        pytest.skip("tests/test_kills.py, test_ranks.py and test_shards.py run this family")
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    run = forked.train(tmp_path / "log", distil(own, whole))
    assert run.ended() == 0, run.printed()

    run = forked.train(tmp_path / "log", distil(own, killed, iterations=1000))
    forked.wait_for(lambda: latest_state(killed) > 0)
    run.process.kill()
    run.process.join()
    done, longer = max(2, steps_saved(killed)), tmp_path / "longer"
    shutil.copytree(whole, longer)
    for folder in (killed, longer):
        if folder == killed or done > 2:  # it was killed after more steps than `whole` has
            run = forked.train(tmp_path / "log", distil(own, folder, iterations=done))
            assert run.ended() == 0, run.printed()
    assert (killed / WEIGHTS).read_bytes() == (longer / WEIGHTS).read_bytes()

    for iterations, shard_size in ((1, 1), (2, 2)):
        given = distil(own, two, iterations=iterations, shard_size=shard_size, micro_batch=1)
        runs = forked.ranks(tmp_path / str(shard_size), 2, given)
        assert [run.ended() for run in runs] == [0, 0], runs[0].printed()
    assert losses(two) == pytest.approx(losses(whole), rel=1e-4)
    assert len(set(losses(whole))) == 2 and min(losses(whole)) > 0


def test_a_step_of_distillation_lowers_its_loss(own):
    """On the prompts and the noise that it was taken on."""
    world, changes = settings(own, lr=3e-3, guidance=2.0, teacher_guidance=2.0)
    *_, stage = tiny.build(tiny.config(world, **changes))
    before, _ = stage.step(0)
    again = stage.accumulate(stage.plan(0))
    again.collect()
    assert 0 < again.metrics()["loss"] < 0.99 * before["loss"]


def test_a_step_of_grpo_lowers_its_loss(own, monkeypatch):
    """Of the transitions that it was taken on: the second epoch sees them after one step. Before it the
    ratios are 1, and advantages add up to 0."""
    world, changes = settings(own, lr=1e-3, epochs=2, clip_range=0.5, prompts_per_step=2)
    *_, stage = tiny_grpo.build(world, **changes)
    learn, seen = stage.learn, []

    def noted(*arguments):
        sums, drift = learn(*arguments)
        seen.append(sums[STATISTICS.index("policy")].item())
        return sums, drift

    monkeypatch.setattr(stage, "learn", noted)
    stage.step(0)
    first, second = sum(seen[: len(seen) // 2]), sum(seen[len(seen) // 2 :])
    assert abs(first) < 1e-5 and second < -1e-4


# ---- what is refused before weights load -------------------------------------------------------------------


def refused(own, tmp_path, monkeypatch, message, **changes):
    """A run with these settings ends before it loads a weight."""
    world, all_of_them = settings(own, out=str(tmp_path / "run"), **changes)
    for part in ("load_transformer", "load_vae", "load_text"):
        monkeypatch.setattr(load_family(all_of_them["family"]), part, None)
    cfg = tiny.config(world, **all_of_them)
    cfg.check(1)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        set_up(cfg, ranks.start())


def test_a_resolution_that_does_not_divide_is_refused(own, tmp_path, monkeypatch):
    for size in ("7", "8x7", "7x8"):
        message = "resolution 7 does not fit this model: use a multiple of 4"
        refused(own, tmp_path, monkeypatch, message, resolution=("8", size))


def test_the_pipeline_of_another_family_is_refused(own, tmp_path, monkeypatch):
    mine, other = load_family(own[0].family), "z_image"
    if own[0].family == other:
        other = "sd3"
    wanted = load_family(other).PIPELINE
    message = f"is a {mine.PIPELINE}; this family loads a {wanted} .choose another with --family"
    refused(own, tmp_path, monkeypatch, message, family=other)


def test_a_missing_encoder_is_refused(own, tmp_path, monkeypatch):
    for part in load_family(own[0].family).TEXT:
        if not (own[1] / "pipeline" / part).is_dir():
            continue  # sd3's third
        copy = tmp_path / part
        shutil.copytree(own[1] / "pipeline", copy)
        shutil.rmtree(copy / part)
        refused(own, tmp_path, monkeypatch, f"lacks its folders? .*{part}", model=str(copy))


def test_an_adapter_of_another_size_is_refused(own, tmp_path, monkeypatch):
    family = load_family(own[0].family)
    lora = tiny.random_lora(own[1] / "pipeline", seed=3, family=family)
    layer = next(iter(lora.A))
    lora.A[layer] = torch.ones(4, 20)
    tiny.save(lora, tmp_path / "red")
    teachers = {"red": str(tmp_path / "red"), "blue": str(own[1] / "blue")}
    refused(own, tmp_path, monkeypatch, "it was made for another base", teachers=teachers)
