"""The study: results are of runs as they are now, tables and plots are made of results, and only what has no
result is run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from opd.cli import parse
from opd.evaluation import evaluate
from opd.mini.presets import MINI_SCORERS
from opd.mini.study import plots, runs, tables
from opd.mini.study import run as study
from opd.presets import PRESETS

COMMITTED = tables.load(study.RESULTS)
SHIPPED = study.Arguments()


def config(name):
    recipe = runs.RECIPES[name]
    return parse([recipe.preset, *study.filled(SHIPPED, recipe, 0).split()], PRESETS)


def test_every_committed_result_is_of_a_run_as_it_is_now():
    for file in study.RESULTS.glob("*.json"):
        result = json.loads(file.read_text())
        name = result["recipe"]
        assert file == study.result_file(name, result["seed"])
        if name in runs.REFERENCES:
            assert result["flags"] == runs.REFERENCES[name].flags
            assert list(result["held_out"]) == list(runs.REFERENCES[name].titles)
        else:
            assert result["flags"] == study.filled(SHIPPED, runs.RECIPES[name], result["seed"])
            assert result["iterations"] == config(name).iterations


def test_every_run_is_in_a_table_is_allowed_and_is_no_other():
    listed = {name for names in runs.TABLES.values() for name in names}
    assert listed | set(runs.STARTS) == set(runs.RECIPES | runs.REFERENCES)
    configs = [config(name) for name in runs.RECIPES]
    for cfg, recipe in zip(configs, runs.RECIPES.values(), strict=True):
        cfg.check(1)
        assert configs.count(cfg) == 1 and set(recipe.needs()) <= set(runs.RECIPES)
    for reference in runs.REFERENCES.values():
        args = tyro.cli(evaluate.Arguments, args=reference.flags.split())
        evaluate.check(args)
        assert set(reference.titles) <= {"base", *args.adapters}


def test_presets_are_the_studys():
    """The first command, watched; its teachers; the student that goes on."""
    default, watched = PRESETS["mini"], config("default")
    assert replace(watched, watch_every=0, watch_prompts=default.watch_prompts) == default
    for task, name in runs.EQUAL.items():
        assert config(name) == PRESETS[f"mini-{task}"]
    goes_on = PRESETS["mini-student-grpo"]
    assert goes_on.cold_start == f"{default.out}/student"
    assert goes_on == replace(config("rewarded"), cold_start=goes_on.cold_start, out=goes_on.out)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_committed_tables_are_those_of_the_committed_results(page):
    text = page.read_text()
    assert "<!-- table " in text and tables.with_tables(text, COMMITTED) == text


def result(name, seed, compose, text, qualities, **more):
    """A result with the quality of the three tasks' pictures."""
    held_out = {"compose": compose, "text": text, "quality": qualities[2]}
    quality_of = dict(zip(runs.TASKS, qualities, strict=True))
    return {"recipe": name, "seed": seed, "held_out": held_out, "quality_of": quality_of} | more


def test_scores_by_hand():
    apart = {"diversity": {"quality": 0.125}, "variety": {"compose": 0.25, "text": 0.125, "quality": 0.5}}
    page = tables.table("rivals", [result("equal-text", 0, 0.3, 0.9, (0.6, 0.4, 0.8), **apart)])
    row = page.splitlines()[-1]
    assert row == "| text teacher | 1 | .300 | .900 | .800 | .600 | .400 | .600 | .600 | .125 | .188 |"


def test_runs_are_compared_seed_by_seed():
    results = [result("asked", seed, 0.3 + 0.3 * seed, 0.9, (0.6 + 0.3 * seed,) * 3) for seed in (0, 1)]
    results += [result("ode", seed, 0.6, 0.9, (0.6, 0.6, 0.6)) for seed in (0, 1, 2)]
    _, _, first, row = tables.table("questions", results).strip().split("\n")
    assert first.endswith("| .700 ± .141 | .000 ± .000 |")
    assert row.endswith("| 3 | .600 ± .000 | .900 ± .000 | .600 ± .000 | .700 ± .000 | .000 ± .141 |")


def test_every_plot_is_written(tmp_path, monkeypatch):
    files = {tmp_path / file.name: plot for file, plot in plots.PLOTS.items()}
    monkeypatch.setattr(plots, "PLOTS", files)
    plots.draw(COMMITTED)
    assert all("</svg>" in file.read_text() for file in files)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The programs that the study runs, by their arguments; every run leaves scores and metrics."""
    made, cells = [], []
    for n, task in enumerate(runs.TASKS):
        own, where = MINI_SCORERS[task], {"row": "student", "task": task, "tag": "", "error": 0.01}
        means = {study.QUALITY: 0.4, own: 0.1 * n, "variety": 0.25}
        cells += [where | {"scorer": scorer, "mean": mean} for scorer, mean in means.items()]
        cells.append(where | {"scorer": own, "tag": "counting", "mean": 0.9})

    def call(arguments):
        made.append(arguments)
        if arguments[0] == "train.py":
            cfg = parse(arguments[1:], PRESETS)
            (tmp_path / cfg.out / "student").mkdir(parents=True)
            line = {"step": cfg.iterations, "effective_batch": 30, "samples_per_second": 15.0}
            (tmp_path / cfg.out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        elif "opd.evaluation" in arguments:
            Path(arguments[arguments.index("--out") + 1]).write_text(json.dumps({"cells": cells}))

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "PAGES", ())
    monkeypatch.setattr(study.plots, "draw", lambda results: None)
    monkeypatch.setattr(study, "call", call)
    return made


def test_a_run_makes_what_it_needs_once_then_trains_then_scores(tmp_path, calls):
    out = str(tmp_path / "out")
    # A result alone, as in a fresh clone, is no teacher.
    (tmp_path / "equal-text-5.json").write_text('{"recipe": "of no table"}')
    for _ in range(2):
        study.main(["--runs", "from-sft", "ode", "--seeds", "5", "--out", out, "--train=--dtype float32"])
    assert calls[0][0] == "sample.py" and calls[1][:2] == ["train.py", "mini-sft-start"]
    trained = [c for c in calls if c[0] == "train.py" and "--out" in c]
    names = [Path(c[c.index("--out") + 1]).name for c in trained]
    assert names == ["equal-compose-5", "equal-text-5", "all-quality-5", "from-sft-5", "ode-5"]
    assert f"text={tmp_path / 'out/equal-text-5/student'}" in trained[3]
    assert trained[3][trained[3].index("--seed") + 1] == "5" and trained[3][-2:] == ["--dtype", "float32"]
    found = json.loads((tmp_path / "from-sft-5.json").read_text())
    assert found["held_out"] == {"compose": 0.0, "text": 0.1, "quality": 0.2}
    assert found["quality_of"] == {"compose": 0.4, "text": 0.4, "quality": 0.2}
    assert found["variety"] == dict.fromkeys(runs.TASKS, 0.25) and found["errors"]["text"] == 0.01


@pytest.mark.slow
def test_a_small_run_for_real(tmp_path, monkeypatch):
    flags = "--iterations 2 --prompts-per-step 3 --watch-every 2 --watch-prompts 3"
    monkeypatch.setitem(study.RECIPES, "ode", runs.Recipe("small", flags, preset="mini"))
    for name, value in {"COUNT": 3, "RESULTS": tmp_path, "PAGES": ()}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study.plots, "draw", lambda results: None)
    study.main(["--runs", "ode", "--seeds", "0", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "ode-0.json").read_text())
    assert found["flags"] == flags and found["iterations"] == 2
    assert [point["step"] for point in found["curve"]] == [2]
    assert all(0 <= score <= 1 for score in found["held_out"].values())
    assert found["held_out"].keys() == found["quality_of"].keys() == set(runs.TASKS)
