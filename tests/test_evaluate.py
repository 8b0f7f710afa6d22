"""Scoring: no padded row enters a mean, the same noise for everyone, scorers that misbehave are named; means,
errors, diversity and the table against closed forms, a bootstrap, records made by hand."""

import base64
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from opd.data import Prompt, fair_sample
from opd.evaluation import evaluate, statistics
from opd.evaluation.records import Record, in_8_bits
from opd.evaluation.score import Row, Scorers, mean_score, planned, score
from opd.evaluation.statistics import clustered, summarise
from opd.evaluation.statistics import diversity_across as across
from opd.evaluation.statistics import diversity_within as within
from opd.evaluation.tables import blocks_of, differences, label, number, remarks, scores_of, stands, table
from opd.model import Sampling
from opd.rewards import Reward, Term
from tests import tiny
from tests.tiny_grpo import BRIGHT

HERE = "tests.test_evaluate"
TEXTS = ("a red circle", "a blue circle", "two red circles")
POOL = [Prompt(text, "red", {"n": n}) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(world):
    return tiny.build(tiny.config(world))[1]


class Darkness:
    """Right only after load on the CPU."""

    def load(self, device):
        self.device = device

    def __call__(self, images, prompts, metadata):
        assert self.device == torch.device("cpu")
        return 1 - images.mean((1, 2, 3))


# ---- means -----------------------------------------------------------------------------------------
def test_mean_is_over_exactly_the_images_asked_for_that_have_a_score(model):
    """7 images in batches of 3: the mean of one by one, each with its prompt and metadata."""
    sampling, seen = Sampling(3, 0, 1.0), []
    order = [prompt.metadata["n"] for _, prompt in fair_sample(POOL, 3)]
    assert sorted(order) == [0, 1, 2] and [index for index, _ in fair_sample(POOL, 3)] == [0, 1, 2]

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, [m["n"] for m in metadata], strict=True))
        unknown = torch.tensor([text == "two red circles" for text in prompts])
        return torch.where(unknown, math.nan, images.mean((1, 2, 3)))

    batches = planned({"red": Row("red", sampling)}, {"train": {"red": POOL}}, {"red": {}}, 7, batch=3)
    scorers = Scorers({"red": [Reward("spy", [Term(1.0, "spy", reward)])]}, 30.0, strict=True)
    records = score(batches, scorers, model)
    asked = [(POOL[order[i % 3]].text, order[i % 3]) for i in range(7)]
    assert set(seen) == set(asked) and [record.prompt for record in records] == [text for text, _ in asked]
    known = []
    for index, (text, _) in enumerate(asked):
        if text != "two red circles":
            known.append(in_8_bits(model.images("red", [text], [index], sampling)).mean().item())
    # A rounding to 8 bits may fall the other way.
    assert mean_score(records, "spy") == pytest.approx(sum(known) / len(known), abs=1e-4)
    missing = [record for record in records if record.lacks("spy")]
    assert len(missing) == 7 - len(known) > 0 and all(record.scores["spy"] is None for record in missing)
    assert {record.reasons["spy"] for record in missing} == {"prompt 'two red circles': returned nan"}


def test_few_images_are_a_fair_sample_of_a_sorted_file():
    pool = [Prompt(str(n), "t") for n in range(500)]
    mean = sum(int(prompt.text) for _, prompt in fair_sample(pool, 100)) / 100
    assert abs(mean - 249.5) < 4 * 144 / 10  # four standard errors of a uniform sample
    indices, prompts = zip(*fair_sample(pool, 6, per_prompt=2), strict=True)
    assert indices == tuple(range(6)) and prompts[:3] == prompts[3:] and len(fair_sample(pool, 0, 2)) == 1000


# ---- the command -----------------------------------------------------------------------------------
def command(world, *changes):
    files = f"red={world / 'red.txt'}"
    model = ["--model", str(world / "pipeline"), "--adapters", f"red={world / 'red'}", "--dtype", "float32"]
    sampling = ["--count", "3", "--steps", "2"]
    tasks = ["--prompts", files, "--heldout", files, "--rewards", f"red={BRIGHT}"]
    evaluate.main([*model, *sampling, *tasks, *changes])


def test_what_is_the_miniatures_stays_away_from_other_models_and_pictures(world, tmp_path):
    out, file = tmp_path / "scores.json", f"red={world / 'red.txt'}"
    short = ["--dtype", "float32", "--count", "2", "--steps", "1", "--out", str(out)]
    evaluate.main(
        ["--model", str(world / "pipeline"), "--prompts", file, "--rewards", f"red={BRIGHT}", *short]
    )
    assert list(json.loads(out.read_text())["scores"]["base"]) == ["train"]

    def kept(*given):
        args = evaluate.without_the_miniature(evaluate.Arguments(), set(given))
        tables = ("adapters", "prompts", "heldout", "rewards")
        return [name for name in tables if getattr(args, name)]

    assert kept("pictures", "scorers") == ["adapters", "prompts", "heldout"]
    assert kept("prompts", "rewards") == ["adapters", "prompts", "rewards"]
    assert kept("adapters") == ["adapters", "prompts", "heldout", "rewards"]


def test_the_command_writes_what_it_prints(world, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    command(world, "--out", str(out), "--rewards", f"red={HERE}:Darkness")
    written = json.loads(out.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    scores = written["scores"]
    assert list(scores) == ["base", "red"] and written["settings"]["reward_timeout"] == 60.0
    assert scores["red"]["train"] == scores["red"]["held-out"] != scores["base"]["train"]
    said = capsys.readouterr()
    printed = [line.split()[:3] for line in said.out.splitlines()]
    assert ["red", "g=1", f"{scores['red']['train']['red']:.3f}"] in printed
    assert "score" not in said.err  # the bar is a terminal's
    command(world, "--out", str(out), "--no-base")  # a file may be replaced
    [(row, bright)] = json.loads(out.read_text())["scores"].items()
    assert row == "red"
    assert scores["red"]["train"]["red"] + bright["train"]["red"] == pytest.approx(1, abs=1e-5)


REFUSED = [
    (["--per-prompt", "0"], "--per-prompt is 0"),
    (["--rewards", "blue=a:b"], "task 'red' has no scorer; add --rewards red=module:function"),
    (["--rewards", "red=tests.test_rewards:needs_target"], "needs_target needs 'target'"),
    (
        ["--rewards", "bleu=a:b", "--scorers", "jpeg_compressibility"],
        "--rewards names 'bleu', which is not among",
    ),
    (["--prompts", "--heldout"], "both empty"),
    (["--adapters", "type=x"], "--adapters: the name 'type' is taken; choose another"),
    (["--no-base", "--adapters"], "--no-base without --adapters"),
    (["--out", "/proc/x/scores.json"], "'/proc' cannot be written into (No such file or directory); name"),
    (["--out", "/dev/null"], "--out '/dev/null' is not a regular file"),
    (["--out", f"{__file__}/new/scores.json"], f"{__file__!r} is not a directory"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_bad_arguments_are_refused_before_the_model(world, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(world, "--model", "/nowhere", *flags)
    assert stop.value.code.startswith("error: ") and message in stop.value.code


@pytest.mark.parametrize(
    "scorer, message", [("too_long", r"returned shape \(3,\) for 2 images"), ("nothing", "returned nan")]
)
def test_a_scorer_that_is_wrong_ends_the_command_with_its_reason(world, scorer, message):
    with pytest.raises(SystemExit, match=f"error: task 'red': .*'tests.tiny_grpo:{scorer}'.*{message}"):
        command(world, "--rewards", f"red=tests.tiny_grpo:{scorer}")


def record(row="student", task="t", prompt="p", index=0, tag="", thumbnail="", reasons=None, **scores):
    file = f"{row}/{task}/{prompt}/{index}.png"
    place = dict(file=file, row=row, split="held-out", task=task, tag=tag, prompt=prompt, index=index)
    made = dict(metadata={}, seed=0, settings={}, thumbnail=thumbnail)
    return Record(**place, **made, scores=scores, reasons=reasons or {})


def thumbnail(pixels) -> str:
    return base64.b64encode(np.asarray(pixels, dtype=np.uint8).tobytes()).decode()


BLACK, WHITE = thumbnail(np.zeros(192)), thumbnail(np.full(192, 255))


# ---- errors -----------------------------------------------------------------------------------------
def test_the_error_agrees_with_a_bootstrap_over_prompts():
    """Prompts of unequal size drawn with replacement; the plain error of the mean is far too small."""
    random = np.random.default_rng(1)
    groups = [random.normal(random.normal(0, 1.0), 0.3, size) for size in [2, 4, 6, 8] * 20]
    sizes, sums = np.array([len(group) for group in groups]), np.array([group.sum() for group in groups])
    values = np.concatenate(groups)
    _, error = clustered(values.tolist(), [str(n) for n in np.repeat(range(80), sizes)])
    drawn = random.integers(80, size=(20000, 80))
    assert error == pytest.approx((sums[drawn].sum(1) / sizes[drawn].sum(1)).std(), rel=0.05)
    assert error > 1.7 * values.std(ddof=1) / math.sqrt(len(values))
    assert clustered([1.0, 2.0], ["a", "a"]) == pytest.approx((1.5, math.nan), nan_ok=True)
    assert clustered([], []) == pytest.approx((math.nan, math.nan), nan_ok=True)


# ---- cells ------------------------------------------------------------------------------------------
def test_sub_scores_and_their_mean():
    """Worked out by hand: counting has pictures 1 0 | 0 0, colors 1 1 | None 1 | 0."""
    scores = {("counting", "two cats"): [1, 0], ("counting", "three cats"): [0, 0]}
    scores |= {("colors", "a red cat"): [1, 1], ("colors", "a blue cat"): [None, 1], ("colors", "a cat"): [0]}
    records = []
    for (tag, prompt), values in scores.items():
        for index, value in enumerate(values):
            records.append(record(prompt=prompt, tag=tag, index=index, geneval=value))
    cells = {cell.tag: cell for cell in summarise(records, ["geneval"])}
    assert list(cells) == [statistics.ALL, "colors", "counting", statistics.TAGS]
    whole = cells[statistics.ALL]
    assert (whole.n, whole.missing, whole.prompts) == (8, 1, 5)
    assert (whole.mean, cells["colors"].mean, cells["counting"].mean) == (1 / 2, 3 / 4, 1 / 4)
    overall = cells[statistics.TAGS]
    assert (overall.mean, overall.n, overall.prompts) == (1 / 2, 8, 5)
    parts = (cells["colors"].error, cells["counting"].error)
    assert overall.error == pytest.approx(math.hypot(*parts) / 2)


def test_edits_of_two_source_pictures_are_two_prompts():
    """Of one text; every number is that of two texts."""
    texts = []
    for row, values in {"base": [0.0, 0.2, 0.5, 0.9], "student": [0.1, 0.4, 0.9, 0.5]}.items():
        for index, value in enumerate(values):
            shown = [BLACK, WHITE][index % 3 == 0]
            texts.append(record(row, prompt="ab"[index % 2], index=index, thumbnail=shown, s=value))
    edits = [replace(one, prompt="redder", sources=[f"{one.prompt}.png"]) for one in texts]
    cells = summarise(edits, ["s"])
    assert cells == summarise(texts, ["s"])
    assert {cell.scorer for cell in cells} == {"s", *statistics.MEASURES}
    assert cells[0].prompts == 2 and cells[0].error > 0 and cells[0].apart > 0


# ---- diversity --------------------------------------------------------------------------------------
def test_diversity_within_a_prompt_is_the_distance_of_pictures_of_one_prompt():
    place = ("student", "held-out", "t")
    records = [record(prompt="a", thumbnail=BLACK), record(prompt="b", thumbnail=WHITE)]
    assert within(place, records) == []  # each prompt has one
    records += [record(prompt="a", thumbnail=BLACK), record(prompt="b", thumbnail=BLACK)]
    [cell] = within(place, records)
    assert (cell.scorer, cell.mean, cell.n, cell.prompts) == (statistics.DIVERSITY, pytest.approx(0.5), 2, 2)
    [cell] = within(place, [*records, record(prompt="b", thumbnail=BLACK)])  # pairs 1, 1, 0
    assert cell.mean == pytest.approx((0 + 2 / 3) / 2)
    noise = np.random.default_rng(0).integers(256, size=(40, 192))
    [cell] = within(place, [record(thumbnail=thumbnail(pixels)) for pixels in noise])
    assert cell.mean == pytest.approx(math.sqrt(1 / 6), abs=0.01)


def test_diversity_across_prompts_is_the_distance_of_pictures_of_different_prompts(monkeypatch):
    """By hand; its error against drawing the prompts anew."""
    place = ("student", "held-out", "t")
    alike = [record(prompt="a", thumbnail=BLACK), record(prompt="a", thumbnail=WHITE)]
    assert across(place, alike) == [] and across(place, [record(prompt="c")]) == []
    [cell] = across(place, [*alike, record(prompt="b", thumbnail=WHITE)])  # pairs 1, 0
    assert (cell.scorer, cell.mean, cell.n, cell.prompts) == (statistics.VARIETY, pytest.approx(0.5), 2, 2)

    random = np.random.default_rng(0)

    def drawn():
        """40 prompts, two pictures of each in a colour of the prompt's own."""
        colours = random.integers(256, size=40)
        pictures = np.clip(np.repeat(colours, 2)[:, None] + random.integers(-9, 10, size=(80, 192)), 0, 255)
        return [record(prompt=str(n // 2), thumbnail=thumbnail(p)) for n, p in enumerate(pictures)]

    records = drawn()
    [cell] = across(place, records)
    assert cell.n == 80 * 78 / 2
    means = [across(place, drawn())[0].mean for _ in range(200)]
    assert cell.error == pytest.approx(np.std(means), rel=0.3)
    monkeypatch.setattr(statistics, "MOST", 20)
    assert across(place, records)[0].prompts == 20


# ---- the table --------------------------------------------------------------------------------------
def test_the_table_shows_means_errors_and_what_is_behind_them():
    records = []
    for row, shift in (("base", 0.0), ("student", 0.25)):
        for index in range(8):
            value = 0.5 * (index % 2) + shift
            scores = {"m:own": value, "0.5*m:a+m:b": 20 * value}
            tag = "odd" if index % 2 else "even"
            place = dict(row=row, prompt=str(index // 2), index=index, tag=tag)
            records.append(record(thumbnail=BLACK if index % 2 else WHITE, **place, **scores))
    cells = summarise(records, ["m:own", "0.5*m:a+m:b"])
    first, labels = {"t": "m:own"}, {"base": "base", "student": "student"}
    lines = table(cells, first, "n=8", labels, whole=True).splitlines()
    assert lines[:2] == ["n=8", ""]
    assert lines[2].split() == ["held-out", "t", "t:0.5*a+b", "mean"]
    assert lines[3].split() == ["base", "0.250", "±.000", "5.000", "±.000", "0.250", "±.000"]
    assert lines[4].split()[:3] == ["student", "0.500", "±.000"]
    assert lines[6].split() == "held-out t: own even odd mean of tags".split()
    assert lines[8].split()[:2] == ["student", "0.250"]
    assert lines[14].split() == "held-out t: diversity within a prompt across prompts".split()
    assert lines[16].split() == ["student", "1.000", "±.000", "0.500", "±.000"]
    sentence, line = table(cells, first, "n=8", labels).splitlines()[6:]  # in the place of what is behind
    assert sentence.startswith("Held-out prompts: the student is above the base in t.")
    assert line == "t: student 0.500, base 0.250 (+0.250 ±.000)"
    assert scores_of(cells, first)["student"] == {"held-out": {"t": 0.5, "mean": 0.5}}
    assert label("0.5*m.n:a + m:b@/weights/x") == "0.5*a + b@/weights/x"
    assert label("deqa@http://host.name:8000/v1") == "deqa@http://host.name:8000/v1"
    assert [number(21.644, 0.25), number(-0.5, math.nan)] == ["21.64 ±.25", "-0.500"]


def test_scorers_of_one_name_have_columns_of_their_own():
    scores = {"a.py:reward": 0.1, "b.py:reward": 0.9, "c.py:other": 0.5}
    cells = summarise([record(tag="t", **scores)], list(scores))
    blocks = blocks_of(cells, {"t": "a.py:reward"})
    held_out = {heading: mean for heading, (mean, _) in blocks["held-out"]["student"].items()}
    assert held_out == {"t": 0.1, "t:b.py:reward": 0.9, "t:other": 0.5, "mean": 0.1}
    assert {"held-out t: a.py:reward", "held-out t: b.py:reward"} < blocks.keys()


def test_the_student_is_compared_with_the_teacher_of_each_task():
    """Picture by picture: the error is that of the differences, not of two means; of the mean over tasks only
    where every task has a teacher."""
    random, records = np.random.default_rng(0), []
    hard = {task: random.normal(size=9) for task in "ab"}  # prompts differ far more than models do
    gain = {("student", task): 0.3 + 0.1 * random.normal(size=9) for task in "ab"}
    for row in ("base", "a g=4", "c", "student"):
        for task in "ab":
            scores = hard[task] + gain.get((row, task), 0.5 * (row == "a g=4"))
            records += [record(row, task, str(i), i, m=float(score)) for i, score in enumerate(scores)]
    records.append(record("c", "b", "9", 9, m=7.0))  # the student has no such picture
    cells, first = summarise(records, ["m"]), {"a": "m", "b": "m"}
    error = {task: gain["student", task].std(ddof=1) / 3 for task in "ab"}
    whom = differences(cells, "held-out", first, {"b": "c"})
    own, base = whom["its teacher"], whom["the base"]
    assert own["a"] == pytest.approx((gain["student", "a"].mean() - 0.5, error["a"]))
    assert base["b"] == pytest.approx((gain["student", "b"].mean(), error["b"]))
    assert own["b"][1] == pytest.approx(error["b"])
    assert base["mean"][1] == pytest.approx(math.hypot(*error.values()) / 2)
    assert list(differences(cells, "held-out", first, {})["its teacher"]) == ["a"]
    assert [stands(*pair) for pair in ((0.1, 0.04), (-0.1, 0.04))] == ["above", "below"]
    assert stands(0.1, math.nan) == "not comparable with"


def test_missing_scores_are_said():
    records = [record(prompt=str(i), index=i, ocr=0.0) for i in range(8)]
    records += [record(prompt=str(i), index=i, ocr=None, reasons={"ocr": f"why {i}"}) for i in (8, 9)]
    expected = "student, held-out t, ocr: pictures without a score: 2, first: why 8"
    assert remarks(records, ["ocr"]) == [expected] and remarks(records, ["other"]) == []
    cells = summarise(records[8:], ["ocr"])
    assert math.isnan(cells[0].mean) and "nan" in table(cells, {"t": "ocr"}, "", {"student": "student"})
