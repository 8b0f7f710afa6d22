"""The OCR reward: the released formula on readings made by hand, and the real engine on rendered signs."""

import pytest
import torch

from opd.rewards import ocr
from tests.tiny_scorers import loaded

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


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed; .[test] brings it")
    return loaded("ocr")


def test_a_blank_picture_scores_zero_without_a_word(reward, capfd):
    images_BCHW = torch.stack([torch.zeros(3, 256, 256), torch.full((3, 256, 256), 0.5)])
    scores_B = reward(images_BCHW, ['"a b"'] * 2, [{}] * 2)
    assert scores_B.tolist() == [0, 0]
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_what_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package rapidocr.*flow-opd\[ocr\]"):
        ocr.Ocr()
