"""Presets that step aside for the user's own prompts and teachers, and the runs that come of it."""

import json
from dataclasses import replace

import pytest
import torch

from opd.cli import given_fields, parse
from opd.config.own import step_aside
from opd.presets import PRESETS
from opd.report.start import distances
from tests import tiny

LORAS = "--teachers a=A b=B"


def own(words: str):
    """(settings, lines) of a command line."""
    return step_aside(parse(words.split(), PRESETS), given_fields(words.split()))


# A command; what its settings are; what else is said.
CASES = [
    ("sd35", {}, 0),
    ("mini --lr 1", {}, 0),
    (f"sd35 {LORAS} --prompts a=F b=G", {"mix": {}, "anchor_weight": 0.0, "cold_start": "merge"}, 2),
    (f"mini {LORAS} --prompts a=F b=G", {"anchor_levels": {}}, 5),
    (f"mini {LORAS} --prompts a=F b=G --anchor base", {"anchor_levels": {"0.6": 3.0}}, 4),
    (f"sd35 {LORAS} --prompts a=F b=G --mix a=2 --anchor b", {"mix": {"a": 2}, "anchor": "b"}, 0),
    (f"sd35 {LORAS} --prompts a=F b=G --anchor-weight 0", {"anchor": "deqa"}, 1),
    ("sd35 --teachers a=A --prompts a=F b=G", {"routes": {"b": "a"}, "cold_start": "base"}, 4),
    ("sd35-fold --teachers a=A --prompts a=F", {"cold_start": "merge"}, 2),  # its guidance is to be learned
    ("sd35 --teachers a=A --prompts a=F --iterations 0", {"cold_start": "merge"}, 2),  # to be saved
    ("guidance-distil --prompts x=F", {"routes": {"x": "base"}, "cold_start": "base"}, 1),
    ("sd35-gfd-opd --teachers a=A b=B --prompts a=F b=F", {"extrapolate": {"a": 1.25, "b": 1.25}}, 2),
    ("guidance-distil --teachers a=A --prompts all=F", {"routes": {"all": "a"}}, 1),
    ("sd35 --teachers a=A --prompts a=F --routes a=0.5*a+0.5*base", {"cold_start": "merge"}, 2),
    ("sd35-large-to-medium --teachers ocr=A b=B --prompts ocr=F", {"routes": {}}, 2),
    (
        "mini --prompts text=F",
        {"mix": {"text": 2}, "evaluate": True, "rewards": {"text": "opd.mini.rewards:text"}},
        3,
    ),
    ("mini --prompts new=F", {"evaluate": False, "heldout": {}, "rewards": {}}, 4),
    ("sd35-grpo-ocr --prompts new=F --train-rewards new=my.py:f", {"evaluate": False}, 0),
    ("mini-text --prompts new=F --train-rewards new=my.py:f", {"heldout": {}, "watch_every": 0}, 3),
    (f"flux {LORAS} --prompts a=F b=G --anchor b", {"anchor_weight": 0.02}, 1),
    (f"flux {LORAS} --prompts a=F b=G --anchor b --anchor-weight 0", {"anchor_weight": 0.0}, 0),
    ("mini --train-rewards compose=m.py:f text=m.py:f quality=m.py:f", {"routing": "reward"}, 1),
    (f"sd35 {LORAS} --prompts a=F b=G --rewards a=ocr b=ocr", {"evaluate": True}, 3),
    ("sd35-gfd-opd --anchor deqa", {"extrapolate": dict.fromkeys(("geneval", "ocr", "pickscore"), 1.25)}, 2),
    ("sd35 --rewards geneval=geneval ocr=ocr pickscore=pickscore --no-evaluate", {"evaluate": False}, 0),
]


@pytest.mark.parametrize("words, wanted, lines", CASES)
def test_a_preset_keeps_what_does_not_speak_of_its_own_tasks(words, wanted, lines):
    cfg, said = own(words)
    before = vars(parse(words.split(), PRESETS))
    changed = {name for name, value in vars(cfg).items() if value != before[name]}
    assert {name: getattr(cfg, name) for name in wanted} == wanted
    assert len(said) == len(changed) == lines, said
    assert not changed & given_fields(words.split())
    if words != "mini --prompts new=F":  # which names no teacher for it
        cfg.check(1)


def test_it_is_said_why_scorers_are_not_asked():
    for words in ("sd35-24gb --heldout ocr=F --rewards ocr=ocr", "sd35 --rewards ocr=ocr"):
        cfg, (line,) = own(words)
        assert not cfg.evaluate and "--evaluate stays False: no scorer for geneval, pickscore" in line


def test_a_scorer_of_no_task_is_named():
    with pytest.raises(
        ValueError, match=r"--rewards names 'animee', which is not among the tasks: \['a', 'b'\]"
    ):
        own(f"sd35 {LORAS} --prompts a=F b=F --rewards a=ocr animee=ocr")
    own("mini-compose --prompts compose=F --heldout text=F --rewards compose=ocr text=ocr")


def test_distances_are_zero_at_the_teacher_and_a_hundred_at_the_base(world, tmp_path):
    found = {}
    for start in ("base", "red"):
        source = start if start == "base" else str(world / "red")
        cfg = tiny.config(world, cold_start=source, out=str(tmp_path / start))
        _, model, data, _, stage = tiny.build(cfg)
        found[start] = distances(cfg, model, stage.teachers, data)
    assert found["base"] == pytest.approx({"red": 100, "blue": 100}, rel=1e-5)
    assert found["red"]["red"] == pytest.approx(0, abs=0.1) and found["red"]["blue"] > 10


def test_a_grid_shows_an_average_that_teaches_as_it_is_then(world, tmp_path):
    teachers = {"red": str(world / "red"), "me": "ema"}
    cfg = tiny.config(
        world, out=str(tmp_path / "run"), teachers=teachers, routes={"blue": "me"}, anchor="red", ema=0.5
    )
    *_, report = tiny.run(replace(cfg, iterations=2, lr=0.1, sample_every=1))
    shown, now = (rows["its teacher\nguidance 1"][0] for rows in (report.kept_above, report.above()))
    assert all(torch.equal(a, b) for a, b in zip(shown, now, strict=True))


def test_a_grid_shows_the_prompts_that_the_user_names(world, tmp_path):
    """Each with the teacher of its own task, and none above a prompt of no task."""
    lines = [{"prompt": "a blue dot", "task": "blue"}, {"prompt": "a dot", "seen": 1}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"sample_prompts": str(tmp_path / "own.jsonl"), "iterations": 0}
    cfg = tiny.config(world, out=str(tmp_path / "run"), **own)
    *_, report = tiny.run(cfg)
    assert [prompt.text for prompt in report.prompts] == ["a blue dot", "a dot"]
    (base, _), (above, _) = report.above().values()
    assert torch.equal(above[0], report.pictures("blue", 1.0, [0])[0])
    assert above[1].min() == 1 and base[1].min() < 1
    assert report.shown.measured.keys() == {"red", "blue"}
    (tmp_path / "own.jsonl").write_text(json.dumps(lines[0] | {"route": "green"}) + "\n")
    with pytest.raises(ValueError, match="names 'green', which is not among the teachers"):
        tiny.build(replace(cfg, out=str(tmp_path / "other")))
