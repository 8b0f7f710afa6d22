"""The command line, config.json, and what --dry-run prints."""

import json
import re
import shlex
from dataclasses import fields, replace

import pytest

from opd.config import STAGES, DistillationConfig, SFTConfig
from opd.flags import dashed
from opd.presets import DEFAULT, PRESETS
from opd.settings import (
    describe,
    field_names,
    from_json,
    parse,
    read_config,
    stage_of,
    starting_point,
    to_json,
)

COLOURS = {"red": "red.txt", "green": "green.txt", "blue": "blue.txt"}
DISTIL = DistillationConfig(
    out="run", model="model", teachers=COLOURS, prompts=COLOURS, mix={"red": 3}, anchor="blue"
)
FINETUNE = SFTConfig(out="run", model="model", data="images")

# One preset of every stage, to put flags on.
PRESET_OF = {"opd": "mini", "grpo": "mini-text", "sft": "mini-sft-text"}


# ---- the command line ----------------------------------------------------------------------------


def test_no_preset_means_the_default_and_an_unknown_one_lists_them():
    assert DEFAULT == PRESETS["mini"]
    assert parse([], PRESETS) == DEFAULT and parse(["--lr", "0.5"], PRESETS) == replace(DEFAULT, lr=0.5)
    with pytest.raises(ValueError, match="unknown preset 'mimi'; choose from mini, mini-fold, mini-flow-opd"):
        parse(["mimi", "--seed", "1"], PRESETS)


def test_pairs_replace_the_default_as_a_whole():
    flags = "--teachers a=path/to=it b=owner/name:sub --prompts a=a.txt b=b.txt --mix a=3 --rewards --routes"
    cfg = parse(flags.split(), PRESETS)
    assert cfg.teachers == {"a": "path/to=it", "b": "owner/name:sub"}
    assert cfg.prompts == {"a": "a.txt", "b": "b.txt"}
    assert cfg.mix == {"a": 3} and cfg.rewards == {} and cfg.routes == {}
    assert cfg.heldout == DEFAULT.heldout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--teachers a path", "expected NAME=VALUE, got 'a'"),
        ("--teachers =path", "expected NAME=VALUE, got '=path'"),
        ("--teachers a=", "expected NAME=VALUE, got 'a='"),
        ("--prompts a=x b=y a=y", "the name 'a' is given twice"),
        ("--mix a=1 a=2", "the name 'a' is given twice"),
        ("--mix a=x", "'x'"),
        ("--mix a=1.5", "'1.5'"),
        ("--weight l2", "l2"),
        ("--dtype float16", "float16"),
        ("--steps ten", "ten"),
        ("--query-beta 1", "query-beta"),
        ("--learning-rate 1", "learning-rate"),
        ("--iter 1", "--iter"),
        ("--seed 1 mini", "mini"),
    ],
)
def test_malformed_flags_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments.split(), PRESETS)
    assert message in capsys.readouterr().err


def foreign_fields(kind):
    others = [name for other in STAGES.values() for name in sorted(field_names(other) - field_names(kind))]
    return dict.fromkeys(others)


FOREIGN = [(stage, name) for stage, kind in STAGES.items() for name in foreign_fields(kind)]


@pytest.mark.parametrize("stage, name", FOREIGN)
def test_flags_of_another_stage_are_refused_and_placed(stage, name):
    flag = f"--{dashed(name)}"
    owners = [owner for owner, kind in STAGES.items() if name in field_names(kind)]
    spellings = [[flag, "1"], [f"{flag}=1"], [f"--{name}", "1"], [f"--no-{dashed(name)}"]]
    for spelling in spellings:
        with pytest.raises(ValueError) as caught:
            parse([PRESET_OF[stage], "--seed", "1", *spelling], PRESETS)
        belongs = f"belongs to stage {' and '.join(owners)}; this is stage {stage}"
        assert str(caught.value) == f"{spelling[0].partition('=')[0]} {belongs}"


def test_stages_differ_in_what_they_refuse():
    refused_by = {stage: {name for s, name in FOREIGN if s == stage} for stage in STAGES}
    assert {"beta", "full", "data"} <= refused_by["opd"] and "teachers" not in refused_by["opd"]
    assert {"anchor", "weight", "data"} <= refused_by["grpo"] and "full" not in refused_by["grpo"]
    assert {"prompts", "evaluate", "group", "rollout"} <= refused_by["sft"] and "full" not in refused_by[
        "sft"
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_flags_of_the_stage_and_no_other(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        parse([PRESET_OF[stage], "--help"], PRESETS)
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    options = {match.replace("-", "_") for match in re.findall(r"--([a-z][a-z0-9-]*)", shown)}
    assert field_names(STAGES[stage]) <= options
    for name in foreign_fields(STAGES[stage]):
        assert not re.search(rf"^\W*--{dashed(name)}\b(?!-)", shown, re.MULTILINE), name


def test_help_needs_no_preset_and_names_them_all(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], PRESETS)
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert ", ".join(PRESETS) in shown and "--config FILE" in shown


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name):
    cfg = PRESETS[name]
    saved = to_json(cfg)
    assert saved["stage"] == stage_of(cfg) and list(saved)[1:] == [f.name for f in fields(cfg)]
    assert from_json(saved) == cfg and saved["stage"] == stage_of(cfg)
    restored = from_json(json.loads(json.dumps(saved)))
    assert restored == cfg and type(restored) is type(cfg)
    for field in fields(cfg):
        assert type(getattr(restored, field.name)) is type(getattr(cfg, field.name))


def written(folder, **changes):
    """A saved config.json of stage opd with changed entries; None leaves one out."""
    values = to_json(DISTIL) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    file = folder / "config.json"
    file.write_text(json.dumps(kept))
    return file


def test_a_saved_run_is_read_and_flags_override_it(tmp_path):
    file = str(written(tmp_path))
    for arguments in (["--config", file, "--seed", "7"], ["--seed", "7", f"--config={file}"]):
        assert parse(arguments, PRESETS) == replace(DISTIL, seed=7)
    assert read_config(file) == DISTIL
    (tmp_path / "config.json").write_text(json.dumps(to_json(FINETUNE)))
    assert parse(["--config", file], PRESETS) == FINETUNE
    with pytest.raises(ValueError, match="--teachers belongs to stage opd; this is stage sft"):
        parse(["--config", file, "--teachers", "a=b"], PRESETS)


def test_whole_numbers_in_json_are_read_as_fractions_where_these_are_meant(tmp_path):
    cfg = read_config(written(tmp_path, lr=1, query_beta=[1, 2]))
    assert cfg == replace(DISTIL, lr=1.0, query_beta=(1.0, 2.0))
    assert type(cfg.lr) is float and [type(number) for number in cfg.query_beta] == [float, float]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": None}, '"stage" is missing'),
        ({"stage": "ppo"}, "\"stage\" is 'ppo'; expected one of opd, grpo, sft"),
        ({"stage": ["opd"]}, "\"stage\" is ['opd']; expected one of opd, grpo, sft"),
        ({"lr": None}, "field 'lr' is missing"),
        ({"stage": "sft"}, "stage sft has no field 'evaluate'"),
        ({"learning_rate": 1.0}, "stage opd has no field 'learning_rate'"),
        ({"lr": "0.1"}, "field 'lr' is '0.1'; expected float"),
        ({"lr": True}, "field 'lr' is True; expected float"),
        ({"seed": 1.5}, "field 'seed' is 1.5; expected int"),
        ({"seed": True}, "field 'seed' is True; expected int"),
        ({"t5": 1}, "field 't5' is 1; expected bool"),
        ({"out": 3}, "field 'out' is 3; expected str"),
        (
            {"weight": "l2"},
            "field 'weight' is 'l2'; expected Literal['kl', 'kl_released', 'ode_kl', 'uniform', ",
        ),
        ({"weight": ["kl"]}, "field 'weight' is ['kl']; expected Literal["),
        ({"teachers": ["a"]}, "field 'teachers' is ['a']; expected dict[str, str]"),
        ({"teachers": {"a": 1}}, "field 'teachers' is {'a': 1}; expected dict[str, str]"),
        ({"mix": {"red": 1.0}}, "field 'mix' is {'red': 1.0}; expected dict[str, int]"),
        ({"query_beta": [1.0]}, "field 'query_beta' is [1.0]; expected tuple[float, float]"),
        ({"query_beta": "ab"}, "field 'query_beta' is 'ab'; expected tuple[float, float]"),
        ({"query_beta": [1.0, "2"]}, "field 'query_beta' is [1.0, '2']; expected tuple[float, float]"),
    ],
)
def test_a_wrong_saved_field_is_named_with_its_file(changes, message, tmp_path):
    file = written(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        parse(["--config", str(file)], PRESETS)
    assert str(file) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"stage": "opd",', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1, 2]", "expected an object with the settings, got [1, 2]"),
        (None, "no such file"),
    ],
)
def test_a_broken_file_is_named(content, message, tmp_path):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        parse(["--config", str(file)], PRESETS)
    assert str(file) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("mini --config FILE", "preset 'mini' and --config FILE: give one of the two"),
        ("--config FILE mini", "preset 'mini' and --config FILE: give one of the two"),
        ("--config=FILE sd35 --seed 1", "preset 'sd35' and --config FILE: give one of the two"),
        ("--config a --config=b", "--config is given 2 times: a, b"),
        ("--config", "--config needs a FILE: a saved config.json"),
        ("--config=", "--config needs a FILE: a saved config.json"),
        ("mini --seed 1 --config", "--config needs a FILE: a saved config.json"),
    ],
)
def test_config_takes_one_file_and_no_preset(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(arguments.split(), PRESETS)


# ---- --dry-run -----------------------------------------------------------------------------------


ODD = replace(DISTIL, out="a run's # folder", routes={"red": "base"}, evaluate=False, guidance=-0.5)


@pytest.mark.parametrize("cfg", [*PRESETS.values(), ODD])
def test_describe_shows_every_field_once_and_can_be_parsed(cfg):
    first, *lines = describe(cfg, "somewhere").splitlines()
    assert first == f"# stage {stage_of(cfg)}, from somewhere"
    assert [line.split()[0] for line in lines] == [
        f"--no-{dashed(f.name)}" if getattr(cfg, f.name) is False else f"--{dashed(f.name)}"
        for f in fields(cfg)
    ]
    arguments = shlex.split("\n".join(lines))
    assert parse([PRESET_OF[stage_of(cfg)], *arguments], PRESETS) == cfg


def test_the_starting_point_is_named(tmp_path):
    file = str(written(tmp_path))
    assert starting_point(["sd35", "--seed", "1"], PRESETS) == ("sd35", PRESETS["sd35"], ["--seed", "1"])
    assert starting_point(["--seed", "1"], PRESETS) == ("mini", DEFAULT, ["--seed", "1"])
    assert starting_point(["--config", file], PRESETS) == (f"--config {file}", DISTIL, [])


# ---- the program ---------------------------------------------------------------------------------


def run_main(monkeypatch, *arguments):
    import train

    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    train.main()


def test_dry_run_prints_the_settings_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "run")
    run_main(monkeypatch, "sd35", "--dry-run", "--lr", "0.125", "--out", out)
    shown = capsys.readouterr().out.splitlines()
    assert "stage opd" in shown[0] and "sd35" in shown[0]
    assert "--lr 0.125" in shown and f"--out {out}" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("mimi", "error: unknown preset 'mimi'"),
        ("--lr 0", "error: --lr is 0.0; it must be positive"),
        ("--shard-size 2", "error: --shard-size 2 does not divide the 1 ranks"),
        ("mini --beta 1", "error: --beta belongs to stage grpo; this is stage opd"),
        ("--config nowhere.json", "error: config 'nowhere.json': no such file"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *arguments.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
