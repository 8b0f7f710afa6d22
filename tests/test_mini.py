"""The shipped miniature: its weights are the recorded ones, and the real commands run on it; the miniature of
signs that the real OCR reward grows a teacher on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from opd.families import sd3
from opd.formats.prompts import load_prompts
from opd.mini import build, signs, world
from opd.mini.presets import MINI_PRESETS
from opd.presets import PRESETS
from opd.setup import read_by, set_up
from tests import forked
from tests.tiny_scorers import loaded


def test_shipped_weights_have_the_recorded_sha256():
    assert (build.WEIGHTS / "SHA256SUMS").read_text() == build.sums()


READ = {name: [source for _, _, source in read_by(cfg)] for name, cfg in MINI_PRESETS.items()}
MADE = [name for name, sources in READ.items() if any(source.startswith("runs/") for source in sources)]


@pytest.mark.parametrize("name", MADE)
def test_a_preset_says_what_makes_what_it_reads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/.* is not there yet; make it by: python ") as error:
        set_up(PRESETS[name], torch.device("cpu"))
    assert str(error.value).split()[0] in READ[name]


def test_every_world_prompt_fits_the_tokenizer():
    pipe = sd3.load_text(build.WEIGHTS / "base", torch.float32, torch.device("cpu"), t5=True)
    for prompt in world.specs():
        assert len(pipe.tokenizer(prompt).input_ids) <= pipe.tokenizer.model_max_length, prompt


def test_first_command_ends_with_the_table_and_a_folder_that_holds_everything(tmp_path):
    """The README's first command, shortened."""
    out = tmp_path / "run"
    command = "--iterations 2 --prompts-per-step 6 --eval-prompts 8 --eval-steps 5 --sample-every 2 --out"
    printed = forked.finished([forked.train(tmp_path / "log", [*command.split(), str(out)])])
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["base", "compose", "text", "quality", "start", "student"]
    for row in scores.values():
        assert list(row) == ["held-out"] and list(row["held-out"]) == ["compose", "text", "quality", "mean"]
        assert row["held-out"]["mean"] == pytest.approx(sum(row["held-out"][t] for t in world.TASKS) / 3)
    assert (out / "table.txt").read_text().strip() in printed
    assert scores["text"]["held-out"]["text"] > scores["base"]["held-out"]["text"]
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["effective_batch"] == 6 and row["compose"]["loss"] > 0
    student = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md")
    for name in (*(f"student/{file}" for file in student), "curves.png", "samples/000002.png", "report.html"):
        assert (out / name).exists(), name


def test_the_reader_reads_what_is_drawn_and_what_the_vae_makes_of_it(tmp_path):
    """Its ceiling: 24 strings of the held-out split."""
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed; .[test] brings it")
    _, strings = signs.split()
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(np.stack([signs.draw(string, rng) for string in strings[:24]]))
    images_BCHW = drawn.permute(0, 3, 1, 2) / 255
    vae = sd3.load_vae(build.WEIGHTS / "base")
    decoded_BCHW = sd3.decode(vae, sd3.encode_images(vae, images_BCHW))
    reward = loaded("ocr")
    prompts = [signs.prompt_of(string) for string in strings[:24]]
    for images in (images_BCHW, decoded_BCHW):
        assert reward(images, prompts, [{}] * 24).mean() > 0.95
    others = prompts[1:] + prompts[:1]
    assert reward(images_BCHW, others, [{}] * 24).mean() < 0.5


def test_held_out_strings_are_in_no_caption():
    train_strings, test_strings = signs.split()
    assert len(test_strings) == signs.HELD_OUT and not set(train_strings) & set(test_strings)
    _, captions = signs.pairs(1000, seed=0)
    assert not set(captions) & {signs.prompt_of(string) for string in test_strings}


def test_what_is_made_is_trained_on(tmp_path):
    signs.make(tmp_path, images=40)
    captions = [json.loads(line)["prompt"] for line in open(tmp_path / "data/metadata.jsonl")]
    assert len(captions) == 40 and captions[0].startswith('a sign that says "')
    assert load_file(tmp_path / "data/latents.safetensors")["latents"].shape == (40, 8, 32, 32)
    assert len(load_prompts(str(tmp_path / "test.txt"), "text", None)) == signs.HELD_OUT
    names = {"out": "run", "model": "pipeline", "data": "data"}
    places = {setting: str(tmp_path / name) for setting, name in names.items()}
    short = {"iterations": 1, "sample_every": 0, "prompts_per_step": 4}
    train.run(replace(PRESETS["mini-ocr-base"], **places, **short))
    trained = load_file(tmp_path / "run/student/diffusion_pytorch_model.safetensors")
    assert trained["pos_embed.proj.weight"].shape == (192, 8, 4, 4)
