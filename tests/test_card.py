"""What a student's card tells others to run makes the pictures that sample.py makes."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sample
from opd.formats.export import deployment_of
from opd.model import Model
from opd.report.card import write_card
from opd.report.start import facts
from tests import tiny
from tests.test_families import FIXTURES, made, noise


def carded(folder: Path, cfg, model: Model) -> str:
    deployment_of(cfg, model).write(folder)
    write_card(folder, cfg, model, 3, "")
    return (folder / "README.md").read_text().replace("THIS_FOLDER", str(folder))


def by_snippet(card: str, start) -> np.ndarray:
    """The picture of the card's code, from our noise."""
    [code] = re.findall("```python\n(.*?)\n```", card, re.DOTALL)
    assert len(code.splitlines()) <= 8
    names = {"start": start}
    exec(code.replace("pipe(", "pipe(latents=start, "), names)
    return np.asarray(names["image"]).astype(int)


def by_sample(flags: list[str], out: Path, row: str = "student") -> np.ndarray:
    more = ["--prompts", "two red circles", "--dtype", "float32", "--device", "cpu", "--out", str(out)]
    sample.main([*flags, *more])
    return np.asarray(Image.open(out / f"two-red-circles.0.{row}.png")).astype(int)


HOW = {"resolution": "16x8", "guidance": 3.0, "eval_steps": 4}


@pytest.mark.parametrize("row, t5", [*((row, True) for row in FIXTURES), ("sd3 with T5", False)])
def test_diffusers_makes_the_picture_that_sample_makes(row, t5, world, tmp_path):
    for case in made(row, tmp_path):
        same_pictures(case, tiny.config(world, model=str(case.pipeline), t5=t5, **HOW), tmp_path)


@pytest.mark.parametrize("row, shard", [("sd3 with T5", "1GB"), ("z_image", "40KB")])
def test_the_same_of_a_pipeline_that_is_there_in_float16_alone(row, shard, world, tmp_path):
    """With one file a part, or with shards."""
    for case in made(row, tmp_path):
        kind = getattr(diffusers, case.family.PIPELINE)
        whole = kind.from_pretrained(case.pipeline, dtype=torch.float16)
        whole.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shard)
        assert all("fp16" in file.name for file in (tmp_path / "half").rglob("*.safetensors"))
        files = list((tmp_path / "half/transformer").glob("*.safetensors"))
        assert (len(files) > 1) == (shard == "40KB")
        same_pictures(case, tiny.config(world, model=str(tmp_path / "half"), **HOW), tmp_path)


def same_pictures(case, cfg, place: Path) -> None:
    model = tiny.planned(cfg)
    folder = tiny.save(tiny.random_lora(case.pipeline, 7, family=case.family), place / "student")
    card = carded(folder, cfg, model)
    [command] = re.findall("^    python sample.py (.*)$", card, re.MULTILINE)
    mine = by_sample(shlex.split(command), place / "images")
    theirs = by_snippet(card, case.fixture.pack(noise(model, 0, (0,))))
    assert mine.shape == theirs.shape == (16, 8, 3) and mine.std() > 1
    assert np.abs(mine - theirs).max() <= 1


def test_so_does_a_student_of_all_weights(world, tmp_path):
    cfg = tiny.sft_config(world, full=True, **HOW)
    model = tiny.planned(cfg)
    card = carded(tiny.fold(world, "red", tmp_path / "student"), cfg, model)
    theirs = by_snippet(card, noise(model, 0, (0,)))
    flags = ["--model", cfg.model, "--adapters", f"red={world / 'red'}"]
    told = ["--resolution", "16x8", "--guidance", "3", "--steps", "4"]
    assert np.abs(by_sample([*flags, *told], tmp_path / "images", "red") - theirs).max() <= 1


def test_who_teaches_what_anchors_and_what_rewards_are_named(world):
    cfg = replace(tiny.config(world), anchor_weight=0.0, anchor_levels={"0.6": 2.0}, routes={"red": "base"})
    found = facts(cfg)
    assert found["teacher base"] == "base, at guidance 1" and found["teacher blue"].startswith(str(world))
    assert found["anchor"] == "blue, weight 0, 2 from noise level 0.6 down"
    assert "anchor" not in facts(replace(cfg, anchor_levels={}))
    routed = replace(cfg, routing="reward", train_rewards={"red": "m:f", "blue": "m:g"})
    assert facts(routed)["reward of blue"] == "m:g"
