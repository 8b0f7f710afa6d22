"""The study: tables come from committed results alone, and a run that has a result is not made again."""

import json
import re
import statistics
from dataclasses import replace

import pytest
import tyro

from opd import evaluate, study
from opd.config import Distil
from opd.mini import runs
from opd.presets import MINI_SCORERS, PRESETS
from opd.settings import parse

RESULTS = study.ROOT / "opd/mini/RESULTS.md"
README = study.ROOT / "README.md"


@pytest.mark.parametrize("page", study.PAGES, ids=lambda page: page.name)
def test_the_committed_tables_are_those_of_the_committed_results(page):
    text = page.read_text()
    assert study.with_tables(text, study.PAGES[page]) == text
    assert len(study.PAGES[page]) == text.count("<!-- table ")


def readme_row(start: str) -> list[str]:
    """The cells after the first one of the README's table row that begins so."""
    (line,) = [line for line in README.read_text().splitlines() if line.startswith(f"| {start}")]
    return [cell.strip().strip("*") for cell in line.strip("|").split("|")[1:]]


def test_the_students_row_of_the_readme_is_that_of_its_recipe():
    ((_, results),) = study.rows_of("folded")
    assert readme_row("**student** (guidance folded in), 3 seeds") == study.cells_of(results)
    assert sorted(result["seed"] for result in results) == [0, 1, 2]


def config(recipe):
    return parse([recipe.preset, *recipe.flags.split()], PRESETS)


def test_every_committed_result_is_of_a_run_as_it_is_now():
    files = list(study.RESULTS.glob("*.json"))
    assert len(files) > 0
    for file in files:
        result = json.loads(file.read_text())
        name = result["recipe"]
        assert file == study.result_file(name, result["seed"])
        if name in study.REFERENCES:
            assert result["flags"] == study.REFERENCES[name].flags
            assert list(result["held_out"]) == list(study.REFERENCES[name].titles)
            assert all(list(row) == list(study.REFERENCES[name].tasks) for row in result["held_out"].values())
        else:
            cfg = config(study.RECIPES[name])
            assert result["flags"] == study.RECIPES[name].flags
            assert result["iterations"] == cfg.iterations
            assert ("gap_closed" in result) == (isinstance(cfg, Distil) and cfg.diagnose_every > 0)
            assert list(result["held_out"]) == list(study.RECIPES[name].tasks)


def test_no_two_recipes_are_the_same_and_all_are_settings_of_the_preset():
    configs = [config(recipe) for recipe in study.RECIPES.values()]
    for cfg in configs:
        cfg.check(1)
        assert configs.count(cfg) == 1 and replace(cfg, seed=1) not in configs


def test_references_are_settings_of_evaluation_and_name_its_rows():
    for reference in study.REFERENCES.values():
        args = tyro.cli(evaluate.Arguments, args=reference.flags.split())
        evaluate.check(args)
        assert set(reference.titles) <= {"base", *args.adapters}


def test_every_run_is_in_a_table_and_knows_what_it_needs():
    every = study.RECIPES | study.REFERENCES
    listed = [name for names in study.TABLES.values() for name in names]
    assert set(listed) == set(every)
    for run in every.values():
        # What a flag names below runs/ is made before; what makes it finds its own needs made.
        for place in re.findall(r"runs/[\w/-]+", run.flags):
            assert place in run.needs, (run, place)
        for number, place in enumerate(run.needs):
            made = " ".join([place, *run.needs[:number]])
            for used in re.findall(r"runs/[\w/-]+", runs.PREPARED[place]):
                assert used in made, (place, used)


def test_spread_and_table_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for seed, compose in enumerate((0.3, 0.4, 0.5)):
        scores = {"compose": compose, "text": 0.9, "quality": 0.8}
        result = {"recipe": "folded", "seed": seed, "held_out": scores}
        (tmp_path / f"folded-{seed}.json").write_text(json.dumps(result))
    *_, row = study.table("recipes").strip().split("\n")
    assert row.endswith("| 3 | .400 ± .100 | .900 ± .000 | .800 ± .000 | .700 ± .033 |")
    assert study.spread([0.25]) == ".250" and study.spread([]) == ""
    with pytest.raises(ValueError, match="has no lines <!-- table missing -->"):
        study.with_table("text", "missing", row)


def test_a_table_with_teachers_beside_students_shows_the_gap_of_these_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    scores = {"text": 0.7}
    student = {"recipe": "full", "held_out": scores, "gap_closed": {"fixed": 0.625, "visited": 0.5}}
    (tmp_path / "full-0.json").write_text(json.dumps(student))
    (tmp_path / "full-teacher-0.json").write_text(
        json.dumps({"recipe": "full-teacher", "held_out": {"base": scores}})
    )
    _, _, teacher, row = study.table("other teachers").strip().split("\n")
    assert row.endswith("| 1 |  | .700 |  |  | .625 | .500 |")
    assert teacher.endswith("| 1 |  | .700 |  |  |  |  |")


def test_the_quality_of_all_is_that_of_every_tasks_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    result = {
        "recipe": "mix",
        "held_out": {"compose": 0.3, "text": 0.9, "quality": 0.8},
        "quality_of": {"compose": 0.6, "text": 0.4, "quality": 0.8},
    }
    (tmp_path / "mix-0.json").write_text(json.dumps(result))
    *_, row = study.table("rivals").strip().split("\n")
    assert row == "| GRPO-mix | 1 | .300 | .900 | .800 | .600 | .400 | .600 | .600 |"


def test_gap_closed_is_the_mean_over_teachers_and_noise_levels_of_the_last_comparison():
    early = {"step": 2, "fixed": {"a": {"gap": {"1.0": 0.0}}}, "visited": {"a": {"gap": {"1.0": 0.0}}}}
    late = {
        "step": 4,
        "fixed": {"a": {"gap": {"1.0": 0.2, "0.5": 0.4}}, "b": {"gap": {"1.0": 0.6, "0.5": 0.8}}},
        "visited": {"a": {"gap": {"1.0": 0.1, "0.5": 0.3}}},
    }
    lines = "\n".join(json.dumps(line) for line in (early, late, {"step": 5}))
    assert study.gap_closed(lines) == {"fixed": 0.5, "visited": 0.2}
    assert statistics.fmean((0.2, 0.4, 0.6, 0.8)) == pytest.approx(0.5)


def test_only_missing_runs_are_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "run", lambda args, name, seed: made.append((name, seed)))
    monkeypatch.setattr(study, "write_tables", lambda: None)
    (tmp_path / "plain-1.json").write_text("{}")
    study.main(["--runs", "plain", "folded", "shipped", "--seeds", "0", "1"])
    assert made == [("plain", 0), ("folded", 0), ("folded", 1), ("shipped", 0)]
    with pytest.raises(SystemExit, match="--runs names 'golden'"):
        study.main(["--runs", "golden"])


def cells():
    """What opd.evaluate says of two rows: the own score of a task, its quality, a tag that is neither."""
    own = {"compose": (0.1, 0.4), "text": (0.2, 0.5), "quality": (0.3, 0.3)}
    found = []
    for row in ("base", "student"):
        for task, (score, quality) in own.items():
            place = {"row": row, "task": task, "error": 0.01}
            found.append(place | {"scorer": MINI_SCORERS[task], "tag": "", "mean": score})
            found.append(place | {"scorer": MINI_SCORERS[task], "tag": "counting", "mean": 0.9})
            if task != "quality":
                found.append(place | {"scorer": study.QUALITY, "tag": "", "mean": quality})
    return found


def test_a_run_of_another_stage_is_scored_alike(tmp_path, monkeypatch):
    """GRPO has neither a teacher to compare with nor that setting."""
    calls = []

    def call(arguments):
        calls.append(arguments)
        folder = tmp_path / "mix-0"
        folder.mkdir(exist_ok=True)
        (folder / "heldout.json").write_text(json.dumps({"cells": cells()}))

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "call", call)
    study.run(study.Arguments(out=str(tmp_path)), "mix", 0)
    assert calls[0][:2] == ["train.py", "mini-grpo-mix"]
    result = json.loads((tmp_path / "results/mix-0.json").read_text())
    assert result["held_out"] == {"compose": 0.1, "text": 0.2, "quality": 0.3}
    assert "gap_closed" not in result and result["iterations"] == 320


def test_a_run_makes_what_it_needs_then_trains_then_scores(tmp_path, monkeypatch):
    """Every command in its order, and a result of what they left."""
    calls = []

    def call(arguments):
        calls.append(arguments)
        folder = tmp_path / "out" / "sft-10-1"
        if "opd.evaluate" in arguments:
            folder.mkdir(parents=True)
            (folder / "heldout.json").write_text(json.dumps({"cells": cells()}))

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "call", call)
    monkeypatch.setattr(study, "write_tables", lambda: None)
    (tmp_path / "runs/mini-samples").mkdir(parents=True)
    (tmp_path / runs.SAMPLES).write_text("")
    study.main(
        ["--runs", "sft-10", "--seeds", "1", "--out", str(tmp_path / "out"), "--train=--dtype float32"]
    )
    assert [arguments[0] for arguments in calls] == ["train.py", "train.py", "-m"]
    assert calls[0][1] == "mini-sft-start"
    assert calls[1][:6] == ["train.py", "mini", "--cold-start", runs.SFT_START, "--iterations", "10"]
    assert calls[1][-2:] == ["--dtype", "float32"]
    result = json.loads((tmp_path / "results/sft-10-1.json").read_text())
    assert result["held_out"] == {"compose": 0.1, "text": 0.2, "quality": 0.3}
    assert result["quality_of"] == {"compose": 0.4, "text": 0.5, "quality": 0.3}
    assert result["errors"] == {"compose": 0.01, "text": 0.01, "quality": 0.01}
    assert (result["iterations"], result["seed"], result["recipe"]) == (10, 1, "sft-10")
