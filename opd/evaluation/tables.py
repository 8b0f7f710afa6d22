"""Scores as text and as JSON: a row per model, a block per split, then what is behind single numbers or what
they come to."""

import math
import re
from collections import Counter

from opd.evaluation.records import Record
from opd.evaluation.statistics import ALL, MEASURES, Cell, mean_of
from opd.lora import BASE, START, STUDENT

TEACHERS, THE_BASE = "its teacher", "the base"
Row = dict[str, tuple[float, float]]  # heading -> (mean, standard error)
Block = dict[str, Row]  # name -> row


def scores_of(cells: list[Cell], first: dict[str, str]) -> dict:
    """{row: {split: {task: mean of its first scorer, ..., "mean": their mean}}}. `first`: task -> scorer."""
    scores = {}
    for split in dict.fromkeys(cell.split for cell in cells):
        for name, row in blocks_of(cells, first)[split].items():
            means = {heading: mean for heading, (mean, _) in row.items() if heading in (*first, "mean")}
            scores.setdefault(name, {})[split] = means
    return scores


def table(
    cells: list[Cell],
    first: dict[str, str],
    note: str,
    labels: dict[str, str],
    routes: dict[str, str] | None = None,
    whole: bool = False,
) -> str:
    """A block per split: the mean of every task and scorer with its standard error, and the mean over tasks.
    Below, if `whole`, the tags of every scorer of a task and the diversity; else the verdict on the student,
    if there is one. `labels`: what rows are called; `routes`: task -> teacher."""
    splits = {cell.split for cell in cells}
    lines = [note]
    for title, block in blocks_of(cells, first).items():
        if whole or title in splits:
            lines += ["", *aligned(title, {labels[row]: numbers for row, numbers in block.items()})]
    said = [] if whole else verdict(cells, first, routes or {})
    if said:
        lines += ["", *said]
    return "\n".join(lines)


def blocks_of(cells: list[Cell], first: dict[str, str]) -> dict[str, Block]:
    """Title -> block: those of the splits, then the tags of every scorer of a task, and the diversity."""
    blocks, names = {cell.split: {} for cell in cells}, names_of(cells)
    for cell in cells:
        title, heading = place_of(cell, first, names)
        blocks.setdefault(title, {}).setdefault(cell.row, {})[heading] = cell.mean, cell.error
    for split in {cell.split for cell in cells}:
        for row in blocks[split].values():
            row["mean"] = mean_of([row[task] for task in first if task in row])
    return blocks


# ---- the student against base and teachers -------------------------------------------------------


def verdict(cells: list[Cell], first: dict[str, str], routes: dict[str, str]) -> list[str]:
    """How the student stands on held-out prompts (else those of training): a sentence, then a line per task.
    Nothing where there is no student or nothing to compare it with. `routes`: as in `teacher_of`."""
    split = min((cell.split for cell in cells), default="")  # held-out before train
    block = blocks_of(cells, first).get(split, {})
    apart = differences(cells, split, first, routes)
    if not apart:
        return []
    words, lines = [], []
    for whom, row in apart.items():
        standing = {}
        for task in (task for task in row if task in first):
            standing.setdefault(stands(*row[task]), []).append(task)
        words += [f"{how} {whom} in {', '.join(tasks)}" for how, tasks in standing.items()]
    for task in (task for task in block[STUDENT] if task in first):
        said = [f"{task}: {STUDENT} {number(block[STUDENT][task][0])}"]
        for whom, row in ((TEACHERS, teacher_of(task, block, routes)), (THE_BASE, BASE)):
            if task in apart.get(whom, {}):
                named = row if row == BASE else f"teacher {row}"
                said.append(f"{named} {number(block[row][task][0])} ({signed(*apart[whom][task])})")
        lines.append(", ".join(said))
    sentence = f"{split.capitalize()} prompts: the student is {'; '.join(words)}."
    return [f"{sentence} (Level: within two standard errors.)", *lines]


def differences(cells: list[Cell], split: str, first: dict[str, str], routes: dict[str, str]) -> Block:
    """The student's means less those of the task's teacher ("its teacher") and less those of the base, with
    the errors of such differences; of the mean over tasks where every task has one."""
    block, found = blocks_of(cells, first).get(split, {}), {TEACHERS: {}, THE_BASE: {}}
    mine = {heading: mean for heading, (mean, _) in block.get(STUDENT, {}).items() if heading != "mean"}
    names = names_of(cells)
    for cell in cells:
        title, heading = place_of(cell, first, names)
        if title == split and heading in mine:
            less = mine[heading] - cell.mean, cell.apart
            if cell.row == teacher_of(cell.task, block, routes):
                found[TEACHERS][heading] = less
            if cell.row == BASE:
                found[THE_BASE][heading] = less
    for row in found.values():
        tasks = [row[task] for task in row if task in first]
        if tasks and len(tasks) == len(first.keys() & mine.keys()):
            row["mean"] = mean_of(tasks)
    return {whom: row for whom, row in found.items() if row}


def teacher_of(task: str, block: Block, routes: dict[str, str]) -> str:
    """The row of a task's teacher: that of `routes` (task -> teacher), else the one that bears its name, else
    the only one; "" where there is none."""
    name = routes.get(task, task)
    teachers = [row for row in block if row not in (BASE, START, STUDENT)]
    for row in teachers:
        if row == name or row.startswith(f"{name} g="):
            return row
    return teachers[0] if len(teachers) == 1 and task not in routes else ""


def stands(mean: float, error: float) -> str:
    """How a difference is called."""
    if not math.isfinite(mean) or math.isnan(error):
        return "not comparable with"
    if abs(mean) <= 2 * error:
        return "level with"
    return "above" if mean > 0 else "below"


# ---- words and numbers ---------------------------------------------------------------------------


def names_of(cells: list[Cell]) -> dict[str, str]:
    """Scorer -> what it is called: its label, or all of its spec where another has the same label."""
    labels = {scorer: label(scorer) for scorer in dict.fromkeys(cell.scorer for cell in cells)}
    shared = Counter(labels.values())
    return {scorer: scorer if shared[name] > 1 else name for scorer, name in labels.items()}


def place_of(cell: Cell, first: dict[str, str], names: dict[str, str]) -> tuple[str, str]:
    """The title of its block and the heading of its column. `names`: scorer -> what it is called."""
    task = f"{cell.split} {cell.task}"
    if cell.scorer in MEASURES:
        return f"{task}: diversity", MEASURES[cell.scorer]
    if cell.tag != ALL:
        return f"{task}: {names[cell.scorer]}", cell.tag
    if cell.scorer == first[cell.task]:
        return cell.split, cell.task
    return cell.split, f"{cell.task}:{names[cell.scorer]}"


def aligned(title: str, block: Block) -> list[str]:
    """The lines of a block: names to the left, numbers to the right."""
    columns = [[title, *block]]
    for heading in dict.fromkeys(heading for row in block.values() for heading in row):
        texts = [number(*row[heading]) if heading in row else "" for row in block.values()]
        columns.append([heading, *texts])
    padded = []
    for place, column in enumerate(columns):
        width = max(map(len, column))
        padded.append([text.rjust(width + 2) if place else text.ljust(width) for text in column])
    return ["".join(line) for line in zip(*padded, strict=True)]


def number(mean: float, error: float = math.nan) -> str:
    """0.345 ±.030, with three decimals below 10, else two."""
    decimals = 3 if abs(mean) < 10 else 2
    behind = "" if math.isnan(error) else f" ±{error:.{decimals}f}".replace("±0.", "±.")
    return f"{mean:.{decimals}f}{behind}"


def signed(mean: float, error: float) -> str:
    """+0.345 ±.030: a difference."""
    return f"{'+' * (mean >= 0)}{number(mean, error)}"


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
