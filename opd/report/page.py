"""report.html: a run on one page, which needs nothing but itself; written at every save and at the end. Its
figures are beside it, curves.png and kl.png.

python -m opd.report runs/mini        # write it anew from what lies in the folder
"""

import base64
import io
import json
import sys
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from opd import errors
from opd.files import read_json, replace
from opd.report import plots

WIDEST = 1200  # pixels of a picture of the strip
SHOWN = 12  # pictures of it
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: auto; padding: 2em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid #ddd }
pre { font: 13px/1.4 ui-monospace, monospace; background: #f6f6f4; padding: .8em; overflow-x: auto }
figure { margin: 0 0 .8em; overflow-x: auto } figcaption { font-size: 13px; color: #666 }
.plot { width: 100%; max-width: 1100px }
"""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not (Path(arguments[0]) / "config.json").is_file():
        sys.exit("error: usage: python -m opd.report RUN_FOLDER, a folder with a config.json")
    with errors.in_one_line(ValueError):
        print(write_page(Path(arguments[0])))


def write_page(folder: Path) -> Path:
    """Write FOLDER/report.html from config.json, metrics.jsonl, samples/ and table.txt. Returns its path."""
    settings = read_json(folder / "config.json")
    saved = escape((folder / "config.json").read_text(encoding="utf-8"))
    rows = read_metrics(folder / "metrics.jsonl")
    parts = [
        heading(folder, settings, rows),
        *drawn("Curves", folder / "curves.png", plots.curve_figure(rows)),
        *drawn("KL to the teachers (grey: not measured)", folder / "kl.png", plots.kl_figure(rows)),
        *strip(folder / "samples"),
    ]
    if (folder / "table.txt").is_file():
        parts.append(f"<h2>Scores</h2>\n<pre>{escape((folder / 'table.txt').read_text())}</pre>")
    parts.append(f"<h2>Settings</h2>\n<details><summary>config.json</summary><pre>{saved}</pre></details>")
    body = "\n".join(parts)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(folder.name)}: {settings["stage"]}</title>
<style>{STYLE}</style></head>
<body>
{body}
</body></html>
"""
    file = folder / "report.html"
    replace(file, lambda path: path.write_text(page, encoding="utf-8"))
    return file


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl; a kill may have cut the last."""
    if not file.is_file():
        return []
    whole, _, _ = file.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


# ---- parts ---------------------------------------------------------------------------------------


def heading(folder: Path, settings: dict, rows: list[dict]) -> str:
    done = rows[-1]["step"] if rows else 0
    facts = [f"stage {settings['stage']}", f"step {done} of {settings['iterations']}", settings["model"]]
    return f"<h1>{escape(folder.name)}</h1>\n<p>{escape(', '.join(facts))}</p>"


def drawn(title: str, file: Path, figure: Figure | None) -> list[str]:
    """A figure as a picture of the page, and as a file; nothing where there is nothing to draw."""
    if figure is None:
        return []
    content = plots.png(figure)
    replace(file, lambda path: path.write_bytes(content))
    return [f"<h2>{title}</h2>", f'<img class="plot" alt="{title}" src="{data_url(content, "png")}">']


def strip(folder: Path) -> list[str]:
    """The student's pictures of fixed prompts from fixed noise, at up to SHOWN steps from first to last."""
    files = sorted(folder.glob("*.png"))
    if not files:
        return []
    figures = []
    for place in np.linspace(0, len(files) - 1, min(SHOWN, len(files))).round():
        file = files[int(place)]
        caption = f"step {int(file.stem)}"
        image = f'<img alt="{caption}" src="{picture_url(file)}">'
        figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    return ["<h2>Fixed prompts, fixed noise</h2>", *figures]


def picture_url(file: Path) -> str:
    """A picture, reduced where it is wide."""
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=92)
    return data_url(buffer.getvalue(), "jpeg")


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
