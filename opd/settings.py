"""Settings in and out: the command line, config.json, and what --dry-run prints."""

import inspect
import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from opd.config import STAGES, RunConfig
from opd.flags import dashed, require


def parse(arguments: list[str], presets: dict[str, RunConfig]) -> RunConfig:
    """`[PRESET | --config FILE] --field value ...` -> the settings; with neither, the first of `presets`.

    ValueError for an unknown preset, a bad FILE or a flag of another stage; tyro exits on other bad flags.
    """
    source, start, flags = starting_point(arguments, presets)
    refuse_flags_of_other_stages(flags, start)
    about = f"Presets: {', '.join(presets)}. --config FILE starts from a saved config.json instead."
    return tyro.cli(type(start), default=start, args=flags, prog=f"train.py {source}", description=about)


def starting_point(arguments: list[str], presets: dict[str, RunConfig]) -> tuple[str, RunConfig, list[str]]:
    """What was named (a preset, or `--config FILE`), its settings, and the flags that override them."""
    file, rest = take_config(arguments)
    named = len(rest) > 0 and not rest[0].startswith("-")
    if file is not None:
        if named:
            raise ValueError(f"preset {rest[0]!r} and --config {file}: give one of the two")
        return f"--config {file}", read_config(file), rest
    if not named:
        name = next(iter(presets))
        return name, presets[name], rest
    name = rest[0]
    require(name in presets, f"unknown preset {name!r}; choose from {', '.join(presets)}")
    return name, presets[name], rest[1:]


def take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(FILE of --config or None, the other arguments)."""
    files, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag, has_value, value = argument.partition("=")
        if flag != "--config":
            rest.append(argument)
        elif has_value:
            files.append(value)
        else:
            files.append(next(remaining, ""))
    if not files:
        return None, rest
    require(len(files) == 1, f"--config is given {len(files)} times: {', '.join(files)}")
    require(files[0] != "", "--config needs a FILE: a saved config.json")
    return files[0], rest


def refuse_flags_of_other_stages(flags: list[str], start: RunConfig) -> None:
    """ValueError that says where a flag belongs. tyro would call it unknown, or guess at a similar one."""
    for flag in flags:
        if not flag.startswith("--"):
            continue
        flag = flag.partition("=")[0]
        name = flag[2:].replace("-", "_").removeprefix("no_")
        owners = [stage for stage, kind in STAGES.items() if name in field_names(kind)]
        if owners and stage_of(start) not in owners:
            owner = " and ".join(owners)
            raise ValueError(f"{flag} belongs to stage {owner}; this is stage {stage_of(start)}")


def field_names(kind: type) -> set[str]:
    return {setting.name for setting in fields(kind)}


def stage_of(cfg: RunConfig) -> str:
    """The name in STAGES of the stage that `cfg` configures."""
    return next(stage for stage, kind in STAGES.items() if kind is type(cfg))


# ---- config.json ---------------------------------------------------------------------------------


def read_config(file: str | Path) -> RunConfig:
    """The settings in a saved config.json. ValueError naming the file, and the field where one is wrong."""
    require(Path(file).expanduser().is_file(), f"config {str(file)!r}: no such file")
    try:
        values = json.loads(Path(file).expanduser().read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise ValueError(f"config {str(file)!r}: not JSON ({error})") from error
    try:
        return from_json(values)
    except ValueError as error:
        raise ValueError(f"config {str(file)!r}: {error}") from error


def to_json(cfg: RunConfig) -> dict:
    """{"stage": its name, then every field}: what config.json holds."""
    return {"stage": stage_of(cfg), **asdict(cfg)}


def from_json(values: dict) -> RunConfig:
    """The inverse of `to_json`, also where JSON made lists of tuples. ValueError naming a wrong field."""
    require(isinstance(values, dict), f"expected an object with the settings, got {values!r}")
    require("stage" in values, '"stage" is missing')
    stage = values["stage"]
    require(stage in list(STAGES), f'"stage" is {stage!r}; expected one of {", ".join(STAGES)}')
    own = {name: value for name, value in values.items() if name != "stage"}
    return restore(STAGES[stage], own, f"stage {stage}")


def restore(kind: type, values: dict, what: str) -> Any:
    """An instance of a dataclass of settings from what JSON made of all its fields. ValueError naming a wrong
    field; `what` has those fields."""
    hints = get_type_hints(kind)
    types = {setting.name: hints[setting.name] for setting in fields(kind)}
    for name in values:
        require(name in types, f"{what} has no field {name!r}")
    settings = {}
    for name, expected in types.items():
        require(name in values, f"field {name!r} is missing")
        try:
            settings[name] = restored(values[name], expected)
        except TypeError as error:
            wanted = inspect.formatannotation(expected)
            raise ValueError(f"field {name!r} is {values[name]!r:.200}; expected {wanted}") from error
    return kind(**settings)


def restored(value: Any, kind: Any) -> Any:
    """`value` as JSON holds it -> a value of the annotated type `kind`; TypeError if it is none."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal and value in parts:
        return value
    if origin is dict and isinstance(value, dict):
        return {name: restored(item, parts[1]) for name, item in value.items()}
    if origin is UnionType and NoneType in parts:
        return None if value is None else restored(value, parts[0])
    if origin is tuple and parts[-1] is Ellipsis and isinstance(value, list | tuple):
        return tuple(restored(item, parts[0]) for item in value)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
        return tuple(map(restored, value, parts))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:  # not isinstance: True is no number here
        return value
    raise TypeError


# ---- --dry-run -----------------------------------------------------------------------------------


def describe(cfg: RunConfig, source: str) -> str:
    """One line per field, `--flag value`, in the order of the classes, under a comment with the stage.

    `source` is what `starting_point` says. On top of any preset of the stage the lines give `cfg` again.
    """
    lines = [f"# stage {stage_of(cfg)}, from {source}"]
    for setting in fields(cfg):
        words = flag_words(setting.name, getattr(cfg, setting.name))
        lines.append(shlex.join(words))
    return "\n".join(lines)


def flag_words(name: str, value: Any) -> list[str]:
    flag = f"--{dashed(name)}"
    if value is False:
        return [f"--no-{dashed(name)}"]
    if value is True:
        return [flag]
    if isinstance(value, dict):
        return [flag, *(f"{key}={item}" for key, item in value.items())]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]
