"""The editing miniature: it draws what it says, its scorers see that, and the real commands run on it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

import train
from opd.families import flux2
from opd.formats.prompts import load_prompts
from opd.mini import build, edit_pipeline, edits, world
from opd.mini.presets import EDITS
from opd.presets import PRESETS
from opd.rewards.pixels import preservation

WEIGHTS = build.WEIGHTS / "edits"
SCORERS = {"recolour": edits.recolour, "write": edits.write}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits") / EDITS
    edits.write_prompts(folder)
    return folder


def drawn(task: str, number: int = 48) -> tuple[list[edits.Edit], list[torch.Tensor]]:
    """Held-out edits, and their [before, after, mask] of four times the size, (B, 3, 96, 96) in [0, 1]."""
    asked = edits.split(task)[1][:number]
    pictures = [edits.draw(edit, np.random.default_rng(n)) for n, edit in enumerate(asked)]
    parts = [np.stack([edits.large(one) for one in part]) for part in zip(*pictures, strict=True)]
    return asked, [torch.from_numpy(part).permute(0, 3, 1, 2) / 255 for part in parts]


@pytest.mark.parametrize("task", SCORERS)
def test_scorers_see_the_edit_and_masks_cover_it(task):
    asked, (before, after, mask) = drawn(task)
    about = [edit.prompt for edit in asked], [edits.record_of(edit) for edit in asked]
    assert (SCORERS[task](after, *about) == 1).all()
    assert SCORERS[task](before, *about).mean() < 0.2
    assert torch.equal(before * (1 - mask), after * (1 - mask)) and 0.05 < mask.mean() < 0.35


@pytest.mark.parametrize("task", SCORERS)
def test_what_is_held_out_is_in_no_training_picture(task):
    train_edits, test_edits = edits.split(task)
    part = {"recolour": "before", "write": "change"}[task]
    held_out = {getattr(edit, part) for edit in test_edits[: edits.HELD_OUT]}
    assert not held_out & {words for edit in train_edits for words in (edit.before, edit.after)}
    assert all(edit.before != edit.after for edit in train_edits + test_edits)
    texts = [text for _, _, text in edit_pipeline.samples({task: 2000}, seed=0)]
    if task == "write":
        assert not set(texts) & {edit.prompt for edit in test_edits}


@pytest.mark.parametrize("task", SCORERS)
def test_prompt_files_name_pictures_that_rewards_find(task, folder):
    prompts = load_prompts(str(folder / f"{task}.test.jsonl"), task, None)
    assert len(prompts) == edits.HELD_OUT and all(len(prompt.pictures) == 1 for prompt in prompts)
    sources = [np.asarray(Image.open(prompt.pictures[0])) for prompt in prompts[:8]]
    images = torch.from_numpy(np.stack(sources)).permute(0, 3, 1, 2) / 255
    texts, metadata = [p.text for p in prompts[:8]], [p.metadata for p in prompts[:8]]
    assert (preservation(images, texts, metadata) == 1).all()
    assert SCORERS[task](images, texts, metadata).mean() < 0.5


def test_what_is_made_is_trained_on(tmp_path):
    """The data's latents are normalised and decode to what the scorer reads."""
    base = tmp_path / "pipeline"
    edit_pipeline.build_pipeline(base)
    edit_pipeline.write_data(tmp_path, base, {"recolour": 8, "write": 40, "paint": 16})
    rows = [json.loads(line) for line in open(tmp_path / "metadata.jsonl")]
    latents = load_file(tmp_path / "latents.safetensors")["latents"].float()
    assert latents.shape == (64, 32, 6, 6) and sum("image" in row for row in rows) == 48
    assert abs(latents.mean()) < 0.2 and abs(latents.std() - 1) < 0.2
    signs = [number for number, row in enumerate(rows) if row["prompt"].startswith("write")]
    images = flux2.decode(flux2.load_vae(base), latents[signs])
    scores = edits.write(images, [rows[number]["prompt"] for number in signs], [{}] * len(signs))
    # A fifth of the characters in the instructions are wrong.
    assert 0.6 < scores.mean() < 0.9
    short = {"iterations": 1, "sample_every": 0, "prompts_per_step": 8, "micro_batch": 8}
    places = {"model": str(base), "data": str(tmp_path), "out": str(tmp_path / "run")}
    train.run(replace(PRESETS["mini-edit-base"], **places, **short))
    assert (tmp_path / "run/student/diffusion_pytorch_model.safetensors").is_file()


def test_every_prompt_fits_the_tokenizer():
    tokenizer = Qwen2Tokenizer.from_pretrained(edit_pipeline.BASE / "tokenizer")
    texts = [edit.prompt for task in edits.EDITED for part in edits.split(task) for edit in part]
    for text in [*texts, *world.all_prompts("quality")]:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        words = 10 if "sign" in text else len(text.split())  # a string is read by the character
        assert len(tokenizer(chat).input_ids) == 1 + words <= tokenizer.model_max_length, text


def test_two_edit_teachers_and_one_that_paints_become_a_student(folder, tmp_path, monkeypatch):
    """The preset, shortened."""
    monkeypatch.chdir(folder.parent.parent)
    short = {"iterations": 2, "prompts_per_step": 6, "eval_prompts": 4, "eval_steps": 4, "sample_every": 0}
    train.run(replace(PRESETS["mini-edit"], **short, out=str(tmp_path)))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["base", *edits.TASKS, "start", "student"]
    assert set(scores["student"]["held-out"]) >= {*edits.TASKS, "mean"}
