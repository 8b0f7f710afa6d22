"""Figures of a run: its curves over the steps, and the KL to each teacher by noise level and step."""

import io
import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd.report.tracker import flatten

COLOURS = ("#3366aa", "#cc6633", "#339966", "#aa3377", "#888833", "#222222", "#66aadd", "#dd99aa")
WIDTH = 11  # inches of a figure: two panels and their legends
COLUMNS = 80  # of a map: more cannot be told apart
LABELS = 12  # noise levels that are written beside a map
# Blue by logarithm; grey where nothing was measured, white where the KL is 0, black where it is no number.
SHADES = colormaps["Blues"].with_extremes(bad="#e8e8e8", under="white", over="black")


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


# ---- curves ----------------------------------------------------------------------------------------


def curve_figure(rows: list[dict]) -> Figure | None:
    """A panel per kind of number in the lines of metrics.jsonl: held-out scores and rewards per task, losses
    per teacher, the gradient norm. None where nothing was logged."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    kinds = {
        "held-out score": [name for name in names if name.startswith("watch/")],
        "reward": [name for name in names if name.startswith("reward/")],
        "loss, nats per dimension": [name for name in names if name == "loss" or name.endswith("/loss")],
        "gradient norm": [name for name in names if name == "grad_norm"],
    }
    panels = {}
    for title, own in kinds.items():
        found = {name: points(name, flat) for name in own}
        drawn = {name: values for name, values in found.items() if values}
        if drawn:
            panels[title] = drawn
    if not panels:
        return None
    figure, axes = grid_of_panels(len(panels), height=3.0)
    for panel, (title, drawn) in zip(axes, panels.items(), strict=True):
        draw_curves(panel, title, drawn)
    return figure


def points(name: str, flat: list[dict]) -> dict[int, float]:
    """Step -> value, where there is a finite number."""
    found = {row["step"]: row[name] for row in flat if isinstance(row.get(name), int | float)}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def draw_curves(panel: Axes, title: str, drawn: dict[str, dict[int, float]]) -> None:
    for number, (name, values) in enumerate(drawn.items()):
        label = name.removeprefix("watch/").removeprefix("reward/").removesuffix("/loss")
        marker = "o" if len(values) < 30 else ""  # a single point is no line
        style = {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 3}
        panel.plot(list(values), list(values.values()), label=label, linewidth=1.3, **style)
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel("step")
    panel.grid(color="#e4e4e4")
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    scores = title in ("held-out score", "reward")
    if not scores and all(value > 0 for values in drawn.values() for value in values.values()):
        panel.set_yscale("log")
    if len(drawn) > 1 or scores:
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9)


# ---- maps of the KL --------------------------------------------------------------------------------


def kl_figure(rows: list[dict]) -> Figure | None:
    """A map per teacher: its KL by noise level and step, colours by logarithm. None where a run logs none."""
    logged = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict) and isinstance(value.get("kl"), dict):
                logged.setdefault(name, []).append((row["step"], value["kl"]))
    if not logged:
        return None
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


def grid_of_panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, two in a row, each `height` inches high."""
    lines = math.ceil(count / 2)
    figure = Figure(figsize=(WIDTH, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, 2, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]
