"""The configuration: every bad number is refused by flag and value, and every flag is read by something."""

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import train
from opd.config import PRESETS, Config, check, dashed, load_family, parse

ROOT = Path(__file__).parents[1]
SFT = dict(stage="sft", cold_start="base", data="somewhere")

# (changes, what the message must contain: the flag, the value, the way out)
REFUSED = [
    *[({name: 0}, f"--{dashed(name)} is 0; it must be at least 1") for name in (
        "prompts_per_step", "group", "micro_batch", "steps", "iterations", "rank", "shard_size", "log_every", "save_every",
        "max_bad_steps", "eval_prompts", "eval_steps")],
    *[({name: value}, f"--{name} is {value}; it must be positive") for name in ("lr", "alpha", "clip") for value in (0.0, -1.5)],
    ({"lr": float("nan")}, "--lr is nan"),
    *[({name: -1}, f"--{dashed(name)} is -1; it must not be negative") for name in (
        "anchor_weight", "noise_level", "weight_decay", "warmup", "sample_every", "queries")],
    *[({name: value}, f"--{dashed(name)} is {value}; it must lie in [0, 1)") for name in ("ema", "caption_dropout") for value in (-0.1, 1.0)],
    ({"shard_size": 3}, "--shard-size 3 does not divide the 4 ranks; choose one of [1, 2, 4]"),
    ({"query_beta": (0.0, 2.0)}, "--query-beta (0.0, 2.0): both numbers must be positive"),
    # stage opd
    ({"full": True}, "--full is for stages sft and grpo"),
    ({"steps": 1, "skip_last": True}, "--steps 1 with --skip-last leaves no state"),
    ({"queries": 11}, "--queries 11 exceeds the 10 states"),
    ({"queries": 10, "skip_last": True}, "--queries 10 exceeds the 9 states"),
    ({"noise_level": 0.0}, "--weight kl divides by the SDE's noise; with --noise-level 0 use --weight ode_kl or uniform"),
    ({"noise_level": 0.0, "weight": "kl_released"}, "--weight kl_released divides"),
    ({"noise_level": 0.0, "weight": "uniform"}, "--rollout sde with --noise-level 0 adds no noise; use --rollout ode"),
    ({"noise_level": 0.0, "weight": "ode_kl", "rollout": "cps"}, "--rollout cps with --noise-level 0"),
    ({"teachers": {}}, "--teachers is empty: give at least one NAME=ADAPTER pair"),
    ({"teachers": {"base": "x"}}, "the name 'base' means the base itself"),
    *[({"teachers": {name: "x"}}, f"the name '{name}' is taken") for name in ("student", "start", "anchor", "loss")],
    ({"prompts": {"dog": "x.txt"}}, "task 'dog' is routed to 'dog', which is not among the teachers ['compose', 'text', 'quality', 'base']; "
                                    "add it to --teachers or map it with --routes dog=NAME"),
    ({"routes": {"text": "nobody"}}, "task 'text' is routed to 'nobody'"),
    ({"routes": {"dog": "text"}}, "names task 'dog', which has no --prompts; known: ['compose', 'text', 'quality']"),
    ({"mix": {"dog": 1}}, "names task 'dog', which has no --prompts"),
    ({"mix": {"text": 0}}, "--mix text=0: shares are whole numbers of at least 1"),
    ({"anchor": "nobody"}, "--anchor 'nobody' is not among the teachers"),
    ({"rewards": {"compose": "m:f", "quality": "m:f"}}, "task 'text' has no scorer; add --rewards text=module:function or --no-evaluate"),
    ({"heldout": {"dog": "x.txt"}}, "task 'dog' has no scorer"),
    ({"heldout": {}, "rewards": {}}, "task 'compose' has no scorer"),
    # stage sft
    (SFT | {"data": ""}, "stage sft needs --data"),
    (SFT | {"cold_start": "merge"}, "--cold-start merge is for stage opd"),
    (SFT | {"full": True, "cold_start": "some/adapter"}, "--full trains the base; --cold-start 'some/adapter' cannot apply"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_settings_are_refused_by_flag_and_value(changes, message):
    with pytest.raises(ValueError) as caught:
        check(replace(Config(), **changes), world=4)
    assert message in str(caught.value)
    for flag in re.findall(r"--[a-z][a-z0-9-]*", str(caught.value)):
        name = flag[2:].replace("-", "_").removeprefix("no_")
        assert name in {f.name for f in fields(Config)}, f"the message names {flag}, which does not exist"


@pytest.mark.parametrize("changes", [
    {"anchor": "nobody", "anchor_weight": 0.0}, {"anchor": "base"}, {"teachers": {"base": "base"}, "anchor": "base", "routes": dict.fromkeys(
        ("compose", "text", "quality"), "base")}, {"noise_level": 0.0, "weight": "ode_kl", "rollout": "ode"}, {"queries": 10},
    {"evaluate": False, "rewards": {}}, {"shard_size": 4}, SFT, SFT | {"full": True}, SFT | {"cold_start": "some/adapter"},
])
def test_settings_at_the_edge_are_accepted(changes):
    check(replace(Config(), **changes), world=4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_and_can_be_parsed(name):
    given = {"train_rewards": {"geneval": "my.rewards:geneval"}} if name == "sd35-grpo" else {}  # the user's, until there is one here
    check(replace(PRESETS[name], **given), world=1)
    assert parse([name]) == PRESETS[name]
    assert parse([name, "--seed", "7"]) == replace(PRESETS[name], seed=7)


def test_the_sd35_teacher_asks_for_its_reward():
    with pytest.raises(ValueError, match="task 'geneval' has no reward to train on; add --train-rewards geneval=module:function"):
        check(PRESETS["sd35-grpo"], world=1)


# ---- the command line ----------------------------------------------------------------------------------------------


def test_no_preset_means_mini_and_an_unknown_one_lists_them():
    assert parse([]) == PRESETS["mini"] and parse(["--lr", "0.5"]).lr == 0.5
    with pytest.raises(ValueError, match="unknown preset 'mimi'; choose from mini, mini-base"):
        parse(["mimi", "--seed", "1"])


def test_pairs_replace_the_default_as_a_whole():
    cfg = parse(["--teachers", "a=path/to=it", "b=owner/name:sub", "--prompts", "a=a.txt", "b=b.txt", "--mix", "a=3", "--rewards", "--routes"])
    assert cfg.teachers == {"a": "path/to=it", "b": "owner/name:sub"} and cfg.prompts == {"a": "a.txt", "b": "b.txt"}
    assert cfg.mix == {"a": 3} and cfg.rewards == {} and cfg.routes == {} and cfg.heldout == Config().heldout
    assert cfg.share() == {"a": 3, "b": 1} and replace(cfg, routes={"a": "b"}).route("a") == "b" == cfg.route("b")


@pytest.mark.parametrize("arguments, message", [
    (["--teachers", "a", "path"], "expected NAME=VALUE, got 'a'"), (["--mix", "a=x"], "'x'"), (["--weight", "l2"], "l2"),
    (["--learning-rate", "1"], "learning-rate"),
])
def test_malformed_flags_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_dry_run_prints_the_settings_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "sd35", "--dry-run", "--lr", "0.125", "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "c")])
    train.main()
    assert "lr=0.125" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [
    (["mimi"], "error: unknown preset 'mimi'"), (["--lr", "0"], "error: --lr is 0.0; it must be positive"),
    (["--shard-size", "2"], "error: --shard-size 2 does not divide the 1 ranks"),
])
def test_bad_settings_end_in_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["flux9", "flow", "../opd/sd3", ""])
def test_an_unknown_family_is_named(name):
    with pytest.raises(ValueError, match=f"--family '{name}': there is no model family"):
        load_family(name)


# ---- every flag means something --------------------------------------------------------------------------------------


def attributes_of(name, files):
    """Attributes X read as `name.X` or `something.name.X`."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if (getattr(node.value, "id", None) or getattr(node.value, "attr", None)) == name:
                    yield node.attr


def config_class():
    tree = ast.parse((ROOT / "opd" / "config.py").read_text())
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")


def test_every_field_is_read_by_the_program():
    """Checks do not count as reading: only train.py, the other modules, and Config's own methods."""
    files = [ROOT / "train.py", *(f for f in (ROOT / "opd").glob("*.py") if f.name != "config.py")]
    read = {*attributes_of("cfg", files)}
    methods = [m for m in config_class().body if isinstance(m, ast.FunctionDef) and m.name in read]
    read |= {node.attr for m in methods for node in ast.walk(m) if isinstance(node, ast.Attribute)}
    assert {f.name for f in fields(Config)} - read == set()


def test_every_field_says_what_it_is():
    body = config_class().body
    silent = [node.target.id for node, after in zip(body, [*body[1:], None]) if isinstance(node, ast.AnnAssign)
              and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and len(after.value.value) > 5)]
    assert silent == []
