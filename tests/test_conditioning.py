"""Encoded prompts: encoded once, ahead of the steps that read them, to bits that no resume changes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd import conditioning
from opd.conditioning import Conditioning
from opd.families import sd3

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]
STEPS = [[f"{step} {n}" for n in range(3)] for step in range(5)]


def words(seen: list) -> Conditioning:
    """A family of words in the place of encoders. `seen` gets every batch of prompts, and "loaded" whenever
    the encoders load. What a prompt becomes depends on its batch, as rounding may."""

    def encode_prompts(text, prompts, device):
        seen.append(prompts)
        return [{"words": torch.full((1 + len(p.split()), 3), float(len(prompts)))} for p in prompts]

    family = SimpleNamespace(load_text=lambda *_: seen.append("loaded"), encode_prompts=encode_prompts)
    return Conditioning(family, Path("nowhere"), torch.float32, CPU)


def test_conditions_are_the_encoders_own_and_encoded_once(world, monkeypatch):
    texts = Conditioning(sd3, world / "pipeline", torch.float32, CPU)
    texts.prepare([*PROMPTS, PROMPTS[0]])
    encoders = sd3.load_text(world / "pipeline", torch.float32, CPU, True)
    expected = sd3.encode_prompts(encoders, PROMPTS, CPU)
    monkeypatch.setattr(sd3, "load_text", None)
    texts.prepare(PROMPTS)
    for mine, theirs in zip(texts(PROMPTS[::-1]), expected[::-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_prompt_of_a_micro_batch_is_moved_once_for_all_its_states_and_teachers():
    texts = words([])
    texts.prepare(["one", "two"])
    first = texts(["one", "two", "one"])
    assert first[0] is first[2] and texts(["two"])[0] is first[1]


def test_prompts_are_encoded_in_windows_ahead_of_the_steps_that_read_them(monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 6)
    seen = []
    texts = words(seen)
    texts.prepare(["shown"])
    texts.follow([*STEPS, ["shown", "4 0"]])
    for step, prompts in enumerate(STEPS):
        texts.ahead(step)
        assert len(texts(prompts)) == 3
        assert len(texts.window) <= 6
    batches = [batch for batch in seen if batch != "loaded"]
    assert batches == [["shown"], STEPS[0] + STEPS[1], STEPS[2] + STEPS[3], STEPS[4]]


def test_a_run_that_resumes_encodes_the_window_of_its_step_as_before(monkeypatch):
    """Whole, and in the same batches, whatever step it goes on from."""
    monkeypatch.setattr(conditioning, "WINDOW", 6)
    whole, resumed = words([]), words([])
    for texts, steps in ((whole, range(4)), (resumed, [3])):
        texts.follow(STEPS)
        for step in steps:
            texts.ahead(step)
    assert whole.window.keys() == resumed.window.keys()
    for prompt, condition in whole.window.items():
        assert torch.equal(condition["words"], resumed.window[prompt]["words"])


def test_a_step_larger_than_a_window_is_encoded_whole(monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 2)
    texts = words([])
    texts.follow([["a", "b", "c"], ["d"]])
    for step, prompts in enumerate([["a", "b", "c"], ["d"]]):
        texts.ahead(step)
        assert list(texts.window) == prompts


def test_numbers_that_are_none_are_refused_with_the_prompt():
    texts = words([])
    texts.family.encode_prompts = lambda *_: [{"words": torch.tensor([float("nan")])}]
    with pytest.raises(ValueError, match="NaN or infinite numbers for 'one'"):
        texts.prepare(["one"])
