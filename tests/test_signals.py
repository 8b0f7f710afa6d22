"""A run that is told to stop or killed, and ranks that are lost: what is kept and said, and how it goes on.

KILLS=20 pytest tests/test_signals.py kills each stage so often at random moments; by default it is twice.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd import signals
from opd.formats.state import latest_state
from tests import forked, tiny
from tests.forked import ROOT, losses
from tests.test_ranks import distil, finetuning, launch

GO_ON = "the same command goes on"
SHOWN = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def asleep(images, prompts, metadata):
    """A score of grey images, none of others."""
    if images.std() > 0:
        Path(os.environ["BEGUN"]).touch()
        time.sleep(600)
    return images.mean((1, 2, 3))


def asleep_over_one(images, prompts, metadata):
    """Fails for a whole micro-batch, and falls asleep when it is asked again prompt by prompt."""
    if images.std() > 0 and len(set(prompts)) > 1:
        raise ValueError("only one at a time")
    return asleep(images, prompts, metadata)


class LoadsForever:
    def load(self, device):
        Path(os.environ["BEGUN"]).touch()
        time.sleep(600)

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


def distillation(world, out, **changes) -> list[str]:
    return forked.command_line(tiny.config(world, out=str(out), **changes))


@pytest.mark.parametrize("number, world_size", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_leaves_a_step_of_minutes_and_the_run_goes_on(world, tmp_path, number, world_size):
    """To one rank: within five seconds all of them end with the last finished step saved."""

    def command(out, iterations):
        return distillation(world, out, iterations=iterations, prompts_per_step=24)

    out, slow = tmp_path / "run", tmp_path / "slow"
    runs = forked.ranks(tmp_path, world_size, command(out, 2000), "tests.slowed", SLOW=str(slow))
    forked.wait_for(lambda: len(forked.rows(out)) >= 3)
    half = tmp_path / "half"  # what is read while it is written would be empty
    half.write_text("0.4")
    half.rename(slow)
    forked.wait_for(slow.with_suffix(".begun").exists)
    runs[-1].signal(number)
    signalled = time.monotonic()
    assert [run.ended() for run in runs] == [0] * world_size
    assert time.monotonic() - signalled < 5
    done, name = latest_state(out), signal.Signals(number).name
    assert done == len(forked.rows(out)) >= 3
    printed = runs[0].printed()
    assert printed.count(f"stopped by {name} after step {done} of 2000; {GO_ON} there") == 1
    assert f"{name}: saving the last finished step; again to leave now" in runs[-1].printed() or runs[1:]
    assert all("Traceback" not in run.printed() and "rror" not in run.printed() for run in runs)

    again = forked.train(tmp_path / "log", command(out, done + 2))
    whole = forked.train(tmp_path / "log2", command(tmp_path / "whole", done + 2))
    assert (again.ended(), whole.ended()) == (0, 0)
    assert f"resuming {out} after step {done}" in again.printed()
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    if world_size == 1:
        file = "student/adapter_model.safetensors"
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_ctrl_c_saves_though_it_ended_who_reads_the_output_too(world, tmp_path):
    """As with `2>&1 | tee log`."""
    out, log = tmp_path / "run", tmp_path / "log"
    os.mkfifo(log)
    run = forked.train(log, distillation(world, out, iterations=2000))
    reader = os.open(log, os.O_RDONLY)
    forked.wait_for(lambda: len(forked.rows(out)) >= 3)
    run.signal(signal.SIGSTOP)
    run.signal(signal.SIGINT)
    os.close(reader)
    run.signal(signal.SIGCONT)
    assert run.ended() == 0
    assert latest_state(out) == len(forked.rows(out)) >= 3


WATCHED = {"iterations": 4, "sample_every": 2, "eval_steps": 20, "watch_every": 2, "watch_prompts": 2}
WATCHED |= {"rewards": dict.fromkeys(tiny.PROMPTS, "jpeg_compressibility"), "eval_prompts": 2, "ema": 0.9}


@pytest.mark.parametrize(
    "world_size, stops",
    [
        (1, [("sample_grid", 0), ("watch", 2), ("measure", 2), ("sample_grid", 2), ("table", 4)]),
        (2, [("sample_grid", 2), ("table", 4)]),
    ],
)
def test_a_signal_leaves_pictures_and_scores_and_the_run_ends_with_the_same_files(
    world, tmp_path, world_size, stops
):
    """Twenty states of half a second would take 10 s."""
    heldout, slow = {name: str(world / f"{name}.txt") for name in tiny.PROMPTS}, tmp_path / "slow"

    def ranks(out):
        command = distillation(world, out, **WATCHED, heldout=heldout, evaluate=True)
        return forked.ranks(tmp_path, world_size, command, "tests.slowed", SLOW=str(slow))

    out, whole = tmp_path / "a/run", tmp_path / "b/run"
    forked.finished(ranks(whole))
    for method, done in stops:
        slow.write_text(f"0.5 {method} {done}")
        slow.with_suffix(".begun").unlink(missing_ok=True)
        runs = ranks(out)
        forked.wait_for(slow.with_suffix(".begun").exists)
        runs[-1].signal(signal.SIGTERM)
        signalled = time.monotonic()
        printed = forked.finished(runs)
        assert time.monotonic() - signalled < 5
        assert len(forked.rows(out)) == latest_state(out) == done
        where = f"step {done} of 4; {GO_ON} there"
        if done == 4:
            where = f"the last step; {GO_ON} with the scores"
        assert printed.count(f"stopped by SIGTERM after {where}") == 1
    slow.unlink()
    forked.finished(ranks(out))
    got, want = contents(out), contents(whole)
    assert [name for name in want if name not in got or got[name] != want[name]] == []


@pytest.mark.parametrize("config", [tiny.grpo_config, tiny.nft_config])
def test_updates_of_a_step_that_is_left_are_taken_back(world, monkeypatch, config):
    """Two updates a step, left between them."""
    *_, trained, stage = tiny.build(config(world, updates=2, ema=0.9))
    stage.step(0)
    before = {name: tensor.clone() for name, tensor in trained.state().items()}
    update = trained.update

    def update_once(step, turn, turns):
        if turn == 1:
            raise signals.Stopped("SIGTERM")
        return update(step, turn, turns)

    monkeypatch.setattr(trained, "update", update_once)
    with pytest.raises(signals.Stopped):
        stage.step(1)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained.state().items())
    trained.undo(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state().items())


@pytest.mark.parametrize(
    "reward, number, where",
    [
        ("asleep", signal.SIGUSR1, " after step 0 of 2"),
        ("asleep_over_one", signal.SIGTERM, " after step 0 of 2"),
        ("LoadsForever", signal.SIGTERM, f"; {GO_ON} after the last checkpoint"),
    ],
)
def test_a_signal_waits_for_no_reward(world, tmp_path, reward, number, where):
    """Neither for its scores, at the first call or a retry, nor, before training, for its weights."""
    rewards = dict.fromkeys(tiny.PROMPTS, f"{__name__}:{reward}")
    cfg = tiny.grpo_config(world, out=str(tmp_path / "run"), train_rewards=rewards, reward_timeout=900.0)
    begun = tmp_path / "begun"
    run = forked.train(tmp_path / "log", forked.command_line(cfg), BEGUN=str(begun))
    forked.wait_for(begun.exists)
    run.signal(number)
    assert run.ended(5) == 0
    assert f"stopped by {signal.Signals(number).name}{where}" in run.printed()
    assert "Traceback" not in run.printed()


def test_a_second_signal_leaves_at_once_and_one_that_is_passed_on_does_not(world, tmp_path):
    """The first waits for one velocity, which takes a minute here."""
    out, slow = tmp_path / "run", tmp_path / "slow"
    slow.write_text("60")
    run = forked.main("tests.slowed", tmp_path / "log", distillation(world, out), SLOW=str(slow))
    forked.wait_for(slow.with_suffix(".begun").exists)
    for _ in range(2):
        run.signal(signal.SIGUSR1)
        time.sleep(0.2)
    time.sleep(4)  # an echo comes within two seconds of the first
    assert run.process.is_alive()
    run.signal(signal.SIGUSR1)
    assert run.ended(5) == 128 + signal.SIGUSR1
    assert "Traceback" not in run.printed()
    assert latest_state(out) == 0


def test_ctrl_c_that_nobody_handles_is_a_line():
    """As while a command imports; the status is that of a process that SIGINT ends, and a fault stays one."""
    for code, status, said in (
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT, "stopped by SIGINT\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ):
        ended = subprocess.run([sys.executable, "-c", f"import opd, signal; {code}"], cwd=ROOT, **SHOWN)
        assert ended.returncode == status and ended.stdout.endswith(said)
        assert ("Traceback" in ended.stdout) == (status == 1)


def test_ranks_skip_a_non_finite_step_together_and_end_together(world, tmp_path):
    arguments = distillation(world, tmp_path / "run", iterations=9, lr=1e30)
    runs = forked.ranks(tmp_path, 2, arguments)
    assert [run.ended() for run in runs] == [1, 1]
    for run in runs:
        assert "error: 5 steps in a row with a non-finite gradient; lower --lr" in run.printed()
    assert runs[0].printed().count("a non-finite gradient; step skipped") == 5
    assert not (tmp_path / "run/student").exists()


def test_a_port_in_use_is_named(world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        run = forked.train(tmp_path / "log", distillation(world, tmp_path / "run"), **environment)
        assert run.ended() == 1
    assert f"error: port {port} is in use; choose another" in run.printed()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_others_in_a_line(world, tmp_path, number):
    out = tmp_path / "run"
    arguments = distillation(world, out, iterations=2000)
    first, second = forked.ranks(tmp_path, 2, arguments, "tests.impatient")
    forked.wait_for(lambda: len(forked.rows(out)) >= 2)
    second.signal(number)
    assert first.ended(60) == 1
    lost = "error: another rank ended, or did not answer for ten minutes; the same command goes on"
    assert first.printed().count(lost) == 1 and "Traceback" not in first.printed()
    second.ended(0)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(world, tmp_path):
    """`--max-restarts 1`, and a rank is killed: the run ends as if nothing had been, with the losses of one
    process."""
    settings = {"save_every": 1, "iterations": 8}
    alone = launch(tmp_path / "alone", 1, distil(world, tmp_path / "alone", **settings))
    torchrun = "-m torch.distributed.run --nproc_per_node 2 --max-restarts 1 --master_port"
    script = [str(forked.free_port()), "train.py", *distil(world, tmp_path / "run", **settings)]
    arguments = [sys.executable, *torchrun.split(), *script]
    launcher = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **SHOWN)
    forked.wait_for(lambda: len(forked.rows(tmp_path / "run")) >= 2)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, output[-3000:]
    assert "resuming" in output
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-4)


KILLS = int(os.environ.get("KILLS", 2))
CLOCK = ("seconds", "samples_per_second", "states_per_second")  # of a row of metrics.jsonl
OFTEN = {"iterations": 6, "save_every": 1, "sample_every": 2, "eval_steps": 2}


# By stage: the command line of a run on the tiny world.
STAGES = {
    "opd": lambda world, out, _: forked.command_line(tiny.config(world, out=str(out), ema=0.9, **OFTEN)),
    "grpo": lambda world, out, _: forked.command_line(tiny.grpo_config(world, out=str(out), **OFTEN)),
    "nft": lambda world, out, _: forked.command_line(tiny.nft_config(world, out=str(out), **OFTEN)),
    "sft": lambda world, out, latents: finetuning(world, out, latents, **OFTEN),
}


def contents(run):
    """Every file by content, without the run's own place, and what the clock makes."""
    found = {}
    for file in run.rglob("*"):
        if file.name == "digests.json" or not file.is_file():
            continue
        name = str(file.relative_to(run))
        found[name] = file.read_bytes().replace(str(run).encode(), b"RUN")
        # The order of a state's tensors says nothing.
        if file.suffix == ".safetensors" and name.startswith("state/"):
            found[name] = {key: (value.dtype, value.tolist()) for key, value in load_file(file).items()}
        if name == "report.html":  # says when the last step was
            found[name] = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d", b"TIME", found[name])
        if name == "metrics.jsonl":
            rows = forked.rows(run)
            found[name] = [{key: v for key, v in row.items() if key not in CLOCK} for row in rows]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_ends_with_the_same_files(world, tmp_path, latents, stage):
    log, whole, command = tmp_path / "log", tmp_path / "whole/run", STAGES[stage]
    started = time.monotonic()
    assert forked.train(log, command(world, whole, latents)).ended() == 0
    longest = time.monotonic() - started
    want = contents(whole)
    assert any(name.startswith("state/000006/") for name in want)
    moments = random.Random(stage)
    kills = attempt = 0
    while kills < KILLS:
        attempt += 1
        out = tmp_path / str(attempt) / "run"
        ended = False
        while not ended and kills < KILLS:
            run = forked.train(log, command(world, out, latents))
            run.process.join(moments.uniform(0.1, 0.9) * longest)
            ended = run.process.exitcode is not None
            if not ended:
                run.signal(signal.SIGKILL)
                run.process.join()
                kills += 1
        assert forked.train(log, command(world, out, latents)).ended() == 0, log.read_text()
        got = contents(out)
        assert got.keys() == want.keys()
        assert [name for name in want if got[name] != want[name]] == []
