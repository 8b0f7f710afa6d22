"""Scoring: no padded row enters a mean, the same noise for everyone, scorers that misbehave are named."""

import json
import math
import threading

import pytest
import torch

from opd.data import Prompt, fair_sample
from opd.evaluation import evaluate
from opd.evaluation.records import in_8_bits
from opd.evaluation.score import Row, Scorers, mean_score, planned, score
from opd.model import Sampling
from opd.rewards import Reward, Term
from tests import tiny

HERE = "tests.test_evaluate"
TEXTS = ("a red circle", "a blue circle", "two red circles")
POOL = [Prompt(text, "red", {"n": n}) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(world):
    """With the adapters red and blue."""
    return tiny.build(tiny.config(world))[1]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def nothing(images, prompts, metadata):
    return torch.full((len(images),), math.nan)


def only_circles(images, prompts, metadata):
    """NaN for two circles."""
    scores = images.mean((1, 2, 3))
    return torch.where(torch.tensor([text == "two red circles" for text in prompts]), math.nan, scores)


def too_short(images, prompts, metadata):
    return torch.zeros(1)


def needs_target(images, prompts, metadata):
    return torch.tensor([float(m["target"]) for m in metadata])


needs_target.metadata_keys = ("target",)


class Darkness:
    """Scores that are right only after load on the CPU."""

    device = None

    def load(self, device):
        self.device = device

    def __call__(self, images, prompts, metadata):
        assert self.device == torch.device("cpu")
        return 1 - images.mean((1, 2, 3))


def records_of(model, adapter="red", reward=brightness, count=7, timeout=30.0, **changes):
    settings = dict(steps=3, seed=0, guidance=1.0) | changes
    rows = {adapter: Row(adapter, Sampling(**settings))}
    batches = planned(rows, {"train": {"red": POOL}}, {adapter: {}}, count, batch=3)
    scorers = Scorers({"red": [Reward("spy", [Term(1.0, "spy", reward)])]}, timeout, strict=True)
    return score(batches, scorers, model)


def mean_of(model, adapter="red", reward=brightness, **changes):
    return mean_score(records_of(model, adapter, reward, **changes), "spy")


def brightness_one_by_one(model, count):
    """Of images that are generated one at a time."""
    order = [prompt.metadata["n"] for _, prompt in fair_sample(POOL, 3)]
    single = []
    for index in range(count):
        text = POOL[order[index % 3]].text
        image = in_8_bits(model.images("red", [text], [index], Sampling(3, 0, 1.0)))
        single.append(image.mean().item())
    return order, single


# ---- means -----------------------------------------------------------------------------------------


def test_mean_is_over_exactly_the_images_asked_for(model):
    """7 images in batches of 3: the mean of one by one, each with its prompt and metadata."""
    order, single = brightness_one_by_one(model, 7)
    assert sorted(order) == [0, 1, 2] and [index for index, _ in fair_sample(POOL, 3)] == [0, 1, 2]
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, [m["n"] for m in metadata], strict=True))
        return brightness(images, prompts, metadata)

    # A rounding to 8 bits may fall the other way.
    assert mean_of(model, reward=reward) == pytest.approx(sum(single) / 7, abs=1e-4)
    assert seen == [(POOL[order[i % 3]].text, order[i % 3]) for i in range(7)]


def test_few_images_are_a_fair_sample_of_a_sorted_file():
    pool = [Prompt(str(n), "t") for n in range(500)]
    mean = sum(int(prompt.text) for _, prompt in fair_sample(pool, 100)) / 100
    assert abs(mean - 249.5) < 4 * 144 / 10  # four standard errors of a uniform sample
    indices, prompts = zip(*fair_sample(pool, 6, per_prompt=2), strict=True)
    assert indices == tuple(range(6)) and prompts[:3] == prompts[3:] and len(fair_sample(pool, 0, 2)) == 1000


def test_a_batch_is_scored_while_the_next_is_generated(model, monkeypatch):
    """The first call waits until the second batch's images exist: waited for, it would hang."""
    alone = mean_of(model)
    generated, batches, images = threading.Event(), [], model.images

    def watched(*arguments):
        batches.append(arguments)
        if len(batches) == 2:
            generated.set()
        return images(*arguments)

    def reward(images, prompts, metadata):
        assert generated.wait(60)
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(model, "images", watched)
    assert mean_of(model, reward=reward, timeout=120.0) == alone


# ---- scorers that fail -----------------------------------------------------------------------------


def test_images_without_a_score_are_left_out_of_the_mean(model):
    order, single = brightness_one_by_one(model, 7)
    known = [value for index, value in enumerate(single) if TEXTS[order[index % 3]] != "two red circles"]
    assert 4 <= len(known) <= 5
    records = records_of(model, reward=only_circles)
    assert mean_score(records, "spy") == pytest.approx(sum(known) / len(known), abs=1e-4)
    missing = [record for record in records if record.lacks("spy")]
    assert len(missing) == 7 - len(known) and all(record.scores["spy"] is None for record in missing)
    assert {record.reasons["spy"] for record in missing} == {"prompt 'two red circles': returned nan"}


# ---- the command -----------------------------------------------------------------------------------


def command(world, *changes):
    files = f"red={world / 'red.txt'}"
    model = ["--model", str(world / "pipeline"), "--adapters", f"red={world / 'red'}", "--dtype", "float32"]
    sampling = ["--count", "3", "--steps", "2"]
    tasks = ["--prompts", files, "--heldout", files, "--rewards", f"red={HERE}:brightness"]
    evaluate.main([*model, *sampling, *tasks, *changes])


def test_the_command_writes_what_it_prints(world, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    command(world, "--out", str(out), "--rewards", f"red={HERE}:Darkness")
    written = json.loads(out.read_text())
    scores = written["scores"]
    assert list(scores) == ["base", "red"] and written["settings"]["reward_timeout"] == 60.0
    assert scores["red"]["train"] == scores["red"]["held-out"] != scores["base"]["train"]
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["red", f"{scores['red']['train']['red']:.3f}"] in printed
    command(world, "--out", str(out), "--no-base")  # a file may be replaced
    [(row, bright)] = json.loads(out.read_text())["scores"].items()
    assert row == "red"
    assert scores["red"]["train"]["red"] + bright["train"]["red"] == pytest.approx(1, abs=1e-5)


REFUSED = [
    (["--per-prompt", "0"], "--per-prompt is 0"),
    (["--rewards", "blue=a:b"], "task 'red' has no scorer; add --rewards red=module:function"),
    (["--rewards", f"red={HERE}:needs_target"], "task 'red': reward 'tests.test_evaluate:needs_target'"),
    (["--prompts", "--heldout"], "both empty"),
    (["--no-base", "--adapters"], "--no-base without --adapters"),
    (["--out", "/dev/null"], "--out '/dev/null' is not a regular file"),
    (["--out", f"{__file__}/new/scores.json"], f"{__file__!r} is not a directory"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_bad_arguments_are_refused_before_the_model(world, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(world, "--model", "/nowhere", *flags)
    assert stop.value.code.startswith("error: ") and message in stop.value.code


@pytest.mark.parametrize(
    "scorer, message", [("too_short", r"returned shape \(1,\) for 2 images"), ("nothing", "returned nan")]
)
def test_a_scorer_that_is_wrong_ends_the_command_with_its_reason(world, scorer, message):
    with pytest.raises(SystemExit, match=f"error: task 'red': .*'{HERE}:{scorer}'.*{message}"):
        command(world, "--rewards", f"red={HERE}:{scorer}")
