"""How a student is to be sampled: written with it, read by whoever samples it, and really used."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sample
from opd.evaluation import evaluate
from opd.formats.export import deployment_of
from tests import tiny

BRIGHT = "tests.test_evaluate:brightness"


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
    assert written == own | {"t5": True, "t5_tokens": 128}
    saved = folder / "run" / "checkpoints" / "000001"
    for file in saved.glob("*.safetensors"):  # equal weights are equal bytes
        assert file.read_bytes() == (folder / "run" / "student" / file.name).read_bytes()


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
    sample.main(again)
    assert np.array_equal(Image.open(tmp_path / "again" / own["student"].name), pixels["student"])


def test_a_broken_record_ends_in_one_line_before_weights_load(folder, tmp_path):
    shutil.copytree(student(folder), tmp_path / "broken")
    (tmp_path / "broken" / "deployment.json").write_text("{}")
    for main, more in ((sample.main, ["--prompts", "x"]), (evaluate.main, [])):
        with pytest.raises(SystemExit, match="error: .*deployment.json: 'guidance' is None"):
            main(["--model", "/nowhere", "--adapters", f"x={tmp_path / 'broken'}", *more])
