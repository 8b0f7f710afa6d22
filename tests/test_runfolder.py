"""The run folder: whose it is, what it logs and keeps, and what a run that resumes insists on."""

import json
import math
import os
import resource
import shutil
import signal
import struct
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from opd import errors, files
from opd.cli import field_names
from opd.config import STAGES, DistillationConfig, GRPOConfig, SFTConfig
from opd.formats.pictures import save_image
from opd.formats.settings import read_config
from opd.formats.state import save_state
from opd.runfolder import FREE, RunFolder, check_same_run
from opd.setup import contents
from tests import forked, tiny
from tests.tiny_grpo import BRIGHT

TRAINED = mock.Mock(state=lambda: {"x": torch.ones(1)})


def config(folder, **changes):
    return DistillationConfig(out=str(folder / "run"), **changes)


def rows(*steps):
    red = {"loss": 0.1, "kl": {"1.000": 0.5}}
    return [{"step": s, "loss": 1.0 / s, "red": red, "grad_norm": 2.0 * s} for s in steps]


# ---- metrics and resuming ----------------------------------------------------------------------------------
def hold(folder, held):
    run = RunFolder(DistillationConfig(out=str(folder)), active=True)
    held.set()
    time.sleep(600)
    del run  # it lived so long


def test_a_folder_belongs_to_one_living_run(tmp_path):
    """A second process is refused while the first lives, and welcome once it was killed."""
    held = forked.SERVER.Event()
    other = forked.SERVER.Process(target=hold, args=(tmp_path / "run", held))
    other.start()
    assert held.wait(300)
    with pytest.raises(ValueError, match="run belongs to a run that is still going; stop that run or"):
        RunFolder(config(tmp_path), active=True)
    RunFolder(config(tmp_path), active=False)  # the other ranks of a run hold nothing
    other.kill()
    other.join()
    RunFolder(config(tmp_path), active=True)


def test_a_run_killed_before_its_first_state_starts_over(tmp_path):
    run = RunFolder(config(tmp_path), active=True)
    run.log(rows(1)[0])
    again = RunFolder(config(tmp_path, lr=0.5), active=True)  # nothing to mix with, so any setting may change
    assert json.loads((again.path / "config.json").read_text())["lr"] == 0.5


@pytest.mark.parametrize("done, kept", [(0, []), (1, ["000000.png", "000001.png"])])
def test_what_is_past_the_state_that_a_run_goes_on_from_is_dropped(tmp_path, done, kept):
    """Lines of the log and grids, which without a state may be another run's; what the user calls otherwise
    stays."""
    run = RunFolder(config(tmp_path), active=True)
    for row in rows(1, 2):
        run.log(row)
    if done > 0:
        save_state(run.path, done, TRAINED.state())
    for name in ("000000.png", "000001.png", "000002.png", "2.png", "nice.png"):
        save_image(Image.new("RGB", (8, 8)), run.path / "samples" / name)
    assert run.resume(TRAINED) == done
    assert run.metrics() == rows(1, 2)[:done]
    assert sorted(file.name for file in (run.path / "samples").iterdir()) == [*kept, "2.png", "nice.png"]


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
    message = "run holds a run of stage sft, and this is stage grpo; choose another --out, or"
    with pytest.raises(ValueError, match=message):
        RunFolder(GRPOConfig(out=out), active=True)
    assert read_config(tmp_path / "run" / "config.json", STAGES) == cfg


# ---- files -------------------------------------------------------------------------------------------------
@contextmanager
def full_disk():
    """No file can grow past 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def log(file, numbers):
    run = RunFolder(DistillationConfig(out=str(file.parent)), active=False)
    run.active = True
    run.log({"step": 1, "numbers": numbers})


WRITERS = {
    "x.json": files.write_json,
    "x.png": lambda file, numbers: save_image(Image.frombytes("RGB", (64, 64), bytes(numbers)), file),
    "x.safetensors": lambda file, numbers: files.write_safetensors(file, {"x": torch.tensor(numbers)}),
    "metrics.jsonl": log,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, name):
    """What lay there before stays as it was."""
    file, noise = tmp_path / name, list(os.urandom(64 * 64 * 3))
    WRITERS[name](file, noise[::-1])
    before = file.read_bytes()
    with full_disk(), pytest.raises(SystemExit, match=f"^error: {file} cannot be written .*File too large"):
        with errors.in_one_line(OSError):
            WRITERS[name](file, noise)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [name]


def written_in_part(file, noise):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills at the 4,097th byte
    with full_disk():
        WRITERS[file.name](file, noise)


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_kill_leaves_of_a_write_is_removed(tmp_path, name):
    """Also the temporary files of libraries, such as the one of safetensors."""
    file, noise = tmp_path / name, list(os.urandom(64 * 64 * 3))
    WRITERS[name](file, noise[::-1])
    before = file.read_bytes()
    writer = forked.SERVER.Process(target=written_in_part, args=(file, noise))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGXFSZ
    files.remove_temporaries(tmp_path)
    assert file.read_bytes().startswith(before) and [path.name for path in tmp_path.iterdir()] == [name]


def snapshot(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- what is kept ------------------------------------------------------------------------------------------
def test_retention_the_best_student_and_what_a_finished_run_restores(world, tmp_path):
    out = tmp_path / "run"
    scored = {"heldout": {"red": str(world / "red.txt")}, "rewards": {"red": BRIGHT}}
    often = {"iterations": 5, "save_every": 1, "keep_last": 2, "sample_every": 5, "eval_steps": 2}
    cfg = tiny.config(world, out=str(out), lr=0.1, watch_every=1, watch_prompts=4, **often, **scored)
    (out / "checkpoints/000001.bak").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"stage": "opd"}))
    train.run(cfg)
    kept = {file.name for file in (out / "checkpoints").iterdir()}
    assert kept == {"000001.bak", "000004", "000005"}  # the first is the user's copy
    watched = [row["watch"]["red"] for row in forked.rows(out)]
    best = watched.index(max(watched)) + 1
    assert len(set(watched)) == 5
    if f"{best:06d}" in kept:
        kept_best = snapshot(out / "checkpoints" / f"{best:06d}")
        kept_best.pop(Path("README.md"), None)  # the card is written beside what a run ends with
        assert snapshot(out / "best") == kept_best
    assert snapshot(out / "student") == snapshot(out / "checkpoints/000005")

    before = snapshot(out)
    for folder in ("student", "checkpoints/000005"):
        shutil.rmtree(out / folder)
    (out / "samples/000005.png").unlink()
    (out / "student").mkdir()
    shutil.copytree(out / "state/000005", out / "state/000004")
    (out / "state/.000006.tmp").mkdir()
    (out / "state/.000006.tmp/half").write_bytes(b"half")
    (out / "student" / ".adapter_model.safetensors.4.tmp").write_bytes(b"half")
    train.run(cfg)
    assert snapshot(out) == before
    mode = (out / "student/adapter_model.safetensors").stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


@pytest.mark.parametrize("line", ['{"step": 1', "", "\xff", "3", "{}", '{"step": "x"}'])
def test_a_damaged_log_is_named_before_weights_load(tmp_path, line):
    cfg, path = with_state(config(tmp_path))
    text = "\n".join([json.dumps(row) for row in rows(1)] + [line, '{"step": 2}', '{"step": 3, "cut by a ki'])
    (path / "metrics.jsonl").write_text(text, encoding="latin1")
    named = f"{path}/metrics.jsonl: line 2 is none of a run's log, delete it: "
    with pytest.raises(ValueError, match=named):
        RunFolder(cfg, active=True)
    (path / "metrics.jsonl").write_text(text.replace(f"{line}\n", "", 1))
    assert RunFolder(cfg, active=True).metrics() == [*rows(1), {"step": 2}]


def test_a_state_past_the_last_step_is_refused_and_a_copy_of_one_is_no_state(tmp_path):
    cfg, path = with_state(config(tmp_path))
    shutil.copytree(path / "state/000001", path / "state/000090.bak")
    RunFolder(cfg, active=True)
    save_state(path, 2, {"x": torch.ones(1)})
    assert {folder.name for folder in (path / "state").iterdir()} == {"000002", "000090.bak"}
    (path / "state/000002").rename(path / "state/1000000000")
    with pytest.raises(ValueError, match="is 1000000000 steps along, past --iterations 60; choose another"):
        RunFolder(cfg, active=True)


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def lacking(file):
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


def spoilt(file):
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("f", math.nan))


def edited(file):
    """Whole and finite, but with other numbers of optimizer steps than were made."""
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("optimizer/step/"):
            tensors[name] += 1000
    size = file.stat().st_size
    save_file(tensors, file, metadata)
    assert file.stat().st_size == size


@pytest.mark.parametrize("damage", [cut, lacking, spoilt, edited, Path.unlink])
def test_a_damaged_state_is_named_with_the_way_out_and_stays(world, tmp_path, damage):
    cfg, _, _, trained, _ = tiny.build(tiny.config(world, out=str(tmp_path)))
    RunFolder(cfg, active=True).save_to_go_on(trained, 3)
    (file,) = (tmp_path / "state/000003").glob("*.safetensors")
    damage(file)
    half = snapshot(tmp_path / "state")
    with pytest.raises(OSError, match="state/000003 is damaged .*student"):
        RunFolder(cfg, active=True).resume(trained)
    assert snapshot(tmp_path / "state") == half


@pytest.mark.parametrize(
    "changes, apart",
    [
        ({"rank": 8}, r"\S*lora_A\S* is \(4, 32\) in it, \(8, 32\) here"),
        ({"ema": 0.9}, r"it has no average/\S*lora_A\S*"),
    ],
)
def test_a_whole_state_that_does_not_fit_costs_nothing(world, tmp_path, changes, apart):
    """The former settings go on, with what the run read before."""
    cfg = tiny.config(world, out=str(tmp_path), rank=4)
    folder, trained = RunFolder(cfg, active=True), tiny.build(cfg)[3]
    folder.check_contents({"base": "1"})
    folder.resume(trained)
    folder.save_to_go_on(trained, 3)
    before = snapshot(tmp_path)
    other = replace(cfg, force_resume=True, **changes)
    forced, trained_otherwise = RunFolder(other, active=True), tiny.build(other)[3]
    forced.check_contents({"base": "2"})
    with pytest.raises(OSError, match=f"state/000003 does not fit these settings: {apart}; go on with the"):
        forced.resume(trained_otherwise)
    assert snapshot(tmp_path) == before
    assert RunFolder(cfg, active=True).resume(trained) == 3


# ---- whose folder it is ------------------------------------------------------------------------------------
# (files, links, message); links lead to what is beside the run folder.
NOT_A_RUNS = [
    ({"config.json": '{"model_type": "llama"}'}, [], "holds 'config.json' and no run; choose an empty --out"),
    ({"config.json": '{"stage": "opd"}', "student/x": ""}, [], "a student, but no state/ to resume from"),
    ({}, ["student"], "student is a link; a run writes into its own folder"),
    ({"checkpoints/x": ""}, ["checkpoints/000020"], "000020 is a link"),
]


@pytest.mark.parametrize("files, links, message", NOT_A_RUNS)
def test_a_folder_that_is_not_a_runs_is_left_alone(world, tmp_path, files, links, message):
    out, precious = tmp_path / "run", tmp_path / "precious"
    out.mkdir()
    precious.mkdir()
    for name, text in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    for name in links:
        (out / name).symlink_to(precious)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        RunFolder(tiny.config(world, out=str(out)), active=True)
    assert snapshot(tmp_path) == before


# ---- the same run ------------------------------------------------------------------------------------------
def test_a_run_resumes_with_the_same_contents_or_says_which_changed(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "one", ignore=shutil.ignore_patterns("cache", "run"))
    out = str(tmp_path / "run")

    def red(alpha, cfg):
        return replace(cfg, teachers=cfg.teachers | {"red": f"{cfg.teachers['red']}:alpha={alpha}"})

    cfg = red(8, tiny.config(tmp_path / "one", out=out))
    folder = RunFolder(cfg, active=True)
    folder.check_contents(contents(cfg, tiny.planned(cfg), {}))
    folder.resume(TRAINED)
    save_state(folder.path, 1, TRAINED.state())

    (tmp_path / "one/blue/README.md").write_text("a card with new scores")
    shutil.move(tmp_path / "one", tmp_path / "two")
    plain = tiny.config(tmp_path / "two", out=out, micro_batch=1)
    moved = red(8, plain)
    RunFolder(moved, active=True).check_contents(contents(moved, tiny.planned(moved), {}))

    with open(tmp_path / "two" / "red.txt", "a") as file:
        file.write("a red line more\n")
    tiny.save(tiny.random_lora(tmp_path / "two/pipeline", seed=9), tmp_path / "two/blue")
    base = tmp_path / "two/pipeline/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(base).items()}, base)
    changed = contents(red(1, plain), tiny.planned(replace(moved, dtype="bfloat16")), {})
    kept = snapshot(tmp_path / "run")
    others = "dtype, base, teacher red, teacher blue, prompt file of red .task 1."
    with pytest.raises(ValueError, match=f"began with another {others}; restore that, choose"):
        RunFolder(moved, active=True).check_contents(changed)
    assert snapshot(tmp_path / "run") == kept
    with pytest.raises(ValueError, match="lr 0.01 -> 0.5"):
        RunFolder(replace(moved, lr=0.5), active=True)

    forced = RunFolder(replace(moved, lr=0.5, force_resume=True), active=True)
    forced.check_contents(changed)
    forced.resume(TRAINED)
    printed = capsys.readouterr().out
    assert "lr 0.01 -> 0.5" in printed and "teacher blue" in printed
    RunFolder(replace(moved, lr=0.5), active=True).check_contents(changed)
