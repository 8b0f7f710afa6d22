"""report.html: a run on one page, which needs nothing but itself; written at every save and at the end. Its
curves are beside it, curves.png."""

import base64
import io
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from opd.config import RunConfig
from opd.evaluation import tables
from opd.evaluation.statistics import Cell
from opd.files import replace
from opd.formats.state import numbered
from opd.lora import STUDENT
from opd.report import plots
from opd.report.start import facts

WIDEST, SMALL = 1200, 600  # pixels: the newest picture, and the earlier ones
SHOWN = 12  # pictures of a page
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
    """What a page shows."""

    folder: Path
    cfg: RunConfig
    rows: list[dict]  # lines of metrics.jsonl
    cells: list[Cell]
    first: dict[str, str]
    """Task -> the scorer that makes its mean."""
    routes: dict[str, str]  # task -> teacher, where one is set
    table: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def write_page(run: Run) -> None:
    """report.html in the run's folder, with the pictures that lie there."""
    folder = run.folder
    rows = [
        ("", [f"<th>{escape(name)}</th>", f"<td>{escape(text)}</td>"]) for name, text in about(run).items()
    ]
    curves = drawn("curves", folder, plots.curve_figure(run.rows, teachers_scores(run)))
    saved = escape((folder / "config.json").read_text(encoding="utf-8"))
    parts = [f"<h1>{escape(run.name)}</h1>", html_table("facts", rows), *verdict(run)]
    parts += pictures(folder / "samples") + scores(run)
    if curves:
        parts += ["<h2>Curves</h2>", curves, f"<p><small>{plots.NOTE}</small></p>"]
    parts.append(folded("Settings (config.json)", f"<pre>{saved}</pre>"))
    write_html(folder / "report.html", f"{run.name}: {run.cfg.stage}", parts)


# ---- parts ---------------------------------------------------------------------------------------


def about(run: Run) -> dict[str, str]:
    """What ran, and how far."""
    done = run.rows[-1]["step"] if run.rows else 0
    found = facts(run.cfg) | {"steps": f"{done} of {run.cfg.iterations}"}
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
    last = measured[-1]
    said = ["Distance to the teachers in percent of the base's (0: as the teacher)"]
    for task, now in last["distance"].items():
        # Missing while its teacher is the base itself, as an average is before it moves.
        first = next(row for row in measured if task in row["distance"])
        before = f"{first['distance'][task]:.0f} after step {first['step']}"
        said.append(f"{task}: {now:.0f} after step {last['step']} ({before})")
    return said


def pictures(folder: Path) -> list[str]:
    """The student's pictures of fixed prompts from fixed noise: the newest, then earlier ones."""
    *earlier, newest = numbered(folder, ".png") or [None]
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
    if not run.cells:
        return []
    note, splits = run.table.partition("\n")[0], {cell.split for cell in run.cells}
    parts = [f"<h2>Scores</h2>\n<p><small>{escape(note)}</small></p>"]
    behind = [f"<pre>{escape(run.table)}</pre>"]
    for title, block in tables.blocks_of(run.cells, run.first).items():
        if title in splits:
            apart = tables.differences(run.cells, title, run.first, run.routes)
            less = {f"{STUDENT} − {whom}": row for whom, row in apart.items()}
            parts.append(number_table(f"{title} prompts", block, less))
        else:
            behind.append(number_table(title, block, {}))
    return [*parts, folded("As text, with tags and diversity", "".join(behind))]


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
    block = tables.blocks_of(run.cells, run.first).get("held-out", {})
    found = {task: block.get(tables.teacher_of(task, block, run.routes), {}) for task in run.first}
    return {task: row[task][0] for task, row in found.items() if task in row}


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


def write_html(file: Path, title: str, parts: list[str]) -> None:
    body = "\n".join(parts)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
{body}
</body></html>
"""
    replace(file, lambda path: path.write_text(page, encoding="utf-8"))
