"""Names of SD3's layers in Stability's code, which kohya and ComfyUI use, and flat names, as diffusers'.

diffusers has such a translation for its other families (`Pipeline.lora_state_dict`), none for SD3.
"""

import re

import torch
from torch import Tensor

from opd.formats.lora_files import FOREIGN

BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
OUTSIDE = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`LAYER.lora_A.weight`, `LAYER.lora_down.weight` and their partners -> the same update as lora_A and
    lora_B by diffusers' names. A joint projection of q, k and v becomes three that share A.

    ValueError for a layer that SD3 does not have.
    """
    converted = {}
    for key, a_RI in tensors.items():
        for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")):
            if key.endswith(down):
                layer = key.removesuffix(down)
                converted |= convert_layer(layer, a_RI, tensors[layer + up])
    return converted


def convert_layer(layer: str, a_RI: Tensor, b_OR: Tensor) -> dict[str, Tensor]:
    """One layer's factors by diffusers' names."""
    flat = layer
    for prefix in FOREIGN:
        flat = flat.removeprefix(prefix)
    flat = flatten(flat)
    names = diffusers_names(flat)
    if not names:
        raise ValueError(f"SD3 has no layer {layer!r}")
    # The last modulations are (shift, scale) with Stability and (scale, shift) with diffusers: before the
    # output, and for the last block's text, which has these two alone.
    last_text = flat.endswith("context_block_adaLN_modulation_1") and b_OR.shape[0] == 2 * a_RI.shape[1]
    if flat == "final_layer_adaLN_modulation_1" or last_text:
        b_OR = torch.cat(b_OR.chunk(2)[::-1])
    converted = {}
    for name, part in zip(names, b_OR.chunk(len(names)), strict=True):
        converted[f"{name}.lora_A.weight"] = a_RI
        converted[f"{name}.lora_B.weight"] = part
    return converted


def diffusers_names(flat: str) -> list[str]:
    """The layer, or layers, of diffusers' transformer for a flat name of either; empty for an unknown one."""
    for native, name in OUTSIDE.items():
        if flat in (flatten(native), flatten(name)):
            return [name]
    block = re.fullmatch(r"(?:joint|transformer)_blocks_(\d+)_(.+)", flat)
    names = []
    for native, ends in BLOCK.items():
        own = [end for end in ends if block and block[2] in (flatten(native), flatten(end))]
        names += [f"transformer_blocks.{block[1]}.{end}" for end in own]
    return names


def flatten(name: str) -> str:
    """kohya's names: _ for every dot."""
    return name.replace(".", "_")
