"""The real command on one and on two processes: same samples, same losses, replicated and fully sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked, tiny
from tests.counted_run import counted_by

ROOT = Path(__file__).parent.parent


def distil(world):
    """A distillation on the tiny world: preset and flags."""
    teachers = ["--teachers", f"red={world / 'red'}", f"blue={world / 'blue'}"]
    flags = "--anchor blue --queries 0 --cold-start base --group 1 --micro-batch 2"
    return ["mini", *teachers, *flags.split()]


def grow():
    """GRPO on the tiny world, from two rewards."""
    flags = """--group 4 --micro-batch 5 --beta 0.1 --epochs 2 --iterations 2 --clip-range 1e-3
        --window 0
        --no-shared-start --ema 0 --decay cosine --watch-every 0 --train-rewards
        red=tests.tiny_grpo:brightness blue=tests.tiny_grpo:brightness"""
    return ["mini-grpo-mix", *flags.split()]


def flags(world, out, *arguments):
    """The command line of a run on the tiny world: preset, what all of them share, and `arguments`."""
    preset, *own = arguments
    prompts = ["--prompts", f"red={world / 'red.txt'}", f"blue={world / 'blue.txt'}"]
    folders = ["--model", str(world / "pipeline"), "--out", str(out)]
    shared = """--dtype float32 --rank 4 --alpha 8 --prompts-per-step 5 --steps 3 --mix --iterations 3
        --lr 1e-2 --warmup 0 --no-evaluate --sample-every 3"""
    return [preset, *prompts, *folders, *shared.split(), *own]


def torchrun(world, out, processes, *arguments):
    launcher = f"{sys.executable} -m torch.distributed.run --nproc_per_node {processes}"
    port = f"--master_port {free_port()} train.py"
    return [*launcher.split(), *port.split(), *flags(world, out, *arguments)]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(world, out, processes, *arguments):
    """Without a launcher, which tests/test_signals.py and the SLURM script start."""
    forked.finished(forked.ranks(Path(f"{out}-logs"), processes, flags(world, out, *arguments)))
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return out, launch(world, out, 1, *distil(world))


@pytest.mark.parametrize("shard_size, micro_batch", [(1, 3), (2, 1)])
def test_two_processes_give_the_losses_of_one(world, tmp_path, alone, shard_size, micro_batch):
    """3 red and 2 blue prompts. Micro-batches of 3: rrr and bb, so a rank runs red's teacher for the other's
    sake; of 1: one turn with r and b, and padding. One process: rr, rb, b."""
    extra = ["--shard-size", str(shard_size), "--micro-batch", str(micro_batch)]
    assert launch(world, tmp_path, 2, *distil(world), *extra) == pytest.approx(alone[1], rel=1e-4)
    from PIL import Image, ImageChops

    images = [Image.open(folder / "samples/000003.png").convert("RGB") for folder in (alone[0], tmp_path)]
    assert max(hi for _, hi in ImageChops.difference(*images).getextrema()) <= 2
    assert len(set(alone[1])) == 3 and min(alone[1]) > 0


def test_a_sharded_full_teacher_gives_the_losses_of_the_adapter_in_its_weights(world, tmp_path, alone):
    full = tiny.fold(world, "red", tmp_path / "full")
    extra = ["--teachers", f"red={full}", f"blue={world / 'blue'}", "--shard-size", "2", "--micro-batch", "1"]
    assert launch(world, tmp_path / "run", 2, *distil(world), *extra) == pytest.approx(alone[1], rel=1e-4)


@pytest.mark.parametrize(
    "shard_size, extra",
    [(1, ()), (2, ("--group", "3", "--micro-batch", "1", "--guidance", "2", "--checkpointing"))],
)
def test_grpo_on_two_processes_is_grpo_on_one(world, tmp_path, shard_size, extra):
    """5 groups of 4 in micro-batches of 5, then of 3 in ones of 1, with padding: groups span micro-batches
    and ranks, and their advantages do not change."""
    rows = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch(
            world, out, processes, *grow(), *extra, "--shard-size", str(shard_size if processes == 2 else 1)
        )
        rows.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            # the loss is a mean of advantages of size 1 that cancel almost, so float32 sums leave 1e-8 of it
            # in any order
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7) and one[key] != 0
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)  # the same samples
        assert two["groups"] == one["groups"]
        assert (
            two["ratio"]["largest"] == pytest.approx(one["ratio"]["largest"], rel=1e-2)
            and one["ratio"]["clipped"] > 0
        )


@pytest.mark.parametrize("shard_size", [1, 2])
def test_the_frozen_base_exists_once_and_gradients_are_reduced_once(world, tmp_path, shard_size):
    """Counted in the real command on two ranks: per step one reduction of the LoRA's gradients, one of the
    log's table and one of the wish to stop, and no other, FSDP's included. Sharded, a rank holds its half of
    the base, and what was gathered is gone again."""
    given = flags(
        world, tmp_path / "run", *distil(world), "--shard-size", str(shard_size), "--sample-every", "0"
    )
    counted = counted_by(forked.ranks(tmp_path, 2, given, "tests.counted_run"))
    trained, table = (
        counted["trained"],
        3 * 3,
    )  # sums of 2 teachers and anchor; 3 states
    stop = 1  # whether any rank was told to stop
    assert counted["reduced"] == [stop, table, trained] * 3
    assert counted["scattered"] == 0
    frozen = counted["whole"] - 4 * trained
    assert counted["parameters"] - 4 * trained <= 1.02 * frozen / shard_size
    # Adam's moments and a gradient per trained number, the VAE, the text, the schedules.
    assert counted["alive"] - counted["parameters"] < 0.6 * counted["whole"]


# One `srun` for each node's torchrun, both of them here.
SLURM = {"srun": '"$@" & other=$!; "$@" && wait $other', "scontrol": "echo localhost"}


def test_the_slurm_script_on_two_nodes_of_two_ranks_gives_the_losses_of_one(world, tmp_path, alone):
    """Each node holds the weights once, sharded over its two ranks, as --shard-size 2 of four ranks says."""
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = flags(world, tmp_path / "run", *distil(world), "--shard-size", "2", "--micro-batch", "1")
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "x"}
    done = subprocess.run(
        ["bash", "opd/cluster.sbatch", *given],
        cwd=ROOT,
        env=os.environ | slurm | {"PATH": path, "PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(alone[1], rel=1e-4)


def test_bad_input_is_one_line(tmp_path):
    run = forked.train(
        tmp_path / "log", ["mini", "--model", "/no/such/model", "--out", str(tmp_path / "run")]
    )
    assert run.ended() == 1
    assert "error: model '/no/such/model'" in run.printed() and "Traceback" not in run.printed()


def test_no_option_of_ours_collides_with_torchrun():
    """torchrun looks at every argument: one of ours that abbreviates two of its own is refused as
    ambiguous."""
    from dataclasses import fields

    from torch.distributed.run import get_args_parser

    from opd.config import STAGES

    for field in {field.name: field for stage in STAGES.values() for field in fields(stage)}.values():
        option = "--" + field.name.replace("_", "-")
        assert get_args_parser().parse_args(["train.py", option, "1"]).training_script_args == [option, "1"]
