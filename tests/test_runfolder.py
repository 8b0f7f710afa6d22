"""The run folder: what is logged, what survives a resume or a crash, and the pictures."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd import files
from opd.config import Config
from opd.runfolder import FREE, RunFolder, flatten, labelled_grid, to_pil, wrap


def config(folder, **changes):
    return replace(Config(out=str(folder / "run")), **changes)


def rows(*steps):
    return [{"step": s, "loss": 1.0 / s, "red": {"loss": 0.1, "kl": {"1.000": 0.5}}, "grad_norm": 2.0 * s} for s in steps]


# ---- metrics and resuming ------------------------------------------------------------------------------------------


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
    hold = ("import sys, time; from opd.config import Config; from opd.runfolder import RunFolder; "
            "run = RunFolder(Config(out=sys.argv[1]), True); print('held', flush=True); time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="run belongs to a run that is still going; stop that run or choose another --out"):
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
    return value + 1 if isinstance(value, (int, float)) else "other"


def checkpointed(tmp_path):
    cfg = config(tmp_path)
    RunFolder(cfg, active=True).save_state(1, {"x": torch.ones(1)})
    return cfg


@pytest.mark.parametrize("name", sorted(FREE - {"out", "tracker"}))
def test_free_settings_may_change_on_resume(name, tmp_path):
    cfg = checkpointed(tmp_path)
    run = RunFolder(replace(cfg, **{name: different(getattr(cfg, name))}), active=True)
    assert run.load_state()[0] == 1


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name not in FREE])
def test_other_settings_may_not(name, tmp_path):
    cfg = checkpointed(tmp_path)
    RunFolder(cfg, active=True)
    other = replace(cfg, **{name: different(getattr(cfg, name))})
    with pytest.raises(ValueError, match=f"other settings: {name} .* -> .*; choose another --out") as caught:
        RunFolder(other, active=True)
    assert str(tmp_path) in str(caught.value)
    assert json.loads((tmp_path / "run" / "config.json").read_text())[name] == json.loads(json.dumps(getattr(cfg, name)))


def test_tensorboard_gets_the_flat_numbers(tmp_path):
    run = RunFolder(config(tmp_path, tracker="tensorboard"), active=True)
    for row in rows(1, 2):
        run.log(row)
    run.tracker.flush()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "loss", "red/loss", "red/kl/1.000", "grad_norm"}
    assert [(e.step, e.value) for e in events.Scalars("grad_norm")] == [(1, 2.0), (2, 4.0)]


# ---- files -----------------------------------------------------------------------------------------------------------


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


# ---- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels, side", [(1, 8), (8, 8), (9, 16), (120, 120)])
def test_to_pil_enlarges_by_whole_factors(pixels, side):
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    image = to_pil(x, pixels)
    assert image.size == (side, side)
    exact = (x.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(np.asarray(image), exact.repeat(side // 8, 0).repeat(side // 8, 1))


def test_labelled_grid_puts_every_image_in_its_place():
    g = torch.Generator().manual_seed(0)
    images = {name: list(torch.rand(3, 3, 8, 8, generator=g)) for name in ("base", "student")}
    grid = labelled_grid(images, ["a red circle", "two", "x" * 80], pixels=16)
    pixels = np.asarray(grid)
    tiles = [np.asarray(to_pil(image, 16)) for name in images for image in images[name]]
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16, 3))[:, :, 0]
    found = [np.argwhere((windows == tile).all((2, 3, 4))).tolist() for tile in tiles]
    assert all(len(places) == 1 for places in found)
    (y0, x0), *_ = [places[0] for places in found]
    pitch = 16 + 4
    assert [places[0] for places in found] == [[y0 + r * pitch, x0 + c * pitch] for r in range(2) for c in range(3)]
    assert grid.size == (x0 + 3 * pitch, y0 + 2 * pitch)
    ink = (pixels < 128).all(2)
    assert ink[:y0, x0:x0 + 16].any() and ink[y0:y0 + 16, :x0].any()  # a caption above, a name to the left


def test_wrap_makes_three_lines_at_most():
    assert wrap("a red circle left of a blue square", 10) == "a red\ncircle\nleft of a"
    assert wrap("x" * 30, 10) == "x" * 10 and wrap("", 10) == ""


def test_curves_are_drawn(tmp_path):
    run = RunFolder(config(tmp_path), active=True)
    for row in rows(*range(1, 6)):
        run.log(row)
    run.curves()
    image = Image.open(run.path / "curves.png")
    assert image.format == "PNG" and image.width > 600
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50  # axes and coloured lines, not a blank sheet
