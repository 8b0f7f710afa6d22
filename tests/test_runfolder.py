"""The run folder: whose it is, what is logged, and what survives a resume or a crash."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd import files
from opd.cli import field_names
from opd.config import STAGES, DistillationConfig, GRPOConfig, SFTConfig
from opd.formats.settings import read_config
from opd.formats.state import save_state
from opd.report.tracker import Tracker
from opd.runfolder import FREE, RunFolder, check_same_run
from tests import tiny


def config(folder, **changes):
    return DistillationConfig(out=str(folder / "run"), **changes)


def rows(*steps):
    return [
        {"step": s, "loss": 1.0 / s, "red": {"loss": 0.1, "kl": {"1.000": 0.5}}, "grad_norm": 2.0 * s}
        for s in steps
    ]


# ---- metrics and resuming ----------------------------------------------------------------------------------


def test_what_is_past_the_state_is_dropped_on_resume(world, tmp_path):
    """And a line that a kill has cut."""
    cfg, _, _, trained, _ = tiny.build(tiny.config(world, out=str(tmp_path / "run")))
    run = RunFolder(cfg, active=True)
    assert run.resume(trained) == 0 and run.metrics() == []
    for row in rows(1, 2, 3):
        run.log(row)
    run.save_to_go_on(trained, 2)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    before = {name: tensor.clone() for name, tensor in trained.state().items()}
    for parameter in trained.parameters.values():
        parameter.data.zero_()
    resumed = RunFolder(cfg, active=True)
    assert resumed.resume(trained) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state().items())
    resumed.log(rows(3)[0])
    assert resumed.metrics() == rows(1, 2, 3)


def test_a_folder_belongs_to_one_living_run(tmp_path):
    """A second process is refused while the first lives, and welcome once it was killed."""
    hold = (
        "import sys, time; from opd.config import DistillationConfig; from opd.runfolder import RunFolder; "
    )
    hold += "run = RunFolder(DistillationConfig(out=sys.argv[1]), True); print('held', flush=True); "
    command = [sys.executable, "-c", hold + "time.sleep(600)", str(tmp_path / "run")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="run belongs to a run that is still going; stop that run or"):
            RunFolder(config(tmp_path), active=True)
        RunFolder(config(tmp_path), active=False)  # the other ranks of a run hold nothing
    finally:
        other.kill()
        other.wait()
    RunFolder(config(tmp_path), active=True)


def test_a_run_killed_before_its_first_state_starts_over(tmp_path):
    run = RunFolder(config(tmp_path), active=True)
    run.log(rows(1)[0])
    again = RunFolder(config(tmp_path, lr=0.5), active=True)  # nothing to mix with, so any setting may change
    assert json.loads((again.path / "config.json").read_text())["lr"] == 0.5


def test_inactive_ranks_write_nothing(tmp_path):
    run = RunFolder(config(tmp_path), active=False)
    run.log(rows(1)[0])
    assert list(tmp_path.iterdir()) == []


OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 1}
OTHER |= {dict: lambda value: {"other": 1}, tuple: lambda value: (9.0, 9.0), str: lambda value: "other"}


def with_state(cfg):
    run = RunFolder(cfg, active=True)
    save_state(run.path, 1, {"x": torch.ones(1)})
    return cfg, run.path


@pytest.mark.parametrize("stage", STAGES)
def test_what_may_change_on_resume_is_how_a_run_is_computed_logged_and_scored(stage, tmp_path):
    """Every setting is changed: the free ones go on, the others are refused by name and change nothing."""
    cfg, path = with_state(STAGES[stage](out=str(tmp_path / "run")))
    saved = (path / "config.json").read_bytes()
    for name in field_names(STAGES[stage]) - {"out"}:
        other = replace(cfg, **{name: OTHER[type(getattr(cfg, name))](getattr(cfg, name))})
        if name in FREE:
            check_same_run(other, path)
        else:
            with pytest.raises(ValueError, match=f"other settings: {name} .* -> .*; choose another --out"):
                RunFolder(other, active=True)
    assert (path / "config.json").read_bytes() == saved
    assert {"iterations", "micro_batch", "shard_size", "eval_steps"} <= FREE
    assert not FREE & {"model", "dtype", "seed", "lr", "prompts", "teachers", "group", "data"}


def test_a_run_of_another_stage_is_refused(tmp_path):
    out = str(tmp_path / "run")
    cfg, _ = with_state(SFTConfig(out=out))
    for kind, stage in ((DistillationConfig, "opd"), (GRPOConfig, "grpo")):
        message = f"run holds a run of stage sft, and this is stage {stage}; choose another --out, or"
        with pytest.raises(ValueError, match=message):
            RunFolder(kind(out=out), active=True)
    assert read_config(tmp_path / "run" / "config.json", STAGES) == cfg


def test_saved_settings_that_cannot_be_read_are_refused_by_name(tmp_path):
    cfg, _ = with_state(config(tmp_path))
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"lr"', '"learning_rate"'))
    message = "config.json.*no field 'learning_rate' .*; choose another --out, or delete that folder"
    with pytest.raises(ValueError, match=message):
        RunFolder(cfg, active=True)


def test_tensorboard_gets_the_flat_numbers(tmp_path):
    tracker = Tracker(config(tmp_path, tracker="tensorboard"), tmp_path)
    for row in rows(1, 2):
        tracker.log(row)
    tracker.board.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "loss", "red/loss", "red/kl/1.000", "grad_norm"}
    assert [(e.step, e.value) for e in events.Scalars("grad_norm")] == [(1, 2.0), (2, 4.0)]


# ---- files -------------------------------------------------------------------------------------------------


def test_replace_keeps_the_old_file_if_writing_fails(tmp_path):
    file = tmp_path / "deep" / "x.txt"
    files.replace(file, lambda p: p.write_text("old"))

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace(file, fails)
    assert file.read_text() == "old" and [p.name for p in file.parent.iterdir()] == ["x.txt"]
    files.replace(file, lambda p: p.write_text("new"))
    assert file.read_text() == "new"
