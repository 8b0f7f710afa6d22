"""A student's files and what they mean to those who load them: ours, PEFT, diffusers, ComfyUI; and how the
student is to be sampled: written, read, and really used."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

import sample
from opd import lora
from opd.evaluation import evaluate
from opd.families import sd3
from opd.formats import export
from opd.formats.export import Deployment, deployment_of, guidance_of
from tests import tiny
from tests.tiny_grpo import BRIGHT
from tests.tiny_lora import ours, under, velocity

DEPLOYED = Deployment("some/model", 2.5, "8", 2, False, 12)


# ---- weights -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(base, world, tmp_path_factory):
    """A student of rank 4, alpha 10 as saved, and its velocity."""
    folder, transformer = tmp_path_factory.mktemp("saved"), copy.deepcopy(base)
    student = tiny.random_lora(world / "pipeline", 5, rank=4, alpha=10.0)
    lora.attach(transformer, "student", student, torch.float32)
    weights = lora.parameters_of(transformer, "student")
    export.save_lora(folder, weights, "student", 4, 10.0, {export.KEY: DEPLOYED.text()})
    DEPLOYED.write(folder)
    return folder, under(transformer, "student")


def by_peft(base, world, folder):
    return velocity(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())


def by_diffusers(base, world, folder, **which):
    parts = {"transformer": copy.deepcopy(base), **sd3.NO_T5}
    pipe = StableDiffusion3Pipeline.from_pretrained(world / "pipeline", **parts)
    pipe.load_lora_weights(folder, **which)
    return velocity(pipe.transformer)


SINGLE = "pytorch_lora_weights.safetensors"
READERS = {
    "ours": ours,
    "our reader of the diffusers file": lambda base, world, folder: ours(base, world, folder / SINGLE),
    "PEFT": by_peft,
    "diffusers": by_diffusers,
    "diffusers by file name": lambda *given: by_diffusers(*given, weight_name=SINGLE),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_we_save_means_the_same_to_everyone(read, base, world, saved):
    folder, expected = saved
    assert (expected - velocity(base)).abs().max() > 0.01
    assert (read(base, world, folder) - expected).abs().max() < 1e-5


PREFIXES = {SINGLE: "transformer.", "adapter_model.safetensors": "base_model.model."}


@pytest.mark.parametrize("file", PREFIXES)
def test_both_files_of_a_student_work_in_comfyui_at_full_strength(file, saved, world):
    """Its loader knows these prefixes before diffusers' names, and takes alpha from a tensor beside the
    factors alone: without one their product is the update, whatever any config says."""
    student = tiny.random_lora(world / "pipeline", 5, rank=4, alpha=10.0)
    tensors = load_file(saved[0] / file)
    assert len(tensors) == 2 * len(student.A)
    for layer in student.A:
        a, b = (tensors[f"{PREFIXES[file]}{layer}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(b @ a, student.update(layer), rtol=1e-5, atol=1e-5)


# ---- how it is to be sampled -------------------------------------------------------------------------------
def test_the_folder_and_the_single_file_say_it(saved, world, tmp_path):
    folder, _ = saved
    shutil.copy(folder / SINGLE, tmp_path / "alone.safetensors")
    sources = {"base": "base", "a": str(folder), "b": str(tmp_path / "alone.safetensors")}
    silent = {"c": str(world / "red")}
    assert guidance_of(sources | silent) == {"base": 1.0, "a": 2.5, "b": 2.5, "c": 1.0}
    assert guidance_of(sources, 2.0) == dict.fromkeys(sources, 2.0)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A run whose student is deployed at 2.5, with grids, watch and table."""
    folder = tmp_path_factory.mktemp("deployed")
    red = {"red": str(world / "red.txt")}
    once = {"iterations": 1, "sample_every": 1, "watch_every": 1, "watch_prompts": 3, "heldout": red}
    table = {"evaluate": True, "eval_prompts": 3, "eval_steps": 2, "deploy_guidance": 2.5}
    scorers = dict.fromkeys(tiny.PROMPTS, BRIGHT)
    tiny.main(tiny.config(world, out=str(folder / "run"), rewards=scorers, **once, **table), folder)
    return folder


def student(folder) -> str:
    return str(folder / "run" / "student")


# ---- what is written --------------------------------------------------------------------------------
def test_a_students_folder_says_how_to_sample_it(world, folder):
    written = json.loads((folder / "run" / "student" / "deployment.json").read_text())
    own = {"model": str(world / "pipeline"), "guidance": 2.5, "resolution": "8", "steps": 2}
    assert written == own | {"t5": False, "max_sequence_length": 12}
    saved = folder / "run" / "checkpoints" / "000001"
    for file in saved.glob("*.safetensors"):  # equal weights are equal bytes
        assert file.read_bytes() == (folder / "run" / "student" / file.name).read_bytes()


def test_without_the_flag_it_is_the_guidance_of_training(world):
    cfg, model, *_ = tiny.build(tiny.config(world, guidance=3.0, t5=False, resolution="16x8"))
    deployment = deployment_of(cfg, model)
    assert (deployment.guidance, deployment.resolution) == (3.0, "16x8")
    assert deployment_of(replace(cfg, deploy_guidance=1.5), model).guidance == 1.5


# ---- what a run does with it ------------------------------------------------------------------------
def test_grid_watch_and_table_sample_the_student_as_it_is_deployed(world, folder, capsys):
    """The same images from opd.evaluation and sample.py at 2.5, and others at 1."""
    run = folder / "run"
    table = json.loads((run / "scores.json").read_text())
    watched = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["watch"]["red"]
    inside = table["student"]["held-out"]["red"]
    again = scores(world, folder, folder / "again.json")["student"]["held-out"]["red"]
    assert again == pytest.approx(inside, abs=1e-6) and watched == pytest.approx(inside, abs=1e-6)
    other = scores(world, folder, folder / "other.json", "--guidance", "1")["student"]["held-out"]["red"]
    assert abs(other - inside) > 1e-4
    rows = ["base g=2.5", "red g=1", "blue g=1", "student g=2.5"]
    shown = [line.split("  ")[0] for line in (run / "table.txt").read_text().splitlines()]
    assert [line for line in shown if " g=" in line][:4] == rows


def scores(world, folder, out, *flags):
    files = ["--prompts", "--heldout", f"red={world / 'red.txt'}", "--rewards", f"red={BRIGHT}"]
    model = ["--model", str(world / "pipeline"), "--adapters", f"student={student(folder)}"]
    sampling = ["--count", "3", "--dtype", "float32"]
    evaluate.main([*model, *files, *sampling, "--out", str(out), *flags])
    return json.loads(out.read_text())["scores"]


# ---- what others do with it -------------------------------------------------------------------------
def test_evaluate_sweeps_the_scale(world, folder, capsys):
    swept = scores(world, folder, folder / "swept.json", "--guidance", "1", "2.5")
    assert list(swept) == ["base g=1", "base g=2.5", "student g=1", "student g=2.5"]
    recorded = scores(world, folder, folder / "recorded.json")
    assert recorded["student"] == swept["student g=2.5"] != swept["student g=1"]
    assert recorded["base"] == swept["base g=1"]
    assert json.loads((folder / "recorded.json").read_text())["guidance"] == {"base": 1.0, "student": 2.5}
    said = capsys.readouterr().out
    assert "recorded with student: steps 2, resolution 8, t5 False" in said
    assert "n=3 per-prompt=1 steps=2 seed=0 resolution=8" in said
    assert "\nbase g=1 " in said and "\nstudent g=2.5 " in said


def pictures(world, folder, out, *flags):
    files = [f"student={student(folder)}", f"red={world / 'red'}"]
    model = ["--model", str(world / "pipeline"), "--adapters", *files, "--prompts", "a red dot"]
    places = ["--out", str(out), "--device", "cpu"]
    sample.main([*model, *places, "--dtype", "float32", *flags])
    return {name: out / f"a-red-dot.0.{name}.png" for name in ("base", "student", "red")}


def made_by(file):
    return json.loads(Image.open(file).info[export.KEY])


def test_sample_takes_what_is_recorded_unless_told(world, folder, tmp_path, capsys):
    """For every row alike. The picture tells what it was."""
    own = pictures(world, folder, tmp_path / "own")
    assert "recorded with student: guidance 2.5, steps 2, resolution 8, t5 False\n" in capsys.readouterr().out
    for file in own.values():
        used = made_by(file)
        assert (used["guidance"], used["steps"], used["resolution"], used["t5"]) == (2.5, 2, "8", False)
    pixels = {name: np.asarray(Image.open(file)) for name, file in own.items()}
    told = pictures(world, folder, tmp_path / "told", "--guidance", "2.5", "--steps", "2")
    assert all(np.array_equal(pixels[name], Image.open(file)) for name, file in told.items())
    other = pictures(world, folder, tmp_path / "other", "--guidance", "1", "--steps=3")
    assert not any(np.array_equal(pixels[name], Image.open(file)) for name, file in other.items())
    used = made_by(other["student"])
    assert (used["guidance"], used["steps"]) == (1.0, 3)


def test_of_several_records_the_largest_guidance_counts(folder, tmp_path, capsys):
    """Of the folders' files, not of the metadata of the weights beside them; also where an older version
    wrote no more than the guidance, and a later one more."""
    for name, scale in (("high", 4), ("low", 1.5)):
        shutil.copytree(student(folder), tmp_path / name)
        (tmp_path / name / export.FILE).write_text(json.dumps({"guidance": scale, "of a later version": 1}))
    sources = {name: str(tmp_path / name) for name in ("low", "high")}
    args = sample.Arguments(adapters=sources | {"student": student(folder)})
    names = ("guidance", "steps", "resolution")
    assert export.completed(args, [], names) == replace(args, guidance=4.0)
    said = "recorded with high: guidance 4 (the largest recorded; low 1.5, student 2.5)\n"
    assert capsys.readouterr().out == said
    assert export.completed(args, ["--guidance=1"], names) == args


def test_a_broken_record_ends_in_one_line_before_weights_load(folder, tmp_path):
    shutil.copytree(student(folder), tmp_path / "broken")
    for record, message in {'{"steps": 1': "not JSON", '{"steps": 0}': "--steps is 0"}.items():
        (tmp_path / "broken" / export.FILE).write_text(record)
        for main, more in ((sample.main, ["--prompts", "x"]), (evaluate.main, ["--prompts", "x=x"])):
            with pytest.raises(SystemExit, match=f"^error: .*broken.*: {message}"):
                main(["--model", "/nowhere", "--adapters", f"x={tmp_path / 'broken'}", *more])
