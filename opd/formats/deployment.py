"""How a student is meant to be sampled: recorded beside its weights, the default of whoever samples it.

A student that absorbed its teachers' guidance is at its best at a scale of its own, which its weights cannot
tell. `deployment.json` in its folder says it; the copy of the weights for diffusers, which travels alone,
holds the same text in its metadata.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opd.adapters import BASE
from opd.config import RunConfig
from opd.errors import require
from opd.files import read_json, write_json
from opd.formats.lora_files import WEIGHTS, find_adapter
from opd.model import Model

FILE = "deployment.json"
KEY = "flow-opd"  # under which files of weights and pictures hold what they are


@dataclass(frozen=True)
class Deployment:
    model: str
    """The base: pipeline directory or Hub id."""
    guidance: float
    resolution: str
    """Pixels per side, or HEIGHTxWIDTH."""
    steps: int
    """ODE steps."""
    t5: bool
    """Whether T5 is used where the pipeline has one."""
    t5_tokens: int
    """Sequence length of its prompts; 0 without T5."""

    def text(self) -> str:
        """As metadata of a safetensors file: equal records are equal bytes."""
        return json.dumps(asdict(self), sort_keys=True)

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))


def deployment_of(cfg: RunConfig, model: Model) -> Deployment:
    """What a run says about its student."""
    tokens = 0
    if cfg.t5:
        tokens = model.family.T5_TOKENS
    return Deployment(
        model=cfg.model,
        guidance=cfg.deployed_guidance(),
        resolution=model.resolution,
        steps=cfg.eval_steps,
        t5=cfg.t5,
        t5_tokens=tokens,
    )


def read_deployment(source: str) -> Deployment | None:
    """What is recorded with an adapter (directory, file or Hub id), None where nothing is.

    `deployment.json` in the folder of an adapter counts, else the metadata of a single file. ValueError
    naming the file that is wrong.
    """
    path = find_adapter(source)
    file = path.parent / FILE
    if path.name in WEIGHTS and file.is_file():
        return from_json(read_json(file), file)
    try:
        with safe_open(path, "pt") as weights:
            metadata = weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"adapter {source!r}: {path} is not a readable safetensors file ({error})"
        ) from error
    if KEY not in metadata:
        return None
    return from_json(json.loads(metadata[KEY]), path)


def from_json(values: dict, file: Path) -> Deployment:
    """Unknown fields are ignored. ValueError naming `file` and the field that is missing or wrong."""
    known = {}
    for setting in fields(Deployment):
        name = setting.name
        require(name in values, f"{file}: {name!r} is missing; see README, deployment.json")
        value = values[name]
        if setting.type in (float, str) and type(value) is int:
            value = setting.type(value)
        kind = setting.type.__name__
        require(type(value) is setting.type, f"{file}: {name!r} is {value!r}; expected {kind}")
        known[name] = value
    guidance = known["guidance"]
    require(math.isfinite(guidance), f"{file}: 'guidance' is {guidance}; it must be finite")
    return Deployment(**known)


def guidance_of(adapters: dict[str, str], guidance: float | None = None) -> dict[str, float]:
    """Name -> guidance of the base and of every adapter (name -> source): `guidance`, or where that is None
    what is recorded with the adapter, 1 where nothing is."""
    if guidance is not None:
        return dict.fromkeys([BASE, *adapters], guidance)
    scales = {BASE: 1.0}
    for name, source in adapters.items():
        if name != BASE:
            deployment = read_deployment(source)
            scales[name] = deployment.guidance if deployment else 1.0
    return scales
