"""The study's tables, from results alone.

A result says "held_out": each task's own score, "quality_of": the quality of every task's pictures,
"diversity": how far apart the pictures of one prompt are, "variety": those of different prompts, "curve":
scores during training, and "kl_closed": which share of a teacher's KL is gone, by noise level.
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opd.evaluation.statistics import DIVERSITY, MEASURES, VARIETY
from opd.files import read_json
from opd.mini.study.runs import EQUAL, RECIPES, REFERENCES, TABLES, TASKS, TEACHERS

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "opd/mini/study/results"
OTHER = RESULTS / "other"  # the same runs on another split of the prompts
SIGNS = ROOT / "opd/mini/study/ocr_scores.json"  # opd.evaluation of the text teacher of opd/mini/signs.py
NEAR = 0.03
"""How far below a teacher a student is at its level."""
SCORES = ("held_out", "errors", "quality_of", *MEASURES)
QUALITIES = ("quality of shapes", "of signs", "of all", "mean of compose, text, quality of all")


def load(folder: Path) -> list[dict]:
    return [read_json(file) for file in sorted(folder.glob("*.json"))]


def table(name: str, results: list[dict]) -> str:
    """The lines of a table."""
    if name == "signs":
        return signs(read_json(SIGNS)["cells"])
    if name == "claims":
        return claims(results, load(OTHER))
    return LAYOUTS[name](TABLES[name], results)


def own_scores(names: tuple[str, ...], results: list[dict]) -> str:
    """A row per recipe or model: mean and standard deviation over the seeds that have a result."""
    columns = ["seeds", *TASKS, "mean", "gap closed, fixed states", "visited states"]
    lines = []
    for title, own in rows_of(names, results):
        lines.append([title, str(len(own)), *cells_of(own), *gap_cells(own)])
    return markdown(columns, lines)


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    """A table whose first column, the rows' names, has no heading."""
    rows = [["", *columns], ["---"] * (len(columns) + 1), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def everywhere(names: tuple[str, ...], results: list[dict]) -> str:
    """A row per recipe or model with the quality of every task's pictures. Its mean over the three is `of
    all`, which the mean of three takes instead of the quality of landscapes."""
    columns = ["seeds", *TASKS, *QUALITIES, "diversity", "variety"]
    lines = []
    for title, own in rows_of(names, results):
        varieties = spread([variety(result) for result in own if VARIETY in result])
        lines.append([title, str(len(own)), *family_cells(own), diversity(own), varieties])
    return markdown(columns, lines)


def anchors(names: tuple[str, ...], results: list[dict]) -> str:
    """The same, and what the tasks and all pictures have above the first row's, seed by seed."""
    ours = [*TASKS, *QUALITIES, "diversity"]
    columns = ["seeds", *ours, "compose and text above the first row's", "quality of all above"]
    lines = []
    for title, own in rows_of(names, results):
        cells = [str(len(own)), *family_cells(own), diversity(own)]
        for score in (mean_of_tasks, quality_of_all):
            cells.append(above(own, names[0], results, score))
        lines.append([title, *cells])
    return markdown(columns, lines)


def family_cells(own: list[dict]) -> list[str]:
    """A cell per task and of QUALITIES."""
    cells = cells_of(own)[: len(TASKS)]
    for task in ("compose", "text"):
        cells.append(spread([result["quality_of"][task] for result in own]))
    cells.append(spread([quality_of_all(result) for result in own]))
    return [*cells, spread([mean_of_three(result) for result in own])]


def diversity(own: list[dict]) -> str:
    """Of landscapes."""
    return spread([result[DIVERSITY]["quality"] for result in own if DIVERSITY in result])


def questions(names: tuple[str, ...], results: list[dict]) -> str:
    """A table with what each row's mean of three is above that of the first row, seed by seed."""
    columns = ["seeds", "compose", "text", "quality of all", "mean of three", "above the first row's"]
    lines = []
    for title, own in rows_of(names, results):
        compose, text, *_ = cells_of(own)
        cells = [str(len(own)), compose, text]
        cells.append(spread([quality_of_all(result) for result in own]))
        cells.append(spread([mean_of_three(result) for result in own]))
        lines.append([title, *cells, above(own, names[0], results, mean_of_three)])
    return markdown(columns, lines)


def above(own: list[dict], first: str, results: list[dict], score: Callable[[dict], float]) -> str:
    """What results have above those of the recipe `first` with the same seeds."""
    below = {result["seed"]: score(result) for result in results if result["recipe"] == first}
    return spread([score(result) - below[result["seed"]] for result in own if result["seed"] in below])


def claims(results: list[dict], others: list[dict]) -> str:
    """What one run has above another, seed by seed, on the shipped prompts, their mean, and on `others`'."""
    shipped, other = by_seed(results), by_seed(others)
    columns = [f"seed {seed}" for seed in shipped]
    columns += ["mean of these", *[f"seed {seed}, other prompts" for seed in other]]
    lines = []
    for title, claim in CLAIMS.items():
        leads = [lead(*claim, source) for source in shipped.values()]
        cells = [spread(found) for found in [*leads, sum(leads, [])]]
        cells += [spread(lead(*claim, source)) for source in other.values()]
        lines.append([title, *cells])
    return markdown(columns, lines)


def by_seed(results: list[dict]) -> dict[int, dict[str, dict]]:
    """Seed of a student -> `of_seed`."""
    seeds = sorted({result["seed"] for result in results if result["recipe"] == "student"})
    return {seed: of_seed(seed, results) for seed in seeds}


def lead(run: str, below: str, score: Callable[[dict], float], source: dict[str, dict]) -> list[float]:
    """[What a run has above another of the same seed], [] where either has no result."""
    if run in source and below in source:
        return [score(source[run]) - score(source[below])]
    return []


def of_seed(seed: int, results: list[dict]) -> dict[str, dict]:
    """Recipe -> its result with this seed; the base; and the teachers as one, each on its own task."""
    source = {r["recipe"]: r for r in results if r["recipe"] in RECIPES and r["seed"] == seed}
    for _, (base,) in rows_of(("base",), results):
        source["base"] = base
    if set(TEACHERS) <= set(source):
        own = {task: source[name]["held_out"][task] for task, name in EQUAL.items()}
        source["specialists"] = {"held_out": own, "quality_of": source[EQUAL["quality"]]["quality_of"]}
    return source


def pace(names: tuple[str, ...], results: list[dict]) -> str:
    """What the mix has learned of each task from as many pictures of it as its teacher saw: the scores that
    both watched."""
    *teachers, mix = names
    mixes = {r["seed"]: r["curve"] for r in results if r["recipe"] == mix and "curve" in r}
    columns = ["pictures", "seeds", "teacher", "mix after as many", "mix in the end"]
    lines = []
    for task, teacher in zip(TASKS, teachers, strict=True):
        own = {r["seed"]: r["curve"] for r in results if r["recipe"] == teacher and "curve" in r}
        seeds = sorted(set(own) & set(mixes))
        if not seeds:
            continue
        pictures = own[seeds[0]][-1]["samples"]
        then = [score_after(mixes[seed], task, pictures / MIX_SHARE[task]) for seed in seeds]
        cells = [str(pictures), str(len(seeds)), spread([own[seed][-1][task] for seed in seeds])]
        cells += [spread(then), spread([mixes[seed][-1][task] for seed in seeds])]
        lines.append([task, *cells])
    return markdown(columns, lines)


def score_after(curve: list[dict], task: str, samples: float) -> float:
    """A watched score after so many samples, on the straight line between two; beyond them the nearest."""
    return float(np.interp(samples, [point["samples"] for point in curve], [point[task] for point in curve]))


def level(names: tuple[str, ...], results: list[dict]) -> str:
    """Seconds of training from the base until a run watches every task within NEAR of its teacher's last
    score, seed by seed: with those of what it starts and learns from, and alone."""
    sources = {seed: found for seed, found in by_seed(results).items() if "specialists" in found}
    lines = [["the teachers", *[str(seconds(TEACHERS, source)) for source in sources.values()]]]
    for name in names:
        cells = [time_to_level(name, source) for source in sources.values()]
        lines.append([RECIPES[name].title, *cells])
    return markdown([f"seed {seed}" for seed in sources], lines)


def time_to_level(name: str, source: dict[str, dict]) -> str:
    """ "1558 (199)": the seconds, and those of this run alone; how long it was where it never got there;
    nothing where its result, or one of what it starts and learns from, is missing."""
    if not {name, *before(name)} <= set(source):
        return ""
    aims = {task: source[teacher]["curve"][-1][task] - NEAR for task, teacher in EQUAL.items()}
    earlier, curve = seconds(before(name), source), source[name]["curve"]
    for point in curve:
        if all(point[task] >= aim for task, aim in aims.items()):
            return f"{earlier + point['seconds']} ({point['seconds']})"
    return f"not in {earlier + curve[-1]['seconds']} ({curve[-1]['seconds']})"


def before(name: str) -> tuple[str, ...]:
    """All recipes that one starts and learns from."""
    needs = [need for need in RECIPES[name].needs if need in RECIPES]
    earlier = [other for need in needs for other in before(need)]
    return tuple(dict.fromkeys([*needs, *earlier]))


def seconds(names: tuple[str, ...], source: dict[str, dict]) -> int:
    """Of training these recipes, one after another."""
    return sum(source[name]["curve"][-1]["seconds"] for name in names)


def signs(cells: list[dict]) -> str:
    """Base and teacher of the larger signs: `cells` as opd.evaluation writes them."""
    found = {(cell["row"], cell["split"], cell["scorer"]): cell for cell in cells}
    columns = ["OCR, held out", "best of three", "OCR, trained strings", "diversity, held out"]
    lines = []
    for row, title in {"base": "base", "teacher": "text teacher"}.items():
        heldout, trained = found[row, "held-out", "ocr"], found[row, "train", "ocr"]
        different = found[row, "held-out", DIVERSITY]
        texts = [
            plus_minus(heldout["mean"], heldout["error"]),
            short(heldout["best"]),
            plus_minus(trained["mean"], trained["error"]),
            plus_minus(different["mean"], different["error"]),
        ]
        lines.append([title, *texts])
    return markdown(columns, lines)


def own_score(task: str) -> Callable[[dict], float]:
    return lambda result: result["held_out"][task]


def quality_of_all(result: dict) -> float:
    return statistics.fmean(result["quality_of"].values())


def mean_of_tasks(result: dict) -> float:
    return statistics.fmean([result["held_out"][task] for task in ("compose", "text")])


def mean_of_three(result: dict) -> float:
    own = result["held_out"]
    return statistics.fmean([own["compose"], own["text"], quality_of_all(result)])


def variety(result: dict) -> float:
    """Of shapes and of signs, whose prompts ask for no background."""
    return statistics.fmean([result[VARIETY][task] for task in ("compose", "text")])


def rows_of(names: tuple[str, ...], results: list[dict]) -> list[tuple[str, list[dict]]]:
    """(title, results) of each row of the runs that have a result."""
    found = []
    for name in names:
        own = [result for result in results if result["recipe"] == name]
        if name in RECIPES and own:
            found.append((RECIPES[name].title, own))
        elif own:
            for row, title in REFERENCES[name].titles.items():
                found.append((title, [{what: own[0][what][row] for what in SCORES if what in own[0]}]))
    return found


def cells_of(results: list[dict]) -> list[str]:
    """A cell per task and the mean; empty where the tasks are not all scored."""
    cells = []
    for task in TASKS:
        cells.append(spread([result["held_out"][task] for result in results if task in result["held_out"]]))
    whole = [result["held_out"].values() for result in results if len(result["held_out"]) == len(TASKS)]
    return [*cells, spread([statistics.fmean(scores) for scores in whole])]


def gap_cells(results: list[dict]) -> list[str]:
    if "gap_closed" not in results[0]:
        return ["", ""]
    return [spread([result["gap_closed"][states] for result in results]) for states in ("fixed", "visited")]


def spread(values: list[float]) -> str:
    """Mean and standard deviation, the value alone, or nothing."""
    if not values:
        return ""
    if len(values) == 1:
        return short(values[0])
    return plus_minus(statistics.fmean(values), statistics.stdev(values))


def plus_minus(mean: float, deviation: float) -> str:
    """.345 ± .008"""
    return f"{short(mean)} ± {short(deviation)}"


def short(value: float) -> str:
    """.345, 1.000 or -.008"""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


# Title -> (run, run below it, score).
CLAIMS = {
    "compose teacher above the base, compose": ("equal-compose", "base", own_score("compose")),
    "text teacher above the base, text": ("equal-text", "base", own_score("text")),
    "quality teacher above the base, quality of all": ("all-quality", "base", quality_of_all),
    "the same, text": ("all-quality", "base", own_score("text")),
    "the same, compose": ("all-quality", "base", own_score("compose")),
    "stacked rewards above the text teacher, text": ("stacked", "equal-text", own_score("text")),
    "student above the compose teacher, compose": ("student", "equal-compose", own_score("compose")),
    "student above the text teacher, text": ("student", "equal-text", own_score("text")),
    "student above the quality teacher, quality of all": ("student", "all-quality", quality_of_all),
    "student above the usual mix, mean of three": ("student", "mix", mean_of_three),
    "student above the mix rewarded for everything, mean": ("student", "mix-all", mean_of_three),
    "the teachers, each on its own task, above that mix": ("specialists", "mix-all", mean_of_three),
    "student above that mix folded into itself": ("student", "mix-folded", mean_of_three),
    "distilled, then that mix, above the usual mix": ("rewarded", "mix", mean_of_three),
    "the same, above the mix rewarded for everything": ("rewarded", "mix-all", mean_of_three),
    "the same, above the mix folded into itself": ("rewarded", "mix-folded", mean_of_three),
    "the same, above the student": ("rewarded", "student", mean_of_three),
    "the same, above the compose teacher, compose": ("rewarded", "equal-compose", own_score("compose")),
    "the same, above the text teacher, text": ("rewarded", "equal-text", own_score("text")),
    "the same, above the quality teacher, quality of all": ("rewarded", "all-quality", quality_of_all),
    "student without folding above that mix": ("plain-student", "mix-all", mean_of_three),
    "that mix above the base, variety": ("mix-all", "base", variety),
    "the same, folded into itself": ("mix-folded", "base", variety),
    "student above the base, variety": ("student", "base", variety),
    "distilled, then that mix, above the base, variety": ("rewarded", "base", variety),
    "student without folding above the base, variety": ("plain-student", "base", variety),
}
# Table -> its lines from the names of its runs and results.
LAYOUTS = {
    "rivals": everywhere,
    "controls": everywhere,
    "anchors": anchors,
    "references": everywhere,
    "questions": questions,
    "other teachers": own_scores,
    "pace": pace,
    "level": level,
}
# The part of a task's pictures among those of mix-all; quality is rewarded on three kinds of prompts.
MIX_SHARE = {"compose": 9 / 15, "text": 3 / 15, "quality": 3 / 15}
