"""The study's plots, from results alone (opd/mini/study/tables.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from operator import itemgetter
from statistics import fmean, stdev

import matplotlib
from matplotlib.figure import Figure

from opd.files import replace
from opd.mini.study.runs import METHODS, RECIPES, SPEED, TASKS, TEACHERS
from opd.mini.study.tables import RESULTS, ROOT, level, load, rows_of, scores_of

# Text stays text, and names inside the file do not change from run to run.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}
# Where labels stand, in turns, as neighbours may lie close together.
BESIDE = [("left", (5, 4)), ("left", (5, -10)), ("right", (-5, 4))]


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    label: str
    x_spread: float
    y_spread: float


def draw(results: list[dict]) -> None:
    """The committed pictures, anew."""
    with matplotlib.rc_context(STYLE):
        for file, plot in PLOTS.items():
            of_base = load(RESULTS / OF_BASE[file.name]) if file.name in OF_BASE else results
            save = partial(plot(of_base).savefig, format="svg", metadata={"Date": None})
            replace(file, save)


def trade(results: list[dict]) -> Figure:
    """What an anchor costs the tasks and what it brings all pictures: weights for all noise levels in one
    curve, the others beside it."""
    weights = {"anchor-0": "0", "anchor-0.02": ".02", "anchor-0.1": ".1", "anchor-0.5": ".5", "anchor-2": "2"}
    late = {"anchor-late": ".02, 2 below .6", "anchor-earlier": "2 below .7", "anchor-late-4": "4 below .6"}
    curves = {
        "anchor: one weight for all levels": marks(weights, results),
        "anchor: by noise level": marks(late, results),
        "the default, 100 steps": marks({"student": ""}, results),
        "student, then GRPO": marks({"rewarded": ""}, results),
        "GRPO-mix": marks({"mix": "", "mix-all": "quality of all"}, results),
    }
    return plane("mean of compose and text", "quality of all pictures", curves)


def marks(labels: dict[str, str], results: list[dict]) -> list[Mark]:
    """A mark per recipe that has a result: means and standard deviations over its seeds."""
    found = []
    for name, label in labels.items():
        for _, own in rows_of((name,), results):
            scores = [scores_of(result) for result in own]
            tasks, quality = ([one[score] for one in scores] for score in ("of the tasks", "of all"))
            found.append(Mark(fmean(tasks), fmean(quality), label, deviation(tasks), deviation(quality)))
    return found


def progress(results: list[dict]) -> Figure:
    """Score against seconds of training: the mix, the student after its three teachers, and a student of half
    as many steps that went on by GRPO."""
    teaching = taken(TEACHERS, results)
    learning = taken(("anchor-late",), results)
    curves = {
        "GRPO-mix, quality of all": watched("mix-all", results, 0.0),
        "student, after its teachers": watched("student", results, teaching),
        "student, then GRPO": watched("rewarded", results, teaching + learning),
    }
    return plane("seconds of one core", "mean of compose, text, quality of landscapes", curves)


def taken(names: tuple[str, ...], results: list[dict]) -> float:
    """Seconds that training the recipes one after another takes."""
    rows = rows_of(names, results)
    return sum(own[0]["curve"][-1]["seconds"] for _, own in rows)


def mean_of_tasks(point: dict) -> float:
    return fmean([point[task] for task in TASKS])


def watched(
    name: str,
    results: list[dict],
    start: float,
    score: Callable[[dict], float] = mean_of_tasks,
    unit: str = "seconds",
) -> list[Mark]:
    """The mean over seeds of what a recipe's runs watched, `start` of the unit later. The unit is of the
    first seed: machines differ in seconds, and the first of all recipes ran on one."""
    found = []
    for _, own in rows_of((name,), results):
        for points in zip(*[result["curve"] for result in own], strict=True):
            means = [score(point) for point in points]
            found.append(Mark(start + points[0][unit], fmean(means), "", 0.0, deviation(means)))
    return found


def deviation(values: list[float]) -> float:
    """The standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def plane(x_name: str, y_name: str, curves: dict[str, list[Mark]]) -> Figure:
    """Marks with their spreads, joined by lines in their order."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_name, ylabel=y_name)
    for name, points in curves.items():
        x, y = [mark.x for mark in points], [mark.y for mark in points]
        across, upright = [mark.x_spread for mark in points], [mark.y_spread for mark in points]
        axes.errorbar(x, y, upright, across, marker="o", markersize=4, elinewidth=0.6, label=name)
        for mark, (side, offset) in zip(points, cycle(BESIDE), strict=False):
            place = {"textcoords": "offset points", "ha": side, "fontsize": 7}
            axes.annotate(mark.label, (mark.x, mark.y), offset, **place)
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=8)
    return figure


def soon(results: list[dict]) -> Figure:
    """The level of the shipped teachers' students against what training took."""
    score = partial(level, results=results)
    curves = {RECIPES[name].title: watched(name, results, 0.0, score) for name in SPEED}
    return plane("seconds of one core", "0: the base, 1: its teachers", curves)


def grown(results: list[dict]) -> Figure:
    """Each task's own score while its teacher grows by one method or another."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for method, (title, cost, *_) in METHODS.items():
            points = watched(f"{method}-{task}", results, 0.0, itemgetter(task), "step")
            seconds, scores = [cost * point.x for point in points], [point.y for point in points]
            spreads = [point.y_spread for point in points]
            axes.errorbar(seconds, scores, spreads, marker="o", markersize=4, elinewidth=0.6, label=title)
        axes.set(title=task, xlabel="seconds of one core")
        axes.grid(linewidth=0.3)
    figure.axes[0].set_ylabel("own score, held out")
    figure.axes[-1].legend(fontsize=8, loc="lower right")
    return figure


OF_BASE = {"anchors.svg": "earlier", "grown.svg": "earlier"}
PLOTS = {
    ROOT / "opd/mini/study/anchors.svg": trade,
    ROOT / "opd/mini/study/progress.svg": progress,
    ROOT / "opd/mini/study/levels.svg": soon,
    ROOT / "opd/mini/study/grown.svg": grown,
}
