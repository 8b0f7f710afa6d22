"""What a run will hold in memory, predicted from its settings and the model's shapes before a weight is read.

Parameters, gradients and moments are counted. Activations are found by running one micro-batch forward and
backward, and one decoding, on tensors without storage and adding up what is alive: what autograd keeps hangs
on many small decisions of the model, which no formula would follow.
"""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from math import prod

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd import lora, ranks
from opd.conditioning import WINDOW
from opd.config import (
    DistillationConfig,
    GRPOConfig,
    NFTConfig,
    RewardedConfig,
    Rollout,
    RunConfig,
    SFTConfig,
)
from opd.data import micro_batches
from opd.families import Condition
from opd.families._parts import children_of, vae_skeleton, with_fused_norms
from opd.files import resolve
from opd.formats.hub import stored, weight_files
from opd.formats.latents import load_captions
from opd.formats.prompts import load_tasks
from opd.formats.teacher_files import read_teachers
from opd.lora import STUDENT, Lora
from opd.model import Model
from opd.report.shown import SHOWN

IN_TURN = ("activations", "decoding", "encoding")
"""Parts of which only the largest counts: pictures are decoded, and prompts encoded, between the passes of
training."""
GIB = 2**30


# ---- what a user sees --------------------------------------------------------------------------------------


def forecast(cfg: RunConfig) -> str:
    """The prediction for one rank on a GPU in words, as comment lines under the printed settings. Nothing is
    downloaded for it: a teacher that is not on this disk is taken for a LoRA of --rank. ValueError where a
    teacher cannot teach the run."""
    if not resolve(cfg.model).exists():
        return f"# memory: not predicted, as model {cfg.model!r} is not on this disk"
    # Whatever this machine has: memory is what a GPU is short of, and there --dtype auto is bfloat16.
    model = Model.plan(cfg.model, cfg.dtype, cfg.resolution, torch.device("cuda"), cfg.t5)
    parts, assumed = predict_run(cfg, model), ""
    absent = absent_teachers(cfg)
    if absent:
        assumed = f"; not on this disk, taken for a LoRA of --rank {cfg.rank}: {', '.join(absent)}"
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [f"# predicted memory of one of {ranks.declared_world()} GPUs, {dtype}{assumed}:"]
    for name, size in {**parts, "peak": peak(parts)}.items():
        if size > 0:
            lines.append(f"#   {name:13}{in_words(size):>12}")
    return "\n".join(lines)


def in_words(size: int) -> str:
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.2f} MiB"


# ---- the prediction ----------------------------------------------------------------------------------------


def predict_run(cfg: RunConfig, model: Model) -> dict[str, int]:
    """Bytes by what they hold, on one of the declared ranks."""
    vae = vae_skeleton(model.folder)
    text = model.family.text_shapes(model.folder, cfg.t5) | picture_shapes(cfg, model)
    pixels = prod(model.pixels)
    images = min(max(cfg.micro_batch, SHOWN), max(1, model.decode_pixels // pixels))
    parts = predict(cfg, model, text) | {"vae": 4 * numbers(vae.parameters())}
    return parts | {"decoding": decoding(model, vae, images), "encoding": encoding(cfg, model)}


def encoding(cfg: RunConfig, model: Model) -> int:
    """Bytes of the text encoders where they come back beside the model, for prompts past the first window."""
    if prompts_of_run(cfg) <= WINDOW:
        return 0
    absent, _ = model.family.arguments(model.folder, cfg.t5, 1.0)
    size = 0
    for part in model.folder.glob("text_encoder*"):
        if part.name in absent:
            continue
        if any(part.glob("*.safetensors")):
            size += model.dtype.itemsize * numbers(stored(weight_files(part, "model")).values())
        else:  # pickles, as large as they are stored
            size += sum(file.stat().st_size for file in part.glob("*.bin"))
    return size


def prompts_of_run(cfg: RunConfig) -> int:
    """How many prompts a run reads at most, as far as its files are on this disk."""
    drawn = cfg.iterations * cfg.prompts_per_step
    if isinstance(cfg, SFTConfig):
        file = resolve(cfg.data) / "metadata.jsonl"
        return min(drawn, len(file.read_text().splitlines())) if file.is_file() else drawn
    if all(resolve(path).is_file() for path in cfg.prompts.values()):
        return min(drawn, sum(map(len, load_tasks(cfg.prompts).values())))
    return drawn


def picture_shapes(cfg: RunConfig, model: Model) -> dict[str, tuple[int, ...]]:
    """Of the latents of those source pictures that take the most tokens, in the prompt files, or the data,
    on this disk."""
    if model.family.EDITING is None:
        return {}
    if isinstance(cfg, SFTConfig):
        folder = resolve(cfg.data)
        prompts = load_captions(folder) if (folder / "metadata.jsonl").is_file() else []
    else:
        found = {task: path for task, path in cfg.prompts.items() if resolve(path).is_file()}
        prompts = [prompt for pool in load_tasks(found).values() for prompt in pool]
    most = {}
    for shape in dict.fromkeys(filter(None, model.shapes([prompt.asked for prompt in prompts]).values())):
        sizes = [map(int, size.split("x")) for size in shape.split("+")]
        latents = [model.family.latent_shape(model.folder, height, width) for width, height in sizes]
        if sum(map(prod, latents)) > sum(map(prod, most.values())):
            most = {f"picture{k}": latent for k, latent in enumerate(latents)}
    return most


def predict(cfg: RunConfig, model: Model, text: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes by what they hold, but for the VAE. `text`: shapes of a Condition."""
    weights, buffers = numbers(model.skeleton.parameters()), numbers(model.skeleton.buffers())
    width, share = model.dtype.itemsize, cfg.shard_size
    # The student, which every rank holds whole, and the memory of its start, which is frozen.
    trained = lora_numbers(cfg, model)
    base, loras, old = width * weights, 4 * trained + width * trained // share, 0
    if isinstance(cfg, NFTConfig):
        old = 4 * trained
    if cfg.full:
        trained, base, loras = weights // share, 4 * weights, 0
    average = 4 * trained * (cfg.ema > 0)
    return {
        "base": base // share + width * (buffers + gathered(cfg, model)),
        "adapters": loras + old,
        "teachers": held_by_teachers(cfg, model) // share,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "average": average,
        # All that a step of several updates changes, as it was before.
        "to undo": (12 * trained + average + old) * (isinstance(cfg, RewardedConfig) and cfg.updates > 1),
        "trajectories": trajectories(cfg, model),
        "activations": activations(cfg, model, text),
    }


def peak(parts: dict[str, int]) -> int:
    """Bytes on the device at once."""
    steady = [size for name, size in parts.items() if name not in IN_TURN]
    return sum(steady) + max(parts[name] for name in IN_TURN if name in parts)


def absent_teachers(cfg: RunConfig) -> list[str]:
    """The teachers whose weights are not on this disk."""
    if not isinstance(cfg, DistillationConfig):
        return []
    own = {name: source for name, source in cfg.teachers.items() if source not in lora.WITHOUT_WEIGHTS}
    return [name for name, source in own.items() if not resolve(source).exists()]


def held_by_teachers(cfg: RunConfig, model: Model) -> int:
    """Bytes that teachers take on the student's device."""
    if not isinstance(cfg, DistillationConfig):
        return 0
    away = absent_teachers(cfg)
    here = {name: source for name, source in cfg.teachers.items() if name not in away}
    held = len(away) * lora_numbers(cfg, model)
    for teacher in read_teachers(replace(cfg, teachers=here), model).values():
        if isinstance(teacher, Lora):
            held += numbers([*teacher.A.values(), *teacher.B.values()])
        # Of the first rank: a bare cuda is its cuda:0.
        elif (teacher.model.device.type, teacher.model.device.index or 0) == (model.device.type, 0):
            skeleton = teacher.model.skeleton
            weights = with_two_blocks(teacher.model) if teacher.offload else numbers(skeleton.parameters())
            held += weights + numbers(skeleton.buffers())
    return held * model.dtype.itemsize


def with_two_blocks(model: Model) -> int:
    """Numbers of what is in no block, of the block at work, and of the one on its way."""
    blocks = sorted(numbers(block.parameters()) for block in model.family.blocks(model.skeleton))
    return numbers(model.skeleton.parameters()) - sum(blocks[:-2])


def lora_numbers(cfg: RunConfig, model: Model) -> int:
    """How many numbers one LoRA of --rank has."""
    with FakeTensorMode():
        fresh = fresh_lora(cfg, model)
    return numbers([*fresh.A.values(), *fresh.B.values()])


def fresh_lora(cfg: RunConfig, model: Model) -> Lora:
    return lora.fresh_lora(model.skeleton, model.family.LORA_TARGETS, cfg.rank, cfg.alpha, cfg.seed)


def gathered(cfg: RunConfig, model: Model) -> int:
    """Numbers of sharded weights that stand whole on a rank; all of them where they are only replicated by
    FSDP."""
    if cfg.shard_size == 1:
        return cfg.full * numbers(model.skeleton.parameters())
    return with_two_blocks(model)


def trajectories(cfg: RunConfig, model: Model) -> int:
    """Bytes of the states that are kept, in float32, from the rollout to the update."""
    states = 0
    if isinstance(cfg, GRPOConfig):
        states = cfg.states_per_sample() + 1
    if isinstance(cfg, NFTConfig):  # the pictures' latents
        states = 1
    return 4 * states * sum(rows(cfg)) * prod(model.shape)


def rows(cfg: RunConfig) -> list[int]:
    """Samples of this rank's micro-batches."""
    samples = dict.fromkeys(range(cfg.samples_per_step()), "any")
    mine = micro_batches(samples, cfg.micro_batch, ranks.declared_world(), rank=0)
    return [len(batch.samples) for batch in mine]


def numbers(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


# ---- tensors without storage -------------------------------------------------------------------------------


def activations(cfg: RunConfig, model: Model, text: dict[str, tuple[int, ...]]) -> int:
    """Bytes of one micro-batch's forward and backward pass beyond weights and gradients, a teacher's forward
    pass in between."""
    with FakeTensorMode():
        fake, trained = without_weights(cfg, model, text)
        if cfg.checkpointing:
            fake.transformer.enable_gradient_checkpointing()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        transformer = fake.transformer
        live = LiveTensors([*transformer.parameters(), *transformer.buffers(), *(p.grad for p in trained)])
        samples, guidance = max(rows(cfg)), 1.0
        if isinstance(cfg, Rollout):
            guidance = cfg.guidance
        with live:
            v = velocity(fake, samples, text, guidance)
            if isinstance(cfg, DistillationConfig):
                with torch.no_grad():
                    velocity(fake, samples, text, max(map(cfg.guidance_of, cfg.teachers)))
            v.square().mean().backward()
        return live.peak - live.before


def without_weights(
    cfg: RunConfig, model: Model, text: dict[str, tuple[int, ...]]
) -> tuple[Model, list[nn.Parameter]]:
    """The model with a transformer without storage under the student's adapter, and what is trained of it.
    Call it under FakeTensorMode."""
    transformer = without_storage(model.skeleton, model.dtype)
    if model.device.type == "cuda":
        keep_of_norms_what_a_gpu_keeps(transformer)
    fake = replace(model, transformer=transformer, device=torch.device("cpu"))
    fake.negative = condition(model, text)
    if cfg.full:
        return fake, list(transformer.requires_grad_(True).parameters())
    lora.attach(transformer, STUDENT, fresh_lora(cfg, model), torch.float32)
    for layer in lora.lora_layers(transformer):
        layer.switch(STUDENT)
    trained = list(lora.parameters_of(transformer, STUDENT).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return fake, trained


def keep_of_norms_what_a_gpu_keeps(transformer: nn.Module) -> None:
    """A CPU computes an RMSNorm in pieces and keeps them. A GPU keeps what it keeps of a LayerNorm: its
    input, and a number or two per row."""
    for parent, name, norm in children_of(transformer, nn.RMSNorm):
        fused = nn.LayerNorm(norm.normalized_shape, bias=False, dtype=transformer.dtype)
        setattr(parent, name, fused.requires_grad_(False))


def velocity(fake: Model, samples: int, text: dict[str, tuple[int, ...]], guidance: float) -> Tensor:
    conditions = [condition(fake, text) for _ in range(samples)]
    return fake.velocity(torch.empty(samples, *fake.shape), torch.empty(samples), conditions, guidance)


def condition(model: Model, text: dict[str, tuple[int, ...]]) -> Condition:
    return {name: torch.empty(shape, dtype=model.dtype) for name, shape in text.items()}


def decoding(model: Model, vae: nn.Module, images: int) -> int:
    """Bytes beyond the VAE's weights while it decodes so many images at once."""
    with FakeTensorMode():
        fake = without_storage(vae, torch.float32)
        live = LiveTensors([*fake.parameters(), *fake.buffers()])
        with live:
            model.family.decode(fake, torch.empty(images, *model.shape))
        return live.peak - live.before


def without_storage(skeleton: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """A frozen one of the same shapes, which computes shapes only, as a CPU would. Call it under
    FakeTensorMode."""
    torch.set_default_dtype(dtype)
    try:
        fake = type(skeleton).from_config(skeleton.config)
    finally:
        torch.set_default_dtype(torch.float32)
    return with_fused_norms(fake).requires_grad_(False).eval()


class LiveTensors(TorchDispatchMode):
    """The bytes of all tensors that are alive, and their peak: what torch.cuda.max_memory_allocated is for a
    CPU. Scratch memory inside an operator is not seen."""

    def __init__(self, tensors: Iterable[Tensor] = ()):
        """`tensors`: those that are there before."""
        super().__init__()
        self.known = {}
        self.bytes = self.peak = 0
        self.add(tensors)
        self.before = self.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.add([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
        return output

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known[key] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, key)
        self.peak = max(self.peak, self.bytes)

    def forget(self, key: int) -> None:
        self.bytes -= self.known.pop(key)
