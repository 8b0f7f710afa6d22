"""Figures of a run: its curves over the steps, and the KL to each teacher by noise level and step."""

import io
import math
import textwrap

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from opd.report.tracker import flatten

COLOURS = ("#3366aa", "#cc6633", "#339966", "#aa3377", "#888833", "#222222", "#66aadd", "#dd99aa")
WIDTH = 9  # inches of a figure: two panels, whose letters can be read on a small screen
LEGEND = {"frameon": False, "ncols": 4, "columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.5}
ALL, WATCHED, FAR = "all", "held-out score", "distance to the teacher, % of the base's"
SIZE = "log |v| / |v_base|"
NOTE = "Thick: the running mean. Thin: the numbers themselves."
COLUMNS = 80  # of a map: more cannot be told apart
LABELS = 12  # noise levels that are written beside a map
Curves = dict[str, dict[int, float]]  # label -> step -> value
# Blue by logarithm; grey where nothing was measured, white where the KL is 0, black where it is no number.
SHADES = colormaps["Blues"].with_extremes(bad="#e8e8e8", under="white", over="black")


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


# ---- curves ----------------------------------------------------------------------------------------


def curve_figure(rows: list[dict], levels: dict[str, float] | None = None) -> Figure | None:
    """A panel per kind of number in the lines of metrics.jsonl. `levels`: task -> the held-out score of its
    teacher, a dashed line. None where nothing was logged."""
    return figure_of(curves_of(rows), levels or {})


def comparison(runs: dict[str, list[dict]]) -> Figure | None:
    """A panel per number, the runs over each other."""
    panels = {}
    for run, rows in runs.items():
        for kind, curves in curves_of(rows).items():
            for label, values in curves.items():
                title = kind if label == ALL else f"{kind}: {label}"
                panels.setdefault(title, {})[run] = values
    figure = figure_of(panels, {}, columns=3)
    if figure is not None:
        lines = {line.get_label(): line for panel in figure.axes for line in panel.lines}
        drawn = [run for run in runs if run in lines]
        figure.legend([lines[run] for run in drawn], drawn, loc="outside upper left", **LEGEND)
    return figure


def curves_of(rows: list[dict]) -> dict[str, Curves]:
    """Kind of number -> its curves: rewards and scores per task, losses per teacher."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    of_teachers = {name.removesuffix("/loss"): name for name in names if name.endswith("/loss")}
    unit = ", nats per dimension" if of_teachers else ""
    kinds = {
        "reward": {name.removeprefix("reward/"): name for name in names if name.startswith("reward/")},
        "KL to the base, nats per dimension": {ALL: "kl"},
        "|v - v_base|², mean over dimensions": {ALL: "from_base"},
        SIZE: {ALL: "log_size"},
        WATCHED: {name.removeprefix("watch/"): name for name in names if name.startswith("watch/")},
        FAR: {name.removeprefix("distance/"): name for name in names if name.startswith("distance/")},
        f"loss{unit}": {ALL: "loss", **of_teachers},
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


def figure_of(panels: dict[str, Curves], levels: dict[str, float], columns: int = 2) -> Figure | None:
    """A panel per title, in which a label has the same colour as in the others. None without any."""
    if not panels:
        return None
    labels = dict.fromkeys(label for curves in panels.values() for label in curves if label != ALL)
    colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
    figure, axes = grid_of_panels(len(panels), 1 + 4.4 / columns, columns)
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        watched = title.startswith(WATCHED)
        for label, values in curves.items():
            draw_curve(panel, label, values, colours.get(label, "#444444"), smooth=not watched)
            if watched and label in levels:
                panel.axhline(levels[label], color=colours[label], linestyle="--", linewidth=1)
        if watched and levels.keys() & curves.keys():
            panel.plot([], [], color="#888888", linestyle="--", linewidth=1, label="teacher at the end")
        dress(panel, title, curves, columns)
        if columns == 2 and list(curves) != [ALL]:
            drawn = len(panel.get_legend_handles_labels()[0])
            lines = math.ceil(drawn / LEGEND["ncols"])
            even = LEGEND | {"ncols": math.ceil(drawn / lines)}
            panel.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), **even)
    return figure


def draw_curve(panel: Axes, label: str, values: dict[int, float], colour: str, smooth: bool) -> None:
    """The running mean, over what it is the mean of; the numbers themselves where they are few."""
    steps, numbers = list(values), np.array(list(values.values()))
    width = 2 * (len(numbers) // 10) + 1
    style = {"color": colour, "marker": "o" if len(numbers) < 10 else "", "markersize": 4}
    if smooth and width > 1:
        panel.plot(steps, numbers, color=colour, linewidth=0.7, alpha=0.45)
        window = np.ones(width)
        numbers = np.convolve(numbers, window, "same") / np.convolve(np.ones(len(numbers)), window, "same")
    panel.plot(steps, numbers, label=label, linewidth=1.8, **style)


def dress(panel: Axes, title: str, curves: Curves, columns: int) -> None:
    panel.set_title(textwrap.fill(title, 90 // columns), fontsize=11, loc="left")
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(14 // columns, integer=True))
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


# ---- maps of the KL --------------------------------------------------------------------------------


def kl_figure(rows: list[dict]) -> Figure | None:
    """A map per teacher: its KL by noise level and step, colours by logarithm. None where a run logs none."""
    names = {}
    for row in rows:
        names |= {name: None for name, value in row.items() if is_map(value)}
    if not names:
        return None
    # A column for every step: a teacher need not have samples in it, nor the anchor a weight.
    logged = {name: [(row["step"], row[name]["kl"] if name in row else {}) for row in rows] for name in names}
    grids = {name: kl_grid(columns) for name, columns in logged.items()}
    numbers = np.concatenate([grid[np.isfinite(grid) & (grid > 0)] for grid in grids.values()])
    low, high = (numbers.min(), numbers.max()) if numbers.size else (1.0, 1.0)
    norm = LogNorm(low / 1.1, high * 1.1)
    figure, axes = grid_of_panels(len(grids), height=2.6)
    for panel, (name, grid) in zip(axes, grids.items(), strict=True):
        columns = logged[name]
        image = panel.imshow(
            grid.clip(norm.vmin / 2, 2 * norm.vmax),  # 0 and infinity become numbers off the scale
            extent=(columns[0][0] - 0.5, columns[-1][0] + 0.5, len(grid) - 0.5, -0.5),
            aspect="auto",
            interpolation="nearest",
            norm=norm,
            cmap=SHADES,
        )
        every = math.ceil(len(grid) / LABELS)
        panel.set_yticks(range(0, len(grid), every), sigmas_of(columns)[::every], fontsize=8)
        panel.set_title(f"{name}: KL by sigma and step", fontsize=10, loc="left")
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="nats per dimension", aspect=30, pad=0.02)
    return figure


def is_map(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("kl"), dict)


def kl_grid(columns: list[tuple[int, dict[str, float]]]) -> np.ndarray:
    """(noise levels from high to low, COLUMNS or fewer): the mean of the steps that share a column, NaN where
    none was measured, infinite where the mean is no number."""
    sigmas = sigmas_of(columns)
    bins = min(COLUMNS, len(columns))
    sums, counts = np.zeros((len(sigmas), bins)), np.zeros((len(sigmas), bins))
    for place, (_, values) in enumerate(columns):
        for sigma, value in values.items():
            cell = sigmas.index(sigma), place * bins // len(columns)
            sums[cell] += value if math.isfinite(value) else math.inf
            counts[cell] += 1
    return np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)


def sigmas_of(columns: list[tuple[int, dict[str, float]]]) -> list[str]:
    return sorted({sigma for _, values in columns for sigma in values}, key=float, reverse=True)


def grid_of_panels(count: int, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `columns` in a row, each `height` inches high."""
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]
