"""Model families: all that the code knows about one diffusers pipeline is in one module of this folder.

A family is a module with the names of `CONTRACT`; what most of them share comes with _parts.py by `import *`.
To support another pipeline, write opd/families/NAME.py, build its tiny pipeline in tests/tiny_families.py and
give it a row in tests/test_families.py; nothing else changes.

Shapes: B batch, C latent channels, H x W latent size. `folder` is the pipeline's directory.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from opd.files import read_json

Condition = dict[str, Tensor]
"""The text of ONE sample: named tensors without a batch axis, as long as the text is. Source pictures are
beside it as picture0, picture1, ... (C, H, W). Where an encoder of the text sees them too, negative_NAME is
what NAME is in the unconditional branch."""

JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The projections of image and text stream where both attend together, by diffusers' names: what Flow-GRPO
adapts."""


class Editing(NamedTuple):
    """How a family takes the source pictures of a prompt."""

    fewest: int
    most: int
    size: Callable
    """(folder, width, height) -> (width, height) in pixels that the transformer sees of such a picture;
    ValueError where the pipeline takes none of that size."""
    fit: Callable
    """(folder, picture (PIL, RGB)) -> the picture of that size, scaled and cut as the pipeline does it."""
    read: Callable | None
    """(load_text's result, prompt, pictures (PIL, RGB), device) -> the Condition of a prompt whose pictures
    the text encoder sees too, before they are put beside it; None where it reads the prompt alone."""


CONTRACT = {
    "PIPELINE": "class name of the diffusers pipeline, as its model_index.json has it; a plain string",
    "LORA_TARGETS": "ends of the names of the linear layers that a fresh LoRA adapts; * stands for anything",
    "NEGATIVE": "prompt of the unconditional branch of guidance",
    "EDITING": "an Editing where a prompt may have source pictures, else None",
    "skeleton": "(folder) -> the transformer on the meta device: names and shapes before weights load",
    "load_transformer": "(folder, dtype) -> the frozen base on the CPU, in eval mode",
    "load_vae": "(folder) -> the frozen VAE in float32 on the CPU",
    "load_text": "(folder, dtype, device, t5) -> what encode_prompts needs; t5 = False: without a T5 encoder",
    "arguments": "(folder, t5, guidance) -> (arguments of diffusers' from_pretrained, arguments of the "
    "pipeline's call) that mean what `guidance` and `t5` mean here; ValueError for a guidance that the model "
    "cannot be run at",
    "text_shapes": "(folder, t5) -> shape by name of a Condition's tensors, at their longest",
    "encode_prompts": "(load_text's result, prompts, device) -> a Condition per prompt, in load_text's dtype",
    "collate": "(B Conditions) -> the text that velocity takes: stacked, padded with a mask, or a list; with "
    "source pictures beside it, of whose tokens velocity returns nothing",
    "velocity": "(transformer, x_BCHW, sigma_B, collate's result) -> dx/dsigma (B, C, H, W), any dtype; "
    "where guide is None, a fifth argument is the guidance that the network is told",
    "guide": "(v, v_uncond, scale) -> the guided velocity (B, C, H, W), float32; scale 1 must mean v itself; "
    "None where the network is told the scale, in one pass",
    "sigmas": "(folder, shape_CHW, steps) -> the pipeline's steps + 1 noise levels, strictly from 1 to 0",
    "log_shift": "(folder, shape_CHW) -> log of the factor on sigma / (1 - sigma) in training",
    "latent_shape": "(folder, height, width in pixels) -> (C, H, W); ValueError where they do not fit",
    "default_resolution": "(folder) -> pixels per side that the model was made for",
    "pixels": "(folder) -> pixels of the image per pixel of the latents, along a side",
    "decode": "(vae, latents_BCHW) -> images (B, 3, height, width) float32 in [0, 1]",
    "encode_images": "(vae, images in [0, 1]) -> latents_BCHW float32, scaled for the transformer",
    "convert_lora": "({LAYER.lora_A.weight, ...} by another tool's names) -> by the transformer's own",
    "blocks": "(transformer) -> the blocks to shard and to checkpoint, in order",
}


def unconditional(condition: Condition, negative: Condition) -> Condition:
    """The condition of the unconditional branch, `negative` being that of NEGATIVE by itself: the
    source pictures stay."""
    beside = {}
    for name, tensor in condition.items():
        if name.startswith("negative_"):
            beside[name.removeprefix("negative_")] = tensor
    return (beside or negative) | pictures_of(condition)


def pictures_of(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a Condition, or of a stack of them."""
    return {name: tensor for name, tensor in condition.items() if name.startswith("picture")}


def family_of(folder: Path) -> ModuleType:
    """The family of a pipeline's directory. ValueError where it is of none, or breaks the contract."""
    pipeline, known = read_json(folder / "model_index.json").get("_class_name"), pipelines()
    if pipeline not in known:
        raise ValueError(f"model {str(folder)!r} is a {pipeline}; known pipelines: {', '.join(known)}")
    name = known[pipeline]
    family = importlib.import_module(f"opd.families.{name}")
    for part, meaning in CONTRACT.items():
        if not hasattr(family, part):
            raise ValueError(f"opd/families/{name}.py lacks {part}: {meaning}")
    return family


def has_t5(folder: Path) -> bool:
    """Whether the pipeline directory ships a T5 encoder."""
    return ["transformers", "T5EncoderModel"] in read_json(folder / "model_index.json").values()


def pipelines() -> dict[str, str]:
    """PIPELINE of every family -> its module's name. The files are only looked at, so that a family whose
    pipeline the installed diffusers lacks does not stop the others."""
    found = {}
    for place in __path__:
        for file in sorted(Path(place).glob("[!_]*.py")):
            named = re.search(r'^PIPELINE = "(\w+)"', file.read_text(), re.MULTILINE)
            if named:
                found[named[1]] = file.stem
    return found
