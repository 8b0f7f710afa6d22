"""The study: committed results are of runs as they are now, and a run that has a result is not made again."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from opd.cli import parse
from opd.config import DistillationConfig
from opd.evaluation import evaluate
from opd.mini import world
from opd.mini.presets import MINI_SCORERS
from opd.mini.study import pages as study_pages
from opd.mini.study import run as study
from opd.mini.study import runs
from opd.mini.study import tables as study_tables
from opd.presets import PRESETS

README = study.ROOT / "README.md"
ARGUMENTS = study.Arguments()


def config(recipe):
    return parse([recipe.preset, *study.filled(ARGUMENTS, recipe, 0).split()], PRESETS)


OTHERS = study.Arguments(out="runs/other", results=str(study_tables.OTHER))


@pytest.mark.parametrize("args", [ARGUMENTS, OTHERS], ids=["shipped prompts", "other prompts"])
def test_every_committed_result_is_of_a_run_as_it_is_now(args):
    files = list(Path(args.results).glob("*.json"))
    assert len(files) > 0
    for file in files:
        result = json.loads(file.read_text())
        name = result["recipe"]
        assert file == study.result_file(args, name, result["seed"])
        assert ("prompts" in result) == (args is OTHERS)
        if name in study.REFERENCES:
            assert result["flags"] == study.REFERENCES[name].flags
            assert list(result["held_out"]) == list(study.REFERENCES[name].titles)
            assert all(list(row) == list(study.REFERENCES[name].tasks) for row in result["held_out"].values())
        else:
            cfg = config(study.RECIPES[name])
            assert result["flags"] == study.filled(args, study.RECIPES[name], result["seed"])
            assert result["iterations"] == cfg.iterations
            assert ("gap_closed" in result) == (
                isinstance(cfg, DistillationConfig) and cfg.diagnose_every > 0
            )
            assert list(result["held_out"]) == list(study.RECIPES[name].tasks)


def test_no_two_recipes_are_the_same_and_all_are_settings_of_the_preset():
    configs = [config(recipe) for recipe in study.RECIPES.values()]
    for cfg in configs:
        cfg.check(1)
        assert configs.count(cfg) == 1 and replace(cfg, seed=1) not in configs


def test_the_student_that_goes_on_is_a_preset_that_starts_from_the_default_run():
    preset = PRESETS["mini-student-grpo"]
    assert preset.cold_start == f"{PRESETS['mini'].out}/student"
    recipe = config(study.RECIPES["student-mix"])
    assert preset == replace(recipe, cold_start=preset.cold_start, out=preset.out)


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
        places = [need for need in run.needs if need in runs.PREPARED]
        for place in re.findall(r"runs/[\w/-]+", run.flags):
            assert place in places, (run, place)
        assert set(re.findall(r"{of ([\w.-]+)}", run.flags)) == set(run.needs) - set(places)
        assert set(run.needs) - set(places) <= set(study.RECIPES)
        for number, place in enumerate(places):
            made = " ".join([place, *places[:number]])
            for used in re.findall(r"runs/[\w/-]+", runs.PREPARED[place]):
                assert used in made, (place, used)


def test_the_student_of_the_study_is_the_default_preset():
    """With teachers of its own seed, and watched."""
    cfg = config(study.RECIPES["student"])
    default = PRESETS["mini"]
    same = {"teachers": default.teachers, "out": default.out}
    assert replace(cfg, watch_every=0, watch_prompts=default.watch_prompts, **same) == default


def test_presets_of_the_teachers_are_the_studys():
    for task, name in runs.EQUAL.items():
        assert config(study.RECIPES[name]) == PRESETS[f"mini-{task}"]


def test_kl_closed_compares_a_levels_last_values_with_its_first():
    early = {"red": {"kl": {"1.000": 0.4, "0.500": 0.1}}, "anchor": {"kl": {"1.000": 0.0}}}
    between = {"red": {"kl": {"1.000": 0.2}}}
    late = {"red": {"kl": {"1.000": 0.1, "0.500": 0.05}}, "green": {"kl": {}}}
    lines = [early, between, *[late] * 20]
    found = study.kl_closed(lines, ["red", "green", "anchor"])
    assert found == {
        "red": {
            "1.000": pytest.approx(1 - 0.1 / 0.3, abs=1e-4),
            "0.500": pytest.approx(1 - 0.05 / 0.075, abs=1e-4),
        }
    }


def test_a_curve_counts_the_samples_and_seconds_before_each_score():
    speeds = (15.0, 0.01, 15.0)  # the second step was held up
    lines = [{"step": n + 1, "effective_batch": 30, "samples_per_second": s} for n, s in enumerate(speeds)]
    lines[1]["watch"] = {"compose": 0.3, "text": 0.9, "quality": 0.8}
    (point,) = study.curve(lines)["curve"]
    assert point == {"step": 2, "samples": 60, "seconds": 4, "compose": 0.3, "text": 0.9, "quality": 0.8}
    assert study.curve(lines[:1]) == {}


def test_the_mixs_shares_of_pictures_are_those_of_its_recipe():
    cfg = config(study.RECIPES["mix-all"])
    share = cfg.share()
    whole = sum(share.values())
    looks = ("quality", "shapes", "signs")  # rewarded by the quality of their pictures
    assert study_tables.MIX_SHARE["compose"] == pytest.approx(share["compose"] / whole)
    assert study_tables.MIX_SHARE["text"] == pytest.approx(share["text"] / whole)
    assert study_tables.MIX_SHARE["quality"] == pytest.approx(sum(share[task] for task in looks) / whole)


def test_gap_closed_is_the_mean_over_teachers_and_noise_levels_of_the_last_comparison():
    early = {"step": 2, "fixed": {"a": {"gap": {"1.0": 0.0}}}, "visited": {"a": {"gap": {"1.0": 0.0}}}}
    late = {
        "step": 4,
        "fixed": {"a": {"gap": {"1.0": 0.2, "0.5": 0.4}}, "b": {"gap": {"1.0": 0.6, "0.5": 0.8}}},
        "visited": {"a": {"gap": {"1.0": 0.1, "0.5": 0.3}}},
    }
    assert study.gap_closed([early, late, {"step": 5}]) == {"fixed": 0.5, "visited": 0.2}


def test_only_missing_runs_are_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "run", lambda args, name, seed: made.append((name, seed)))
    (tmp_path / "asked-1.json").write_text(json.dumps({"recipe": "of no table"}))
    elsewhere = ["--results", str(tmp_path)]
    study.main(["--runs", "asked", "ode", "base", "--seeds", "0", "1", *elsewhere])
    assert made == [("asked", 0), ("ode", 0), ("ode", 1), ("base", 0)]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--runs", "golden"], "--runs names golden; known: full,"),
        (["--seeds"], "--seeds is empty"),
        (["--heldout", "signs=a"], "--heldout names signs; known: compose, text, quality"),
        (["--heldout", "compose=a"], "--heldout compose=a: there is no such file"),
        (["--heldout", f"text={README}"], "give another folder to --results"),
        (["--prompts", "nowhere"], "--prompts nowhere: there is no compose.train.jsonl in it"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(flags, words, monkeypatch):
    monkeypatch.setattr(study, "call", None)
    monkeypatch.setattr(study_pages, "write", None)
    with pytest.raises(SystemExit, match=re.escape(words)):
        study.main(flags)


def cells():
    """What opd.evaluation says of two rows: the own score of a task, its quality, a tag that is neither."""
    own = {"compose": (0.1, 0.4), "text": (0.2, 0.5), "quality": (0.3, 0.3)}
    found = []
    for row in ("base", "student"):
        for task, (score, quality) in own.items():
            place = {"row": row, "task": task, "error": 0.01}
            found.append(place | {"scorer": MINI_SCORERS[task], "tag": "", "mean": score})
            found.append(place | {"scorer": MINI_SCORERS[task], "tag": "counting", "mean": 0.9})
            if task != "quality":
                found.append(place | {"scorer": study.QUALITY, "tag": "", "mean": quality})
            found.append(place | {"scorer": "variety", "tag": "", "mean": 0.25})
        quality = {"row": row, "task": "quality", "scorer": "diversity", "tag": "", "mean": 0.15}
        found.append(quality)
    return found


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The programs that the study runs, by their arguments; every run leaves scores and metrics."""
    made = []

    def call(arguments):
        made.append(arguments)
        out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else tmp_path
        out.parent.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "train.py":
            (out / "student").mkdir(parents=True, exist_ok=True)
            line = {"step": parse(arguments[1:], PRESETS).iterations}
            line |= {"effective_batch": 30, "samples_per_second": 15.0}
            (out / "metrics.jsonl").write_text(json.dumps(line))
        elif "opd.evaluation" in arguments:
            out.write_text(json.dumps({"cells": cells()}))

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "call", call)
    return made


def test_a_run_of_another_stage_is_scored_alike(tmp_path, calls):
    """GRPO has neither a teacher to compare with nor that setting."""
    study.main(["--runs", "mix", "--seeds", "0", "--out", str(tmp_path), "--results", str(tmp_path)])
    assert calls[0][:2] == ["train.py", "mini-grpo-mix"]
    result = json.loads((tmp_path / "mix-0.json").read_text())
    assert result["held_out"] == {"compose": 0.1, "text": 0.2, "quality": 0.3}
    assert "gap_closed" not in result and "curve" not in result and result["iterations"] == 550


def test_a_run_makes_what_it_needs_then_trains_then_scores(tmp_path, calls):
    """Every command in its order, and a result of what they left."""
    (tmp_path / "runs/mini-samples").mkdir(parents=True)
    (tmp_path / runs.SAMPLES).write_text("")
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    for teacher in runs.TEACHERS:
        (tmp_path / f"out/{teacher}-1/student").mkdir(parents=True)
    study.main(["--runs", "from-sft", "--seeds", "1", *places, "--train=--dtype float32"])
    assert [arguments[0] for arguments in calls] == ["train.py", "train.py", "-m"]
    assert calls[0][1] == "mini-sft-start"
    assert calls[1][:3] == ["train.py", "mini-fold", "--teachers"]
    assert calls[1][calls[1].index("--cold-start") + 1] == runs.SFT_START
    assert calls[1][-2:] == ["--dtype", "float32"]
    result = json.loads((tmp_path / "results/from-sft-1.json").read_text())
    assert result["held_out"] == {"compose": 0.1, "text": 0.2, "quality": 0.3}
    assert result["quality_of"] == {"compose": 0.4, "text": 0.5, "quality": 0.3}
    assert result["errors"] == {"compose": 0.01, "text": 0.01, "quality": 0.01}
    assert result["diversity"] == {"quality": 0.15}
    assert result["variety"] == {"compose": 0.25, "text": 0.25, "quality": 0.25}
    assert (result["iterations"], result["seed"], result["recipe"]) == (25, 1, "from-sft")


def test_a_student_learns_from_the_teachers_of_its_own_seed_on_the_prompts_asked_for(tmp_path, calls):
    """Each teacher is a run with a result of its own, made once."""
    other = tmp_path / "other.txt"
    other.write_text("")
    heldout = ["--heldout", f"text={other}"]
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    # A result alone, as in a fresh clone, is no teacher.
    (tmp_path / "results").mkdir()
    (tmp_path / "results/equal-text-5.json").write_text(json.dumps({"recipe": "of no table"}))
    study.main(["--runs", "anchor-late", "anchor-0", "--seeds", "5", *heldout, *places])
    trained = [arguments for arguments in calls if arguments[0] == "train.py"]
    names = [Path(arguments[arguments.index("--out") + 1]).name for arguments in trained]
    assert names == ["equal-compose-5", "equal-text-5", "all-quality-5", "anchor-late-5", "anchor-0-5"]
    assert all(arguments[arguments.index("--seed") + 1] == "5" for arguments in trained)
    assert f"text={tmp_path / 'out/equal-text-5/student'}" in trained[3]
    shipped = f"quality={study.PROMPTS / 'quality.test.txt'}"
    scored = [arguments for arguments in calls if "opd.evaluation" in arguments]
    assert all(f"text={other}" in arguments and shipped in arguments for arguments in scored)
    assert not any("--prompts" in arguments[5:] for arguments in trained[3:])
    assert (tmp_path / "results/all-quality-5.json").is_file()


def test_another_split_is_trained_on_and_scored_and_refused_among_the_committed_results(tmp_path, calls):
    """Every prompt file of a run is that of the folder, those of its further tasks too."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, content in world.prompt_files("other").items():
        (folder / name).write_text(content)
    with pytest.raises(SystemExit, match="give another folder to --results"):
        study.main(["--runs", "mix-all", "--prompts", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="other teachers than those of runs/study; give"):
        study.main(["--runs", "mix-all", "--prompts", str(folder), "--results", str(tmp_path)])
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    study.main(["--runs", "mix-all", "--seeds", "3", "--prompts", str(folder), *places])
    training, scoring = calls
    cfg = parse(training[1:], PRESETS)
    assert set(cfg.prompts) == {*runs.TASKS, "shapes", "signs"} and len(set(cfg.prompts.values())) == 3
    for file in (*cfg.prompts.values(), *cfg.heldout.values()):
        assert Path(file).parent == folder and Path(file).is_file()
    assert f"text={folder / 'text.test.txt'}" in scoring
    assert json.loads((tmp_path / "results/mix-all-3.json").read_text())["prompts"] == str(folder)


def test_a_run_that_was_stopped_is_no_result(tmp_path, calls, monkeypatch):
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    make = study.call

    def stopped(arguments):
        make(["train.py", *arguments[1:], "--iterations", "7"])

    monkeypatch.setattr(study, "call", stopped)
    with pytest.raises(SystemExit, match="mix-0 was stopped after step 7 of 550; run this again to go on"):
        study.main(["--runs", "mix", "--seeds", "0", *places])
    assert not (tmp_path / "results").exists() and len(calls) == 1


def test_scoring_again_trains_nothing_and_leaves_what_has_no_weights(tmp_path, calls):
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    scores = dict.fromkeys(runs.TASKS, 0.9)
    before = {"recipe": "mix", "seed": 0, "held_out": scores, "quality_of": scores, "iterations": 7}
    for seed in (0, 1):
        (tmp_path / f"mix-{seed}.json").write_text(json.dumps(before))
    (tmp_path / "out/mix-0/student").mkdir(parents=True)
    study.main(["--rescore", "--runs", "mix", "base", *places])
    assert [arguments[:2] for arguments in calls] == [["-m", "opd.evaluation"]]
    after = json.loads((tmp_path / "mix-0.json").read_text())
    assert (after["iterations"], after["held_out"]["text"], after["variety"]["text"]) == (7, 0.2, 0.25)
    assert json.loads((tmp_path / "mix-1.json").read_text()) == before
    assert not (tmp_path / "base-0.json").exists()


def test_quick_divides_the_steps_and_keeps_out_of_the_committed_results(tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    study.main(["--quick", "--runs", "mix"])
    assert [arguments[0] for arguments in calls] == ["train.py", "-m"]
    assert calls[0][-4:] == ["--iterations", "11", "--watch-prompts", "8"]
    assert calls[1][calls[1].index("--count") + 1] == "24"
    assert (tmp_path / "runs/study-quick/results/mix-0.json").is_file()
    assert study.quickened(ARGUMENTS).runs == runs.TABLES["rivals"]
