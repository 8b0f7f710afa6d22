"""A student's folder: weights that other programs read, and how it is meant to be sampled.

A student that absorbed its teachers' guidance is at its best at a scale of its own, which its weights cannot
tell. `deployment.json` in its folder says it; the copy of the weights for diffusers, which travels alone,
holds the same text in its metadata.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from opd.cli import Finite, check_bounds, given_fields
from opd.config import RunConfig
from opd.families import has_t5
from opd.files import read_json, reading, write_json, write_safetensors
from opd.formats.lora_files import KEY, WEIGHTS, find_adapter
from opd.formats.settings import Settings
from opd.lora import BASE
from opd.model import Model
from opd.ranks import say

FILE = "deployment.json"


@dataclass(frozen=True)
class Deployment:
    model: str  # the base: pipeline directory or Hub id
    guidance: float
    resolution: str  # pixels per side, or HEIGHTxWIDTH
    steps: int  # ODE steps
    t5: bool  # whether the pipeline has a T5 encoder, and it is used
    max_sequence_length: int  # what diffusers' pipeline must be told to see the same text

    def text(self) -> str:
        """As metadata of a safetensors file: equal records are equal bytes."""
        return json.dumps(asdict(self), sort_keys=True)

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))


def deployment_of(cfg: RunConfig, model: Model) -> Deployment:
    """What a run says about its student."""
    guidance = cfg.deployed_guidance()
    _, call = model.family.arguments(model.folder, cfg.t5, guidance)
    return Deployment(
        model=cfg.model,
        guidance=guidance,
        resolution=model.resolution,
        steps=cfg.eval_steps,
        t5=cfg.t5 and has_t5(model.folder),
        max_sequence_length=call["max_sequence_length"],
    )


# ---- writing -----------------------------------------------------------------------------------------------


def save_lora(
    folder: Path,
    weights: dict[str, torch.Tensor],
    name: str,
    rank: int,
    alpha: float,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write adapter `name` from full (unsharded) weights keyed as in `parameters_of`, each file whole or not
    at all. `metadata` (one key) goes into the file that is used without its folder.

    `adapter_model.safetensors` + `adapter_config.json` is a PEFT directory,
    `pytorch_lora_weights.safetensors` is for `pipe.load_lora_weights`. In both alpha / r is folded into B and
    the config says alpha = r: readers that look at no config (ComfyUI) mean the same update.
    """
    folded = {}
    for key, weight in weights.items():
        weight = weight.detach().cpu()
        if ".lora_B." in key:
            weight = weight * (alpha / rank)
        folded[key.replace(f".{name}.weight", ".weight")] = weight.contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({key.partition(".lora_")[0] for key in folded}),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
    for_diffusers = {"transformer." + key: weight for key, weight in folded.items()}
    write_safetensors(folder / "pytorch_lora_weights.safetensors", for_diffusers, metadata)
    for_peft = {"base_model.model." + key: weight for key, weight in folded.items()}
    write_safetensors(folder / "adapter_model.safetensors", for_peft)


def save_transformer(
    folder: Path, transformer: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write all weights of the transformer as the `transformer/` directory of a pipeline, in `dtype`."""
    tensors = {n: w.cpu().to(dtype).contiguous() for n, w in weights.items()}
    tensors |= {
        n: b.cpu().contiguous() for n, b in transformer.named_buffers() if n in transformer.state_dict()
    }
    settings = json.loads(transformer.to_json_string())
    # FSDP gives a module that it shards a class of its own, which no other program knows.
    settings["_class_name"] = settings["_class_name"].removeprefix("FSDP")
    write_json(folder / "config.json", settings)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)


# ---- reading -----------------------------------------------------------------------------------------------


def guidance_of(adapters: dict[str, str], guidance: float | None = None) -> dict[str, float]:
    """Name -> guidance of the base and of every adapter (name -> source): `guidance`, or where that is None
    what is recorded with the adapter, 1 where nothing is."""
    if guidance is not None:
        return dict.fromkeys([BASE, *adapters], guidance)
    recorded_with = records_of(adapters)
    return {name: recorded_with.get(name, {}).get("guidance", 1.0) for name in (BASE, *adapters)}


def completed(args: Settings, words: list[str] | None, names: tuple[str, ...]) -> Settings:
    """`args` of a program, with what is recorded with its adapters in those fields among `names` that its
    command line (`words`) does not name; a line says what. Of several records that of the largest guidance
    counts."""
    given, records = given_fields(sys.argv[1:] if words is None else words), records_of(args.adapters)
    if not records:
        return args
    scales = guidance_of(args.adapters)
    name = max(records, key=scales.__getitem__)
    taken = {key: records[name][key] for key in names if key in records[name] and key not in given}
    if taken:
        said = ", ".join(f"{key} {value}" for key, value in taken.items())
        others = {f"{other} {scales[other]:g}" for other in records if scales[other] != scales[name]}
        if others and "guidance" in taken:
            said += f" (the largest recorded; {', '.join(sorted(others))})"
        say(f"recorded with {name}: {said}")
    args = replace(args, **taken)
    with reading(f"adapter {args.adapters[name]!r}"):
        check_bounds(args)
    return args


def records_of(adapters: dict[str, str]) -> dict[str, dict]:
    """Name -> what is recorded with an adapter, of those that have a record."""
    records = {name: recorded(source) for name, source in adapters.items() if name != BASE}
    return {name: record for name, record in records.items() if record}


KINDS = {"guidance": (float, int), "steps": (int,), "resolution": (str,), "t5": (bool,)}
"""What programs take from a record."""


def recorded(source: str) -> dict:
    """What `deployment.json` in the folder of an adapter says, else the metadata of a single file; {} where
    neither is. ValueError naming the file that is wrong."""
    path = find_adapter(source)
    file = path.parent / FILE
    if path.name in WEIGHTS and file.is_file():
        record = read_json(file)
    else:
        file = path
        with reading(f"adapter {source!r}: {path}"), safe_open(path, "pt") as weights:
            record = dict(json.loads((weights.metadata() or {}).get(KEY, "{}")))
    for key in KINDS.keys() & record.keys():
        value, kinds = record[key], KINDS[key]
        if type(value) not in kinds or key == "guidance" and value not in Finite:
            raise ValueError(f"{file}: {key!r} is {value!r}; it must be a {kinds[0].__name__}, and finite")
    return record
