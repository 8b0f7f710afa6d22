"""The miniature of 64 px signs that the real OCR reward grows a teacher on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from opd import rewards
from opd.formats.prompts import load_prompts
from opd.mini import signs
from opd.presets import PRESETS


def test_the_reader_reads_what_is_drawn_and_what_the_vae_makes_of_it(tmp_path):
    """Its ceiling: 24 strings of the held-out split."""
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed; .[test] brings it")
    _, strings = signs.split()
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(np.stack([signs.draw(string, rng) for string in strings[:24]]))
    images_BCHW = drawn.permute(0, 3, 1, 2) / 255
    vae = signs.sd3.load_vae(signs.build.WEIGHTS / "base")
    decoded_BCHW = signs.sd3.decode(vae, signs.sd3.encode_images(vae, images_BCHW))
    reward = rewards.find_reward("ocr")
    reward.load(torch.device("cpu"))
    prompts = [signs.prompt_of(string) for string in strings[:24]]
    for images in (images_BCHW, decoded_BCHW):
        assert reward(images, prompts, [{}] * 24).mean() > 0.95
    others = prompts[1:] + prompts[:1]
    assert reward(images_BCHW, others, [{}] * 24).mean() < 0.5


def test_held_out_strings_are_in_no_caption_and_captions_are_wrong_as_often_as_said():
    train_strings, test_strings = signs.split()
    assert len(test_strings) == signs.HELD_OUT and not set(train_strings) & set(test_strings)
    rng = np.random.default_rng(0)
    captions = [signs.misspelt("A2A", rng, set(test_strings)) for _ in range(4000)]
    assert not set(captions) & set(test_strings)
    wrong = np.mean([[a != b for a, b in zip(caption, "A2A", strict=True)] for caption in captions])
    # Captions drawn again for being held out had a wrong character or more.
    assert 0.28 < wrong < signs.CAPTION_ERROR


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
