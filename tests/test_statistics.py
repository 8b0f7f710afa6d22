"""Means, errors, sub-scores, diversity, the table: closed forms, a bootstrap, records made by hand."""

import base64
import math
from itertools import combinations

import numpy as np
import pytest

from opd.evaluation import statistics
from opd.evaluation.records import Record
from opd.evaluation.statistics import (
    ALL,
    DIVERSITY,
    TAGS,
    VARIETY,
    clustered,
    diversity_across,
    diversity_within,
    pixels_of,
    summarise,
)
from opd.evaluation.tables import label, number, remarks, scores_of, table


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
    assert list(cells) == [ALL, "colors", "counting", TAGS]
    whole = cells[ALL]
    assert (whole.n, whole.missing, whole.prompts) == (8, 1, 5)
    assert (whole.mean, cells["colors"].mean, cells["counting"].mean) == (1 / 2, 3 / 4, 1 / 4)
    overall = cells[TAGS]
    assert (overall.mean, overall.n, overall.prompts) == (1 / 2, 8, 5)
    parts = (cells["colors"].error, cells["counting"].error)
    assert overall.error == pytest.approx(math.hypot(*parts) / 2)


# ---- diversity --------------------------------------------------------------------------------------


def test_diversity_within_a_prompt_is_the_distance_of_pictures_of_one_prompt():
    place = ("student", "held-out", "t")
    records = [record(prompt="a", thumbnail=BLACK), record(prompt="b", thumbnail=WHITE)]
    assert diversity_within(place, records) == []  # each prompt has one
    records += [record(prompt="a", thumbnail=BLACK), record(prompt="b", thumbnail=BLACK)]
    [cell] = diversity_within(place, records)
    assert (cell.scorer, cell.mean, cell.n, cell.prompts) == (DIVERSITY, pytest.approx(0.5), 2, 2)
    [cell] = diversity_within(place, [*records, record(prompt="b", thumbnail=BLACK)])  # pairs 1, 1, 0
    assert cell.mean == pytest.approx((0 + 2 / 3) / 2)
    noise = np.random.default_rng(0).integers(256, size=(40, 192))
    [cell] = diversity_within(place, [record(thumbnail=thumbnail(pixels)) for pixels in noise])
    assert cell.mean == pytest.approx(math.sqrt(1 / 6), abs=0.01)


def test_diversity_across_prompts_is_the_distance_of_pictures_of_different_prompts(monkeypatch):
    """By hand, and against loops over pairs; its error against drawing the prompts anew."""
    place = ("student", "held-out", "t")
    alike = [record(prompt="a", thumbnail=BLACK), record(prompt="a", thumbnail=WHITE)]
    assert diversity_across(place, alike) == [] and diversity_across(place, [record(prompt="c")]) == []
    [cell] = diversity_across(place, [*alike, record(prompt="b", thumbnail=WHITE)])  # pairs 1, 0
    assert (cell.scorer, cell.mean, cell.n, cell.prompts) == (VARIETY, pytest.approx(0.5), 2, 2)

    random = np.random.default_rng(0)

    def drawn():
        """40 prompts, two pictures of each in a colour of the prompt's own."""
        colours = random.integers(256, size=40)
        pictures = np.clip(np.repeat(colours, 2)[:, None] + random.integers(-9, 10, size=(80, 192)), 0, 255)
        return [record(prompt=str(n // 2), thumbnail=thumbnail(p)) for n, p in enumerate(pictures)]

    records = drawn()
    [cell] = diversity_across(place, records)
    pairs = [(a, b) for a, b in combinations(records, 2) if a.prompt != b.prompt]
    distances = [((pixels_of(a.thumbnail) - pixels_of(b.thumbnail)) ** 2).mean() ** 0.5 for a, b in pairs]
    assert cell.n == len(pairs) and cell.mean == pytest.approx(np.mean(distances))
    means = [diversity_across(place, drawn())[0].mean for _ in range(200)]
    assert cell.error == pytest.approx(np.std(means), rel=0.3)
    monkeypatch.setattr(statistics, "MOST", 20)
    assert diversity_across(place, records)[0].prompts == 20


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
    first = {"t": "m:own"}
    lines = table(cells, first, "n=8").splitlines()
    assert lines[:2] == ["n=8", ""]
    assert lines[2].split() == ["held-out", "t", "t:0.5*a+b", "mean"]
    assert lines[3].split() == ["base", "0.250", "±.000", "5.000", "±.000", "0.250", "±.000"]
    assert lines[4].split()[:3] == ["student", "0.500", "±.000"]
    assert lines[6].split() == "held-out t: own even odd mean of tags".split()
    assert lines[8].split()[:2] == ["student", "0.250"]
    assert lines[14].split() == "held-out t: diversity within a prompt across prompts".split()
    assert lines[16].split() == ["student", "1.000", "±.000", "0.500", "±.000"]
    assert scores_of(cells, first)["student"] == {"held-out": {"t": 0.5, "mean": 0.5}}
    assert label("0.5*m.n:a + m:b@/weights/x") == "0.5*a + b@/weights/x"
    assert label("deqa@http://host.name:8000/v1") == "deqa@http://host.name:8000/v1"
    assert [number(21.644, 0.25), number(-0.5, math.nan)] == ["21.64 ±.25", "-0.500"]


def test_missing_scores_are_said():
    records = [record(prompt=str(i), index=i, ocr=0.0) for i in range(8)]
    records += [record(prompt=str(i), index=i, ocr=None, reasons={"ocr": f"why {i}"}) for i in (8, 9)]
    expected = "student, held-out t, ocr: pictures without a score: 2, first: why 8"
    assert remarks(records, ["ocr"]) == [expected] and remarks(records, ["other"]) == []
    cells = summarise(records[8:], ["ocr"])
    assert math.isnan(cells[0].mean) and "nan" in table(cells, {"t": "ocr"}, "")
