"""The real command on one and on two processes: same samples, same losses, replicated and fully sharded; and
what a rank holds."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from opd import ranks
from opd.config import STAGES
from tests import forked, tiny
from tests.counted_run import counted_by
from tests.forked import ROOT, losses

SHORT = {"prompts_per_step": 5, "steps": 3, "sample_every": 3}


def distil(world, out, **changes):
    """A distillation on the tiny world as a command line."""
    settings = SHORT | {"group": 1, "micro_batch": 2} | changes
    return forked.command_line(tiny.config(world, out=str(out), **settings))


def averaged(world, red):
    """The student's moving average is the anchor."""
    teachers = {"red": str(red), "blue": str(world / "blue"), "average": "ema"}
    return {"teachers": teachers, "anchor": "average", "ema": 0.5}


def grow(world, out, **changes):
    settings = SHORT | {"prompts_per_step": 6, "updates": 2, "micro_batch": 5, "decay": "cosine"}
    settings |= {"beta": 0.1, "clip_range": 1e-3} | changes
    return forked.command_line(tiny.grpo_config(world, out=str(out), **settings))


def launch(out, processes, arguments):
    """Without a launcher, which tests/test_signals.py and the SLURM script start. Returns the losses."""
    forked.finished(forked.ranks(Path(f"{out}-logs"), processes, arguments))
    return losses(out)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, launch(out, 1, distil(world, out, **averaged(world, world / "red")))


@pytest.mark.parametrize("shard_size, micro_batch", [(1, 3), (2, 1)])
def test_two_processes_give_the_losses_of_one(world, tmp_path, alone, shard_size, micro_batch):
    """3 red and 2 blue prompts. Micro-batches of 3: rrr and bb, so a rank runs red's teacher for the other's
    sake; of 1: one turn with r and b, and padding. One process: rr, rb, b."""
    changes = averaged(world, world / "red") | {"shard_size": shard_size, "micro_batch": micro_batch}
    given = distil(world, tmp_path / "run", **changes)
    assert launch(tmp_path / "run", 2, given) == pytest.approx(alone[1], rel=1e-4)
    pictures = (folder / "samples/000003.png" for folder in (alone[0], tmp_path / "run"))
    images = [Image.open(file).convert("RGB") for file in pictures]
    assert max(hi for _, hi in ImageChops.difference(*images).getextrema()) <= 2
    assert len(set(alone[1])) == 3 and min(alone[1]) > 0


def test_a_sharded_full_teacher_gives_the_losses_of_the_adapter_in_its_weights(world, tmp_path, alone):
    changes = averaged(world, tiny.fold(world, "red", tmp_path / "full"))
    given = distil(world, tmp_path / "run", **changes, shard_size=2, micro_batch=1)
    assert launch(tmp_path / "run", 2, given) == pytest.approx(alone[1], rel=1e-4)


SMALL = {"group": 3, "micro_batch": 1, "guidance": 2.0, "checkpointing": True}


@pytest.mark.parametrize("shard_size, changes", [(1, {}), (2, SMALL)], ids=str)
def test_grpo_on_two_processes_is_grpo_on_one(world, tmp_path, shard_size, changes):
    """Two updates of 3 groups of 4 in micro-batches of 5, then of 3 in ones of 1, with padding: groups span
    micro-batches and ranks, and their advantages do not change."""
    rows = []
    for processes, shard in ((1, 1), (2, shard_size)):
        out = tmp_path / str(processes)
        launch(out, processes, grow(world, out, shard_size=shard, **changes))
        rows.append(forked.rows(out))
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            # the loss is a mean of advantages of size 1 that cancel almost, so float32 sums leave 1e-8 of it
            # in any order
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7) and one[key] != 0
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)  # the same samples
        assert two["groups"] == one["groups"]
        assert two["ratio"]["largest"] == pytest.approx(one["ratio"]["largest"], rel=1e-2)
        assert one["ratio"]["clipped"] > 0


def test_nft_on_two_processes_is_nft_on_one(world, tmp_path):
    """Sharded: the old policy, like the one that it follows, is whole on every rank."""
    rows = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        settings = SHORT | {"micro_batch": 5, "beta": 0.1, "ema": 0.9, "shard_size": processes}
        cfg = tiny.nft_config(world, out=str(out), old_decay=(0.0, 0.2, 0.5), **settings)
        launch(out, processes, forked.command_line(cfg))
        rows.append(forked.rows(out))
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "from_base", "grad_norm", "log_size"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7)
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)
    assert rows[0][-1]["from_base"] > 0 and rows[0][-1]["log_size"] != 0


@pytest.mark.parametrize("shard_size", [1, 2])
def test_the_frozen_base_exists_once_and_gradients_are_reduced_once(world, tmp_path, shard_size):
    """Counted in the real command on two ranks: per step one reduction of the LoRA's gradients, one of the
    log's table, and no other, FSDP's included, but for the wish to stop at every state. Sharded, a rank holds
    its half of the base, and what was gathered is gone again."""
    given = distil(world, tmp_path / "run", shard_size=shard_size, sample_every=0)
    counted = counted_by(forked.ranks(tmp_path, 2, given, "tests.counted_run"))
    trained, table = counted["trained"], 3 * 3  # sums of 2 teachers and anchor; 3 states
    stop = 1  # whether any rank was told to stop
    assert [size for size in counted["reduced"] if size != stop] == [table, trained] * 3
    assert counted["scattered"] == 0
    frozen = counted["whole"] - 4 * trained
    assert counted["parameters"] - 4 * trained <= 1.02 * frozen / shard_size
    # Adam's moments and a gradient per trained number, the VAE, the text, the schedules.
    assert counted["alive"] - counted["parameters"] < 0.6 * counted["whole"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU; use --nproc_per_node 2"):
        ranks.start()


@pytest.mark.parametrize("name, given", [("ALLOC", ""), ("ALLOC", "a:1"), ("CUDA_ALLOC", "a:1")])
def test_segments_of_gpu_memory_can_grow_unless_the_user_says_otherwise(name, given):
    """PyTorch reads either variable, and both where both are set."""
    code = "import os, opd; print({k: v for k, v in os.environ.items() if 'ALLOC_CONF' in k})"
    environment = dict(os.environ)
    for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment.pop(key, None)
    if given:
        environment[f"PYTORCH_{name}_CONF"] = given
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == str({f"PYTORCH_{name}_CONF": given or "expandable_segments:True"})


# One `srun` for each node's torchrun, both of them here.
SLURM = {"srun": '"$@" & other=$!; "$@" && wait $other', "scontrol": "echo localhost"}


@pytest.mark.slow
def test_the_slurm_script_on_two_nodes_of_two_ranks_gives_the_losses_of_one(world, tmp_path, alone):
    """Each node holds the weights once, sharded over its two ranks, as --shard-size 2 of four ranks says."""
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    changes = averaged(world, world / "red")
    given = distil(world, tmp_path / "run", **changes, shard_size=2, micro_batch=1)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "x"}
    environment = os.environ | slurm | {"PATH": path, "PORT": str(forked.free_port()), "OMP_NUM_THREADS": "1"}
    command = ["bash", "opd/cluster.sbatch", *given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(alone[1], rel=1e-4)


def test_no_option_of_ours_collides_with_torchrun():
    """torchrun looks at every argument: one of ours that abbreviates two of its own is refused as
    ambiguous."""
    for name in {field.name for stage in STAGES.values() for field in fields(stage)}:
        option = ["--" + name.replace("_", "-"), "1"]
        assert get_args_parser().parse_args(["train.py", *option]).training_script_args == option


def finetuning(world, out, latents, **changes):
    shared = {"data": str(latents), "full": True, "save_every": 1, "ema": 0.9, "prompts_per_step": 4}
    cfg = tiny.sft_config(world, out=str(out), **shared | changes)
    return forked.command_line(cfg)


def test_a_sharded_run_goes_on_with_another_number_of_ranks(world, tmp_path, latents):
    """1 -> 2 -> 1: losses and weights of one rank all the way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert forked.train(tmp_path / "log", finetuning(world, whole, latents, iterations=6)).ended() == 0
    for done, size in ((2, 1), (4, 2), (6, 1)):
        given = finetuning(world, parts, latents, iterations=done, shard_size=size)
        runs = forked.ranks(tmp_path / str(done), size, given)
        assert [run.ended() for run in runs] == [0] * size, runs[0].printed()
        assert [folder.name for folder in (parts / "state").iterdir()] == [f"{done:06d}"]
        assert (f"after step {done - 2}" in runs[0].printed()) == (done > 2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    file = "student/diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(load_file(parts / file), load_file(whole / file), rtol=1e-3, atol=1e-5)


def test_no_rank_holds_more_than_its_share_and_a_block_and_saving_gathers_nothing(world, tmp_path, latents):
    """Weights, gradients, two moments and the average are float32 and sharded; only the files of the student,
    which are whole, gather weights, one at a time."""
    given = finetuning(world, tmp_path / "run", latents, iterations=2, shard_size=2, sample_every=0)
    counted = counted_by(forked.ranks(tmp_path, 2, given, "tests.counted_run"))
    share, block = counted["whole"] / 2, counted["whole"] / 2  # of two blocks
    assert counted["parameters"] <= 1.02 * share
    assert counted["alive"] <= 5 * 1.02 * share + block
    assert counted["largest_saved"] <= 0.51 * counted["largest"]
    assert counted["largest_exported"] == counted["largest"]
