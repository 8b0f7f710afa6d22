"""What may teach, told apart by its source; read and checked before weights load.

    source           teacher                                     memory beside the student's
    base             the base, adapter off                       none
    ema              the student's own moving average (--ema)    none beyond what --ema keeps
    an adapter       a LoRA of any rank on the base              its weights, in the compute dtype
    a transformer    the base with all weights fine-tuned        a transformer, in the compute dtype
    a pipeline       another model on the same latents, with     its transformer, in the compute dtype; text
                     encoders, size, family, guidance its own    is encoded beforehand, its encoders freed

A transformer of its own may stand on another device, or stay on the CPU and come to the device one block at a
time (--teacher-devices); with --shard-size it is sharded like the student's base.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opd import lora
from opd.config import DistillationConfig
from opd.files import read_json, reading
from opd.formats.hub import check_weights, locate_part, stored, weight_files
from opd.formats.lora_files import FILES, NATIVE, Lora
from opd.model import Model, check_finite

OFFLOAD = "offload"
# What tells kinds of teachers apart; of the weights only an adapter's are fetched at once.
KINDS = ["model_index.json", "config.json", "transformer/config.json", *FILES]
WHOLE = "model.diffusion_model."  # what the transformer's names begin with in files that hold encoders too


@dataclass(frozen=True)
class Whole:
    """A teacher with a transformer of its own, which is not loaded yet."""

    source: str
    model: Model
    files: list[Path]
    """Weights in place of those in the pipeline's directory; none for a pipeline."""
    offload: bool

    def load(self, vae: torch.nn.Module) -> Model:
        """The model with its transformer, frozen, in its place; latents are the student's, so is the VAE."""
        model = self.model
        model.vae = vae
        model.transformer = model.family.load_transformer(model.folder, model.dtype)
        for file in self.files:
            weights = by_own_names(load_file(file), model.skeleton)
            # Not strict: shards hold a part each. That none is missing was checked when they were read.
            model.transformer.load_state_dict(weights, strict=False)
        with reading(f"teacher {self.source!r}"):
            check_finite(model.transformer)
        if self.offload:
            # With a stream the next block travels while this one computes, and nobody waits for its end.
            cuda = model.device.type == "cuda"
            model.transformer.enable_group_offload(
                onload_device=model.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=cuda,
                record_stream=cuda,
            )
        else:
            model.transformer.to(model.device)
        return model


def read_teachers(cfg: DistillationConfig, model: Model) -> dict[str, Lora | Whole]:
    """Every teacher that is not made of the student itself. ValueError / FileNotFoundError, naming the
    teacher, for one that cannot teach this student."""
    teachers = {}
    for name, source in cfg.teachers.items():
        if source not in lora.WITHOUT_WEIGHTS:
            teachers[name] = read_teacher(cfg, name, source, model)
    if cfg.cold_start == "merge":
        whole = [name for name in cfg.merged() if isinstance(teachers.get(name), Whole)]
        if whole and not cfg.merge_from:
            raise ValueError(
                f"--cold-start merge: the teachers {whole} are no adapters, which alone can be merged; "
                "name adapters with --merge-from, or use --cold-start base"
            )
    return teachers


def read_teacher(cfg: DistillationConfig, name: str, source: str, model: Model) -> Lora | Whole:
    """One teacher, told apart by what its source holds. A new kind of teacher is a branch here."""
    place = cfg.teacher_device(name)
    path = locate_part("teacher", source.partition(":alpha=")[0], KINDS)
    with reading(f"teacher {source!r}"):
        if (path / "model_index.json").is_file():
            return Whole(source, read_pipeline(cfg, name, model), [], place == OFFLOAD)
        if holds_transformer(path, model.skeleton):
            # Its weights are fetched once it is clear that they are wanted.
            files = read_transformer(locate_part("teacher", source, ["*.json", "*.safetensors"]), model)
            return Whole(source, twin(cfg, model, device_of(cfg, place, model)), files, place == OFFLOAD)
    if place:
        adapter = "an adapter on the student's base, and stands where that stands"
        raise ValueError(f"--teacher-devices {name}={place}: {source!r} is {adapter}; leave it out")
    return model.read_lora(source)


def described(teacher: Lora | Whole) -> str:
    """What a log says of it."""
    if isinstance(teacher, Lora):
        return f"sha256 {teacher.sha256[:12]}  |update| {teacher.norm():.3f}"
    skeleton = teacher.model.skeleton
    millions = sum(parameter.numel() for parameter in skeleton.parameters()) / 1e6
    return f"{type(skeleton).__name__} of {millions:.1f} M parameters on {teacher.model.device}"


def device_of(cfg: DistillationConfig, place: str, model: Model) -> torch.device:
    if place in ("", OFFLOAD):
        return model.device
    with reading(f"--teacher-devices {place!r}"):
        if cfg.dry_run:  # perhaps on another machine
            return torch.device(place)
        return torch.empty(0, device=place).device


# ---- a fine-tuned transformer ------------------------------------------------------------------------------


def holds_transformer(path: Path, skeleton: ModelMixin) -> bool:
    """Whether a directory, or a .safetensors file, holds a transformer's own weights."""
    if not path.is_file():  # a folder, which the Hub's client leaves out where no file of it was wanted
        adapter = any((path / name).is_file() for name in FILES)
        return not adapter and any(
            (path / name).is_file() for name in ("config.json", "transformer/config.json")
        )
    try:
        names = stored([path]).keys()
    except SafetensorError:
        return False  # what reads adapters says what is wrong with it
    own = skeleton.state_dict().keys()
    return has_authors_names(names) or any(name.removeprefix("transformer.") in own for name in names)


def has_authors_names(names: Iterable[str]) -> bool:
    """Whether there are whole weights among them by the names of the model's authors."""
    layers = [name.removeprefix(WHOLE).removesuffix(".weight") for name in names if name.endswith(".weight")]
    return any(NATIVE.match(layer) and "lora" not in layer for layer in layers)


def by_own_names(tensors: dict[str, Tensor], skeleton: ModelMixin) -> dict[str, Tensor]:
    """A transformer's tensors by diffusers' names. Those of its authors, which single files and ComfyUI have,
    are converted by diffusers; one that it passes over keeps its name. ValueError where it cannot."""
    if not has_authors_names(tensors):
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if any(name.startswith(WHOLE) for name in tensors):
        tensors = {name.removeprefix(WHOLE): tensors[name] for name in tensors if name.startswith(WHOLE)}
    left = dict(tensors)  # the converters take out what they use
    with reading("its names cannot be converted"):  # a library's errors
        converted = SINGLE_FILE_LOADABLE_CLASSES[type(skeleton).__name__]["checkpoint_mapping_fn"](left)
    return left | converted


def read_transformer(path: Path, model: Model) -> list[Path]:
    """The files of its weights. ValueError unless they are of the base's architecture."""
    files = [path]
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                path = path / "transformer"
            check_config(read_json(path / "config.json"), model.skeleton)
            files = weight_files(path)
        check_weights(by_own_names(stored(files), model.skeleton), model.skeleton)
    except ValueError as error:
        another = "to learn from another architecture name a whole pipeline's directory"
        raise ValueError(f"it is no transformer of the base's architecture: {error}; {another}") from error
    return files


def check_config(config: dict, skeleton: ModelMixin) -> None:
    """ValueError where the configs disagree on what shapes cannot tell, like the number of heads."""
    base = json.loads(skeleton.to_json_string())
    for key in sorted(config.keys() & base.keys() - {"_diffusers_version", "_name_or_path", "sample_size"}):
        if config[key] != base[key]:
            raise ValueError(f"{key} is {config[key]!r} in its config.json, {base[key]!r} in the base's")


def twin(cfg: DistillationConfig, model: Model, device: torch.device) -> Model:
    """The student's model anew, for weights of its own; where it is on the same device, it shares the
    student's conditions."""
    if device == model.device:
        return replace(model, teachers={})
    return Model.plan(cfg.model, cfg.dtype, cfg.resolution, device, cfg.t5)


# ---- another pipeline --------------------------------------------------------------------------------------


def read_pipeline(cfg: DistillationConfig, name: str, student: Model) -> Model:
    """The planned model. ValueError unless its latents and its velocity mean what the student's do."""
    device = device_of(cfg, cfg.teacher_device(name), student)
    teacher = Model.plan(cfg.teachers[name], cfg.dtype, student.resolution, device, cfg.t5)
    theirs, ours = meaning_of_latents(teacher), meaning_of_latents(student)
    for what in theirs:
        if theirs[what] != ours[what]:
            apart = f"its {what} is {theirs[what]}, the student's {ours[what]}"
            raise ValueError(f"it works on other latents than the student's base: {apart}")
    return teacher


def meaning_of_latents(model: Model) -> dict:
    """What gives the numbers of latents and velocities their meaning."""
    vae = read_json(model.folder / "vae" / "config.json")
    meaning = {"shape at the same resolution": model.shape}
    for name in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        meaning[f"VAE's {name}"] = vae.get(name)
    return meaning
