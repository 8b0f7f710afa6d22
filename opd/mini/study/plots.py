"""The study's plots, from results alone (opd/mini/study/tables.py)."""

import statistics

from opd.mini.study.runs import TASKS, TEACHERS
from opd.mini.study.tables import ROOT, mean_of_tasks, quality_of_all, rows_of
from opd.report import svg


def trade(results: list[dict]) -> str:
    """What an anchor costs the tasks and what it brings all pictures: weights for all noise levels in one
    curve, the others beside it."""
    weights = {"anchor-0": "0", "anchor-0.02": ".02", "anchor-0.1": ".1", "anchor-0.5": ".5", "anchor-2": "2"}
    late = {"anchor-late": ".02, 2 below .6", "anchor-earlier": "2 below .7", "anchor-late-4": "4 below .6"}
    curves = [
        svg.Marked("one weight for all levels", marks(weights, results)),
        svg.Marked("by noise level", marks(late, results)),
        svg.Marked("held at a target", marks({"anchor-held": ""}, results)),
        svg.Marked("the default, 100 steps", marks({"student": ""}, results)),
        svg.Marked("student, then GRPO", marks({"rewarded": ""}, results)),
        svg.Marked("GRPO-mix", marks({"mix": "", "mix-all": "quality of all"}, results)),
    ]
    return svg.plane("anchor weights", "mean of compose and text", "quality of all pictures", curves)


def marks(labels: dict[str, str], results: list[dict]) -> list[svg.Mark]:
    """A mark per recipe that has a result: means and standard deviations over its seeds."""
    found = []
    for name, label in labels.items():
        for _, own in rows_of((name,), results):
            tasks = [mean_of_tasks(result) for result in own]
            quality = [quality_of_all(result) for result in own]
            x, y = statistics.fmean(tasks), statistics.fmean(quality)
            found.append(svg.Mark(x, y, label, deviation(tasks), deviation(quality)))
    return found


def over_seconds(results: list[dict]) -> str:
    return progress("one core", "seconds", results)


def over_images(results: list[dict]) -> str:
    return progress("pictures that were made for training", "samples", results)


def progress(title: str, unit: str, results: list[dict]) -> str:
    """Score against what training took in `unit` of a curve: both mixes, the student after its three
    teachers, and a student of half as many steps that went on by GRPO."""
    teaching = taken(TEACHERS, unit, results)
    learning = taken(("anchor-late",), unit, results)
    curves = [
        svg.Marked("GRPO-mix", watched("mix", unit, results, 0.0)),
        svg.Marked("GRPO-mix, quality of all", watched("mix-all", unit, results, 0.0)),
        svg.Marked("student, after its teachers", watched("student", unit, results, teaching)),
        svg.Marked("student, then GRPO", watched("rewarded", unit, results, teaching + learning)),
    ]
    return svg.plane(title, unit, "mean of compose, text, quality of landscapes", curves)


def taken(names: tuple[str, ...], unit: str, results: list[dict]) -> float:
    """What training the recipes one after another takes: the mean over each one's seeds."""
    total = 0.0
    for name in names:
        for _, own in rows_of((name,), results):
            total += statistics.fmean([result["curve"][-1][unit] for result in own])
    return total


def watched(name: str, unit: str, results: list[dict], start: float) -> list[svg.Mark]:
    """The mean over seeds of what a recipe's runs watched, `start` of the unit later."""
    found = []
    for _, own in rows_of((name,), results):
        for points in zip(*[result["curve"] for result in own], strict=True):
            means = [statistics.fmean([point[task] for task in TASKS]) for point in points]
            place = start + statistics.fmean([point[unit] for point in points])
            found.append(svg.Mark(place, statistics.fmean(means), "", 0.0, deviation(means)))
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
    ROOT / "opd/mini/study/anchors.svg": trade,
    ROOT / "opd/mini/study/progress.svg": over_seconds,
    ROOT / "opd/mini/study/progress_images.svg": over_images,
    ROOT / "opd/mini/study/closed.svg": closed,
}
