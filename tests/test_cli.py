"""The command line, config.json, and what --dry-run prints."""

import json
import re
import shlex
from dataclasses import fields, replace

import pytest

from opd.cli import dashed, describe, parse
from opd.config import STAGES
from opd.formats.settings import read_config, to_json
from opd.presets import DEFAULT, PRESETS
from tests.test_config import DISTIL, SFT

# One preset of every stage, to put flags on.
PRESET_OF = {"opd": "mini", "grpo": "mini-text", "nft": "mini-nft-text", "sft": "mini-sft-start"}


def test_no_preset_means_the_default_and_an_unknown_one_lists_them():
    assert DEFAULT == PRESETS["mini"]
    assert parse([], PRESETS) == DEFAULT and parse(["--lr", "0.5"], PRESETS) == replace(DEFAULT, lr=0.5)
    with pytest.raises(ValueError, match="unknown preset '2'; choose from mini, mini-fold, mini-flow-opd"):
        parse(["2", "--seed", "1"], PRESETS)


@pytest.mark.parametrize("slip, meant", [("mimi", "mini"), ("qwen-image", "qwen_image")])
def test_a_slip_of_the_keyboard_gets_the_nearest_preset(slip, meant):
    with pytest.raises(ValueError, match=rf"^unknown preset '{slip}', did you mean {meant}( or [\w-]+)?\? "):
        parse([slip], PRESETS)


def test_pairs_replace_the_default_as_a_whole():
    flags = "--teachers a=path/to=it b=owner/name:sub --prompts a=a.txt b=b.txt --mix a=3 --rewards --routes"
    cfg = parse(flags.split(), PRESETS)
    assert cfg.teachers == {"a": "path/to=it", "b": "owner/name:sub"}
    assert cfg.prompts == {"a": "a.txt", "b": "b.txt"}
    assert cfg.mix == {"a": 3} and cfg.rewards == {} and cfg.routes == {}
    assert cfg.heldout == DEFAULT.heldout


MALFORMED = {
    "--teachers a path": "expected NAME=VALUE, got 'a'",
    "--teachers a=": "expected NAME=VALUE, got 'a='",
    "--mix a=1 a=2": "the name 'a' is given twice",
    "--mix a=1.5": "'1.5'",
    "--iter 1": "--iter",  # no abbreviation
    "--seed 1 mini": "mini",
    "--beta 1": "Unrecognized options: --beta",  # of another stage
}


@pytest.mark.parametrize("arguments, message", MALFORMED.items())
def test_malformed_flags_are_refused_by_name(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal breaks the line
    with pytest.raises(SystemExit):
        parse(arguments.split(), PRESETS)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_what_to_set_first(stage, capsys):
    with pytest.raises(SystemExit):
        parse([PRESET_OF[stage], "--help"], PRESETS)
    first, flags = capsys.readouterr().out.split("Presets:")
    named = re.findall(r"--\w[\w-]+", first)
    assert len(named) > 5 and all(re.search(rf"\n\W*{flag} ", flags) for flag in named)


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
    assert read_config(file, STAGES) == DISTIL
    (tmp_path / "config.json").write_text(json.dumps(to_json(replace(DISTIL, push="a/b", force_resume=True))))
    assert parse(["--config", file], PRESETS) == DISTIL  # these are the other run's alone
    (tmp_path / "config.json").write_text(json.dumps(to_json(SFT)))
    assert parse(["--config", file], PRESETS) == SFT


def test_whole_numbers_in_json_are_read_as_fractions_where_these_are_meant(tmp_path):
    cfg = read_config(written(tmp_path, lr=1, query_beta=[1, 2], extrapolate={"red": 2}), STAGES)
    assert repr(cfg) == repr(replace(DISTIL, lr=1.0, query_beta=(1.0, 2.0), extrapolate={"red": 2.0}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": None}, '"stage" is None; expected one of opd, sft, grpo'),
        ({"lr": None, "seed": None}, "unknown or missing: 'lr', 'seed' (another version's, or misspelt)"),
        ({"stage": "sft"}, "stage sft: unknown or missing: "),
        ({"lr": "0.1"}, "field 'lr' is '0.1'; expected FLOAT"),
        ({"seed": 1.5}, "field 'seed' is 1.5; expected INT"),
        ({"t5": 1}, "field 't5' is 1; expected {True,False}"),
        ({"decay": "linear"}, "field 'decay' is 'linear'; expected {constant,cosine}"),
        ({"resolution": ["512"]}, "field 'resolution' is ('512',); expected STR"),
        ({"teachers": {"a=b": "c"}}, "field 'teachers' is {'a=b': 'c'}; expected NAME=VALUE ..."),
        ({"mix": {"red": 1.0}}, "field 'mix' is {'red': 1.0}; expected NAME=VALUE ..."),
        ({"query_beta": [1.0, "2"]}, "field 'query_beta' is (1.0, '2'); expected FLOAT FLOAT"),
    ],
)
def test_a_wrong_saved_field_is_named_with_its_file(changes, message, tmp_path):
    file = written(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        parse(["--config", str(file)], PRESETS)
    assert str(caught.value).startswith(f"config {str(file)!r}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


ODD = replace(DISTIL, out="a run's # folder", routes={"red": "base"}, evaluate=False, guidance=-0.5)


@pytest.mark.parametrize("cfg", [*map(PRESETS.get, PRESET_OF.values()), PRESETS["sd35-gfd-opd"], ODD])
def test_describe_shows_every_field_once_and_can_be_parsed(cfg):
    first, *lines = describe(cfg, "somewhere").splitlines()
    assert first == f"# stage {cfg.stage}, from somewhere"
    no = {f.name: "no-" * (getattr(cfg, f.name) is False) for f in fields(cfg)}
    assert [line.split()[0] for line in lines] == [f"--{no[name]}{dashed(name)}" for name in no]
    arguments = shlex.split("\n".join(lines))
    assert parse([PRESET_OF[cfg.stage], *arguments], PRESETS) == cfg


def run_main(monkeypatch, *arguments):
    import train

    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    train.main()


def test_dry_run_prints_the_settings_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, "sd35", "--dry-run", "--lr", "0.125", "--out", str(tmp_path / "run"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "# stage opd, from sd35"
    assert "--lr 0.125" in shown and f"--out {tmp_path / 'run'}" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("mimi", "error: unknown preset 'mimi'"),
        ("a.json", "error: unknown preset 'a.json', did you mean --config a.json? choose from"),
        ("--config nowhere.json", "error: config 'nowhere.json': [Errno 2] No such file"),
        ("mini --config FILE", "error: --config FILE and preset 'mini': give one of them"),
        ("--config a --config=b", "error: --config a and --config b: give one of them"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *arguments.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# Preset and flags -> those whose files are nowhere. A model or an adapter may be on the Hub.
LOST = """
sd35 --prompts a=no.txt b=no.jsonl --teachers a=owner/name b=base | --prompts a=no.txt, --prompts b=no.jsonl
mini --prompts a=here.txt --teachers a=./no b=no.st:alpha=8 | --teachers a=./no, --teachers b=no.st:alpha=8
mini --merge-from a=no/a/b --sample-prompts no.csv | --sample-prompts no.csv, --merge-from a=no/a/b
mini-text --heldout text=no.txt --cold-start no/a/b | --heldout text=no.txt, --cold-start no/a/b
mini-sft-start --model ./no --data no/data | --data no/data, --model ./no
"""


@pytest.mark.parametrize("arguments, lost", [line.split(" | ") for line in LOST.strip().splitlines()])
def test_files_that_are_missing_are_named_before_anything_is_fetched(
    arguments, lost, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opd.setup.Model.plan", None)  # finds the model, on the Hub if need be
    monkeypatch.setattr("train.forecast", lambda cfg: "")
    (tmp_path / "here.txt").write_text("a prompt\n")
    run_main(monkeypatch, *arguments.split(), "--dry-run")
    shown = capsys.readouterr().out.splitlines()
    named = [line.removeprefix("# not on this disk: ") for line in shown if "not on" in line]
    assert ", ".join(named) == lost
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *arguments.split(), "--out", str(tmp_path / "run"))
    assert str(caught.value).startswith(f"error: not on this disk: {lost}; give paths that exist")
