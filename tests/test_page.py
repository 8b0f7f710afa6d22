"""report.html, figures and card of a real run, a page made by hand, the upload up to the Hub's boundary."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd.config import DistillationConfig
from opd.evaluation import tables
from opd.report import card, plots
from opd.report.page import Run, write_page
from opd.report.plots import png
from tests import forked, tiny
from tests.tiny_grpo import BRIGHT

CFG = DistillationConfig(out="run", model="m<o>del", teachers={"t<b>": "x"}, iterations=30)
HUB = mock.MagicMock()  # in the place of huggingface_hub.HfApi()


def run(cfg, folder):
    with mock.patch.object(card, "HfApi", lambda: HUB):
        tiny.main(cfg, folder)


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    scored = {"evaluate": True, "eval_prompts": 5, "eval_steps": 2, "deploy_guidance": 1.5}
    scored |= {"heldout": {"red": str(world / "red.txt")}, "rewards": dict.fromkeys(tiny.PROMPTS, BRIGHT)}
    often = {"iterations": 3, "save_every": 2, "sample_every": 2}
    told = {"tracker": "tensorboard", "push": "me/my-student"}
    out = tmp_path_factory.mktemp("page") / "my <run>"
    return tiny.config(world, out=str(out), **often, **scored, **told)


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    HUB.reset_mock()
    run(settings, tmp_path_factory.mktemp("settings"))
    return Path(settings.out)


def pictures_of(text):
    """The addresses of the page's pictures. No element loads anything, no address leads out of the page."""
    assert not re.search(r"<(script|link|iframe|object|a|form)\b|url\(|@import|href=|srcset=", text)
    named = re.findall(r'src="([^"]*)"', text)
    assert all(address.startswith("data:image/") for address in named)
    return named


def test_the_page_of_a_run(folder):
    """Curves and two grids; every number of cells.json; the verdict."""
    text = (folder / "report.html").read_text()
    assert len(pictures_of(text)) == 1 + len(list((folder / "samples").iterdir())) > 2
    assert "<h1>my &lt;run&gt;</h1>" in text and "<td>3 of 3</td>" in text
    assert html.escape('"deploy_guidance": 1.5') in text
    table = (folder / "table.txt").read_text().strip()
    assert html.escape(table) in text and "diversity" not in table
    for cell in json.loads((folder / "cells.json").read_text()):
        error = math.nan if cell["error"] is None else cell["error"]
        mean, _, error = tables.number(cell["mean"], error).partition(" ")
        assert f"{mean} <small>{error}</small>" in text
    assert "student − the base" in text and "student − its teacher" in text
    last = table.splitlines()[-1]
    assert last.startswith("red: student 0.") and f"<li>{last}</li>" in text
    assert '<tr class="student"><td>student</td>' in text


def by_hand(folder, rows, pictures=0, own=()):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").touch()
    for name in [*(f"{step:06d}.png" for step in range(1, pictures + 1)), *own]:
        Image.new("RGB", (20, 4)).save(folder / "samples" / name)
    write_page(Run(folder, CFG, rows, [], {}, {}, ""))
    return (folder / "report.html").read_text()


def test_without_scores_the_verdict_is_the_distance_to_the_teachers(tmp_path):
    rows = [{"step": 1}, {"step": 2, "distance": {"a": 64.4, "b": 9.0}}]
    rows.append({"step": 4, "distance": {"a": 30.6, "b": 4.0}})
    text = by_hand(tmp_path / "run", rows)
    assert "<li>a: 31 after step 4 (64 after step 2)</li><li>b: 4 after step 4 (9 after" in text
    [panel] = plots.curve_figure(rows, {}).axes
    assert panel.get_title("left").startswith("distance") and panel.get_yscale() == "linear"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert drawn == {"a": [[2, 64.4], [4, 30.6]], "b": [[2, 9], [4, 4]]}
    rows[0]["distance"] = {"a": 90.0}  # b's teacher was the base itself
    later = by_hand(tmp_path / "later", rows)
    assert "<li>a: 31 after step 4 (90 after step 1)</li><li>b: 4 after step 4 (9 after step 2)" in later
    assert 'class="verdict"' not in by_hand(tmp_path / "other", [{"step": 1}])


def test_a_page_by_hand(tmp_path):
    """The newest picture, then a strip of earlier ones; none that the user has put there."""
    own = ["nice.png", "7.png", "000090 (copy).png"]
    text = by_hand(tmp_path / "run", [{"step": 5}], pictures=30, own=own)
    steps = [int(step) for step in re.findall(r"<figcaption>step (\d+)<", text)]
    newest, *earlier = steps
    assert newest == 30 and earlier[0] == 1 and len(earlier) == 11 and earlier == sorted({*earlier})
    assert "Curves" not in text and "m&lt;o&gt;del" in text and len(pictures_of(text)) == 12
    assert "<th>teacher t&lt;b&gt;</th>" in text
    assert "<td>5 of 30</td>" in text


def test_what_a_run_logs_is_drawn_and_what_it_does_not_log_is_not(tmp_path, monkeypatch):
    """Every curve goes through its finite points, or is their running mean over them."""
    rows = [{"step": step, "reward": {"text": step / 10}, "red": {"loss": 0.1**step}} for step in (1, 2, 4)]
    rows[0] |= {"watch": {"text": 0.5, "failed": float("nan")}}
    rows.append({"step": 5, "reward": {"text": float("nan")}})
    panels = {panel.get_title("left"): panel for panel in plots.curve_figure(rows, {}).axes}
    assert list(panels) == ["reward", "held-out score", "loss"]
    drawn = {"held-out score": [[1, 0.5]], "reward": [[1, 0.1], [2, 0.2], [4, 0.4]]}
    for title, points in drawn.items():
        [line] = panels[title].lines
        assert (line.get_label(), line.get_xydata().tolist()) == ("text", points)
    teacher = plots.curve_figure(rows, {"text": 0.7}).axes[1].lines[1]
    assert (teacher.get_ydata(), teacher.get_linestyle()) == ([0.7, 0.7], "--")
    many = [{"step": step, "loss": float(step % 2)} for step in range(20)]
    raw, mean = plots.curve_figure(many, {}).axes[0].lines
    assert raw.get_ydata().tolist() == [0, 1] * 10 and mean.get_ydata()[10] == pytest.approx(0.4)
    assert plots.curve_figure([], {}) is None
    names = ("all", "_t", "a$_{$")  # of tasks and teachers; matplotlib reads two of them as something else
    odd = [
        {"step": 1, "loss": 3.0, "watch": {name: 0.5 for name in names}}
        | {name: {"loss": 0.1} for name in names}
    ]
    plots.png(plots.curve_figure(odd, {"all": 0.7}))
    for panel in plots.curve_figure(odd, {"all": 0.7}).axes[:2]:
        _, labels = panel.get_legend_handles_labels()
        assert {"all", " _t", r"a\$_{\$"} <= {*labels}
    monkeypatch.setattr(plots, "png", png)
    by_hand(tmp_path / "run", rows)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "run/curves.png")))) > 10


def test_the_card_says_what_the_student_is(world, folder):
    file = folder / "student" / "README.md"
    loaded = ModelCard(file.read_text())
    data, text = loaded.data, loaded.text
    assert data.pipeline_tag == "text-to-image" and data.library_name == "diffusers"
    assert data.base_model is None  # a local path means nothing on the Hub
    assert f"- teacher red: `{world / 'red'}, at guidance 1`" in text
    assert "guidance: 1.5" in text and "resolution: 8 px" in text and "3 steps" in text
    assert "licence of the base: not known" in text
    assert (folder / "table.txt").read_text().strip() in text and "# my-student" in text


def test_the_base_and_its_licence_are_named_where_they_are_known(settings, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: community\n---\n# Base\n")
    paints = SimpleNamespace(edits=lambda: False)
    model = SimpleNamespace(folder=tmp_path, conditioning=paints)
    cfg = replace(settings, model="owner/base")
    assert card.name_of(replace(CFG, out=".")) == Path.cwd().name
    data = card.front_matter(cfg, model, card.licence_of(model))
    assert (data.base_model, data.license, data.license_name) == ("owner/base", "other", "community")


def test_the_student_is_pushed_when_the_run_ends(folder):
    [login, (created, name, settings), (uploaded, _, upload)] = HUB.method_calls
    assert login == mock.call.whoami() and (created, uploaded) == ("create_repo", "upload_folder")
    assert name == ("me/my-student",) and settings == {"private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/my-student" and upload["folder_path"] == folder / "student"
    assert (folder / "student" / "deployment.json").is_file()


def test_who_cannot_push_learns_it_first_and_a_failed_push_loses_nothing(monkeypatch, tmp_path):
    hub = mock.MagicMock()
    hub.whoami.side_effect = OSError("no token\nand more")
    hub.create_repo.side_effect = ConnectionError("the network is down")
    monkeypatch.setattr(card, "HfApi", lambda: hub)
    card.check_login("")
    with pytest.raises(ValueError, match=r"--push 'a/b': log in first .*OSError: no token"):
        card.check_login("a/b")
    said = card.push_student(tmp_path, "a/b")
    assert "the network is down" in said and f"hf upload a/b {tmp_path}" in said


def test_tensorboard_gets_the_flat_numbers_and_the_grids(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    logged = forked.rows(folder)
    assert {"step", "loss", "red/loss", "distance/red"} <= set(events.Tags()["scalars"])
    for name, values in {
        "grad_norm": [row["grad_norm"] for row in logged],
        "red/loss": [row["red"]["loss"] for row in logged],
    }.items():
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)
    assert [event.step for event in events.Images("samples")] == [0, 2, 3]
    assert ["distance" in row for row in logged] == [False, True, True]
    saved = Image.open(folder / "samples" / "000003.png")
    assert (events.Images("samples")[1].width, events.Images("samples")[1].height) == saved.size
