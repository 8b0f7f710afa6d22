"""Flags: those of NAME=VALUE pairs, and checks of single numbers whose messages name the flag."""

import math
import re
import threading
from collections.abc import Iterable
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

LARGEST = 10_000  # pixels of a side


def pairs(kind: type) -> PrimitiveConstructorSpec:
    """A flag of NAME=VALUE pairs that replace the default as a whole (tyro alone allows its names only)."""

    def read(texts: list[str]) -> dict:
        values = {}
        for text in texts:
            name, _, value = text.partition("=")
            require(name != "" and value != "", f"expected NAME=VALUE, got {text!r}")
            require(name not in values, f"the name {name!r} is given twice")
            values[name] = kind(value)
        return values

    def write(values: dict) -> list[str]:
        return [f"{name}={value}" for name, value in values.items()]

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=write,
    )


Texts = Annotated[dict[str, str], pairs(str)]
Shares = Annotated[dict[str, int], pairs(int)]
Numbers = Annotated[dict[str, float], pairs(float)]


def pixels_of(text: str) -> tuple[int, int]:
    """(height, width) of a --resolution, "512" or "768x512". ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    require(match is not None, f"--resolution {text!r}: write pixels per side, or HEIGHTxWIDTH")
    height, width = match.groups()
    return int(height), int(width or height)


def in_pixels(height: int, width: int) -> str:
    """The inverse of `pixels_of`."""
    if height == width:
        return str(height)
    return f"{height}x{width}"


def check_resolution(text: str) -> None:
    """ValueError for a --resolution that is none; "" is the model's own."""
    if text != "":
        size = pixels_of(text)
        inside = 1 <= min(size) and max(size) <= LARGEST
        require(inside, f"--resolution {text!r}: a side has 1 to {LARGEST} pixels")


def at_least_one(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        require(value >= 1, f"--{dashed(name)} is {value}; it must be at least 1")


def at_most(cfg, limit: int, *names: str) -> None:
    """A bound far above sense, so that a slip of the keyboard is no run that never ends."""
    for name in names:
        value = getattr(cfg, name)
        require(value <= limit, f"--{dashed(name)} is {value}; it must be at most {limit}")


def check_seed(cfg) -> None:
    require(-(2**63) <= cfg.seed < 2**63, f"--seed is {cfg.seed}; it must fit into 64 bits")


def plain_names(flag: str, names: Iterable[str]) -> None:
    """Names become parts of file names and of metrics: letters, digits, spaces and . _ - alone."""
    for name in names:
        plain = re.fullmatch(r"\w[\w .-]{0,99}", name) is not None
        require(plain, f"{flag}: the name {name[:99]!r} may hold letters, digits, spaces and . _ - alone")


def finite(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        require(math.isfinite(value), f"--{dashed(name)} is {value}; it must be finite")


def positive(cfg, *names: str) -> None:
    finite(cfg, *names)
    for name in names:
        value = getattr(cfg, name)
        require(value > 0, f"--{dashed(name)} is {value}; it must be positive")


def not_negative(cfg, *names: str) -> None:
    finite(cfg, *names)
    for name in names:
        value = getattr(cfg, name)
        require(value >= 0, f"--{dashed(name)} is {value}; it must not be negative")


def time_limit(cfg, *names: str) -> None:
    """Seconds that a thread can be waited for."""
    positive(cfg, *names)
    for name in names:
        value, longest = getattr(cfg, name), threading.TIMEOUT_MAX
        require(value <= longest, f"--{dashed(name)} is {value}; it must be at most {longest:.0f} s")


def below_one(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        require(0 <= value < 1, f"--{dashed(name)} is {value}; it must lie in [0, 1)")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def dashed(name: str) -> str:
    return name.replace("_", "-")
