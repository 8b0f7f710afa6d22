"""What `opd.bench` measures: a pipeline's shapes with random weights, random adapters and the settings of a
run, made without any file. The stage on top of it is the real one, or `Released`."""

import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from opd import compiled, lora
from opd.bench.released import Released
from opd.conditioning import Conditioning
from opd.config import DistillationConfig
from opd.data import Prompt, seed_of
from opd.families import _parts as parts
from opd.families import sd3
from opd.formats.lora_files import Lora
from opd.lora import START, STUDENT
from opd.model import Model, compute_dtype
from opd.optim import Trained
from opd.report import memory
from train import Distillation

FURTHER = "further"  # the teacher that is nothing but the anchor
PROMPTS = 10  # of each task
FACTOR = 8  # pixels of the image per pixel of the latents, along a side
SHIFT = 3.0  # of the noise levels, towards noise


@dataclass(frozen=True)
class Size:
    """An SD3 model."""

    config: dict
    """Of its transformer, as diffusers has it."""
    tokens: int  # of a prompt: 77 are CLIP's, 128 T5's

    def transformer(self) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(**self.config, patch_size=2, qk_norm="rms_norm")

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a Condition's tensors."""
        width = self.config["joint_attention_dim"]
        return {"embeds": (self.tokens, width), "pooled": (self.config["pooled_projection_dim"],)}


TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "caption_projection_dim": 64}
TINY |= {"joint_attention_dim": 64, "pooled_projection_dim": 64, "in_channels": 4, "out_channels": 4}
TINY |= {"sample_size": 8, "pos_embed_max_size": 16}
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64}
MEDIUM |= {"caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
MEDIUM |= {"in_channels": 16, "out_channels": 16, "sample_size": 128, "pos_embed_max_size": 384}
MEDIUM |= {"dual_attention_layers": tuple(range(13))}
SIZES = {"tiny": Size(TINY, tokens=4), "sd35-medium": Size(MEDIUM, tokens=205)}


def with_teachers(cfg: DistillationConfig, count: int) -> DistillationConfig:
    """The same with so many tasks, each with a teacher, and a further teacher that is the anchor alone."""
    tasks = [f"task{k}" for k in range(count)]
    teachers = dict.fromkeys([*tasks, FURTHER], "random")
    return replace(cfg, teachers=teachers, prompts=dict.fromkeys(tasks, "random"))


PLAIN = DistillationConfig(
    out="unused",
    anchor=FURTHER,
    anchor_weight=0.02,
    weight="uniform",
    cold_start="base",
    warmup=0,
    decay="constant",
    evaluate=False,
    group=2,
)
# What is measured on each size, with changes. `model` is a name in SIZES.
TINY_WORK = replace(PLAIN, model="tiny", resolution="64", rank=4, alpha=8.0)
MEDIUM_WORK = replace(PLAIN, model="sd35-medium", resolution="512", rank=32, alpha=64.0)
WORKS = {
    "tiny": with_teachers(replace(TINY_WORK, prompts_per_step=6, micro_batch=4, steps=3), 3),
    "sd35-medium": with_teachers(replace(MEDIUM_WORK, prompts_per_step=12, micro_batch=8, steps=10), 3),
}


# ---- the model ---------------------------------------------------------------------------------------------


def make_stage(structure: str, cfg: DistillationConfig, device: torch.device) -> Distillation:
    """The stage of a structure, "ours" or "released", on its model: the same numbers at every call."""
    model, size = planned(cfg, device), SIZES[cfg.model]
    # Equal steps, shifted: s -> shift s / (1 + (shift - 1) s).
    equal = [1 - i / cfg.steps for i in range(cfg.steps + 1)]
    model.grids[cfg.steps] = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in equal]
    pools = {task: [Prompt(f"{task} prompt {n}", task) for n in range(PROMPTS)] for task in cfg.prompts}
    prompts = [prompt.text for pool in pools.values() for prompt in pool]
    model.conditioning.kept = random_conditions([*prompts, sd3.NEGATIVE], size.text_shapes(), model.dtype)
    model.transformer = random_transformer(cfg.model, model.dtype, device)
    if structure == "ours":
        parts.with_fused_norms(model.transformer)
    student, *others = (random_lora(model.skeleton, cfg, n) for n in range(1 + len(cfg.teachers)))
    for name, adapter in zip(cfg.teachers, others, strict=True):
        if structure == "ours":
            lora.attach(model.transformer, name, adapter, model.dtype)
        else:
            whole = merged_copy(model.transformer, adapter)
            model.teachers[name] = replace(model, transformer=whole, teachers={})
    # As train.py does: the frozen memory of the start, then the student.
    lora.attach(model.transformer, START, student, model.dtype)
    lora.attach(model.transformer, STUDENT, student, torch.float32)
    for parameter in lora.parameters_of(model.transformer, STUDENT).values():
        parameter.requires_grad_(True)
    if cfg.checkpointing:
        model.recompute()
    model.transformer.to(model.device)
    if structure == "released":
        return Released(cfg, model, pools, {}, Trained(cfg, model))
    if cfg.compile:
        compiled.compile_blocks(sd3.blocks(model.transformer))
    return Distillation(cfg, model, pools, {}, Trained(cfg, model))


def planned(cfg: DistillationConfig, device: torch.device) -> Model:
    """The model before its weights."""
    dtype, folder, side = compute_dtype(cfg.dtype, device), Path("no-folder"), int(cfg.resolution) // FACTOR
    shape = SIZES[cfg.model].config["in_channels"], side, side
    conditioning = Conditioning(sd3, folder, dtype, device)
    return Model(sd3, folder, skeleton_of(cfg.model), shape, conditioning, dtype, device)


@cache
def skeleton_of(size: str) -> SD3Transformer2DModel:
    """The transformer without storage; made once, as its table of positions takes seconds."""
    with torch.device("meta"):
        return parts.with_fused_norms(SIZES[size].transformer())


def random_transformer(size: str, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
    """Frozen, and drawn on the device: on a CPU it would take minutes."""
    torch.manual_seed(0)
    with device:
        transformer = SIZES[size].transformer()
    return in_dtype(transformer, dtype).requires_grad_(False).eval()


def random_conditions(prompts: list[str], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict:
    """Prompt -> its Condition, in the place of what text encoders make of it."""
    conditions = {}
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed_of(prompt))
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        conditions[prompt] = {name: value.to(dtype) for name, value in drawn.items()}
    return conditions


def random_lora(skeleton: torch.nn.Module, cfg: DistillationConfig, seed: int) -> Lora:
    """An adapter whose update is not zero: a fresh one's would be."""
    adapter = lora.fresh_lora(skeleton, sd3.LORA_TARGETS, cfg.rank, cfg.alpha, seed)
    generator = torch.Generator().manual_seed(seed_of(seed, "B"))
    for b_OR in adapter.B.values():
        b_OR.copy_(0.1 * torch.randn(b_OR.shape, generator=generator))
    return adapter


def merged_copy(transformer: torch.nn.Module, adapter: Lora) -> torch.nn.Module:
    """A whole float32 transformer with the adapter's update added to its weights."""
    whole = in_dtype(copy.deepcopy(transformer), torch.float32)
    with torch.no_grad():
        for module in adapter.A:
            weight = whole.get_submodule(module).weight
            weight += adapter.update(module).to(weight.device)
    return whole


def in_dtype(transformer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """diffusers' own `to` would print advice about files that there are none of."""
    return torch.nn.Module.to(transformer, dtype)


def predicted(cfg: DistillationConfig, device: torch.device) -> dict[str, int]:
    """What opd.report.memory predicts of our structure, by the names under which memory is measured."""
    model = planned(cfg, device)
    found = memory.predict(cfg, model, SIZES[cfg.model].text_shapes())
    same = {name: found[name] for name in ("base", "optimizer", "gradients", "activations")}
    return same | {"adapters": found["adapters"] + found["teachers"], "peak": memory.peak(found)}
