"""The study's pages: tables and plots, from results alone. Nothing here runs a model.

A result says "held_out": each task's own score, "quality_of": the quality of every task's pictures,
"diversity": how far apart the pictures of one prompt are, "curve": scores during training, and "kl_closed":
which share of a teacher's KL is gone, by noise level.
"""

import re
import statistics
from pathlib import Path

from opd import svg
from opd.files import read_json, replace
from opd.flags import require
from opd.mini.runs import EVERYWHERE, RECIPES, REFERENCES, TABLES, TASKS, TEACHERS
from opd.statistics import DIVERSITY

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "opd/mini/results"
SIGNS = ROOT / "opd/mini/ocr_scores.json"  # opd.evaluate of the text teacher of opd/mini/signs.py
SCORES = ("held_out", "errors", "quality_of", DIVERSITY)
# Page -> the tables in it.
PAGES = {
    ROOT / "opd/mini/RESULTS.md": (
        "rivals",
        "cosines",
        "references",
        "controls",
        "anchors",
        "questions",
        "other teachers",
        "signs",
    ),
    ROOT / "README.md": ("rivals",),
}


def load(folder: Path) -> list[dict]:
    return [read_json(file) for file in sorted(folder.glob("*.json"))]


def write(results: list[dict]) -> None:
    """The committed pages and plots, anew."""
    for page, names in PAGES.items():
        text = with_tables(page.read_text(), names, results)
        replace(page, lambda path, text=text: path.write_text(text))
    for file, plot in PLOTS.items():
        drawing = plot(results)
        replace(file, lambda path, drawing=drawing: path.write_text(drawing))


# ---- tables ----------------------------------------------------------------------------------------------


def with_tables(page: str, names: tuple[str, ...], results: list[dict]) -> str:
    for name in names:
        page = with_table(page, name, table(name, results))
    return page


def with_table(page: str, name: str, table: str) -> str:
    """`page` with another table between `<!-- table NAME -->` and `<!-- end -->`. ValueError where it has no
    place for one."""
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
    before, found, rest = page.partition(begin)
    require(bool(found) and end in rest, f"the page has no lines {begin.strip()} and {end.strip()}")
    _, _, after = rest.partition(end)
    return before + begin + table + end + after


def table(name: str, results: list[dict]) -> str:
    """A row per recipe or model: mean and standard deviation over the seeds that have a result."""
    if name == "signs":
        return signs(read_json(SIGNS)["cells"])
    if name == "cosines":
        return cosines([result for _, own in rows_of("mix-all", results) for result in own])
    rows = [row for run in TABLES[name] for row in rows_of(run, results)]
    if name in EVERYWHERE:
        return everywhere(rows)
    if name == "questions":
        return questions(rows, [result for _, own in rows_of("asked", results) for result in own])
    columns = ["seeds", *TASKS, "mean"]
    with_gap = any("gap_closed" in result for _, results in rows for result in results)
    if with_gap:
        columns += ["gap closed, fixed states", "visited states"]
    lines = []
    for title, results in rows:
        cells = [str(len(results)), *cells_of(results)]
        if with_gap:
            cells += gap_cells(results)
        lines.append([title, *cells])
    return markdown(columns, lines)


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    """A table whose first column, the rows' names, has no heading."""
    rows = [["", *columns], ["---"] * (len(columns) + 1), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def everywhere(rows: list[tuple[str, list[dict]]]) -> str:
    """A table with the quality of every task's pictures: its mean over the three is `quality of all`, which
    the mean of three takes instead of the quality of landscapes."""
    columns = [
        "seeds",
        *TASKS,
        "quality of shapes",
        "of signs",
        "of all",
        "mean of compose, text, quality of all",
        "diversity",
    ]
    lines = []
    for title, results in rows:
        cells = [str(len(results)), *cells_of(results)[: len(TASKS)]]
        for task in ("compose", "text"):
            cells.append(spread([result["quality_of"][task] for result in results]))
        cells.append(spread([quality_of_all(result) for result in results]))
        cells.append(spread([mean_of_three(result) for result in results]))
        cells.append(spread([result[DIVERSITY]["quality"] for result in results if DIVERSITY in result]))
        lines.append([title, *cells])
    return markdown(columns, lines)


def questions(rows: list[tuple[str, list[dict]]], first: list[dict]) -> str:
    """A table with what each row's mean of three is above that of `first`, seed by seed."""
    means = {result["seed"]: mean_of_three(result) for result in first}
    columns = ["seeds", "compose", "text", "quality of all", "mean of three", "above the first row's"]
    lines = []
    for title, results in rows:
        compose, text, *_ = cells_of(results)
        cells = [str(len(results)), compose, text]
        cells.append(spread([quality_of_all(result) for result in results]))
        cells.append(spread([mean_of_three(result) for result in results]))
        paired = [result for result in results if result["seed"] in means]
        cells.append(spread([mean_of_three(result) - means[result["seed"]] for result in paired]))
        lines.append([title, *cells])
    return markdown(columns, lines)


def cosines(results: list[dict]) -> str:
    """The cosine of every two tasks' gradients, its mean over a run."""
    lines = []
    for pair in results[0]["cosines"]:
        values = [result["cosines"][pair] for result in results]
        lines.append([pair.replace("/", ", "), str(len(values)), spread(values)])
    return markdown(["seeds", "cosine"], lines)


def signs(cells: list[dict]) -> str:
    """Base and teacher of the larger signs: `cells` as opd.evaluate writes them."""
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


def quality_of_all(result: dict) -> float:
    return statistics.fmean(result["quality_of"].values())


def mean_of_three(result: dict) -> float:
    own = result["held_out"]
    return statistics.fmean([own["compose"], own["text"], quality_of_all(result)])


def rows_of(name: str, results: list[dict]) -> list[tuple[str, list[dict]]]:
    """(title, results) of each row of a run that has a result."""
    own = [result for result in results if result["recipe"] == name]
    if not own:
        return []
    if name in RECIPES:
        return [(RECIPES[name].title, own)]
    found = []
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


# ---- plots -----------------------------------------------------------------------------------------------


def trade(results: list[dict]) -> str:
    """What an anchor costs the tasks and what it brings all pictures: weights for all noise levels in one
    curve, the others beside it."""
    weights = {"anchor-0": "0", "anchor-0.02": ".02", "anchor-0.1": ".1", "anchor-0.5": ".5", "anchor-2": "2"}
    late = {"anchor-late": ".02, 2 below .6", "anchor-earlier": "2 below .7", "anchor-late-4": "4 below .6"}
    curves = [
        svg.Marked("one weight for all levels", marks(weights, results)),
        svg.Marked("by noise level", marks(late, results)),
        svg.Marked("the default, 100 steps", marks({"student": ""}, results)),
        svg.Marked("GRPO-mix", marks({"mix": "", "mix-all": "quality of all"}, results)),
    ]
    return svg.plane("anchor weights", "mean of compose and text", "quality of all pictures", curves)


def marks(labels: dict[str, str], results: list[dict]) -> list[svg.Mark]:
    """A mark per recipe that has a result: means and standard deviations over its seeds."""
    found = []
    for name, label in labels.items():
        for _, own in rows_of(name, results):
            tasks = [statistics.fmean([r["held_out"]["compose"], r["held_out"]["text"]]) for r in own]
            quality = [quality_of_all(result) for result in own]
            x, y = statistics.fmean(tasks), statistics.fmean(quality)
            found.append(svg.Mark(x, y, label, deviation(tasks), deviation(quality)))
    return found


def progress(results: list[dict]) -> str:
    """Score against seconds of training: both mixes, and the student after its three teachers."""
    teaching = 0.0
    for name in TEACHERS:
        for _, own in rows_of(name, results):
            teaching += statistics.fmean([result["curve"][-1]["seconds"] for result in own])
    curves = [
        svg.Marked("GRPO-mix", watched("mix", results, 0.0)),
        svg.Marked("GRPO-mix, quality of all", watched("mix-all", results, 0.0)),
        svg.Marked("student, after its teachers", watched("student", results, teaching)),
    ]
    return svg.plane("one core", "seconds", "mean of compose, text, quality of landscapes", curves)


def watched(name: str, results: list[dict], start: float) -> list[svg.Mark]:
    """The mean over seeds of what a recipe's runs watched, `start` seconds later."""
    found = []
    for _, own in rows_of(name, results):
        for points in zip(*[result["curve"] for result in own], strict=True):
            means = [statistics.fmean([point[task] for task in TASKS]) for point in points]
            seconds = start + statistics.fmean([point["seconds"] for point in points])
            found.append(svg.Mark(seconds, statistics.fmean(means), "", 0.0, deviation(means)))
    return found


def closed(results: list[dict]) -> str:
    """The share of each teacher's KL that the student closed, by noise level: the mean over its seeds."""
    own = [result for result in results if result["recipe"] == "student" and "kl_closed" in result]
    levels, rows = [], {}
    if own:
        levels = list(own[0]["kl_closed"][TASKS[0]])
        for name in own[0]["kl_closed"]:
            rows[name] = [statistics.fmean([r["kl_closed"][name][level] for r in own]) for level in levels]
    return svg.grid("share of the KL closed, by noise level", [f"{float(v):.2f}" for v in levels], rows)


def deviation(values: list[float]) -> float:
    """The standard deviation; 0 of one value."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values)


PLOTS = {
    ROOT / "opd/mini/anchors.svg": trade,
    ROOT / "opd/mini/progress.svg": progress,
    ROOT / "opd/mini/closed.svg": closed,
}
