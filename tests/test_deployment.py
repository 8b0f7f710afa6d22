"""How a student is to be sampled: written with it, read by whoever samples it, and really used."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open

import sample
import train
from opd import ranks
from opd.cli import to_json
from opd.evaluation import evaluate
from opd.formats.deployment import Deployment, deployment_of, guidance_of, read_deployment
from tests import tiny

BRIGHT = "tests.test_evaluate:brightness"


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A run whose student is deployed at 2.5, with grids, watch and table."""
    folder = tmp_path_factory.mktemp("deployed")
    red = {"red": str(world / "red.txt")}
    cfg = tiny.config(
        world,
        out=str(folder / "run"),
        iterations=1,
        sample_every=1,
        evaluate=True,
        watch_every=1,
        watch_prompts=3,
        heldout=red,
        rewards=dict.fromkeys(tiny.PROMPTS, BRIGHT),
        eval_prompts=3,
        eval_steps=2,
        deploy_guidance=2.5,
    )
    (folder / "config.json").write_text(json.dumps(to_json(cfg)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", str(folder / "config.json")])
        try:
            train.main()
        finally:
            if torch.distributed.is_initialized():
                ranks.stop()
    return folder


def student(folder) -> str:
    return str(folder / "run" / "student")


# ---- what is written --------------------------------------------------------------------------------


def test_a_students_folder_says_how_to_sample_it(world, folder):
    written = json.loads((folder / "run" / "student" / "deployment.json").read_text())
    assert written == {
        "model": str(world / "pipeline"),
        "guidance": 2.5,
        "resolution": "8",
        "steps": 2,
        "t5": True,
        "t5_tokens": 128,
    }
    assert read_deployment(student(folder)) == Deployment(**written)
    assert (folder / "run" / "checkpoints" / "000001" / "deployment.json").is_file()


def test_the_single_file_says_the_same_and_equal_files_are_equal_bytes(folder):
    """It has one metadata key; without its folder it is read alone."""
    name = "pytorch_lora_weights.safetensors"
    original = folder / "run" / "student" / name
    copy = folder / "copy.safetensors"
    shutil.copy(original, copy)
    with safe_open(copy, "pt") as file:
        assert list(file.metadata()) == ["flow-opd"]
    assert read_deployment(str(copy)) == read_deployment(student(folder))
    assert original.read_bytes() == (folder / "run" / "checkpoints" / "000001" / name).read_bytes()


def test_diffusers_and_peft_still_read_the_student(world, folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(world / "pipeline", **tiny.NO_T5)
    pipe.load_lora_weights(student(folder))
    assert pipe.get_active_adapters() == ["default_0"]


def test_without_the_flag_it_is_the_guidance_of_training(world):
    cfg, model, *_ = tiny.build(tiny.config(world, guidance=3.0, t5=False, resolution="16x8"))
    deployment = deployment_of(cfg, model)
    assert (deployment.guidance, deployment.resolution) == (3.0, "16x8")
    assert (deployment.t5, deployment.t5_tokens) == (False, 0)
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
    assert "guidance 2.5 (teachers 1.0)" in (run / "table.txt").read_text()


def scores(world, folder, out, *flags):
    files = ["--prompts", "--heldout", f"red={world / 'red.txt'}", "--rewards", f"red={BRIGHT}"]
    model = ["--model", str(world / "pipeline"), "--adapters", f"student={student(folder)}"]
    sampling = ["--count", "3", "--steps", "2", "--dtype", "float32"]
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
    assert "guidance=base 1, student 2.5" in capsys.readouterr().out


def pictures(world, folder, out, *flags):
    files = [f"student={student(folder)}", f"red={world / 'red'}"]
    model = ["--model", str(world / "pipeline"), "--adapters", *files, "--prompts", "a red dot"]
    places = ["--out", str(out), "--device", "cpu"]
    sample.main([*model, *places, "--dtype", "float32", "--steps", "2", *flags])
    return {name: out / f"a-red-dot.0.{name}.png" for name in ("base", "student", "red")}


def test_sample_takes_the_recorded_scale_unless_told(world, folder, tmp_path):
    """Per row: 1 for the base and the teacher. The picture tells which; --again repeats it."""
    own = pictures(world, folder, tmp_path / "own")
    told = pictures(world, folder, tmp_path / "told", "--guidance", "2.5")
    used = {name: sample.read_settings(str(file))["guidance"] for name, file in own.items()}
    assert used == {"base": 1.0, "student": 2.5, "red": 1.0}
    pixels = {name: np.asarray(Image.open(file)) for name, file in own.items()}
    same = {name: np.array_equal(pixels[name], Image.open(file)) for name, file in told.items()}
    assert same == {"base": False, "student": True, "red": False}
    again = ["--again", str(own["student"]), "--out", str(tmp_path / "again"), "--device", "cpu"]
    sample.main([*again])
    assert np.array_equal(Image.open(tmp_path / "again" / own["student"].name), pixels["student"])


def test_an_edited_record_counts(world, folder, tmp_path):
    """The folder's file, not the metadata of the weights beside it."""
    shutil.copytree(student(folder), tmp_path / "edited")
    values = json.loads((tmp_path / "edited" / "deployment.json").read_text())
    edited = values | {"guidance": 4, "of a later version": 1}
    (tmp_path / "edited" / "deployment.json").write_text(json.dumps(edited))
    adapters = {"base": "base", "a": str(tmp_path / "edited"), "b": str(world / "red")}
    assert guidance_of(adapters) == {"base": 1.0, "a": 4.0, "b": 1.0}
    assert guidance_of(adapters, 2.0) == dict.fromkeys(adapters, 2.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("{}", "'model' is missing"),
        ('"guidance": 2.5 -> "guidance": "high"', "'guidance' is 'high'; expected float"),
        ('"guidance": 2.5 -> "guidance": NaN', "'guidance' is nan; it must be finite"),
        ('"steps": 2 -> "steps": true', "'steps' is True; expected int"),
    ],
)
def test_a_broken_record_is_named_before_weights_load(folder, tmp_path, text, message):
    shutil.copytree(student(folder), tmp_path / "broken")
    file = tmp_path / "broken" / "deployment.json"
    before, _, after = text.partition(" -> ")
    if after:
        text = file.read_text().replace(before, after)
    file.write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*{file.name}.*{message}"):
        sample.main(["--model", "/nowhere", "--adapters", f"x={file.parent}", "--prompts", "x"])
    with pytest.raises(SystemExit, match=f"error: .*{file.name}.*{message}"):
        evaluate.main(["--model", "/nowhere", "--adapters", f"x={file.parent}"])
