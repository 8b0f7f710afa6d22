"""The command line: fields with bounds, presets, and what --dry-run prints.

A program's settings are a frozen dataclass, its flags are the fields, and a field carries its bounds:

    lr: Annotated[float, Positive] = 1e-3
    rank: Few = 16                                      # Annotated[int, Range(1, 10_000)]
    mix: Annotated[Shares, Range(1, 10_000)] = ...      # --mix compose=3 text=1
    model: Annotated[str, Given("a pipeline directory or a Hub id")] = ""
"""

import argparse
import math
import re
import shlex
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from opd.formats.settings import Settings, read_config

# ---- bounds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """What a field's number must be, or each of its numbers: low <= number <= high. NaN is in no range."""

    low: float
    high: float
    words: str = ""
    """What "it must" ends with, where the two numbers would say it badly."""

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return self.words or f"be at least {self.low} and at most {self.high}"


LARGEST, LEAST = sys.float_info.max, math.ulp(0.0)
Finite = Range(-LARGEST, LARGEST, "be finite")
Positive = Range(LEAST, LARGEST, "be positive and finite")
NotNegative = Range(0.0, LARGEST, "not be negative, and be finite")
BelowOne = Range(0.0, math.nextafter(1.0, 0.0), "lie in [0, 1)")
# Counts end far above sense, so that a slip of the keyboard is no run that never ends.
Count = Annotated[int, Range(1, 10**6)]
Few = Annotated[int, Range(1, 10_000)]  # steps of a walk, ranks of a LoRA, images of a prompt
Interval = Annotated[int, Range(0, 10**9)]  # 0 = never
Seed = Annotated[int, Range(-(2**63), 2**63 - 1, "fit into 64 bits")]
# As long as a thread can be waited for.
Seconds = Annotated[
    float, Range(LEAST, threading.TIMEOUT_MAX, f"be positive, at most {threading.TIMEOUT_MAX:.0f}")
]


@dataclass(frozen=True)
class Given:
    """A field that must not stay empty: what to give it."""

    words: str


def check_bounds(settings: Settings) -> None:
    """ValueError, naming the flag, its value and the bound, for the first field that is out of its range."""
    for name, bound in bounds_of(type(settings)):
        value = getattr(settings, name)
        if isinstance(bound, Given) and not value:
            raise ValueError(f"--{dashed(name)} is empty: give {bound.words}")
        if isinstance(bound, Range) and not all(number in bound for number in numbers_of(value)):
            shown = " ".join(flag_words(name, value)[1:])
            raise ValueError(f"--{dashed(name)} is {shown}; it must {bound}")


def bounds_of(kind: type) -> list[tuple[str, Range | Given]]:
    """(field, bound) of those fields that have one."""
    bounds = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        bounds += [(name, mark) for mark in marks if isinstance(mark, Range | Given)]
    return bounds


def numbers_of(value: Any) -> Iterable[float]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, tuple):
        return value
    return () if value is None else (value,)


# ---- NAME=VALUE pairs, names and pixels --------------------------------------------------------------------


def pairs(kind: type) -> PrimitiveConstructorSpec:
    """A flag of NAME=VALUE pairs that replace the default as a whole (tyro alone allows its names only)."""

    def read(texts: list[str]) -> dict:
        values = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name == "" or value == "":
                raise ValueError(f"expected NAME=VALUE, got {text!r}")
            if name in values:
                raise ValueError(f"the name {name!r} is given twice")
            values[name] = kind(value)
        return values

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [f"{name}={value}" for name, value in values.items()],
    )


Texts = Annotated[dict[str, str], pairs(str)]
Shares = Annotated[dict[str, int], pairs(int)]
Numbers = Annotated[dict[str, float], pairs(float)]


def plain_names(flag: str, names: Iterable[str]) -> None:
    """Names become parts of file names and of metrics: letters, digits, spaces and . _ - alone."""
    for name in names:
        if not re.fullmatch(r"\w[\w .-]{0,99}", name):
            allowed = "may hold letters, digits, spaces and . _ - alone"
            raise ValueError(f"{flag}: the name {name[:99]!r} {allowed}")


def known_names(flag: str, names: Iterable[str], what: str, known: Iterable[str]) -> None:
    """ValueError for a name that is not among `known`, which are `what`."""
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} names {name!r}, which is not among the {what}: {list(known)}")


def pixels_of(resolution: str) -> tuple[int, int]:
    """(height, width) of a --resolution, "512" or "768x512". ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", resolution)
    if match is None or any(int(side) > 10_000 for side in match.groups() if side):
        wanted = "write pixels per side, or HEIGHTxWIDTH, each from 1 to 10000"
        raise ValueError(f"--resolution {resolution!r}: {wanted}")
    height, width = match.groups()
    return int(height), int(width or height)


def in_pixels(height: int, width: int) -> str:
    """The inverse of `pixels_of`."""
    if height == width:
        return str(height)
    return f"{height}x{width}"


# ---- train.py [PRESET | --config FILE] --field value ... ---------------------------------------------------


def parse(arguments: list[str], presets: dict[str, Settings]) -> Settings:
    """The settings; with neither PRESET nor FILE, the first of `presets` and what overrides it.

    ValueError for an unknown preset or a bad FILE; tyro exits on bad flags, those of other stages among them.
    """
    source, start, flags = starting_point(arguments, presets)
    first = " ".join(f"--{dashed(name)}" for name in start.first)
    about = (
        f"What to set first: {first}. Presets: {', '.join(presets)}; or --config FILE, a saved config.json."
    )
    return tyro.cli(type(start), default=start, args=flags, prog=f"train.py {source}", description=about)


def starting_point(arguments: list[str], presets: dict[str, Settings]) -> tuple[str, Settings, list[str]]:
    """What was named (a preset, or `--config FILE`), its settings, and the flags that override them. Where a
    run was published, and that it once had to go on, are that run's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE")
    files, rest = parser.parse_known_args(arguments)
    name = next(iter(presets))
    named = len(rest) > 0 and not rest[0].startswith("-")
    if named:
        name, *rest = rest
    sources = [f"--config {file}" for file in files.config] + [f"preset {name!r}"] * named
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(sources)}: give one of them")
    if files.config:
        saved = read_config(files.config[0], stages_of(presets))
        return sources[0], replace(saved, push="", force_resume=False), rest
    if name not in presets:
        near = " or ".join(get_close_matches(name.lower(), presets, n=2))
        meant = f", did you mean {near}?" if near else ";"
        if name.endswith(".json"):
            meant = f", did you mean --config {name}?"
        raise ValueError(f"unknown preset {name!r}{meant} choose from {', '.join(presets)}")
    return name, presets[name], rest


def stages_of(presets: dict[str, Settings]) -> dict[str, type]:
    """Name of a stage -> the class of its settings."""
    return {cfg.stage: type(cfg) for cfg in presets.values()}


def given_fields(arguments: list[str]) -> set[str]:
    """The fields that a command line names."""
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return {flag[2:].replace("-", "_").removeprefix("no_") for flag in flags}


def emptied(args: Settings, given: set[str], *names: str) -> Settings:
    """`args` without what these tables hold by default, where the command line does not give them."""
    return replace(args, **{name: {} for name in names if name not in given})


def field_names(kind: type) -> set[str]:
    return {setting.name for setting in fields(kind)}


def dashed(name: str) -> str:
    return name.replace("_", "-")


# ---- --dry-run ---------------------------------------------------------------------------------------------


def describe(cfg: Settings, source: str) -> str:
    """One line per field, `--flag value`, in the order of the classes, under a comment with the stage.

    `source` is what `starting_point` says. On top of any preset of the stage the lines give `cfg` again.
    """
    lines = [f"# stage {cfg.stage}, from {source}"]
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
