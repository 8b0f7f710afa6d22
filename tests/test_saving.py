"""What a run folder keeps, whom it belongs to, and what a run that resumes insists on."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from opd.formats.state import save_state
from opd.model import Model
from opd.runfolder import RunFolder
from opd.setup import contents
from tests import forked, tiny
from tests.tiny_grpo import BRIGHT


def snapshot(folder):
    """Every file below, by content."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- what is kept ------------------------------------------------------------------------------------------


def test_retention_the_best_student_and_what_a_finished_run_restores(world, tmp_path):
    out = tmp_path / "run"
    scored = {"heldout": {"red": str(world / "red.txt")}, "rewards": {"red": BRIGHT}}
    often = {"iterations": 5, "save_every": 1, "keep_last": 2, "sample_every": 5, "eval_steps": 2}
    cfg = tiny.config(world, out=str(out), lr=0.1, watch_every=1, watch_prompts=4, **often, **scored)
    train.run(cfg)
    kept = {file.name for file in (out / "checkpoints").iterdir()}
    assert kept == {"000004", "000005"}
    watched = [row["watch"]["red"] for row in forked.rows(out)]
    best = watched.index(max(watched)) + 1
    assert len(set(watched)) == 5
    if f"{best:06d}" in kept:
        kept_best = snapshot(out / "checkpoints" / f"{best:06d}")
        kept_best.pop(Path("README.md"), None)  # the card is written beside what a run ends with
        assert snapshot(out / "best") == kept_best
    assert snapshot(out / "student") == snapshot(out / "checkpoints/000005")

    before = snapshot(out)
    for folder in ("student", "checkpoints/000005", "samples"):
        shutil.rmtree(out / folder)
    (out / "student").mkdir()
    (out / "state/.000006.tmp").mkdir()
    (out / "state/.000006.tmp/half").write_bytes(b"half")
    (out / "student" / ".adapter_model.safetensors.4.tmp").write_bytes(b"half")
    train.run(cfg)
    assert snapshot(out) == before
    mode = (out / "student/adapter_model.safetensors").stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def lacking(file):
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


@pytest.mark.parametrize("damage", [cut, lacking, Path.unlink])
def test_a_damaged_state_is_named_with_the_way_out_and_stays(world, tmp_path, damage):
    cfg, _, _, trained, _ = tiny.build(tiny.config(world, out=str(tmp_path)))
    RunFolder(cfg, active=True).save_to_go_on(trained, 3)
    (file,) = (tmp_path / "state/000003").glob("*.safetensors")
    damage(file)
    half = snapshot(tmp_path / "state")
    with pytest.raises(OSError, match="state/000003 is damaged .*student"):
        RunFolder(cfg, active=True).resume(trained)
    assert snapshot(tmp_path / "state") == half


# ---- whose folder it is ------------------------------------------------------------------------------------


def theirs(out):
    (out / "config.json").write_text('{"model_type": "llama"}')


def student_alone(out):
    (out / "config.json").write_text('{"stage": "opd"}')
    (out / "student").mkdir()


def linked_student(out):
    (out.parent / "precious").mkdir()
    (out / "student").symlink_to(out.parent / "precious")


def linked_checkpoint(out):
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "000020").symlink_to(out.parent)


NOT_A_RUNS = [
    (theirs, "holds 'config.json' and no run; choose an empty --out"),
    (student_alone, "holds a student, but no state/ to resume from; choose another --out"),
    (linked_student, "student is a link; a run writes into its own folder"),
    (linked_checkpoint, "000020 is a link"),
]


@pytest.mark.parametrize("prepare, message", NOT_A_RUNS)
def test_a_folder_that_is_not_a_runs_is_left_alone(world, tmp_path, prepare, message):
    out = tmp_path / "run"
    out.mkdir()
    prepare(out)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        RunFolder(tiny.config(world, out=str(out)), active=True)
    assert snapshot(tmp_path) == before


# ---- the same run ------------------------------------------------------------------------------------------


def planned(cfg):
    return Model.plan(cfg.model, cfg.dtype, "", torch.device("cpu"), True)


def test_a_run_resumes_with_the_same_contents_wherever_they_lie_or_says_which_changed(
    world, tmp_path, capsys
):
    shutil.copytree(world, tmp_path / "one", ignore=shutil.ignore_patterns("cache", "run"))
    out = str(tmp_path / "run")
    cfg = tiny.config(tmp_path / "one", out=out)
    folder = RunFolder(cfg, active=True)
    folder.check_contents(contents(cfg, planned(cfg)))
    save_state(folder.path, 1, {"x": torch.ones(1)})

    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = tiny.config(tmp_path / "two", out=out, micro_batch=1)
    RunFolder(moved, active=True).check_contents(contents(moved, planned(moved)))

    with open(tmp_path / "two" / "red.txt", "a") as file:
        file.write("a red line more\n")
    tiny.save(tiny.random_lora(tmp_path / "two/pipeline", seed=9), tmp_path / "two/blue")
    base = tmp_path / "two/pipeline/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(base).items()}, base)
    changed = contents(moved, planned(replace(moved, dtype="bfloat16")))
    kept = snapshot(tmp_path / "run")
    message = "began with another dtype, base, teacher blue, prompts 1: red; restore that, choose another"
    with pytest.raises(ValueError, match=message):
        RunFolder(moved, active=True).check_contents(changed)
    assert snapshot(tmp_path / "run") == kept
    with pytest.raises(ValueError, match="lr 0.01 -> 0.5"):
        RunFolder(replace(moved, lr=0.5), active=True)

    RunFolder(replace(moved, lr=0.5, force_resume=True), active=True).check_contents(changed)
    printed = capsys.readouterr().out
    assert "lr 0.01 -> 0.5" in printed and "teacher blue" in printed
    RunFolder(replace(moved, lr=0.5), active=True).check_contents(changed)
