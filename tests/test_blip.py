"""T2I-CompBench's BLIP-VQA: its formula on what the model itself would generate, on random weights."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from opd.formats.pictures import to_pil
from opd.rewards.blip import BlipVqa
from tests.tiny_scorers import loaded, save_blip

WORDS = "a the red green dog cat bowl apple small".split()
PROMPTS = ["a red apple and a green bowl", "a small dog"]
PHRASES = [["a red apple", "a green bowl"], ["a small dog"]]
METADATA = [{"noun_phrases": phrases} for phrases in PHRASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("blip") / "vqa", WORDS)


@pytest.fixture(scope="module")
def images_BCHW():
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def reward(folder):
    return loaded(f"blip_vqa@{folder}")


def yes_of_generation(folder, image_CHW, phrase):
    """P(yes) / (P(yes) + P(no)) of the first token that `generate` weighs, [ENC] in front."""
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    inputs = processor(images=to_pil(image_CHW, 0), text=f"{phrase}?", return_tensors="pt")
    vocabulary = processor.tokenizer.get_vocab()
    inputs["input_ids"][:, 0] = vocabulary["[ENC]"]
    out = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    odds = out.logits[0][0].double().exp()
    return (odds[vocabulary["yes"]] / (odds[vocabulary["yes"]] + odds[vocabulary["no"]])).item()


def test_the_score_is_the_product_over_the_phrases(folder, reward, images_BCHW):
    wanted = []
    for image_CHW, phrases in zip(images_BCHW, PHRASES, strict=True):
        product = 1.0
        for phrase in phrases:
            product *= yes_of_generation(folder, image_CHW, phrase)
        wanted.append(product)
    scores_B = reward(images_BCHW, PROMPTS, METADATA)
    assert torch.allclose(scores_B.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5)
    other_B = reward(images_BCHW.flip(0), PROMPTS, METADATA)
    assert (scores_B - other_B).abs().min() > 1e-3
    eight = {"noun_phrases": PHRASES[1] * 8}
    nine = {"noun_phrases": PHRASES[1] * 8 + ["the green cat"]}  # which is not asked for
    assert torch.equal(reward(images_BCHW, PROMPTS, [eight] * 2), reward(images_BCHW, PROMPTS, [nine] * 2))


def spacy_that_knows(models):
    """A package spacy whose models split a text at its " and "."""

    def load(name):
        if name not in models:
            raise OSError(f"[E050] Can't find model {name!r}")
        return lambda text: SimpleNamespace(noun_chunks=map(part_of, text.split(" and ")))

    return SimpleNamespace(load=load, __spec__=SimpleNamespace())


def part_of(text):
    return SimpleNamespace(text=text)


def test_without_a_list_the_phrases_are_spacys_noun_chunks(reward, images_BCHW, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", spacy_that_knows({"en_core_web_sm"}))
    wanted = reward(images_BCHW, PROMPTS, METADATA)
    assert torch.equal(reward(images_BCHW, PROMPTS, [{}, {}]), wanted)
    beside = [f"{prompt} and the left and top" for prompt in PROMPTS]
    assert torch.equal(reward(images_BCHW, beside, [{}, {}]), wanted)


FAULTS = [
    ({}, None, r"flow-opd\[compbench\]"),
    ({}, set(), "python -m spacy download en_core_web_sm"),
    ({"noun_phrases": "a dog"}, None, "must be a list of texts, got 'a dog'"),
    ({"noun_phrases": []}, None, "no noun phrase was found"),
]


@pytest.mark.parametrize("metadata, models, words", FAULTS)
def test_a_prompt_that_cannot_be_scored_says_why(folder, monkeypatch, metadata, models, words):
    spacy = None if models is None else spacy_that_knows(models)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert re.search(words, BlipVqa(str(folder)).prompt_fault("a dog", metadata))
