"""report.html: a run on one page, which needs nothing but itself; written at every save and at the end. Its
curves are beside it, curves.png."""

import base64
import io
import json
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from opd.evaluation import tables
from opd.evaluation.statistics import Cell, headline
from opd.files import read_json, read_metrics, reading, replace
from opd.lora import STUDENT
from opd.report import plots
from opd.rewards import specs_of

WIDEST, SMALL = 1200, 600  # pixels: the newest picture, and the earlier ones
SHOWN = 12  # pictures of a page
STAGES = {
    "opd": "on-policy distillation of several teachers into one student (Flow-OPD, arXiv 2605.08063)",
    "grpo": "reinforcement learning from rewards (Flow-GRPO, arXiv 2505.05470)",
    "nft": "reinforcement learning from rewards (DiffusionNFT, arXiv 2509.16117, or AWM, 2509.25050)",
    "sft": "flow matching on images with captions",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: auto; padding: 2em }
h1 { font-size: 1.6em; margin: 0 0 .4em; overflow-wrap: anywhere }
h2 { font-size: 1.2em; margin: 1.8em 0 .6em; border-bottom: 1px solid #ddd }
img { max-width: 100%; display: block } .plot, .newest img { width: 100% } .newest { margin-bottom: 14px }
figure { margin: 0 } figcaption { font-size: 14px; color: #555 }
.strip { display: grid; grid-template-columns: 1fr 1fr; gap: 12px 20px }
.wide { overflow-x: auto; margin-bottom: 1em } table { border-collapse: collapse }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
.numbers { font-variant-numeric: tabular-nums; min-width: 60% }
.numbers td, .numbers th { padding: 4px 14px; border-bottom: 1px solid #eee; white-space: nowrap }
.numbers td + td, .numbers th + th { text-align: right }
.facts th { white-space: nowrap; color: #555; font-weight: 400 } .apart td { color: #555 }
.student td { font-weight: 700; background: #eef4fb } small { color: #777; font-weight: 400 }
td.above { color: #1a7a3c } td.below { color: #b3261e }
.verdict { background: #f4f6f8; border-left: 4px solid #3366aa; padding: 10px 16px }
.verdict ul { margin: 6px 0 0; padding-left: 1.2em }
details { margin: .8em 0 } summary { cursor: pointer; color: #36a }
pre { font: 13px/1.4 ui-monospace, monospace; background: #f6f6f4; padding: .8em; overflow-x: auto }
"""


@dataclass(frozen=True)
class Run:
    """What lies in a run's folder."""

    folder: Path
    settings: dict
    rows: list[dict]  # lines of metrics.jsonl
    cells: list[Cell]
    first: dict[str, str]
    """Task -> the scorer that makes its mean."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def routes(self) -> dict[str, str]:
        return self.settings.get("routes", {})


def read_run(folder: Path) -> Run:
    settings, file = read_json(folder / "config.json"), folder / "cells.json"
    cells = []
    if file.is_file():
        with reading(str(file)):
            cells = [Cell(**cell) for cell in json.loads(file.read_bytes())]
    first = {cell.task: cell.scorer for cell in reversed(cells)}
    for task, specs in settings.get("rewards", {}).items():
        if any((cell.task, cell.scorer) == (task, specs_of(specs)[0]) for cell in cells):
            first[task] = specs_of(specs)[0]
    return Run(folder, settings, read_metrics(folder / "metrics.jsonl"), cells, first)


def write_page(folder: Path) -> Path:
    """Write FOLDER/report.html from config.json, metrics.jsonl, samples/, cells.json and table.txt. Returns
    its path."""
    run = read_run(folder)
    rows = [("", [f"<th>{name}</th>", f"<td>{escape(text)}</td>"]) for name, text in facts(run).items()]
    curves = drawn("curves", folder, plots.curve_figure(run.rows, teachers_scores(run)))
    saved = escape((folder / "config.json").read_text(encoding="utf-8"))
    parts = [f"<h1>{escape(run.name)}</h1>", html_table("facts", rows), *verdict(run)]
    parts += pictures(folder / "samples") + scores(run)
    if curves:
        parts += ["<h2>Curves</h2>", curves, f"<p><small>{plots.NOTE}</small></p>"]
    parts.append(folded("Settings (config.json)", f"<pre>{saved}</pre>"))
    return write_html(folder / "report.html", f"{run.name}: {run.settings['stage']}", parts)


# ---- parts ---------------------------------------------------------------------------------------


def facts(run: Run) -> dict[str, str]:
    """What ran."""
    settings, done = run.settings, run.rows[-1]["step"] if run.rows else 0
    found = {"stage": STAGES[settings["stage"]], "model": settings["model"]}
    if "objective" in settings:
        found["objective"] = settings["objective"]
    for name in ("teachers", "train_rewards"):
        if settings.get(name):
            listed = ", ".join(f"{key}: {value}" for key, value in settings[name].items())
            found[name.replace("train_", "")] = listed
    found["steps"] = f"{done} of {settings['iterations']}"
    if run.rows:
        last = (run.folder / "metrics.jsonl").stat().st_mtime
        found["last step at"] = f"{datetime.fromtimestamp(last):%Y-%m-%d %H:%M}"
    return found


def verdict(run: Run) -> list[str]:
    said = tables.verdict(run.cells, run.first, run.routes) or distances_said(run.rows)
    if not said:
        return []
    items = "".join(f"<li>{escape(line)}</li>" for line in said[1:])
    return [f'<div class="verdict"><b>{escape(said[0])}</b><ul>{items}</ul></div>']


def distances_said(rows: list[dict]) -> list[str]:
    """What a run without scores has of success: how near its student came to each task's teacher."""
    measured = [row for row in rows if "distance" in row]
    if not measured:
        return []
    first, last = measured[0], measured[-1]
    said = ["Distance to the teachers in percent of the base's (0: as the teacher)"]
    for task, now in last["distance"].items():
        before = f"{first['distance'][task]:.0f} after step {first['step']}"
        said.append(f"{task}: {now:.0f} after step {last['step']} ({before})")
    return said


def pictures(folder: Path) -> list[str]:
    """The student's pictures of fixed prompts from fixed noise: the newest, then earlier ones."""
    *earlier, newest = sorted(folder.glob("*.png")) or [None]
    if newest is None:
        return []
    places = np.linspace(0, len(earlier) - 1, min(SHOWN - 1, len(earlier))).round()
    strip = "".join(figure(earlier[int(place)], SMALL) for place in places)
    about = "<h2>Pictures: fixed prompts, fixed noise</h2>"
    return [about, f'<div class="newest">{figure(newest, WIDEST)}</div>', f'<div class="strip">{strip}</div>']


def figure(file: Path, widest: int) -> str:
    caption = f"step {int(file.stem)}"
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((widest, widest))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=92)
    url = data_url(buffer.getvalue(), "jpeg")
    return f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{url}"></figure>'


def scores(run: Run) -> list[str]:
    """A table per split, then all that is behind it."""
    file = run.folder / "table.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not run.cells:
        return [f"<h2>Scores</h2>\n<pre>{escape(text)}</pre>"] if text else []
    parts = [f"<h2>Scores</h2>\n<p><small>{escape(text.partition(chr(10))[0])}</small></p>"]
    blocks = tables.blocks_of(run.cells, run.first)
    splits = sorted({cell.split for cell in run.cells})
    for split in splits:
        apart = tables.differences(run.cells, split, run.first, run.routes)
        less = {f"{STUDENT} − {whom}": row for whom, row in apart.items()}
        parts.append(number_table(f"{split} prompts", blocks[split], less))
    behind = [tables.aligned(title, block) for title, block in blocks.items() if title not in splits]
    whole = "\n\n".join([text, *("\n".join(lines) for lines in behind)])
    return [*parts, folded("As text, with tags and diversity", f"<pre>{escape(whole)}</pre>")]


def number_table(title: str, block: tables.Block, apart: tables.Block) -> str:
    """Means with their errors, the student's bold, then differences, coloured beyond two standard errors."""
    headings = list(dict.fromkeys(heading for row in block.values() for heading in row))
    lines = [("", [f"<th>{escape(text)}</th>" for text in [title, *headings]])]
    for name, row in {**block, **apart}.items():
        less, cells = name in apart, [f"<td>{escape(name)}</td>"]
        for heading in headings:
            number = (tables.signed if less else tables.number)(*row[heading]) if heading in row else ""
            mean, _, error = number.partition(" ")
            kind = tables.stands(*row[heading]).split()[0] if less and heading in row else ""
            cells.append(f'<td class="{kind}">{mean} <small>{error}</small></td>')
        lines.append(("apart" if less else STUDENT if name == STUDENT else "", cells))
    return html_table("numbers", lines)


def teachers_scores(run: Run) -> dict[str, float]:
    """Task -> its teacher's mean on held-out prompts, where the run's end has scored it."""
    names = dict.fromkeys(cell.row for cell in run.cells)
    rows = {name: headline(run.cells, name, "held-out", run.first) for name in names}
    found = {task: rows.get(tables.teacher_of(task, rows, run.routes), {}) for task in run.first}
    return {task: row[task].mean for task, row in found.items() if task in row}


# ---- HTML ----------------------------------------------------------------------------------------


def html_table(kind: str, lines: list[tuple[str, list[str]]]) -> str:
    """`lines`: (class, cells) each."""
    rows = "\n".join(f'<tr class="{name}">{"".join(cells)}</tr>' for name, cells in lines)
    return f'<div class="wide"><table class="{kind}">\n{rows}\n</table></div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def drawn(name: str, folder: Path, figure: Figure | None) -> str:
    """A figure as a picture of the page, and as a file; nothing where there is nothing to draw."""
    if figure is None:
        return ""
    content = plots.png(figure)
    replace(folder / f"{name}.png", lambda path: path.write_bytes(content))
    return f'<img class="plot" alt="{name}" src="{data_url(content, "png")}">'


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def write_html(file: Path, title: str, parts: list[str]) -> Path:
    body = "\n".join(parts)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
{body}
</body></html>
"""
    replace(file, lambda path: path.write_text(page, encoding="utf-8"))
    return file
