"""Scoring: no padded row enters a mean, the same noise for everyone, scorers that misbehave are named."""

import pytest
import torch

from opd import adapters, evaluate
from opd.config import load_family
from opd.data import Prompt
from opd.model import Model


@pytest.fixture(scope="module")
def model(world):
    m = Model.plan(load_family("sd3"), str(world / "pipeline"), "float32", 0, str(world / "cache"), torch.device("cpu"), True)
    m.conditioning.prepare(["a red circle", "a blue circle", "two red circles", ""])
    m.load()
    for name in ("red", "blue"):
        adapters.attach(m.transformer, name, adapters.read_lora(str(world / name)), torch.float32)
    return m


POOL = [Prompt(t, "red", {"n": n}) for n, t in enumerate(("a red circle", "a blue circle", "two red circles"))]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def score(model, adapter="red", reward=brightness, count=7, **changes):
    return evaluate.score(model, adapter, POOL, reward, **(dict(count=count, steps=3, seed=0, guidance=1.0, batch=3) | changes))


def test_mean_is_over_exactly_the_images_asked_for(model):
    """7 images in batches of 3: the mean of one-by-one generation."""
    order = [p.metadata["n"] for _, p in evaluate.cases(POOL, 3)]
    assert sorted(order) == [0, 1, 2] and [n for n, _ in evaluate.cases(POOL, 3)] == [0, 1, 2]
    single = [model.images("red", [POOL[order[i % 3]].text], [i], steps=3, seed=0, guidance=1.0).mean().item() for i in range(7)]
    assert score(model) == pytest.approx(sum(single) / 7, abs=1e-5)
    seen = []
    score(model, reward=lambda images, prompts, metadata: seen.extend(zip(prompts, [m["n"] for m in metadata])) or torch.zeros(len(images)))
    assert seen == [(POOL[order[i % 3]].text, order[i % 3]) for i in range(7)]


def test_few_images_are_a_fair_sample_of_a_sorted_file():
    pool = [Prompt(str(n), "t") for n in range(500)]
    mean = sum(int(p.text) for _, p in evaluate.cases(pool, 100)) / 100
    assert abs(mean - 249.5) < 4 * 144 / 10  # four standard errors of a uniform sample


@pytest.mark.parametrize("changes", [{"adapter": "blue"}, {"adapter": "base"}, {"seed": 1}, {"steps": 4}, {"guidance": 3.0}], ids=str)
def test_every_setting_counts(model, changes):
    assert abs(score(model, **changes) - score(model)) > 1e-5


def test_misbehaving_scorers_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \(1,\) for 3 images"):
        score(model, reward=lambda images, *_: torch.zeros(1))
    with pytest.raises(ValueError, match="non-finite score"):
        score(model, reward=lambda images, *_: torch.full((len(images),), float("nan")))


@pytest.mark.parametrize("spec, message", [("nocolon", "module:function"), ("no.such:thing", "cannot be imported"),
                                           ("opd.mini.rewards:nothing", "cannot be imported"), ("math:sqrt", "must accept")])
def test_unknown_scorers_are_named(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate.find_reward(spec)
    assert spec in str(error.value)


def test_table_shows_every_number():
    scores = {"base": {"train": {"a": 0.1, "mean": 0.2}, "held-out": {"a": 0.3, "mean": 0.4}},
              "student": {"train": {"a": 0.5, "mean": 0.6}, "held-out": {"a": 0.7, "mean": 0.8}}}
    lines = evaluate.table(scores, "settings").splitlines()
    assert lines[0] == "settings" and lines[2].split() == ["a", "mean", "a", "mean"]
    assert lines[4].split() == ["student", "0.500", "0.600", "0.700", "0.800"]
