"""Flags: those of NAME=VALUE pairs, and checks of single numbers whose messages name the flag."""

import math
import threading
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec


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


def at_least_one(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        require(value >= 1, f"--{dashed(name)} is {value}; it must be at least 1")


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
