"""The study's plots, from results alone (opd/mini/study/tables.py)."""

from collections.abc import Callable
from functools import partial
from statistics import fmean, stdev

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from opd.files import replace
from opd.mini.study.runs import RECIPES, SPEED, TASKS, TEACHERS
from opd.mini.study.tables import ROOT, level, rows_of

# Text stays text, and names inside the file do not change from run to run.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}
Curve = list[tuple[float, float, float]]  # seconds, mean over seeds, standard deviation


def draw(results: list[dict]) -> None:
    """The committed pictures, anew."""
    with matplotlib.rc_context(STYLE):
        for file, plot in PLOTS.items():
            replace(file, partial(plot(results).savefig, format="svg", metadata={"Date": None}))


def progress(results: list[dict]) -> Figure:
    """Score against seconds of training: the mix, the student after its three teachers, and a student of half
    as many steps that went on by GRPO."""
    teaching = taken(TEACHERS, results)
    learning = taken(("anchor-late",), results)
    curves = {
        "GRPO-mix, quality of all": watched("mix-all", results, mean_of_tasks),
        "student, after its teachers": watched("student", results, mean_of_tasks, teaching),
        "student, then GRPO": watched("rewarded", results, mean_of_tasks, teaching + learning),
    }
    return drawn("mean of compose, text, quality of landscapes", curves)


def levels(results: list[dict]) -> Figure:
    """The level of the shipped teachers' students against what training took."""
    score = partial(level, results=results)
    curves = {RECIPES[name].title: watched(name, results, score) for name in SPEED}
    return drawn("0: the base, 1: its teachers", curves)


def taken(names: tuple[str, ...], results: list[dict]) -> float:
    """Seconds that training the recipes one after another takes."""
    rows = rows_of(names, results)
    return sum(own[0]["curve"][-1]["seconds"] for _, own in rows)


def mean_of_tasks(point: dict) -> float:
    return fmean([point[task] for task in TASKS])


def watched(name: str, results: list[dict], score: Callable[[dict], float], start: float = 0.0) -> Curve:
    """What a recipe's runs watched, `start` seconds later. Seconds are of the first seed: machines differ,
    and the first of all recipes ran on one."""
    found = []
    for _, own in rows_of((name,), results):
        for points in zip(*[result["curve"] for result in own], strict=True):
            scores = [score(point) for point in points]
            deviation = stdev(scores) if len(scores) > 1 else 0.0
            found.append((start + points[0]["seconds"], fmean(scores), deviation))
    return found


def drawn(y_name: str, curves: dict[str, Curve]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of one core", ylabel=y_name)
    for name, points in curves.items():
        seconds, means, deviations = np.reshape(points, (-1, 3)).T
        axes.errorbar(seconds, means, deviations, marker="o", markersize=4, elinewidth=0.6, label=name)
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=8)
    return figure


PLOTS = {
    ROOT / "opd/mini/study/progress.svg": progress,
    ROOT / "opd/mini/study/levels.svg": levels,
}
