"""What may teach, told apart by its source; read and checked before weights load.

    source           teacher                                     memory beside the student's
    base             the base, adapter off                       none
    ema              the student's own moving average (--ema)    none beyond what --ema keeps
    an adapter       a LoRA of any rank on the base              its weights, in the compute dtype
    a transformer    the base with all weights fine-tuned        a transformer, in the compute dtype
    a pipeline       another model on the same latents, with     its transformer, in the compute dtype; text
                     encoders, size, family, guidance its own    is encoded beforehand, its encoders freed

A transformer of its own may stand on another device, or stay on the CPU and come to the device one layer at a
time (--teacher-devices); with --shard-size it is sharded like the student's base.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from opd.adapters import BASE, EMA
from opd.config import DistillationConfig
from opd.errors import require
from opd.files import locate_part, read_json
from opd.formats.lora_files import WEIGHTS, Lora
from opd.model import Model, find_device

OFFLOAD = "offload"
TRANSFORMER = "diffusion_pytorch_model.safetensors"
# What gives the numbers of a latent their meaning, in the config of a VAE and in that of a scheduler.
LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
PREDICTION = "prediction_type"
FOREIGN = ("model.diffusion_model.", "joint_blocks.")  # what whole checkpoints of other tools begin with
CURE = "to learn from another architecture name a whole pipeline's directory"


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
            weights = {bare(key): tensor for key, tensor in load_file(file).items()}
            # Not strict: shards hold a part each. That none is missing was checked when they were read.
            model.transformer.load_state_dict(weights, strict=False)
        if self.offload:
            # With a stream the next layer travels while this one computes.
            model.transformer.enable_group_offload(
                onload_device=model.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=model.device.type == "cuda",
            )
        else:
            model.transformer.to(model.device)
        return model


def read_teachers(cfg: DistillationConfig, model: Model) -> dict[str, Lora | Whole]:
    """Every teacher that is not made of the student itself. ValueError / FileNotFoundError, naming the
    teacher, for one that cannot teach this student."""
    teachers = {}
    for name, source in cfg.teachers.items():
        if source not in (BASE, EMA):
            teachers[name] = read_teacher(cfg, name, source, model)
    if cfg.cold_start == "merge" and not cfg.merge_from:
        merged = cfg.merged().keys() & teachers.keys()
        whole = [name for name in teachers if name in merged and isinstance(teachers[name], Whole)]
        way_out = "name adapters with --merge-from, or use --cold-start base"
        no_adapters = f"--cold-start merge: the teachers {whole} are no adapters, which alone can be merged"
        require(not whole, f"{no_adapters}; {way_out}")
    return teachers


def described(teacher: Lora | Whole) -> str:
    """What a log says of it."""
    if isinstance(teacher, Lora):
        return f"sha256 {teacher.sha256[:12]}  |update| {teacher.norm():.3f}"
    skeleton = teacher.model.skeleton
    millions = sum(parameter.numel() for parameter in skeleton.parameters()) / 1e6
    return f"{type(skeleton).__name__} of {millions:.1f} M parameters on {teacher.model.device}"


def read_teacher(cfg: DistillationConfig, name: str, source: str, model: Model) -> Lora | Whole:
    place = cfg.teacher_device(name)
    path = locate_part("teacher", source.partition(":alpha=")[0], ["*.json"])
    if (path / "model_index.json").is_file():
        return Whole(source, read_pipeline(cfg, name, path, model), [], place == OFFLOAD)
    if holds_transformer(path, model):
        path = locate_part("teacher", source, ["*.json", "*.safetensors"])
        files = read_transformer(source, path, model)
        return Whole(source, twin(cfg, model, device_of(place, model)), files, place == OFFLOAD)
    adapter = "an adapter on the student's base, and stands where that stands"
    require(place == "", f"--teacher-devices {name}={place}: {source!r} is {adapter}; leave it out")
    return model.read_lora(source)


def device_of(place: str, model: Model) -> torch.device:
    if place in ("", OFFLOAD):
        return model.device
    return find_device(place, "teacher-devices")


def twin(cfg: DistillationConfig, model: Model, device: torch.device) -> Model:
    """The student's model anew, for weights of its own; where it is on the same device, it shares the
    student's conditions."""
    if device == model.device:
        return replace(model, teachers={})
    return Model.plan(cfg.model, cfg.dtype, cfg.resolution, device, cfg.t5)


# ---- a fine-tuned transformer ------------------------------------------------------------------------------


def holds_transformer(path: Path, model: Model) -> bool:
    """Whether a directory, or a .safetensors file, holds a transformer's own weights. ValueError for those
    under the names of another tool."""
    if path.is_dir():
        adapter = any((path / name).is_file() for name in ("adapter_config.json", *WEIGHTS))
        configs = [path / "config.json", path / "transformer" / "config.json"]
        return not adapter and any(config.is_file() for config in configs)
    try:
        with safe_open(path, "pt") as content:
            keys = list(content.keys())
    except SafetensorError:
        return False  # what reads adapters says what is wrong with it
    foreign = any(key.startswith(FOREIGN) and ".lora" not in key for key in keys)
    tool = f"{type(model.skeleton).__name__}.from_single_file(FILE).save_pretrained(FOLDER)"
    names = "names its weights as other tools than diffusers do"
    require(not foreign, f"teacher {str(path)!r} {names}; convert it with {tool}")
    own = model.skeleton.state_dict().keys()
    return any(bare(key) in own for key in keys)


def read_transformer(source: str, path: Path, model: Model) -> list[Path]:
    """The files of its weights. ValueError unless they are of the base's architecture."""
    files = [path]
    if path.is_dir():
        if not (path / "config.json").is_file():
            path = path / "transformer"
        check_config(source, read_json(path / "config.json"), model)
        files = weight_files(source, path)
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as content:
            shapes |= {bare(key): tuple(content.get_slice(key).get_shape()) for key in content.keys()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.skeleton.state_dict().items()}
    other = [name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]]
    problems = {
        "lacks": wanted.keys() - shapes.keys(),
        "has beside the base's": shapes.keys() - wanted.keys(),
        "has in other shapes": other,
    }
    for problem, names in problems.items():
        if names:
            found = f"it {problem} {len(names)} weights: {sorted(names)[:3]}"
            raise ValueError(
                f"teacher {source!r} is no transformer of the base's architecture: {found}; {CURE}"
            )
    return files


def check_config(source: str, config: dict, model: Model) -> None:
    """ValueError where the configs disagree on what shapes cannot tell, like the number of heads."""
    base = dict(model.skeleton.config) | {"_class_name": type(model.skeleton).__name__}
    if "_class_name" in config:
        # What was saved while FSDP had it sharded may be called so.
        config = config | {"_class_name": config["_class_name"].removeprefix("FSDP")}
    for key in config.keys() & base.keys():
        matters = key == "_class_name" or not key.startswith("_") and key != "sample_size"
        same = config[key] == base[key] or isinstance(config[key], list) and config[key] == list(base[key])
        if matters and not same:
            differs = f"{key} is {config[key]!r} in its config.json, {base[key]!r} in the base's"
            raise ValueError(
                f"teacher {source!r} is no transformer of the base's architecture: {differs}; {CURE}"
            )


def weight_files(source: str, folder: Path) -> list[Path]:
    """One file, or the shards that its index names."""
    index = folder / f"{TRANSFORMER}.index.json"
    names = [TRANSFORMER]
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"teacher {source!r}: {folder} holds no {name}")
    return [folder / name for name in names]


def bare(key: str) -> str:
    return key.removeprefix("transformer.")


# ---- another pipeline --------------------------------------------------------------------------------------


def read_pipeline(cfg: DistillationConfig, name: str, path: Path, student: Model) -> Model:
    """The planned model. ValueError unless its latents and its velocity mean what the student's do."""
    source = cfg.teachers[name]
    device = device_of(cfg.teacher_device(name), student)
    try:
        teacher = Model.plan(source, cfg.dtype, student.resolution, device, cfg.t5)
    except ValueError as error:
        raise ValueError(f"teacher {name!r}: {error}") from error
    check_same_space(source, teacher, student)
    return teacher


def check_same_space(source: str, teacher: Model, student: Model) -> None:
    cannot = f"teacher {source!r} works on other latents than the student's base"
    shapes = f"{teacher.shape} instead of {student.shape} at the same resolution"
    require(teacher.shape == student.shape, f"{cannot}: {shapes}")
    vaes = [part_config(model, "vae", "config.json") for model in (teacher, student)]
    for key in LATENTS:
        theirs, ours = (vae[key] if key in vae else None for vae in vaes)
        require(theirs == ours, f"{cannot}: the VAE's {key} is {theirs} instead of {ours}")
    schedulers = [part_config(model, "scheduler", "scheduler_config.json") for model in (teacher, student)]
    name = schedulers[0]["_class_name"]
    other = f"teacher {source!r} predicts something else than the student"
    require(name.startswith("FlowMatch"), f"{other}: its scheduler is a {name}, which is no flow matching")
    theirs, ours = (scheduler[PREDICTION] if PREDICTION in scheduler else None for scheduler in schedulers)
    require(theirs == ours, f"{other}: its scheduler's {PREDICTION} is {theirs} instead of {ours}")


def part_config(model: Model, part: str, name: str) -> dict:
    return read_json(model.folder / part / name)
