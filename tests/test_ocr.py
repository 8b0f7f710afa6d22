"""The OCR reward: the released formula on readings made by hand, and the real engine on rendered signs."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from opd import rewards
from opd.formats.prompts import load_prompts
from opd.rewards import ocr
from opd.rewards.prompts import ocr_prompts

FORMULA = [
    ("Hello World", "hELLOwORLD", 1),  # case and spaces do not count
    ("Hello", "say Hello to all", 1),  # contained: more text costs nothing
    ("Hello", "", 0),
    ("Hello", "Hallo", 1 - 1 / 5),
    ("Hello", "xyz" * 20, 0),  # distance 60, cut at the length
    ("it’s", "it's", 1 - 1 / 4),  # the right reading, as the released formula has it
]


@pytest.mark.parametrize("target, text, score", FORMULA)
def test_the_released_formula(target, text, score):
    assert ocr.ocr_score(target, text) == pytest.approx(score)


def test_folded_typography_counts_as_right():
    for target, text in [("“Go”", '"go"'), ("½ off", "1/2 off"), ("1–2 — ﬁne", "1-2-fine")]:
        assert ocr.ocr_score(target, text) < 1
        assert ocr.ocr_score(ocr.folded(target), ocr.folded(text)) == 1


def test_edit_distance_is_the_recursive_definition():
    """On words of up to 3 letters over {a, b}."""
    words = ["", *"ab", "aa", "ab", "ba", "bb", "aab", "aba", "bab", "bba"]

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a in words:
        for b in words:
            assert ocr.edit_distance(a, b) == slow(a, b)


def test_a_target_stands_in_the_first_pair_of_straight_quotes():
    assert ocr.target_of('a "b c" and "d"') == "b c"
    assert ocr.target_fault('a sign "x"') == ""
    for text in ("a sign “x”", '6" of rain', 'a blank "  " sign'):
        assert "double quotes" in ocr.target_fault(text)


# ---- the engine --------------------------------------------


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed; .[test] brings it")
    found = rewards.find_reward("ocr")
    found.load(torch.device("cpu"))
    return found


def signs(count):
    """512 px pictures of OCR prompts' targets: several fonts, sizes, colours, grain, blur."""
    from matplotlib import get_data_path

    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSans-Oblique", "DejaVuSerif-BoldItalic")
    rng = np.random.default_rng(0)
    prompts = ocr_prompts(count, 11, "test", set())
    images = []
    for number, prompt in enumerate(prompts):
        ground = rng.integers(140, 250, 3)
        grain = rng.normal(0, 8, (512, 512, 3))
        picture = Image.fromarray((ground + grain).clip(0, 255).astype(np.uint8))
        ink = tuple(int(value) for value in rng.integers(0, 60, 3))
        path = f"{get_data_path()}/fonts/ttf/{names[number % len(names)]}.ttf"
        font = ImageFont.truetype(path, int(rng.integers(24, 34)))
        place = (int(rng.integers(10, 30)), int(rng.integers(50, 400)))
        ImageDraw.Draw(picture).text(place, ocr.target_of(prompt), fill=ink, font=font)
        blurred = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.8))))
        images.append(torch.from_numpy(np.array(blurred)).permute(2, 0, 1) / 255)
    return torch.stack(images).float(), prompts


def test_rendered_signs_are_read_and_their_neighbours_are_not(reward):
    images_BCHW, prompts = signs(12)
    scores_B = reward(images_BCHW, prompts, [{}] * 12)
    others_B = reward(images_BCHW, prompts[1:] + prompts[:1], [{}] * 12)
    assert scores_B.shape == (12,) and scores_B.mean() >= 0.98
    assert others_B.mean() <= 0.25 and others_B.max() <= 0.6


def test_a_blank_picture_scores_zero_without_a_word(reward, capfd):
    images_BCHW = torch.stack([torch.zeros(3, 256, 256), torch.full((3, 256, 256), 0.5)])
    scores_B = reward(images_BCHW, ['"a b"'] * 2, [{}] * 2)
    assert scores_B.tolist() == [0, 0]
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_what_cannot_be_scored_is_named(reward, tmp_path, monkeypatch):
    file = tmp_path / "train.txt"
    file.write_text('a sign "yes"\na sign that says no\n')
    message = r"train.txt:2 'a sign that says no' cannot be scored by ocr: .*quotes"
    with pytest.raises(ValueError, match=message):
        reward.check_metadata("ocr", load_prompts(str(file), "ocr", None))
    with pytest.raises(ValueError, match="unknown typography 'fold'"):
        rewards.find_reward("ocr@fold")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package rapidocr.*flow-opd\[ocr\]"):
        ocr.Ocr()
