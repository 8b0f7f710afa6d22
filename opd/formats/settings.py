"""Settings as JSON: config.json of a run."""

from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

from opd.files import path_of, read_json, reading

Settings = Any
"""An instance of a frozen dataclass; one of train.py's has the name of its stage, too."""


def to_json(cfg: Settings) -> dict:
    """{"stage": its name, then every field}: what config.json holds."""
    return {"stage": cfg.stage, **asdict(cfg)}


def read_config(file: str | Path, stages: dict[str, type]) -> Settings:
    """The settings in a saved config.json. ValueError naming the file, and the field where one is wrong."""
    with reading(f"config {str(file)!r}"):
        return from_json(read_json(path_of(file)), stages)


def from_json(values: dict, stages: dict[str, type]) -> Settings:
    """The inverse of `to_json`, also where JSON made lists of tuples: of each field what tyro would make of
    it as a flag. ValueError naming a wrong field."""
    own = dict(values)
    stage = own.pop("stage", None)
    if stage not in list(stages):
        raise ValueError(f'"stage" is {stage!r:.200}; expected one of {", ".join(stages)}')
    kind = stages[stage]
    hints = get_type_hints(kind, include_extras=True)
    known = [setting.name for setting in fields(kind)]
    wrong = own.keys() ^ set(known)
    if wrong:
        names = ", ".join(map(repr, sorted(wrong)))
        raise ValueError(f"stage {stage}: unknown or missing: {names} (another version's, or misspelt)")
    return kind(**{name: restored_value(name, own[name], hints[name]) for name in known})


def restored_value(name: str, value: Any, hint: Any) -> Any:
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
    if isinstance(value, list):
        value = tuple(value)
    if spec.is_instance(value):
        with suppress(ValueError):
            read = spec.instance_from_str(spec.str_from_instance(value))
            if read == value:  # so "0.1" is no number, and 1.0 no whole one
                return read
    raise ValueError(f"field {name!r} is {value!r:.200}; expected {spec.metavar}")
