"""Scores as text and as JSON: a row per model, a block per split, then what is behind single numbers."""

import math
import re

from opd.evaluation.records import Record
from opd.evaluation.statistics import ALL, MEASURES, Cell, headline, mean_of

Block = dict[str, dict[str, str]]  # row -> heading -> text


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
    lines = [note]
    for split in dict.fromkeys(cell.split for cell in cells):
        lines += ["", *text_of(split, means(cells, split, first))]
    blocks = {}
    for cell in cells:
        title = f"{cell.split} {cell.task}: {label(cell.scorer)}"
        if cell.scorer in MEASURES:
            title = f"{cell.split} {cell.task}: diversity"
        blocks.setdefault(title, []).append(cell)
    for title, own in blocks.items():
        block = behind(own)
        if block:
            lines += ["", *text_of(title, block)]
    return "\n".join(lines)


def means(cells: list[Cell], split: str, first: dict[str, str]) -> Block:
    block = {}
    for row in dict.fromkeys(cell.row for cell in cells if cell.split == split):
        texts = {}
        for cell in cells:
            mine = (cell.row, cell.split, cell.tag) == (row, split, ALL)
            if mine and cell.scorer not in MEASURES:
                heading = cell.task
                if first[cell.task] != cell.scorer:
                    heading = f"{cell.task}:{label(cell.scorer)}"
                texts[heading] = number(cell.mean, cell.error)
        texts["mean"] = number(*mean_of(headline(cells, row, split, first).values()))
        block[row] = texts
    return block


def behind(cells: list[Cell]) -> Block:
    """The tags of one scorer on one task, or the diversity; {} where there are none."""
    block = {}
    for cell in cells:
        texts = block.setdefault(cell.row, {})
        if cell.scorer in MEASURES:
            texts[MEASURES[cell.scorer]] = number(cell.mean, cell.error)
        elif cell.tag != ALL:
            texts[cell.tag] = number(cell.mean, cell.error)
    return {row: texts for row, texts in block.items() if texts}


def text_of(title: str, block: Block) -> list[str]:
    """Aligned to the right, as wide as it must be."""
    headings = list(dict.fromkeys(heading for texts in block.values() for heading in texts))
    rows = [[title, *headings]]
    for row, texts in block.items():
        rows.append([row, *(texts[heading] if heading in texts else "" for heading in headings)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *texts in rows:
        padded = [text.rjust(width + 2) for text, width in zip(texts, widths[1:], strict=True)]
        lines.append(name.ljust(widths[0]) + "".join(padded))
    return lines


def number(mean: float, error: float) -> str:
    """0.345 ±.030, with three decimals below 10, else two."""
    decimals = 3 if abs(mean) < 10 else 2
    text = f"{mean:.{decimals}f}"
    if math.isnan(error):
        return text
    return f"{text} ±{error:.{decimals}f}".replace("±0.", "±.")


def label(scorer: str) -> str:
    """A spec without the modules of its functions: 0.7*my.rewards:text -> 0.7*text."""
    return re.sub(r"[\w.]+:(?=[A-Za-z_])", "", scorer)


def remarks(records: list[Record], scorers: list[str]) -> list[str]:
    """A line for every scorer that gave some pictures of a task no score, with its first reason."""
    missing = {}
    for record in records:
        for scorer in scorers:
            if scorer in record.reasons:
                place = f"{record.row}, {record.split} {record.task}, {label(scorer)}"
                missing.setdefault(place, []).append(record.reasons[scorer])
    return [
        f"{place}: pictures without a score: {len(why)}, first: {why[0]}" for place, why in missing.items()
    ]
