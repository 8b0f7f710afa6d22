"""The run folder: what is logged, what survives a resume or a crash, and its curves."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd import files
from opd.config import STAGES, DistillationConfig, GRPOConfig, SFTConfig
from opd.runfolder import FREE, RunFolder, flatten
from opd.settings import field_names, read_config, to_json


def config(folder, **changes):
    return DistillationConfig(out=str(folder / "run"), **changes)


def rows(*steps):
    return [
        {"step": s, "loss": 1.0 / s, "red": {"loss": 0.1, "kl": {"1.000": 0.5}}, "grad_norm": 2.0 * s}
        for s in steps
    ]


# ---- metrics and resuming ----------------------------------------------------------------------------------


def test_flatten():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": "x"}}}) == {"a": 1, "b/c": 2, "b/d/e": "x"}


def test_metrics_past_the_checkpoint_are_dropped_on_resume(tmp_path):
    run = RunFolder(config(tmp_path), active=True)
    assert run.load_state() == (0, {}) and run.metrics() == []
    for row in rows(1, 2, 3):
        run.log(row)
    run.save_state(2, {"x": torch.arange(3.0)})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = RunFolder(config(tmp_path), active=True)
    step, state = resumed.load_state()
    assert step == 2 and list(state) == ["x"] and torch.equal(state["x"], torch.arange(3.0))
    resumed.log(rows(3)[0])
    assert resumed.metrics() == rows(1, 2, 3)


def test_a_folder_belongs_to_one_living_run(tmp_path):
    """A second process is refused while the first lives, and welcome once it was killed."""
    hold = (
        "import sys, time; from opd.config import DistillationConfig; from opd.runfolder import RunFolder; "
        "run = RunFolder(DistillationConfig(out=sys.argv[1]), True); "
        "print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError,
            match="run belongs to a run that is still going; stop that run or choose another --out",
        ):
            RunFolder(config(tmp_path), active=True)
        RunFolder(config(tmp_path), active=False)  # the other ranks of a run hold nothing
    finally:
        other.kill()
        other.wait()
    RunFolder(config(tmp_path), active=True)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    run = RunFolder(config(tmp_path), active=True)
    run.log(rows(1)[0])
    again = RunFolder(config(tmp_path, lr=0.5), active=True)  # nothing to mix with, so any setting may change
    assert again.load_state() == (0, {}) and again.metrics() == []
    assert json.loads((again.path / "config.json").read_text())["lr"] == 0.5


def test_inactive_ranks_write_nothing(tmp_path):
    run = RunFolder(config(tmp_path), active=False)
    run.log(rows(1)[0])
    run.save_state(1, {"x": torch.ones(1)})
    run.curves()
    assert list(tmp_path.iterdir()) == []


def different(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {"other": 1}
    if isinstance(value, tuple):
        return (9.0, 9.0)
    if isinstance(value, int | float):
        return value + 1
    return "other"


def checkpointed(cfg):
    RunFolder(cfg, active=True).save_state(1, {"x": torch.ones(1)})
    return cfg


def settings(free):
    """(class, field) for each field of each stage that may change on resume, or may not."""
    rows = [(kind, name) for kind in STAGES.values() for name in sorted(field_names(kind))]
    return [(kind, name) for kind, name in rows if (name in FREE) == free]


def test_what_may_change_is_how_a_run_is_computed_logged_and_scored():
    shared = set.intersection(*map(field_names, STAGES.values()))
    assert {
        "iterations",
        "out",
        "micro_batch",
        "shard_size",
        "checkpointing",
        "tracker",
        "eval_steps",
    } <= FREE & shared
    assert {"evaluate", "rewards", "heldout", "watch_every", "reward_timeout"} <= FREE - shared
    assert not FREE & {
        "model",
        "dtype",
        "seed",
        "lr",
        "prompts",
        "teachers",
        "group",
        "train_rewards",
        "data",
    }


@pytest.mark.parametrize("kind, name", [row for row in settings(True) if row[1] not in ("out", "tracker")])
def test_free_settings_may_change_on_resume(kind, name, tmp_path):
    cfg = checkpointed(kind(out=str(tmp_path / "run")))
    run = RunFolder(replace(cfg, **{name: different(getattr(cfg, name))}), active=True)
    assert run.load_state()[0] == 1


@pytest.mark.parametrize("kind, name", settings(False))
def test_other_settings_may_not(kind, name, tmp_path):
    cfg = checkpointed(kind(out=str(tmp_path / "run")))
    RunFolder(cfg, active=True)
    other = replace(cfg, **{name: different(getattr(cfg, name))})
    with pytest.raises(ValueError, match=f"other settings: {name} .* -> .*; choose another --out") as caught:
        RunFolder(other, active=True)
    assert str(tmp_path) in str(caught.value)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(json.dumps(to_json(cfg)))


def test_a_run_of_another_stage_is_refused(tmp_path):
    out = str(tmp_path / "run")
    cfg = checkpointed(SFTConfig(out=out))
    for kind, stage in ((DistillationConfig, "opd"), (GRPOConfig, "grpo")):
        message = (
            f"run holds a run of stage sft, and this is stage {stage}; choose another --out, or delete that"
        )
        with pytest.raises(ValueError, match=message):
            RunFolder(kind(out=out), active=True)
    assert read_config(tmp_path / "run" / "config.json") == cfg


def test_the_settings_are_saved_with_their_stage(tmp_path):
    cfg = GRPOConfig(out=str(tmp_path / "run"), window_range=(1, 4), prompts={"a": "a.txt"})
    RunFolder(cfg, active=True)
    file = tmp_path / "run" / "config.json"
    assert json.loads(file.read_text())["stage"] == "grpo" and read_config(file) == cfg


def test_saved_settings_that_cannot_be_read_are_refused_by_name(tmp_path):
    cfg = checkpointed(config(tmp_path))
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"lr"', '"learning_rate"'))
    message = "config.json.*no field 'learning_rate'; choose another --out, or delete that folder"
    with pytest.raises(ValueError, match=message):
        RunFolder(cfg, active=True)


def test_tensorboard_gets_the_flat_numbers(tmp_path):
    run = RunFolder(config(tmp_path, tracker="tensorboard"), active=True)
    for row in rows(1, 2):
        run.log(row)
    run.tracker.flush()
    events = EventAccumulator(str(run.path / "tensorboard"))
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


def test_curves_are_drawn(tmp_path):
    run = RunFolder(config(tmp_path), active=True)
    for row in rows(*range(1, 6)):
        run.log(row)
    run.curves()
    image = Image.open(run.path / "curves.png")
    assert image.format == "PNG" and image.width > 600
    assert (
        len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    )  # axes and coloured lines, not a blank sheet
