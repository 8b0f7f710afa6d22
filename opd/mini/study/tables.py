"""The study's tables, from results alone.

A result says "held_out": each task's own score, "quality_of": the quality of every task's pictures,
"diversity": how far apart the pictures of one prompt are, "variety": those of different prompts; for plots
"curve": scores during training.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from opd.evaluation.statistics import ALL, DIVERSITY, MEASURES, VARIETY
from opd.files import read_json
from opd.mini.study.runs import EQUAL, RECIPES, REFERENCES, TABLES, TASKS, TEACHERS

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "opd/mini/study/results"
EDITS = RESULTS / "edits"  # what `python -m opd.evaluation` wrote of the editing miniature, a file per seed
PAGES = (ROOT / "opd/mini/study/RESULTS.md", ROOT / "README.md")
MEASURED = ("held_out", "errors", "quality_of", *MEASURES)  # what a result has of a model
MEAN = "mean of compose, text, quality of all"
SCORES = (*TASKS, "quality of shapes", "of signs", "of all", MEAN, DIVERSITY, VARIETY)
THREE = {"compose": "compose", "text": "text", "quality of all": "of all"}
# Table -> heading and score of its columns, where it does not have all.
OWN_COLUMNS = {
    "questions": THREE | {"mean of three": MEAN},
    "short": THREE | {"diversity": DIVERSITY, "variety": VARIETY},
}
# README's recipes: run -> its presets, its paper, what is different.
PAPERS = {
    "asked": ("`sd35-fold`, `mini-fold`", "ours", "guidance folded in, states weighed alike, merged start"),
    "flow-opd": ("`sd35`, `mini-flow-opd`", "Flow-OPD", "SDE walk, KL weights, merged start, anchor"),
    "diffusion-opd": (
        "`sd35-diffusion-opd`",
        "[DiffusionOPD](https://arxiv.org/abs/2605.15055)",
        "ODE walk, from the base, no anchor",
    ),
    "dance-opd": (
        "`sd35-dance-opd`",
        "[DanceOPD](https://arxiv.org/abs/2606.27377)",
        "one state per trajectory, near the data",
    ),
    "gfd-opd": (
        "`sd35-gfd-opd`",
        "[GFD-OPD](https://arxiv.org/abs/2609.39692)",
        "guidance folded in, targets past the teachers",
    ),
}
# The editing miniature: row of a result -> what the table calls it, and column -> task and scorer.
EDIT_ROWS = {"base": "base"} | {task: f"{task} teacher" for task in ("recolour", "write", "paint")}
EDIT_ROWS |= {"student": "**student of all three**"}
EDIT_COLUMNS = {
    "recolour": ("recolour", "opd.mini.edits:recolour"),
    "recolour: source kept": ("recolour", "preservation"),
    "write": ("write", "opd.mini.edits:write"),
    "write: source kept": ("write", "preservation"),
    "paint": ("paint", "opd.mini.edits:paint"),
}
LEVELS = (0.8, 0.9, 0.95)
# What stands above another run -> (run, run below it, score).
CLAIMS = {
    "compose teacher above the base, compose": ("equal-compose", "base", "compose"),
    "text teacher above the base, text": ("equal-text", "base", "text"),
    "quality teacher above the base, quality of all": ("all-quality", "base", "of all"),
    "the same, text": ("all-quality", "base", "text"),
    "the same, compose": ("all-quality", "base", "compose"),
    "student above the compose teacher, compose": ("student", "equal-compose", "compose"),
    "student above the text teacher, text": ("student", "equal-text", "text"),
    "student above the quality teacher, quality of all": ("student", "all-quality", "of all"),
    "student above the mix rewarded for everything, mean": ("student", "mix-all", MEAN),
    "the teachers, each on its own task, above that mix": ("specialists", "mix-all", MEAN),
    "student above an NFT-mix rewarded so, mean": ("student", "nft-mix", MEAN),
    "distilled, then that mix, above the mix rewarded for everything": ("rewarded", "mix-all", MEAN),
    "the same, above the student": ("rewarded", "student", MEAN),
    "the same, above the compose teacher, compose": ("rewarded", "equal-compose", "compose"),
    "the same, above the text teacher, text": ("rewarded", "equal-text", "text"),
    "the same, above the quality teacher, quality of all": ("rewarded", "all-quality", "of all"),
    "that mix above the base, variety": ("mix-all", "base", VARIETY),
    "the NFT-mix above the base, variety": ("nft-mix", "base", VARIETY),
    "student above the base, variety": ("student", "base", VARIETY),
    "distilled, then that mix, above the base, variety": ("rewarded", "base", VARIETY),
}


def load(folder: Path) -> list[dict]:
    return [read_json(file) for file in sorted(folder.glob("*.json"))]


def with_tables(page: str, results: list[dict]) -> str:
    """`page` with its tables anew: each stands between `<!-- table NAME -->` and `<!-- end -->`."""

    def anew(found: re.Match) -> str:
        return found[1] + table(found[2], results) + "<!-- end -->"

    return re.sub(r"(<!-- table (\w+) -->\n).*?<!-- end -->", anew, page, flags=re.DOTALL)


def table(name: str, results: list[dict]) -> str:
    """The lines of a table: every score of its runs, unless it has columns of its own."""
    if name == "claims":
        return claims(results)
    if name == "edits":
        return edits(load(EDITS))
    if name == "levels":
        return levels(TABLES[name], results)
    if name == "recipes":
        scores = [[scores_of(one)[MEAN] for one in own] for _, own in rows_of(TABLES[name], results)]
        lines = [[*about, spread(found)] for about, found in zip(PAPERS.values(), scores, strict=True)]
        return markdown(["paper", "what is different", "mean"], lines, first="preset")
    columns = OWN_COLUMNS.get(name, {score: score for score in SCORES})
    return compared(TABLES[name], results, columns, above=name == "questions")


def markdown(columns: list[str], lines: list[list[str]], first: str = "") -> str:
    """A table; `first`: the heading of the rows' names."""
    rows = [[first, *columns], ["---"] * (len(columns) + 1), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


# ---- scores ------------------------------------------------------------------------------------------------


def scores_of(result: dict) -> dict[str, float]:
    """A result's numbers by the names in SCORES; diversity and variety where they were measured.

    `of all` is the mean quality of every task's pictures, the mean takes it instead of the landscapes'.
    """
    own, quality = result["held_out"], result["quality_of"]
    of_all = fmean(quality.values())
    found = own | {"quality of shapes": quality["compose"], "of signs": quality["text"], "of all": of_all}
    found[MEAN] = fmean([own["compose"], own["text"], of_all])
    if DIVERSITY in result:  # of landscapes
        found[DIVERSITY] = result[DIVERSITY]["quality"]
    if VARIETY in result:  # of shapes and of signs, whose prompts ask for no background
        found[VARIETY] = fmean([result[VARIETY][task] for task in ("compose", "text")])
    return found


def compared(names: tuple[str, ...], results: list[dict], columns: dict[str, str], above: bool) -> str:
    """A row per recipe or model, a column per heading in `columns`: mean and standard deviation of a score
    over seeds. `above`: also of the mean of three less that of the first row's run of the same seed."""
    first = {result["seed"]: scores_of(result) for _, own in rows_of(names[:1], results) for result in own}
    lines, headings = [], ["seeds", *columns]
    if above:
        headings.append("above the first row's")
    for title, own in rows_of(names, results):
        scores = {result["seed"]: scores_of(result) for result in own}
        cells = [
            spread([found[name] for found in scores.values() if name in found]) for name in columns.values()
        ]
        if above:
            cells.append(spread([scores[seed][MEAN] - first[seed][MEAN] for seed in scores if seed in first]))
        lines.append([title, str(len(own)), *cells])
    return markdown(headings, lines)


def rows_of(names: tuple[str, ...], results: list[dict]) -> list[tuple[str, list[dict]]]:
    """(title, results) of each row of the runs that have a result."""
    found = []
    for name in names:
        own = [result for result in results if result["recipe"] == name]
        if name in RECIPES and own:
            found.append((RECIPES[name].title, own))
        elif own:
            for row, title in REFERENCES[name].titles.items():
                measured = {what: own[0][what][row] for what in MEASURED if what in own[0]}
                found.append((title, [{"seed": own[0]["seed"]} | measured]))
    return found


def edits(results: list[dict]) -> str:
    """A row per model of the editing miniature: mean and standard deviation over seeds of every score."""
    lines = []
    for row, title in EDIT_ROWS.items():
        found = {column: [] for column in EDIT_COLUMNS.values()}
        for cell in (cell for result in results for cell in result["cells"]):
            own = (cell["row"], cell["split"], cell["tag"]) == (row, "held-out", ALL)
            if own and (cell["task"], cell["scorer"]) in found:
                found[cell["task"], cell["scorer"]].append(cell["mean"])
        seeds = max(map(len, found.values()))
        lines += [[title, str(seeds), *map(spread, found.values())]] if seeds else []
    return markdown(["seeds", *EDIT_COLUMNS], lines)


# ---- how soon ----------------------------------------------------------------------------------------------


def level(scores: dict[str, float], results: list[dict]) -> float:
    """How far from the base (0) to the shipped teachers at the guidance that they teach with (1): the mean
    over the tasks' own scores."""
    (base,) = [result["held_out"]["base"] for result in results if result["recipe"] == "base"]
    (guided,) = [result["held_out"] for result in results if result["recipe"] == "guided"]
    return fmean((scores[task] - base[task]) / (guided[task][task] - base[task]) for task in TASKS)


def levels(names: tuple[str, ...], results: list[dict]) -> str:
    """A row per recipe: seconds of training until a run first watches a share of its teachers' level; the
    level in the end, and the seconds until then."""
    lines = []
    for title, own in rows_of(names, results):
        cells = []
        for share in LEVELS:
            reached = [reaching(share, result["curve"], results) for result in own]
            cells.append("not in all" if None in reached else spread(reached, whole))
        cells.append(spread([level(result["held_out"], results) for result in own]))
        cells.append(spread([result["curve"][-1]["seconds"] for result in own], whole))
        lines.append([title, str(len(own)), *cells])
    columns = [f"seconds to {short(share)}" for share in LEVELS]
    return markdown(["seeds", *columns, "level in the end", "seconds"], lines)


def reaching(share: float, points: list[dict], results: list[dict]) -> float | None:
    """The seconds of the first point of a curve at that level; None: there is none."""
    for point in points:
        if level(point, results) >= share:
            return point["seconds"]
    return None


# ---- seed by seed ------------------------------------------------------------------------------------------


def claims(results: list[dict]) -> str:
    """What one run has above another, seed by seed, and their mean."""
    seeds = sorted({result["seed"] for result in results if result["recipe"] == "student"})
    scores = by_seed(seeds, results)
    lines = []
    for title, (run, below, score) in CLAIMS.items():
        both = [seed for seed in seeds if {(run, seed), (below, seed)} <= scores.keys()]
        leads = {seed: scores[run, seed][score] - scores[below, seed][score] for seed in both}
        cells = [short(leads[seed]) if seed in leads else "" for seed in seeds]
        if leads:
            lines.append([title, *cells, spread(list(leads.values()))])
    return markdown([*(f"seed {seed}" for seed in seeds), "mean of these"], lines)


def by_seed(seeds: list[int], results: list[dict]) -> dict[tuple[str, int], dict[str, float]]:
    """Recipe and seed -> its scores; with the base, and the teachers as one, each on its own task."""
    found = {(one["recipe"], one["seed"]): one for one in results if one["recipe"] in RECIPES}
    for seed in seeds:
        for _, (base,) in rows_of(("base",), results):
            found["base", seed] = base
        if all((name, seed) in found for name in TEACHERS):
            own = {task: found[name, seed]["held_out"][task] for task, name in EQUAL.items()}
            looks = found["all-quality", seed]["quality_of"]
            found["specialists", seed] = {"held_out": own, "quality_of": looks}
    return {key: scores_of(result) for key, result in found.items()}


# ---- numbers in words --------------------------------------------------------------------------------------


def short(value: float) -> str:
    """.345, 1.000 or -.008"""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def whole(value: float) -> str:
    return f"{value:.0f}"


def spread(values: list[float], written: Callable[[float], str] = short) -> str:
    """.345 ± .008, mean and standard deviation; the value alone, or nothing."""
    if len(values) < 2:
        return "".join(map(written, values))
    return f"{written(fmean(values))} ± {written(stdev(values))}"
