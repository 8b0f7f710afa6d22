"""What `opd.bench` measures: a pipeline's shapes with random weights, random adapters and the settings of a
run, made without any file. The stage on top of it is the real one."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import SD3Transformer2DModel

from opd import compiled, lora
from opd.cli import Few, check_bounds
from opd.config import DistillationConfig
from opd.data import Prompt, seed_of
from opd.families import Condition, sd3
from opd.formats.lora_files import Lora
from opd.lora import START, STUDENT
from opd.model import Model, compute_dtype
from opd.optim import Trained
from opd.report import memory
from train import Distillation

FURTHER = "further"  # the teacher that is nothing but the anchor
PATCH = 2


@dataclass(frozen=True)
class Size:
    """Shapes of an SD3 model."""

    layers: int
    heads: int
    head_width: int
    text_width: int
    pooled_width: int
    channels: int
    """Of the latents."""
    positions: int
    """Patches along the largest side."""
    usual_side: int
    """Latents along a side, at the size that positions count from."""
    dual_layers: int
    """Blocks with a second attention, the first ones."""
    factor: int
    """Pixels of the image per pixel of the latents, along a side."""
    shift: float
    """What the noise levels are shifted by, towards noise."""
    tokens: int
    """Text tokens of a prompt."""
    t5: bool

    def transformer(self) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            patch_size=PATCH,
            num_layers=self.layers,
            attention_head_dim=self.head_width,
            num_attention_heads=self.heads,
            caption_projection_dim=self.head_width * self.heads,
            joint_attention_dim=self.text_width,
            pooled_projection_dim=self.pooled_width,
            pos_embed_max_size=self.positions,
            sample_size=self.usual_side,
            in_channels=self.channels,
            out_channels=self.channels,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(self.dual_layers)),
        )

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a Condition's tensors."""
        shapes = {"embeds": (self.tokens, self.text_width), "pooled": (self.pooled_width,)}
        if not self.t5:
            shapes["blank"] = (1, self.text_width)
        return shapes


# In columns: layers, heads, their width, width of text and of pooled text, latent channels, positions along a
# side, usual latents along a side, blocks with a second attention. 77 tokens are CLIP's, 128 T5's.
SIZES = {
    "tiny": Size(2, 2, 32, 64, 64, 4, 16, 8, 0, factor=8, shift=3.0, tokens=4, t5=False),
    "mini": Size(4, 4, 48, 128, 128, 8, 12, 12, 0, factor=2, shift=2.0, tokens=12, t5=False),
    "sd35-medium": Size(24, 24, 64, 4096, 2048, 16, 384, 128, 13, factor=8, shift=3.0, tokens=205, t5=True),
}


@dataclass(frozen=True)
class Work:
    """What one update does."""

    size: tyro.conf.Suppress[str]
    """A name in SIZES."""
    pixels: Few
    """Per side of the image."""
    prompts_per_step: int
    group: int
    """Trajectories per prompt."""
    micro_batch: int
    """Samples per forward pass."""
    states: int
    """Of a trajectory."""
    rank: int
    """Of every LoRA."""
    teachers: Few = 3
    """Tasks, each with a teacher; a further one is the anchor."""
    guidance: float = 1.0
    """Of the student; 1 is one forward row."""
    queries: int = 0
    """States that are trained on. 0: all."""
    query_range: tuple[int, int] = (0, 0)
    """The states to draw from."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    checkpointing: bool = False
    """Recompute activations in backward."""
    compile: bool = False
    """Our structure, compiled."""

    def check(self) -> None:
        """ValueError that names the flag, its value and what to change."""
        check_bounds(self)
        unit = SIZES[self.size].factor * PATCH
        limit = unit * SIZES[self.size].positions
        if self.pixels % unit != 0 or self.pixels > limit:
            way_out = f"use a multiple of {unit} up to {limit}"
            raise ValueError(f"--pixels {self.pixels} does not fit size {self.size}; {way_out}")
        self.config().check(1)
        if self.compile:
            compiled.check_compiler()

    def config(self) -> DistillationConfig:
        """The settings of a run with this work."""
        tasks = [f"task{k}" for k in range(self.teachers)]
        return DistillationConfig(
            out="unused",
            model="random",
            dtype=self.dtype,
            rank=self.rank,
            alpha=2.0 * self.rank,
            teachers=dict.fromkeys([*tasks, FURTHER], "random"),
            anchor=FURTHER,
            anchor_weight=0.02,
            weight="uniform",
            cold_start="base",
            prompts=dict.fromkeys(tasks, "random"),
            prompts_per_step=self.prompts_per_step,
            group=self.group,
            micro_batch=self.micro_batch,
            steps=self.states,
            queries=self.queries,
            query_range=self.query_range,
            guidance=self.guidance,
            checkpointing=self.checkpointing,
            compile=self.compile,
            warmup=0,
            decay="constant",
            evaluate=False,
        )


# What is measured on each size unless flags say otherwise.
WORKS = {
    "tiny": Work("tiny", pixels=64, prompts_per_step=6, group=2, micro_batch=4, states=3, rank=4),
    "mini": Work("mini", pixels=24, prompts_per_step=30, group=1, micro_batch=30, states=10, rank=32),
    "sd35-medium": Work(
        "sd35-medium", pixels=512, prompts_per_step=12, group=2, micro_batch=8, states=10, rank=32
    ),
}


# ---- the model ---------------------------------------------------------------------------------------------


@dataclass
class World:
    """A model without adapters, and everything that a stage wants beside it."""

    cfg: DistillationConfig
    model: Model
    pools: dict[str, list[Prompt]]
    teachers: dict[str, Lora]
    student: Lora


def make_world(work: Work, device: torch.device) -> World:
    """The same numbers at every call with the same arguments."""
    cfg, model = work.config(), planned(work, device)
    model.grids[cfg.steps] = shifted_levels(cfg.steps, SIZES[work.size].shift)
    model.transformer = random_transformer(work.size, model.dtype, device)
    loras = {name: random_lora(model.skeleton, cfg, n) for n, name in enumerate(["student", *cfg.teachers])}
    pools = {task: [Prompt(f"{task} prompt {n}", task) for n in range(64)] for task in cfg.prompts}
    return World(cfg, model, pools, student=loras.pop("student"), teachers=loras)


def random_transformer(size: str, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
    """Frozen; drawn in `dtype` on the device: in float32 it would take twice the memory, on a CPU minutes."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = SIZES[size].transformer()
    finally:
        torch.set_default_dtype(torch.float32)
    return in_dtype(transformer, dtype).requires_grad_(False).eval()


def planned(work: Work, device: torch.device) -> Model:
    """The model before its weights."""
    size, dtype = SIZES[work.size], compute_dtype(work.dtype, device)
    side = work.pixels // size.factor
    text = RandomText(size.text_shapes(), dtype, device)
    shape = (size.channels, side, side)
    return Model(sd3, Path("no-folder"), skeleton_of(work.size), shape, text, dtype, device)


@cache
def skeleton_of(size: str) -> SD3Transformer2DModel:
    """The transformer without storage; made once, as its table of positions takes seconds."""
    with torch.device("meta"):
        return SIZES[size].transformer()


def predicted(work: Work, device: torch.device) -> dict[str, int]:
    """What opd.report.memory predicts of our structure, by the names under which memory is measured."""
    cfg, model = work.config(), planned(work, device)
    teachers = memory.assumed_teachers(cfg, model)
    found = memory.predict(cfg, model, SIZES[work.size].text_shapes(), teachers, world=1)
    parts = {name: found[name] for name in ("base", "optimizer", "gradients", "activations")}
    return parts | {"adapters": found["adapters"] + found["teachers"], "peak": memory.peak(found)}


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
    equal = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in equal]


def random_lora(skeleton: torch.nn.Module, cfg: DistillationConfig, seed: int) -> Lora:
    """An adapter whose update is not zero: a fresh one's would be."""
    adapter = lora.fresh_lora(skeleton, sd3.LORA_TARGETS, cfg.rank, cfg.alpha, seed)
    generator = torch.Generator().manual_seed(seed_of(seed, "B"))
    for b_OR in adapter.B.values():
        b_OR.copy_(0.1 * torch.randn(b_OR.shape, generator=generator))
    return adapter


def our_stage(world: World) -> Distillation:
    """The real stage on the real adapters."""
    cfg, model = world.cfg, world.model
    for name, adapter in world.teachers.items():
        lora.attach(model.transformer, name, adapter, model.dtype)
    attach_student(world)
    if cfg.compile:
        compiled.compile_blocks(model.family.blocks(model.transformer))
    return Distillation(cfg, model, world.pools, {}, Trained(cfg, model))


def attach_student(world: World) -> None:
    """The student, the frozen memory of its start, and the model to its device: as train.py does."""
    model = world.model
    lora.attach(model.transformer, START, world.student, model.dtype)
    lora.attach(model.transformer, STUDENT, world.student, torch.float32)
    for parameter in lora.parameters_of(model.transformer, STUDENT).values():
        parameter.requires_grad_(True)
    if world.cfg.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    model.transformer.to(model.device)


def in_dtype(transformer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """diffusers' own `to` would print advice about files that there are none of."""
    return torch.nn.Module.to(transformer, dtype)
