"""Scoring: no padded row enters a mean, the same noise for everyone, scorers that misbehave are named."""

import json
import math
import os
import sys
import threading
import time

import pytest
import torch

from opd import adapters
from opd.data import Prompt
from opd.evaluation import evaluate, tables
from opd.evaluation import score as gallery
from opd.evaluation.records import in_8_bits
from opd.evaluation.score import Asked, Judge, Row
from opd.evaluation.statistics import summarise
from opd.formats import lora_files
from opd.model import Model, Sampling
from opd.rewards import Reward, Term

HERE = "tests.test_evaluate"


@pytest.fixture(scope="module")
def model(world):
    cpu = torch.device("cpu")
    model = Model.plan(str(world / "pipeline"), "float32", "", cpu, True)
    model.conditioning.prepare(["a red circle", "a blue circle", "two red circles", ""])
    model.load()
    for name in ("red", "blue"):
        adapters.attach(model.transformer, name, lora_files.read_lora(str(world / name)), torch.float32)
    return model


TEXTS = ("a red circle", "a blue circle", "two red circles")
POOL = [Prompt(text, "red", {"n": n}) for n, text in enumerate(TEXTS)]


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


class Unloadable:
    def load(self, device):
        raise OSError("no such weights")

    def __call__(self, images, prompts, metadata):
        return torch.zeros(len(images))


def spy(function, name="spy"):
    return Reward(name, [Term(1.0, name, function)])


def records_of(model, adapter="red", rewards=(brightness,), images_per_task=7, strict=True, **changes):
    settings = dict(ode_steps=3, seed=0, guidance=1.0, batch=3, timeout=30.0) | changes
    rows = {adapter: Row(adapter, settings["guidance"])}
    count = {"count": images_per_task, "steps": settings["ode_steps"], "seed": settings["seed"]}
    sampling = Asked(**count, batch=settings["batch"])
    batches = gallery.planned(rows, {"train": {"red": POOL}}, sampling, {adapter: {}})
    spies = [spy(reward, f"spy{place or ''}") for place, reward in enumerate(rewards)]
    judge = Judge({"red": spies}, settings["timeout"], strict)
    return judge.records(batches, lambda batch: gallery.made(model, rows, batch), None)


def score(model, adapter="red", reward=brightness, **changes):
    return gallery.mean_score(records_of(model, adapter, (reward,), **changes), "spy")


def brightness_one_by_one(model, count):
    """Of images that are generated one at a time."""
    order = [prompt.metadata["n"] for _, prompt in gallery.cases_of(POOL, 3)]
    single = []
    for index in range(count):
        text = POOL[order[index % 3]].text
        image = in_8_bits(model.images("red", [text], [index], Sampling(3, 0, 1.0)))
        single.append(image.mean().item())
    return order, single


# ---- means -----------------------------------------------------------------------------------------


def test_mean_is_over_exactly_the_images_asked_for(model):
    """7 images in batches of 3: the mean of one-by-one generation."""
    order, single = brightness_one_by_one(model, 7)
    assert sorted(order) == [0, 1, 2] and [index for index, _ in gallery.cases_of(POOL, 3)] == [0, 1, 2]
    assert score(model) == pytest.approx(sum(single) / 7, abs=1e-4)  # a rounding may fall the other way
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, [m["n"] for m in metadata], strict=True))
        return torch.zeros(len(images))

    score(model, reward=reward)
    assert seen == [(POOL[order[i % 3]].text, order[i % 3]) for i in range(7)]


def test_few_images_are_a_fair_sample_of_a_sorted_file():
    pool = [Prompt(str(n), "t") for n in range(500)]
    mean = sum(int(prompt.text) for _, prompt in gallery.cases_of(pool, 100)) / 100
    assert abs(mean - 249.5) < 4 * 144 / 10  # four standard errors of a uniform sample


CHANGES = [{"adapter": "blue"}, {"adapter": "base"}, {"seed": 1}, {"ode_steps": 4}, {"guidance": 3.0}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_setting_counts(model, changes):
    assert abs(score(model, **changes) - score(model)) > 1e-5


def test_a_batch_is_scored_while_the_next_is_generated(model):
    """The first call waits until the second batch's images exist: waited for, it would hang."""
    generated, batches = threading.Event(), []

    class Watched:
        device = model.device

        def images(self, *arguments, **settings):
            batches.append(arguments)
            if len(batches) == 2:
                generated.set()
            return model.images(*arguments, **settings)

    def reward(images, prompts, metadata):
        assert generated.wait(60)
        return brightness(images, prompts, metadata)

    assert score(Watched(), reward=reward, timeout=120.0) == score(model)


def test_scores_of_a_sum_with_a_class_and_of_several_scorers(model):
    """Twice the brightness less the darkness; and the parts beside it, of the same pictures."""
    text = f"2*{HERE}:brightness + -1*{HERE}:Darkness, {HERE}:brightness"
    scorers = gallery.find_scorers({"red": text})
    for scorer in scorers["red"]:
        scorer.load(torch.device("cpu"))
    rows = {"base": Row("base", 1.0), "red": Row("red", 2.0)}
    splits = {"train": {"red": POOL}, "held-out": {"red": POOL[:1]}}
    batches = gallery.planned(rows, splits, Asked(4, 3, 0, batch=3), dict.fromkeys(rows, {}))
    judge = Judge(scorers, 30.0, strict=True)
    records = judge.records(batches, lambda batch: gallery.made(model, rows, batch), None)
    blend, bright = [scorer.spec for scorer in scorers["red"]]
    for record in records:
        b = record.scores[bright]
        assert record.scores[blend] == pytest.approx(2 * b - (1 - b), abs=1e-5)
    assert [len(batch) for batch in batches] == [3, 1] * 4 and len(records) == 16
    own = [record for record in records if (record.row, record.split) == ("red", "train")]
    assert gallery.mean_score(own, bright) == score(model, images_per_task=4, guidance=2.0)
    cells = summarise(records, gallery.divisors_of(scorers))
    scores = tables.scores_of(cells, {"red": blend})
    assert scores["red"]["train"]["red"] == scores["red"]["train"]["mean"]
    assert [list(scores), list(scores["base"])] == [["base", "red"], ["train", "held-out"]]


# ---- scorers that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda images, *_: torch.zeros(2), r"prompt '.*': returned shape \(2,\) for 1 images"),
        (lambda images, *_: torch.zeros(len(images), 1), r"returned shape \(1, 1\) for 1 images"),
        (nothing, "prompt '.*': returned nan"),
        (lambda images, *_: torch.full((len(images),), math.inf), "returned inf"),
        (lambda *_: [][0], "raised IndexError: list index out of range"),
        (lambda *_: sys.exit("bye"), "raised SystemExit: bye"),
    ],
)
def test_misbehaving_scorers_are_refused(model, reward, message):
    with pytest.raises(ValueError, match="task 'red': reward 'spy' gave no score for 3 of 3 images") as error:
        score(model, reward=reward)
    assert error.match(message) and "images of 'red'" in str(error.value)
    assert math.isnan(score(model, reward=reward, strict=False))


def test_a_scorer_that_hangs_is_given_up(model):
    release = threading.Event()

    def reward(images, prompts, metadata):
        release.wait(60)
        return torch.zeros(len(images))

    try:
        start = time.monotonic()
        with pytest.raises(ValueError, match="task 'red': reward 'spy'.*took longer than 0.2 s"):
            score(model, reward=reward, timeout=0.2)
        assert math.isnan(score(model, reward=reward, timeout=0.2, strict=False))
        assert time.monotonic() - start < 30
    finally:
        release.set()


def test_images_without_a_score_are_left_out_of_the_mean(model):
    order, single = brightness_one_by_one(model, 7)
    known = [value for index, value in enumerate(single) if POOL[order[index % 3]].text != "two red circles"]
    assert 4 <= len(known) <= 5
    assert score(model, reward=only_circles, strict=False) == pytest.approx(sum(known) / len(known), abs=1e-5)
    missing = [record for record in records_of(model, rewards=(only_circles,)) if record.lacks("spy")]
    assert len(missing) == 7 - len(known) and all(record.scores["spy"] is None for record in missing)
    assert {record.reasons["spy"] for record in missing} == {"prompt 'two red circles': returned nan"}


def test_a_scorer_that_fails_once_is_asked_again(model):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(prompts)
        if len(calls) == 1:
            raise ConnectionError("try later")
        return brightness(images, prompts, metadata)

    assert score(model, reward=reward) == pytest.approx(score(model), abs=1e-7)


# ---- the command -----------------------------------------------------------------------------------


def command(world, *changes):
    files = [f"red={world / 'red.txt'}"]
    pipeline = [
        "--model",
        str(world / "pipeline"),
        "--adapters",
        f"red={world / 'red'}",
        "--dtype",
        "float32",
    ]
    sampling = ["--count", "3", "--steps", "2"]
    tasks = ["--prompts", *files, "--heldout", *files, "--rewards", f"red={HERE}:brightness"]
    evaluate.main([*pipeline, *sampling, *tasks, *changes])


def refused(world, *changes):
    with pytest.raises(SystemExit) as stop:
        command(world, *changes)
    assert stop.value.code.startswith("error: ")
    return stop.value.code


def test_the_command_writes_what_it_prints(world, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    command(world, "--out", str(out), "--rewards", f"red={HERE}:Darkness")
    written = json.loads(out.read_text())
    scores = written["scores"]
    assert list(scores) == ["base", "red"] and written["settings"]["reward_timeout"] == 60.0
    assert scores["red"]["train"] == scores["red"]["held-out"] != scores["base"]["train"]
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["red", f"{scores['red']['train']['red']:.3f}"] in printed
    command(world, "--out", str(out))  # a file may be replaced
    darkness, bright = (
        scores["red"]["train"]["red"],
        json.loads(out.read_text())["scores"]["red"]["train"]["red"],
    )
    assert darkness + bright == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nocolon", "module:function"),
        ("no.such:thing", "cannot be imported"),
        ("opd.mini.rewards:nothing", "cannot be imported"),
        ("math:sqrt", "must accept"),
        (f"{HERE}:Unloadable", "raised OSError: no such weights"),
    ],
)
def test_unknown_scorers_are_named(world, spec, message):
    error = refused(world, "--rewards", f"red={spec}")
    assert message in error and repr(spec) in error


def test_missing_metadata_is_found_before_any_image(world):
    error = refused(world, "--rewards", f"red={HERE}:needs_target", "--model", "/nowhere")
    assert "task 'red'" in error and "needs 'target'" in error


def test_a_scorer_of_the_wrong_shape_is_refused_before_any_image(world):
    error = refused(world, "--rewards", f"red={HERE}:too_short")
    assert "returned shape (1,) for 2 images" in error and "task 'red'" in error and "too_short" in error


def test_a_scorer_that_fails_ends_the_command_with_its_reason(world):
    error = refused(world, "--rewards", f"red={HERE}:nothing", "--reward-timeout", "30")
    assert "task 'red'" in error and f"'{HERE}:nothing'" in error and "returned nan" in error


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--guidance", "nan", "--guidance is nan"),
        ("--guidance", "-inf", "--guidance is -inf"),
        ("--count", "-1", "--count is -1"),
        ("--per-prompt", "0", "--per-prompt is 0"),
        ("--batch", "0", "--batch is 0"),
        ("--steps", "-1", "--steps is -1"),
        ("--reward-timeout", "0", "--reward-timeout is 0"),
        ("--reward-timeout", "nan", "--reward-timeout is nan"),
        ("--reward-timeout", "inf", "--reward-timeout is inf"),
        ("--rewards", "blue=a:b", "task 'red' has no scorer; add --rewards red=module:function"),
        ("--out", "/dev/null", "--out '/dev/null' exists and is not a regular file"),
        ("--out", ".", "--out '.' exists and is not a regular file"),
    ],
)
def test_bad_arguments_are_refused_before_the_model(world, flag, value, message):
    assert message in refused(world, "--model", "/nowhere", flag, value)


def test_without_the_base_the_adapters_scores_are_the_same(world, tmp_path):
    out = tmp_path / "scores.json"
    command(world, "--out", str(out))
    both = json.loads(out.read_text())["scores"]
    command(world, "--out", str(out), "--no-base")
    assert json.loads(out.read_text())["scores"] == {"red": both["red"]} != both
    assert "--no-base without --adapters" in refused(world, "--model", "/nowhere", "--no-base", "--adapters")


def test_no_prompts_at_all_are_refused(world):
    assert "both empty" in refused(world, "--prompts", "--heldout")


def test_an_output_that_cannot_be_a_file_is_refused(world, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    assert "not a regular file" in refused(world, "--out", str(tmp_path / "pipe"))
    assert f"{str(tmp_path / 'file')!r} is not a directory" in refused(
        world, "--out", str(tmp_path / "file" / "new" / "scores.json")
    )
