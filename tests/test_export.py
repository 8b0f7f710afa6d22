"""What a student's folder means to those who load it: ComfyUI's names, by a transcription of its key map.

How diffusers and PEFT read the same files is in tests/test_adapters.py.
"""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from opd import adapters
from opd.families import sd3

# The published configurations; what is not named is the class's default.
SIZES = {
    "SD3.5-Medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "SD3.5-Large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
}
SHARED = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
PAIRS = {
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
}
JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def comfyui_names(depth: int) -> dict[str, str]:
    """Layer name in a LoRA file -> the weight of ComfyUI's SD3 that it changes, or changes a third of."""
    native = {}
    for block in range(depth):
        for ours, theirs in PAIRS.items():
            native[f"transformer_blocks.{block}.{theirs}"] = f"joint_blocks.{block}.{ours}.weight"
        for ours, parts in JOINT.items():
            for part in parts:
                native[f"transformer_blocks.{block}.{part}"] = f"joint_blocks.{block}.{ours}.weight"
    names = {}
    for layer, weight in native.items():
        names[f"transformer.{layer}"] = weight
        names[f"base_model.model.{layer}"] = weight
        names["lora_transformer_" + layer.replace(".", "_")] = weight
    return names


def read_by_comfyui(file, depth: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (B times the scale, A). Alpha is in a tensor beside the factors; without one the scale is 1,
    whatever any config says. AssertionError where a key of the file is not known."""
    tensors, updates, known = load_file(file), {}, set()
    for name in comfyui_names(depth):
        b, a, alpha = f"{name}.lora_B.weight", f"{name}.lora_A.weight", f"{name}.alpha"
        if b in tensors:
            scale = 1.0
            if alpha in tensors:
                scale = tensors[alpha].item() / len(tensors[a])
            layer = name.removeprefix("transformer.").removeprefix("base_model.model.")
            updates[layer] = (scale * tensors[b], tensors[a])
            known |= {a, b, alpha}
    assert tensors.keys() <= known, sorted(tensors.keys() - known)[:3]
    return updates


def skeleton(size: str) -> SD3Transformer2DModel:
    with torch.device("meta"):
        return SD3Transformer2DModel(**SHARED, **SIZES[size])


@pytest.mark.parametrize("size, layers", [("SD3.5-Medium", 24 * 8 - 1), ("SD3.5-Large", 38 * 8 - 1)])
def test_both_files_of_a_student_work_in_comfyui_at_full_strength(size, layers, tmp_path):
    """Of rank 1: the names are what is real here. The last block's text has no output to adapt."""
    lora = adapters.fresh_lora(skeleton(size), sd3.LORA_TARGETS, rank=1, alpha=2.0, seed=0)
    assert len(lora.A) == layers
    weights = {f"{layer}.lora_A.x.weight": a for layer, a in lora.A.items()}
    for layer, b in lora.B.items():
        weights[f"{layer}.lora_B.x.weight"] = torch.full_like(b, 0.5)
    adapters.save_lora(tmp_path, weights, "x", rank=1, alpha=2.0)
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        updates = read_by_comfyui(tmp_path / file, SIZES[size]["num_layers"])
        assert updates.keys() == lora.A.keys()
        for layer, (scaled_b, a) in updates.items():
            assert torch.equal(scaled_b, torch.full_like(lora.B[layer], 2.0 * 0.5))
            assert torch.equal(a, lora.A[layer])
