"""Every stage and family on a pretended GPU (tests/emulated.py): no operation mixes devices, and a step waits
for the device no more often than said here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from opd import ranks
from tests import emulated, tiny
from tests.forked import free_port, rows
from tests.test_evaluate import command as evaluate
from tests.test_families import made
from tests.tiny_grpo import BRIGHT

IN_THERE = os.environ.get(emulated.LOADED) == "1"
there = pytest.mark.skipif(not IN_THERE, reason="runs by tests/emulated.py")


REASONS = {
    "is that process": IN_THERE,
    "the emulated GPU is built by g++, and there is none": shutil.which("g++") is None,
    "this PyTorch has a guard for CUDA of its own": torch.version.cuda is not None,
}
REASON = next((reason for reason, holds in REASONS.items() if holds), "")
outside = pytest.mark.skipif(REASON != "", reason=REASON)


def begun(*arguments, **environment):
    """Its guard must be there before torch is, hence the separate process."""
    command = [sys.executable, "-m", "tests.emulated", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"} | environment
    shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **shown)


@outside
@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_on_the_emulated_gpu(which):
    process = begun("-m", which)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-7000:]


def shared(world):
    """Settings whose step has a turn with padding on two ranks."""
    other = {"dtype": "float32", "prompts_per_step": 3, "group": 1, "micro_batch": 1}
    return tiny.config(world, **SMALL | other)


@outside
@pytest.mark.slow
def test_two_ranks_with_a_gpu_each_have_the_losses_of_a_cpu(world, tmp_path):
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    together["OPD_LOSSES"] = str(tmp_path / "losses")
    processes = [begun("-k", "one_of_two", RANK=rank, LOCAL_RANK=rank, **together) for rank in "01"]
    for process in processes:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-7000:]
    *_, stage = tiny.build(shared(world))
    expected = [stage.step(step)[0]["loss"] for step in range(2)]
    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def gpu():
    with emulated.pretended():
        yield
        if torch.distributed.is_initialized():
            ranks.stop()


@there
def test_mixed_devices_collectives_of_the_cpu_and_waits_are_seen(gpu):
    x = torch.ones(2, device="cuda")
    bad = [lambda: x + torch.ones(2), lambda: x + x.to("cuda:1"), lambda: ranks.total(torch.ones(2))]
    bad.append(lambda: torch.randn(2, device="cuda", generator=torch.Generator()))
    for mix in bad:
        with pytest.raises(RuntimeError):
            mix()
    emulated.waits.clear()
    assert x.to("cpu", non_blocking=True).sum() == 2
    assert emulated.waits.total() == 0
    x.sum().item(), x[x > 0], x.cpu(), torch.ones(2).to("cuda")
    assert emulated.waits.total() == 4


def waits(cfg):
    """Those of the second step; the first one fills caches."""
    *_, stage = tiny.build(cfg)
    stage.step(0)
    emulated.waits.clear()
    stage.step(1)
    return emulated.waits


@pytest.fixture
def own(request, tmp_path):
    """(settings, world) of a row of FIXTURES with adapters."""
    for case in made(request.param, tmp_path):
        tiny.furnish(tmp_path, case.family)
        yield {"resolution": case.fixture.resolution}, tmp_path


SMALL = {"dtype": "bfloat16", "prompts_per_step": 2, "steps": 2, "guidance": 2.0}
REWARDS = dict.fromkeys(tiny.PROMPTS, BRIGHT)
DISTILLATIONS = {
    "sd3": ("sd3", {}, 1),
    "z_image": ("z_image", {}, 1),
    "flux": ("flux", {}, 1),
    "flux2": ("flux2", {}, 1),
    "qwen_image": ("qwen_image", {}, 5),
    "pg": ("sd3", {"estimator": "pg"}, 1),
    "recomputed": ("sd3", {"checkpointing": True}, 1),
    "teacher walks": ("sd3", {"walker": "teacher", "queries": 1}, 1),
    "teacher on cuda:1": ("sd3", {"teacher_devices": {"red": "cuda:1"}}, 1),
    "reward routing": ("sd3", {"routing": "reward", "train_rewards": REWARDS}, 4),
}
"""Row of FIXTURES, settings, waits in a step of one micro-batch: for the gradient's norm; of Qwen-Image for
places that diffusers computes in every pass; of pictures that are scored, and of each reward's scores."""
SLOW = [pytest.param(*case, marks=pytest.mark.slow, id=name) for name, case in DISTILLATIONS.items()][1:]


@there
@pytest.mark.parametrize("own, changes, most", [DISTILLATIONS["sd3"], *SLOW], indirect=["own"])
def test_distillation(own, changes, most, gpu):
    settings, world = own
    if "teacher_devices" in changes:
        folded = tiny.fold(world, "red", world / "folded")
        changes = changes | {"teachers": {"red": str(folded), "blue": str(world / "blue")}}
    found = waits(tiny.config(world, **SMALL | settings | changes))
    assert found.total() <= most, dict(found)


MORE = {"shared_start": True, "guard": True, "updates": 2, "clip_range": 10.0}
SLOWER = [(tiny.grpo_config, MORE, 5), (tiny.nft_config, {}, 4)]
REWARDED = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER]


@there
@pytest.mark.parametrize("config, changes, most", [(tiny.grpo_config, {"clip_range": 10.0}, 4), *REWARDED])
def test_stages_of_rewards(world, config, changes, most, gpu):
    """An iteration waits for the pictures of its two micro-batches, for their scores, and in each update."""
    found = waits(config(world, **SMALL | {"beta": 0.1} | changes))
    assert found.total() <= most, dict(found)


@there
@pytest.mark.skipif("OPD_LOSSES" not in os.environ, reason="runs on two ranks alone")
def test_one_of_two_ranks(world, gpu):
    *_, stage = tiny.build(shared(world))
    losses = [stage.step(0)[0]["loss"]]
    emulated.waits.clear()
    losses.append(stage.step(1)[0]["loss"])
    assert emulated.waits.total() <= 1, dict(emulated.waits)
    if ranks.rank() == 0:
        Path(os.environ["OPD_LOSSES"]).write_text(json.dumps(losses))


@there
def test_sft(world, latents, gpu):
    """Two micro-batches."""
    settings = {"data": str(latents), "micro_batch": 2, "prompts_per_step": 4, "caption_dropout": 0.5}
    found = waits(tiny.sft_config(world, dtype="bfloat16", **settings))
    assert found.total() <= 1, dict(found)


@there
@pytest.mark.slow
def test_a_run_that_is_resumed_and_scored(world, tmp_path, gpu):
    files = {task: str(world / f"{task}.txt") for task in tiny.PROMPTS}
    scored = {"rewards": REWARDS, "heldout": files, "eval_prompts": 2, "eval_steps": 2, "watch_every": 1}
    often = {"save_every": 1, "sample_every": 1, "ema": 0.9, "watch_prompts": 2}
    for iterations in (1, 2):
        cfg = tiny.config(world, out=str(tmp_path / "run"), iterations=iterations, **SMALL | scored | often)
        tiny.main(cfg, tmp_path)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


@there
@pytest.mark.slow
def test_the_commands(world, tmp_path, gpu):
    evaluate(world)
    given = ["--model", world / "pipeline", "--adapters", f"red={world / 'red'}", "--out", tmp_path]
    sample.main([*map(str, given), "--prompts", "a red dot", "--steps", "2", "--device", "cuda"])
    assert len(list(tmp_path.glob("*.png"))) == 3
