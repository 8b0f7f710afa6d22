"""Pictures that are not square, and several sizes in one run: --resolution 8 8x16 16."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
from opd import memory, ranks
from opd.families import sd3
from opd.model import Model
from opd.setup import set_up
from tests import tiny
from tests.tiny_grpo import run

SIZES = ("8", "8x16", "16x8")
BRANCHES = {"guidance": 2.0, "branch_weight": 0.5}
CONFIGS = {
    "opd": lambda world, **changes: tiny.config(world, **BRANCHES, **changes),
    "grpo": tiny.grpo_config,
    "sft": tiny.sft_config,
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The tiny world with a scheduler whose noise levels depend on the size, and pictures to fit."""
    folder = tmp_path_factory.mktemp("resolutions")
    tiny.make_pipeline(folder / "square")
    tiny.with_scheduler(folder / "square", folder / "pipeline", {"use_dynamic_shifting": True})
    (folder / "images").mkdir()
    lines = []
    for number, prompt in enumerate(tiny.PROMPTS["red"]):
        Image.new("RGB", (12 + number, 16), (40 * number, 90, 120)).save(folder / "images" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": prompt}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tiny.furnish(folder)


def config(stage, own, folder, **changes):
    if stage == "sft":
        changes["data"] = str(own / "images")
    return CONFIGS[stage](own, out=str(folder), iterations=3, save_every=1, **changes)


def planned(own, *sizes) -> Model:
    cache, device = str(own / "cache"), torch.device("cpu")
    return Model.plan(sd3, str(own / "pipeline"), "float32", sizes, cache, device, True)


def weights(folder):
    return load_file(folder / "student" / "adapter_model.safetensors")


def test_a_round_of_steps_has_every_size_once_and_another_order_each_time(own):
    model = planned(own, *SIZES)
    drawn = [model.shape_of_step(0, step) for step in range(60)]
    rounds = [tuple(drawn[first : first + 3]) for first in range(0, 60, 3)]
    assert all(set(each) == {(4, 4, 4), (4, 4, 8), (4, 8, 4)} for each in rounds)
    assert len(set(rounds)) > 3
    assert drawn == [planned(own, *SIZES).shape_of_step(0, step) for step in range(60)]
    assert drawn != [model.shape_of_step(1, step) for step in range(60)]


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_step_is_that_of_a_resumed_run_at_its_size_alone(stage, own, tmp_path):
    """To the bit, so resuming changes nothing either."""
    cfg = config(stage, own, tmp_path / "several", resolution=SIZES)
    folder, model, _, _ = run(cfg)
    sizes = [row["resolution"] for row in folder.metrics()]
    assert set(sizes) == set(SIZES)
    assert model.pixels == (8, 8)  # the first, once the run is over
    alone = config(stage, own, tmp_path / "alone", force_resume=True)
    for done, size in enumerate(sizes, 1):
        folder_alone, *_ = run(replace(alone, resolution=(size,), iterations=done, force_resume=done > 1))
    norms = [[row["grad_norm"] for row in each.metrics()] for each in (folder, folder_alone)]
    assert norms[0] == norms[1] and len(set(norms[0])) == 3
    for name, weight in weights(tmp_path / "several").items():
        assert torch.equal(weight, weights(tmp_path / "alone")[name])


def test_noise_levels_and_weights_of_a_size_are_its_own(own):
    _, model, _, _, stage = tiny.build(tiny.config(own, resolution=SIZES))
    square, wide = (4, 4, 4), (4, 4, 8)
    found = {}
    for shape in (square, wide, square):
        with model.at(shape):
            plan = stage.plan(0)
            assert model.sigmas(4) == sd3.sigmas(model.folder, shape, 4)
            assert model.path(4, "sde", 0.7, [0] * 4).sigmas == model.sigmas(4)
            found.setdefault(shape, plan.weight_T)
            assert found[shape] == plan.weight_T
    assert found[square] != found[wide]
    with pytest.raises(RuntimeError), model.at(wide):
        raise RuntimeError
    assert model.shape == square


def test_memory_is_predicted_of_the_largest(own):
    cfg = tiny.config(own)
    parts = [memory.predict_run(cfg, planned(own, *sizes), 0) for sizes in (SIZES, ("16x8",), ("8",))]
    assert parts[0] == parts[1] != parts[2]


def test_sample_makes_pictures_of_height_and_width(own, tmp_path):
    given = ["--model", str(own / "pipeline"), "--cache", str(own / "cache"), "--steps", "2"]
    given += ["--adapters", f"red={own / 'red'}", "--prompts", "a red dot", "--out", str(tmp_path)]
    sample.main([*given, "--resolution", "8x16"])
    sizes = {Image.open(file).size for file in tmp_path.glob("a-red-dot.*.png")}
    assert sizes == {(16, 8)}
    for wrong, message in (("8 16", "HEIGHTxWIDTH"), ("8x6", "resolution 6 does not fit")):
        with pytest.raises(SystemExit, match=message):
            sample.main([*given, "--resolution", wrong])


def test_a_pipeline_as_teacher_has_the_students_sizes(own):
    teachers = {"red": str(own / "pipeline"), "blue": str(own / "blue")}
    cfg = tiny.config(own, resolution=SIZES, teachers=teachers)
    model, *_ = set_up(cfg, ranks.start())
    assert model.teachers["red"].shapes == model.shapes and prod(model.shapes[1]) == 128
