"""SIGKILL at random moments, also while saving: every file ends as if nothing had been.

KILLS=20 pytest tests/test_kills.py kills each stage so often; by default it is twice.
"""

import json
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file

from tests import forked, tiny
from tests.test_shards import arguments as full_fine_tuning
from tests.test_shards import latents  # noqa: F401 (a fixture)

KILLS = int(os.environ["KILLS"]) if "KILLS" in os.environ else 2
CLOCK = ("seconds", "samples_per_second", "states_per_second")  # of a row of metrics.jsonl
OFTEN = {"iterations": 6, "save_every": 1, "sample_every": 2, "eval_steps": 2}


def distil(world, out, latents):  # noqa: F811
    return forked.command_line(tiny.config(world, out=str(out), ema=0.9, **OFTEN))


def grow(world, out, latents):  # noqa: F811
    return forked.command_line(tiny.grpo_config(world, out=str(out), **OFTEN))


def finetune(world, out, latents):  # noqa: F811
    return full_fine_tuning(world, out, latents, **OFTEN)


def contents(run):
    """Every file by content, without the run's own place, and what the clock makes."""
    found = {}
    for file in run.rglob("*"):
        if file.name == "sizes.json":
            continue
        if not file.is_file():
            continue
        name = str(file.relative_to(run))
        found[name] = file.read_bytes().replace(str(run).encode(), b"RUN")
        # The order of a state's tensors says nothing.
        if file.suffix == ".safetensors" and name.startswith("state/"):
            found[name] = {key: (value.dtype, value.tolist()) for key, value in load_file(file).items()}
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{key: v for key, v in row.items() if key not in CLOCK} for row in rows]
    return found


@pytest.mark.parametrize("command", [distil, grow, finetune])
def test_a_run_that_is_killed_ends_with_the_same_files(world, tmp_path, latents, command):  # noqa: F811
    log, whole = tmp_path / "log", tmp_path / "whole/run"
    started = time.monotonic()
    assert forked.train(log, command(world, whole, latents)).ended() == 0
    longest = time.monotonic() - started
    want = contents(whole)
    assert any(name.startswith("state/000006/") for name in want)
    moments = random.Random(command.__name__)
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
