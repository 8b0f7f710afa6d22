"""report.html: a run on one page, which needs nothing but itself; written at every save and at the end.

python -m opd.report runs/mini        # write it anew from what lies in the folder
"""

import base64
import html
import io
import json
import math
import shlex
import sys
from pathlib import Path

from PIL import Image

from opd.files import read_json, replace
from opd.flags import require
from opd.report.svg import Curve, chart, heat_map
from opd.runfolder import flatten

WIDEST = 1200  # pixels of a picture of the strip
SHOWN = 12  # pictures of it
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid #ddd }
pre { font: 13px/1.4 ui-monospace, monospace; background: #f6f6f4; padding: .8em; overflow-x: auto }
table { border-collapse: collapse; font-size: 13px } td { padding: .1em 1em .1em 0; vertical-align: top }
svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #444 }
figure { margin: 0 0 .8em; overflow-x: auto } figcaption { font-size: 13px; color: #666 }
.row { display: flex; flex-wrap: wrap; gap: 1.5em }
"""
# Nothing may be loaded from anywhere: pictures are in the page, and there is no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(folder: Path) -> Path:
    """Write FOLDER/report.html from config.json, metrics.jsonl, samples/ and table.txt. Returns its path."""
    settings = read_json(folder / "config.json")
    rows = read_metrics(folder / "metrics.jsonl")
    parts = [
        heading(folder, settings, rows),
        *curves(rows),
        *heat_maps(rows),
        *strip(folder / "samples"),
        *scores(folder / "table.txt"),
        commands(folder, settings),
        settings_table(settings),
    ]
    title = f"{folder.name}: {settings['stage']}"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>{STYLE}</style></head>
<body>
{chr(10).join(parts)}
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
    return f"<h1>{html.escape(folder.name)}</h1>\n<p>{html.escape(', '.join(facts))}</p>"


def curves(rows: list[dict]) -> list[str]:
    """A chart per kind of number that the run logs: losses per teacher, rewards and held-out scores per task,
    the gradient norm."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    losses = [name for name in names if name == "loss" or name.endswith("/loss")]
    positive = all(row[name] > 0 for row in flat for name in losses if name in row)
    groups = {
        "held-out score": ([name for name in names if name.startswith("watch/")], False),
        "reward": ([name for name in names if name.startswith("reward/")], False),
        "loss, nats per dimension": (losses, positive),
        "gradient norm": ([name for name in names if name == "grad_norm"], True),
    }
    charts = []
    for title, (own, logarithmic) in groups.items():
        drawn = [one for one in (curve(name, flat) for name in own) if one.points]
        if any(len(one.points) > 1 for one in drawn):
            charts.append(chart(title, drawn, logarithmic))
    if not charts:
        return []
    return ["<h2>Curves</h2>", '<div class="row">', *charts, "</div>"]


def curve(name: str, flat: list[dict]) -> Curve:
    points = []
    for row in flat:
        if name in row and isinstance(row[name], int | float) and math.isfinite(row[name]):
            points.append((row["step"], row[name]))
    shown = name.removeprefix("watch/").removeprefix("reward/").removesuffix("/loss")
    return Curve(shown, points)


def heat_maps(rows: list[dict]) -> list[str]:
    """The KL to every teacher by noise level and step, where the run logs one."""
    teachers = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict) and isinstance(value.get("kl"), dict):
                teachers.setdefault(name, []).append((row["step"], value["kl"]))
    if not teachers:
        return []
    maps = [heat_map(f"{name}: KL by sigma and step", columns) for name, columns in teachers.items()]
    caption = "<p>Nats per dimension, colours by logarithm; grey: not measured at that step.</p>"
    return ["<h2>KL to the teachers</h2>", caption, '<div class="row">', *maps, "</div>"]


def strip(folder: Path) -> list[str]:
    """The student's pictures of fixed prompts from fixed noise, at up to twelve steps from first to last."""
    files = sorted(folder.glob("*.png"))
    if not files:
        return []
    count = min(SHOWN, len(files))
    chosen = {round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)}
    figures = []
    for place in sorted(chosen):
        caption = f"step {int(files[place].stem)}"
        image = f'<img alt="{caption}" src="{data_url(files[place])}">'
        figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    return ["<h2>Fixed prompts, fixed noise</h2>", *figures]


def data_url(file: Path) -> str:
    """A picture as text: as it is, or reduced where it is wide."""
    with Image.open(file) as image:
        if image.width <= WIDEST:
            return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        small = image.convert("RGB")
        small.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def scores(file: Path) -> list[str]:
    if not file.is_file():
        return []
    return ["<h2>Scores</h2>", f"<pre>{html.escape(file.read_text())}</pre>"]


def commands(folder: Path, settings: dict) -> str:
    """What to do with the run."""
    quoted = shlex.quote(str(folder))
    model = shlex.quote(settings["model"])
    lines = [
        f"torchrun train.py --config {quoted}/config.json           # go on, if it was stopped",
        f"torchrun train.py --config {quoted}/config.json --seed 1 --out NEW",
    ]
    if not settings.get("full"):
        student = f"--model {model} --adapters student={quoted}/student"
        lines += [f"python sample.py {student} --prompts PROMPTS", f"python -m opd.evaluation {student}"]
    return f"<h2>Commands</h2>\n<pre>{html.escape(chr(10).join(lines))}</pre>"


def settings_table(settings: dict) -> str:
    rows = []
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>")
    body = "\n".join(rows)
    return f"<h2>Settings</h2>\n<details><summary>config.json</summary><table>{body}</table></details>"


def main(arguments: list[str]) -> None:
    try:
        require(len(arguments) == 1, "usage: python -m opd.report RUN_FOLDER")
        folder = Path(arguments[0])
        require(
            (folder / "config.json").is_file(), f"{str(folder)!r} is no run folder: it has no config.json"
        )
        print(write_page(folder))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
