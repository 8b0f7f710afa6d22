"""The study: tables come from committed results alone, and a run that has a result is not made again."""

import json
from dataclasses import replace

import pytest

from opd import study
from opd.presets import PRESETS
from opd.settings import parse


def test_the_committed_tables_are_those_of_the_committed_results():
    page = study.PAGE.read_text()
    assert study.with_table(page, "recipes", study.recipes_table()) == page
    assert len(list(study.RESULTS.glob("*.json"))) > 0


def test_every_committed_result_is_of_a_recipe_as_it_is_now():
    for file in study.RESULTS.glob("*.json"):
        result = json.loads(file.read_text())
        assert file == study.result_file(result["recipe"], result["seed"])
        assert result["flags"] == study.RECIPES[result["recipe"]][1]
        assert result["iterations"] == PRESETS["mini"].iterations
        assert set(result["held_out"]) == set(study.TASKS)


@pytest.mark.parametrize("name", study.RECIPES)
def test_the_flags_of_a_recipe_are_fields_of_the_preset(name):
    cfg = parse(["mini", *study.RECIPES[name][1].split()], PRESETS)
    cfg.check(1)
    others = [parse(["mini", *flags.split()], PRESETS) for _, flags in study.RECIPES.values()]
    assert others.count(cfg) == 1 and replace(cfg, seed=1) not in others


def test_spread_and_table_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for seed, compose in enumerate((0.3, 0.4, 0.5)):
        scores = {"compose": compose, "text": 0.9, "quality": 0.8}
        (tmp_path / f"folded-{seed}.json").write_text(json.dumps({"held_out": scores}))
    *_, row = study.recipes_table().strip().split("\n")
    assert row.endswith("| 3 | .400 ± .100 | .900 ± .000 | .800 ± .000 | .700 ± .033 |")
    assert study.spread([0.25]) == ".250"
    with pytest.raises(ValueError, match="has no lines <!-- table missing -->"):
        study.with_table("text", "missing", row)


def test_only_missing_runs_are_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "run", lambda args, name, seed: made.append((name, seed)))
    monkeypatch.setattr(study, "write_tables", lambda: None)
    (tmp_path / "plain-1.json").write_text("{}")
    study.main(["--runs", "plain", "folded", "--seeds", "0", "1"])
    assert made == [("plain", 0), ("folded", 0), ("folded", 1)]
    with pytest.raises(SystemExit, match="--runs names 'golden'"):
        study.main(["--runs", "golden"])
