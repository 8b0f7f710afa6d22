"""The curves of a run over its steps."""

import io
import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from opd.report.tracker import flatten

COLOURS = ("#3366aa", "#cc6633", "#339966", "#aa3377", "#888833", "#222222", "#66aadd", "#dd99aa")
# Inches of a figure: two panels in a row, whose letters can be read on a small screen.
WIDTH, HEIGHT = 9, 3.2
LEGEND = {"frameon": False, "ncols": 4, "columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.5}
# No task has a name with a bracket.
ALL, WATCHED, FAR = "(all)", "held-out score", "distance to the teacher, % of the base's"
SIZE = "log |v| / |v_base|"
NOTE = "Thick: the running mean. Thin: the numbers themselves."
Curves = dict[str, dict[int, float]]  # label -> step -> value


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def curve_figure(rows: list[dict], levels: dict[str, float]) -> Figure | None:
    """A panel per kind of number in the lines of metrics.jsonl; a label has one colour in all of them.
    `levels`: task -> the held-out score of its teacher, a dashed line. None where nothing was logged."""
    panels = curves_of(rows)
    if not panels:
        return None
    labels = dict.fromkeys(label for curves in panels.values() for label in curves if label != ALL)
    colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
    lines = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(WIDTH, HEIGHT * lines), layout="constrained")
    axes = list(figure.subplots(lines, 2, squeeze=False).flat)
    for spare in axes[len(panels) :]:
        spare.remove()
    for panel, (title, curves) in zip(axes, panels.items(), strict=False):
        watched = title.startswith(WATCHED)
        for label, values in curves.items():
            draw_curve(panel, label, values, colours.get(label, "#444444"), smooth=not watched)
            if watched and label in levels:
                panel.axhline(levels[label], color=colours[label], linestyle="--", linewidth=1)
        if watched and levels.keys() & curves.keys():
            panel.plot([], [], color="#888888", linestyle="--", linewidth=1, label="teacher at the end")
        dress(panel, title, curves)
        if list(curves) != [ALL]:
            drawn = len(panel.get_legend_handles_labels()[0])
            lines = math.ceil(drawn / LEGEND["ncols"])
            even = LEGEND | {"ncols": math.ceil(drawn / lines)}
            panel.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), **even)
    return figure


def curves_of(rows: list[dict]) -> dict[str, Curves]:
    """Kind of number -> its curves: rewards and scores per task, losses per teacher."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    of_teachers = {name.removesuffix("/loss"): name for name in names if name.endswith("/loss")}
    kinds = {
        "reward": {name.removeprefix("reward/"): name for name in names if name.startswith("reward/")},
        "KL to the base, nats per dimension": {ALL: "kl"},
        "|v - v_base|², mean over dimensions": {ALL: "from_base"},
        SIZE: {ALL: "log_size"},
        WATCHED: {name.removeprefix("watch/"): name for name in names if name.startswith("watch/")},
        FAR: {name.removeprefix("distance/"): name for name in names if name.startswith("distance/")},
        "loss": {ALL: "loss", **of_teachers},
        "gradient norm": {ALL: "grad_norm"},
    }
    found = {}
    for title, own in kinds.items():
        for label, name in own.items():
            values = points(name, flat)
            if values:
                found.setdefault(title, {})[label] = values
    return found


def points(name: str, flat: list[dict]) -> dict[int, float]:
    """Step -> value, where there is a finite number."""
    found = {row["step"]: row[name] for row in flat if isinstance(row.get(name), int | float)}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def draw_curve(panel: Axes, label: str, values: dict[int, float], colour: str, smooth: bool) -> None:
    """The running mean, over what it is the mean of; the numbers themselves where they are few."""
    steps, numbers = list(values), np.array(list(values.values()))
    width = 2 * (len(numbers) // 10) + 1
    style = {"color": colour, "marker": "o" if len(numbers) < 10 else "", "markersize": 4}
    if smooth and width > 1:
        panel.plot(steps, numbers, color=colour, linewidth=0.7, alpha=0.45)
        window = np.ones(width)
        numbers = np.convolve(numbers, window, "same") / np.convolve(np.ones(len(numbers)), window, "same")
    # To matplotlib $ begins mathematics, and _ a label that is not shown.
    plain = label.replace("$", r"\$")
    panel.plot(steps, numbers, label=" " * label.startswith("_") + plain, linewidth=1.8, **style)


def dress(panel: Axes, title: str, curves: Curves) -> None:
    panel.set_title(textwrap.fill(title, 45), fontsize=11, loc="left")
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    panel.grid(color="#e4e4e4")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlim(left=0)
    numbers = [value for values in curves.values() for value in values.values()]
    low, high = min(numbers), max(numbers)
    if not title.startswith((WATCHED, FAR, SIZE, "reward")) and low > 0 and high > 10 * low:
        panel.set_yscale("log")
        # 0.2, 0.5, 1 and not 6 x 10^-1.
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
