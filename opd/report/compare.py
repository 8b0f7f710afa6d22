"""compare.html: two runs side by side on one page, which needs nothing but itself."""

import json
from html import escape
from pathlib import Path

from opd.evaluation import tables
from opd.lora import STUDENT
from opd.report import page, plots
from opd.report.page import Run
from opd.report.tracker import flatten


def write_comparison(*folders: Path) -> Path:
    """Write compare.html into the second of two folders. Returns its path."""
    read = [page.read_run(folder) for folder in folders]
    alike = read[0].name == read[1].name
    runs = {str(run.folder) if alike else run.name: run for run in read}
    title = " and ".join(runs)
    own = {name: page.facts(run) for name, run in runs.items()}
    names = dict.fromkeys(name for facts in own.values() for name in facts)
    parts = [f"<h1>{escape(title)}</h1>", side_by_side(own, list(names))]
    parts += ["<h2>Settings that differ</h2>", settings(runs)]
    figure = plots.comparison({name: run.rows for name, run in runs.items()})
    if figure is not None:
        image = page.data_url(plots.png(figure), "png")
        parts += [f'<h2>Curves</h2>\n<img class="plot" alt="curves" src="{image}">']
        parts += [f"<p><small>{plots.NOTE}</small></p>"]
    return page.write_html(folders[1] / "compare.html", title, [*parts, *pictures(runs), *scores(runs)])


def side_by_side(columns: dict[str, dict[str, str]], names: list[str]) -> str:
    lines = [("", ["<th></th>", *(f"<td><b>{escape(column)}</b></td>" for column in columns)])]
    for name in names:
        texts = [values.get(name, "–") for values in columns.values()]
        lines.append(("", [f"<th>{escape(name)}</th>", *(f"<td>{escape(text)}</td>" for text in texts)]))
    return page.html_table("facts", lines)


def settings(runs: dict[str, Run]) -> str:
    """Those that differ, but for the folder."""
    flat = {}
    for name, run in runs.items():
        flat[name] = {key: json.dumps(value).strip('"') for key, value in flatten(run.settings).items()}
    first, second = flat.values()
    differ = [key for key in {**first, **second} if first.get(key) != second.get(key) and key != "out"]
    return side_by_side(flat, differ) if differ else "<p>None.</p>"


def pictures(runs: dict[str, Run]) -> list[str]:
    """The newest of each."""
    parts = []
    for name, run in runs.items():
        for file in sorted((run.folder / "samples").glob("*.png"))[-1:]:
            parts.append(f'<div class="newest"><b>{escape(name)}</b>{page.figure(file, page.WIDEST)}</div>')
    return ["<h2>Pictures: fixed prompts, fixed noise</h2>", *parts] if parts else []


def scores(runs: dict[str, Run]) -> list[str]:
    """Per split every row in both runs; then the second student less the first."""
    blocks = {name: tables.blocks_of(run.cells, run.first) for name, run in runs.items()}
    splits = {cell.split for run in runs.values() for cell in run.cells}
    parts, (first, second) = ["<h2>Scores</h2>"] if splits else [], runs
    for split in sorted(splits):
        own = {name: block.get(split, {}) for name, block in blocks.items()}
        labels = dict.fromkeys(row for block in own.values() for row in block)
        both = [(row, name) for row in labels for name in own if row in own[name]]
        rows = {f"{row}, {name}": own[name][row] for row, name in both}
        students = [f"{STUDENT}, {name}" for name in runs]
        less = tables.subtract(*(rows.get(row, {}) for row in reversed(students)))
        apart = {f"{STUDENT}s, {second} − {first}": less} if less else {}
        parts.append(page.number_table(f"{split} prompts", rows, apart, students))
    return parts
