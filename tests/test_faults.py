"""What breaks under a run: each fault is named, before training where it can be; nothing saved is lost."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from opd.families import flux
from opd.formats import state
from opd.model import Model
from opd.runfolder import RunFolder
from tests import tiny, tiny_families


def cut(file):
    """A file that broke off while it was copied."""
    file.write_bytes(file.read_bytes()[:-200])


def spoil(file):
    """NaN in one number of the first weight."""
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)


def drop_a_layer(file):
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "transformer_blocks.1.attn.to_q" not in name}, file)


def as_two_variants(file):
    shutil.copy(file, file.with_suffix(".bf16.safetensors"))
    file.rename(file.with_suffix(".fp16.safetensors"))


def scribble(file):
    file.write_text('{"a": ')


def setting(name, value):
    def change(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    change.__name__ = f"{name} {value}"
    return change


def empty(folder):
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
SCHEDULER, NAN = "scheduler/scheduler_config.json", float("nan")
FALL = "must fall strictly to 0"
BREAKS = [
    (cut, TRANSFORMER, "pipeline'.*SafetensorError"),
    (spoil, TRANSFORMER, "transformer: 1 of .* numbers of .* are NaN or infinite"),
    (drop_a_layer, TRANSFORMER, "2 weights are missing: .*transformer_blocks.1.attn.to_q"),
    (as_two_variants, TRANSFORMER, "has no .*safetensors; load it with diffusers .variant=.*model.bf16.safe"),
    (scribble, "transformer/config.json", "pipeline"),
    (cut, "vae/diffusion_pytorch_model.safetensors", "vae"),
    (spoil, "vae/diffusion_pytorch_model.safetensors", "vae: 1 of .* NaN or infinite"),
    (scribble, "vae/config.json", "pipeline"),
    (setting("vae", [None, None]), "model_index.json", "pipeline"),
    (scribble, SCHEDULER, "scheduler"),
    *((setting("shift", x), SCHEDULER, f"shift {x}: sigmas {FALL}") for x in (NAN, -2)),
    (setting("invert_sigmas", True), SCHEDULER, f"sigmas {FALL}"),
    (setting("_class_name", "DDIMScheduler"), SCHEDULER, "DDIMScheduler is not for flow matching; put"),
    (cut, "text_encoder/model.safetensors", "text encoders of .*pipeline"),
    (spoil, "text_encoder_2/model.safetensors", "text encoders of .*pipeline: NaN or infinite numbers for"),
    (scribble, "text_encoder/config.json", "pipeline/text_encoder/config.json: not JSON"),
    (empty, "tokenizer_2", "tokenizer_2 holds none of tokenizer.json"),
    (Path.unlink, "model_index.json", "pipeline.*model_index.json"),
    *((shutil.rmtree, part, f"pipeline.*{part}") for part in ("transformer", "vae", "scheduler")),
    *((shutil.rmtree, part, f"lacks its folder {part}") for part in ("tokenizer", "text_encoder_2")),
    (scribble, "tokenizer/tokenizer.json", "text encoders of .*pipeline"),
]


@pytest.mark.parametrize("break_it, part, message", BREAKS, ids=[f"{b.__name__}-{p}" for b, p, _ in BREAKS])
def test_a_broken_part_of_a_pipeline_is_named_before_training(world, tmp_path, break_it, part, message):
    shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    break_it(tmp_path / "pipeline" / part)
    cfg = tiny.config(world, model=str(tmp_path / "pipeline"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tiny.build(cfg)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    """A world whose base takes no guidance, and beside it a pipeline that does."""
    folder = tmp_path_factory.mktemp("schnell")
    tiny_families.make_flux(folder / "dev")
    tiny_families.make_flux(folder / "pipeline", told=False)
    return tiny.furnish(folder, flux)


def loading(*arguments):
    raise AssertionError("weights, or text encoders, load")


GUIDANCES = [{"guidance": 3.5, "deploy_guidance": 1.0}, {"deploy_guidance": 3.5}, {"teacher_guidance": 3.5}]
GUIDANCES.append({"teacher_guidances": {"blue": 3.5}})


@pytest.mark.parametrize("changes", GUIDANCES)
def test_guidance_of_a_model_that_takes_none_is_refused_before_weights_load(schnell, monkeypatch, changes):
    """Unless it is that of a teacher's own model, which takes it."""
    monkeypatch.setattr(Model, "prepare", loading)
    with pytest.raises(ValueError, match="^guidance 3.5: this FLUX.1 takes none; use 1 .--guidance, --depl"):
        tiny.build(tiny.config(schnell, **changes))
    teachers = {"red": str(schnell / "dev"), "blue": str(schnell / "blue")}
    with pytest.raises(AssertionError, match="weights"):
        tiny.build(tiny.config(schnell, teachers=teachers, teacher_guidances={"red": 3.5}))


@pytest.mark.parametrize("name", ["steps", "eval_steps"])
def test_too_few_steps_for_a_scheduler_are_refused_before_weights_load(world, tmp_path, monkeypatch, name):
    """As Qwen-Image's, which stretches its levels to one above 0."""
    monkeypatch.setattr(Model, "prepare", loading)
    settings = {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    model = str(tiny.with_scheduler(world / "pipeline", tmp_path / "pipeline", settings))
    message = f"--{name.replace('_', '-')} 1: .*scheduler has shift_terminal 0.02; it needs 2 steps or more"
    with pytest.raises(ValueError, match=message):
        tiny.build(tiny.config(world, model=model, **{name: 1}))
    with pytest.raises(AssertionError, match="weights"):
        tiny.build(tiny.config(world, model=model, **{name: 2}))


def uncertain(images, prompts, metadata):
    return images.mean((1, 2, 3)).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_deterministic_runs_refuse_what_is_not(world, tmp_path):
    rewards = dict.fromkeys(tiny.PROMPTS, f"{__name__}:uncertain")
    settings = {"out": str(tmp_path), "train_rewards": rewards, "iterations": 1}
    try:
        with pytest.raises(SystemExit, match="put_.* does not have a deterministic implementation"):
            train.run(tiny.grpo_config(world, deterministic=True, **settings))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        train.run(tiny.grpo_config(world, **settings))


def test_a_disk_that_refuses_costs_the_last_steps_alone(world, tmp_path, monkeypatch, capsys):
    """The third state is not written: one line, exit status 1, the second whole; once it can be, it ends
    with the files of a run that never stopped. The clock, meanwhile, jumps a day back at every look."""
    settings = {"iterations": 4, "save_every": 1, "sample_every": 0}
    train.run(tiny.config(world, out=str(tmp_path / "whole"), **settings))
    cfg = tiny.config(world, out=str(tmp_path / "run"), **settings)
    written = []

    def full(tensors, storage_writer):
        written.append(storage_writer.path)
        if len(written) == 3:
            Path(storage_writer.path).mkdir()
            (Path(storage_writer.path) / "half").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, storage_writer=storage_writer)

    days, write = itertools.count(), state.dcp.save
    monkeypatch.setattr(time, "time", lambda: 1.8e9 - 86400 * next(days))
    monkeypatch.setattr(state.dcp, "save", full)
    with pytest.raises(SystemExit, match="error: .*No space left on device"):
        train.run(cfg)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.setattr(state.dcp, "save", write)
    train.run(cfg)
    assert "resuming" in capsys.readouterr().out
    name = "student/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("number, refused", [(errno.ENOLCK, False), (errno.EAGAIN, True)])
def test_a_file_system_without_locks_is_trained_on(world, tmp_path, monkeypatch, number, refused):
    def lockf(file, how):
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    if refused:
        with pytest.raises(ValueError, match="belongs to a run that is still going"):
            RunFolder(tiny.config(world, out=str(tmp_path)), active=True)
    else:
        RunFolder(tiny.config(world, out=str(tmp_path)), active=True)
