"""Scores as text and as JSON: a row per model, a block per split, then what is behind single numbers."""

import math
import re

from opd.evaluation.records import Record
from opd.evaluation.statistics import ALL, MEASURES, Cell, headline, mean_of


def scores_of(cells: list[Cell], first: dict[str, str]) -> dict:
    """{row: {split: {task: mean of its first scorer, ..., "mean": their mean}}}. `first`: task -> scorer."""
    scores = {}
    for row, split in dict.fromkeys((cell.row, cell.split) for cell in cells):
        means = {task: cell.mean for task, cell in headline(cells, row, split, first).items()}
        mean = sum(means.values()) / len(means)
        scores.setdefault(row, {})[split] = means | {"mean": mean}
    return scores


def table(cells: list[Cell], first: dict[str, str], note: str) -> str:
    """A block per split: the mean of every task and scorer with its standard error, and the mean over tasks.
    Below, for every scorer of a task, its tags; then the diversity."""
    blocks = {cell.split: {} for cell in cells}  # title -> row -> heading -> text
    for cell in cells:
        title, heading = place_of(cell, first)
        texts = blocks.setdefault(title, {}).setdefault(cell.row, {})
        texts[heading] = number(cell.mean, cell.error)
    for row, split in dict.fromkeys((cell.row, cell.split) for cell in cells):
        mean, error = mean_of(headline(cells, row, split, first).values())
        blocks[split][row]["mean"] = number(mean, error)
    lines = [note]
    for title, block in blocks.items():
        lines += ["", *aligned(title, block)]
    return "\n".join(lines)


def place_of(cell: Cell, first: dict[str, str]) -> tuple[str, str]:
    """The title of its block and the heading of its column."""
    task = f"{cell.split} {cell.task}"
    if cell.scorer in MEASURES:
        return f"{task}: diversity", MEASURES[cell.scorer]
    if cell.tag != ALL:
        return f"{task}: {label(cell.scorer)}", cell.tag
    if cell.scorer == first[cell.task]:
        return cell.split, cell.task
    return cell.split, f"{cell.task}:{label(cell.scorer)}"


def aligned(title: str, block: dict[str, dict[str, str]]) -> list[str]:
    """The lines of a block, row -> heading -> text: names to the left, numbers to the right."""
    columns = [[title, *block]]
    for heading in dict.fromkeys(heading for texts in block.values() for heading in texts):
        columns.append([heading, *(texts.get(heading, "") for texts in block.values())])
    padded = []
    for place, column in enumerate(columns):
        width = max(map(len, column))
        padded.append([text.rjust(width + 2) if place else text.ljust(width) for text in column])
    return ["".join(line) for line in zip(*padded, strict=True)]


def number(mean: float, error: float) -> str:
    """0.345 ±.030, with three decimals below 10, else two."""
    decimals = 3 if abs(mean) < 10 else 2
    behind = "" if math.isnan(error) else f" ±{error:.{decimals}f}".replace("±0.", "±.")
    return f"{mean:.{decimals}f}{behind}"


def label(scorer: str) -> str:
    """A spec without the modules of its functions: 0.7*my.rewards:text -> 0.7*text."""
    return re.sub(r"[\w.]+:(?=[A-Za-z_])", "", scorer)


def remarks(records: list[Record], scorers: list[str]) -> list[str]:
    """A line for every scorer that gave some pictures of a task no score, with its first reason."""
    missing = {}
    for record in records:
        for scorer in scorers:
            if scorer in record.reasons:
                place = f"{record.row}, {record.split} {record.task}, {scorer}: pictures without a score"
                missing.setdefault(place, []).append(record.reasons[scorer])
    return [f"{place}: {len(reasons)}, first: {reasons[0]}" for place, reasons in missing.items()]
