"""What `opd.bench` measures: a pipeline's shapes with random weights, random adapters and the settings of a
run, made without any file. The stages on top of it are the real ones."""

import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from opd import adapters, compiled, memory
from opd.adapters import START, STUDENT, Lora
from opd.cli import dashed
from opd.config import DistillationConfig, GRPOConfig, RunConfig
from opd.data import Prompt, seed_of
from opd.errors import require
from opd.families import Condition, sd3
from opd.grpo import GRPO
from opd.model import Model, compute_dtype
from opd.optim import Trained
from opd.rewards import find_reward
from train import Distillation

ANCHORS = ("further", "teacher", "base", "none")
DTYPES = ("auto", "bfloat16", "float32")
STAGES = ("opd", "grpo")
REWARD = "opd.bench.model:random_reward"
FURTHER = "further"  # the teacher that is nothing but the anchor


@dataclass(frozen=True)
class Size:
    """Shapes of a model, and the work that is measured on it unless flags say otherwise."""

    transformer: dict
    """Arguments of SD3Transformer2DModel."""
    factor: int
    """Pixels of the image per pixel of the latents, along a side."""
    shift: float
    """What the noise levels are shifted by, towards noise."""
    tokens: int
    """Text tokens of a prompt: CLIP's and T5's, or CLIP's alone."""
    t5: bool
    work: dict
    """Defaults of the flags."""


SIZES = {
    "tiny": Size(
        transformer=dict(
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            caption_projection_dim=64,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            qk_norm="rms_norm",
        ),
        factor=8,
        shift=3.0,
        tokens=4,
        t5=False,
        work=dict(pixels=64, prompts_per_step=6, group=2, micro_batch=4, states=3, rank=4),
    ),
    # The shipped miniature's.
    "mini": Size(
        transformer=dict(
            num_layers=4,
            attention_head_dim=48,
            num_attention_heads=4,
            caption_projection_dim=192,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=12,
            sample_size=12,
            in_channels=8,
            out_channels=8,
            qk_norm="rms_norm",
        ),
        factor=2,
        shift=2.0,
        tokens=12,
        t5=False,
        work=dict(pixels=24, prompts_per_step=30, group=1, micro_batch=30, states=10, rank=32),
    ),
    # 77 tokens of CLIP, 128 of T5.
    "sd35-medium": Size(
        transformer=dict(
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            sample_size=128,
            in_channels=16,
            out_channels=16,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        ),
        factor=8,
        shift=3.0,
        tokens=205,
        t5=True,
        work=dict(pixels=512, prompts_per_step=12, group=2, micro_batch=8, states=10, rank=32),
    ),
}
PATCH = 2


@dataclass(frozen=True)
class Work:
    """What one update does, read from the flags of `python -m opd.bench`."""

    size: str
    stage: str
    teachers: int
    anchor: str
    rank: int
    pixels: int
    guidance: float
    prompts_per_step: int
    group: int
    micro_batch: int
    states: int
    queries: int
    query_range: tuple[int, int]
    dtype: str
    checkpointing: bool
    compile: bool

    def check(self) -> None:
        """ValueError that names the flag, its value and what to change."""
        choices = {"size": tuple(SIZES), "stage": STAGES, "anchor": ANCHORS, "dtype": DTYPES}
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"--{name} {value!r} is unknown; choose from {', '.join(known)}")
        for name in ("teachers", "states", "micro_batch", "pixels"):
            value = getattr(self, name)
            require(value >= 1, f"--{dashed(name)} is {value}; it must be at least 1")
        size = SIZES[self.size]
        unit = size.factor * PATCH
        limit = unit * size.transformer["pos_embed_max_size"]
        fits = self.pixels % unit == 0 and self.pixels <= limit
        way_out = f"use a multiple of {unit} up to {limit}"
        require(fits, f"--pixels {self.pixels} does not fit --size {self.size}; {way_out}")
        self.config().check(1)

    def config(self) -> RunConfig:
        """The settings of a run with this work."""
        if self.stage == "grpo":
            return self.growing()
        return self.distilling()

    def distilling(self) -> DistillationConfig:
        tasks = self.tasks()
        teachers = dict.fromkeys(tasks, "random")
        anchor, weight = "base", 0.02
        if self.anchor == "teacher":
            anchor = tasks[0]
        if self.anchor == "further":
            anchor = FURTHER
            teachers[FURTHER] = "random"
        if self.anchor == "none":
            weight = 0.0
        queried = {"queries": self.queries, "query_range": self.query_range}
        settings = self.shared() | queried | {"weight": "uniform", "cold_start": "base"}
        return DistillationConfig(teachers=teachers, anchor=anchor, anchor_weight=weight, **settings)

    def growing(self) -> GRPOConfig:
        require(self.queries == 0, f"--queries {self.queries} is for --stage opd; leave it out")
        ours = f"--query-range {self.query_range} is for --stage opd; leave it out"
        require(self.query_range == (0, 0), ours)
        return GRPOConfig(train_rewards=dict.fromkeys(self.tasks(), REWARD), **self.shared())

    def shared(self) -> dict:
        """The settings of both stages."""
        return dict(
            out="unused",
            model="random",
            dtype=self.dtype,
            rank=self.rank,
            alpha=2.0 * self.rank,
            prompts=dict.fromkeys(self.tasks(), "random"),
            prompts_per_step=self.prompts_per_step,
            group=self.group,
            micro_batch=self.micro_batch,
            steps=self.states,
            guidance=self.guidance,
            checkpointing=self.checkpointing,
            compile=self.compile,
            warmup=0,
            decay="constant",
            evaluate=False,
        )

    def tasks(self) -> list[str]:
        return [f"task{k}" for k in range(self.teachers)]


# ---- the model ---------------------------------------------------------------------------------------------


@dataclass
class World:
    """A model without adapters on the CPU, and everything that a stage wants beside it."""

    cfg: RunConfig
    model: Model
    pools: dict[str, list[Prompt]]
    teachers: dict[str, Lora]
    student: Lora


def make_world(work: Work, device: torch.device) -> World:
    """The same numbers at every call with the same arguments."""
    size = SIZES[work.size]
    cfg = work.config()
    model = planned(work, device)
    model.grids[cfg.steps] = shifted_levels(cfg.steps, size.shift)
    model.transformer = random_transformer(size, model.dtype)
    teachers = {}
    if isinstance(cfg, DistillationConfig):
        names = enumerate(cfg.teachers, start=1)
        teachers = {name: random_lora(model.skeleton, cfg, number) for number, name in names}
    pools = {task: [Prompt(f"{task} prompt {n}", task) for n in range(64)] for task in cfg.prompts}
    return World(cfg, model, pools, teachers, random_lora(model.skeleton, cfg, 0))


def random_transformer(size: Size, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Frozen; drawn in `dtype`, as a large one in float32 would take twice the memory to make."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        transformer = SD3Transformer2DModel(patch_size=PATCH, **size.transformer)
    finally:
        torch.set_default_dtype(torch.float32)
    return in_dtype(transformer, dtype).requires_grad_(False).eval()


def planned(work: Work, device: torch.device) -> Model:
    """The model before its weights."""
    size = SIZES[work.size]
    dtype = compute_dtype(work.dtype, device)
    side = work.pixels // size.factor
    shape = (size.transformer["in_channels"], side, side)
    text = RandomText(text_shapes(size), dtype, device)
    return Model(sd3, Path("no-folder"), skeleton_of(work.size), shape, text, dtype, device)


@cache
def skeleton_of(size: str) -> SD3Transformer2DModel:
    """The transformer without storage; made once, as its table of positions takes seconds."""
    with torch.device("meta"):
        return SD3Transformer2DModel(patch_size=PATCH, **SIZES[size].transformer)


def text_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Shapes of a Condition's tensors."""
    width, pooled = (size.transformer[name] for name in ("joint_attention_dim", "pooled_projection_dim"))
    shapes = {"embeds": (size.tokens, width), "pooled": (pooled,)}
    if not size.t5:
        shapes["blank"] = (1, width)
    return shapes


def predicted(work: Work, device: torch.device) -> dict[str, int]:
    """What opd.memory predicts of our structure, by the names under which memory is measured."""
    cfg, model = work.config(), planned(work, device)
    text = text_shapes(SIZES[work.size])
    found = memory.predict(cfg, model, text, memory.assumed_teachers(cfg, model), world=1)
    parts = {name: found[name] for name in ("base", "optimizer", "gradients")}
    parts["adapters"] = found["adapters"] + found["teachers"]
    parts["activations"] = found["activations"] + found["trajectories"]
    return parts | {"peak": memory.peak(found)}


@dataclass(eq=False)
class RandomText:
    """In the place of text encoders and their cache: random conditions of the right shape, on the device."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    made: dict[str, Condition] = field(default_factory=dict)

    def __call__(self, prompts: list[str]) -> list[Condition]:
        for prompt in prompts:
            if prompt not in self.made:
                self.made[prompt] = self.make(prompt)
        return [self.made[prompt] for prompt in prompts]

    def make(self, prompt: str) -> Condition:
        generator = torch.Generator().manual_seed(seed_of(prompt))
        values = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return {name: value.to(self.device, self.dtype) for name, value in values.items()}


def shifted_levels(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0: shift s / (1 + (shift - 1) s) of equal steps s."""
    levels = []
    for i in range(steps + 1):
        s = 1 - i / steps
        levels.append(shift * s / (1 + (shift - 1) * s))
    return levels


def random_lora(skeleton: torch.nn.Module, cfg: RunConfig, seed: int) -> Lora:
    """An adapter whose update is not zero: a fresh one's would be."""
    lora = adapters.fresh_lora(skeleton, sd3.LORA_TARGETS, cfg.rank, cfg.alpha, seed)
    generator = torch.Generator().manual_seed(seed_of(seed, "B"))
    for b_OR in lora.B.values():
        b_OR.copy_(0.1 * torch.randn(b_OR.shape, generator=generator))
    return lora


# ---- the stages --------------------------------------------------------------------------------------------


def our_stage(world: World) -> Distillation | GRPO:
    """The real stage on the real adapters."""
    cfg, model = world.cfg, world.model
    for name, lora in world.teachers.items():
        adapters.attach(model.transformer, name, lora, model.dtype)
    attach_student(world)
    if cfg.compile:
        compiled.compile_blocks(model.family.blocks(model.transformer))
    trained = Trained(cfg, model)
    if isinstance(cfg, DistillationConfig):
        return Distillation(cfg, model, world.pools, {}, trained)
    model.decode = first_channels
    return GRPO(cfg, model, world.pools, {REWARD: find_reward(REWARD)}, trained)


def attach_student(world: World) -> None:
    """The student, the frozen memory of its start, and the model to its device: as train.py does."""
    model = world.model
    adapters.attach(model.transformer, START, world.student, model.dtype)
    adapters.attach(model.transformer, STUDENT, world.student, torch.float32)
    for parameter in adapters.parameters_of(model.transformer, STUDENT).values():
        parameter.requires_grad_(True)
    if world.cfg.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    model.transformer.to(model.device)


def merged_copy(transformer: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    """A whole float32 transformer with the adapter's update added to its weights."""
    whole = in_dtype(copy.deepcopy(transformer), torch.float32)
    with torch.no_grad():
        for module in lora.A:
            whole.get_submodule(module).weight += lora.update(module)
    return whole


def in_dtype(transformer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """diffusers' own `to` would print advice about files that there are none of."""
    return torch.nn.Module.to(transformer, dtype)


def first_channels(latents_BCHW: Tensor) -> Tensor:
    """In the place of the VAE's decoder."""
    return latents_BCHW[:, :3].float().sigmoid().cpu()


def random_reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A reward that costs next to nothing."""
    return torch.rand(len(images))
