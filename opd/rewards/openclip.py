"""Weights of CLIP in open_clip's names (HPSv2 is one), as transformers' CLIPModel names them."""

import re

from torch import Tensor

# Applied in this order; the first that matches renames.
_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
)
_BLOCK = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for CLIPModel. The projections are transposed, and attention's joint input projection is
    cut into query, key and value."""
    renamed = {}
    for old, tensor in weights.items():
        if old == "attn_mask":  # the causal mask, which CLIPModel makes itself
            continue
        name = _renamed(old.removeprefix("module."))
        if old.endswith(("visual.proj", "text_projection")):
            renamed[name] = tensor.T.contiguous()
        elif ".in_proj_" in name:
            renamed |= _split(name, tensor)
        else:
            renamed[name] = tensor
    return renamed


def _renamed(name: str) -> str:
    for pattern, new in _NAMES:
        if re.match(pattern, name):
            name = re.sub(pattern, new, name)
            break
    for old, new in _BLOCK:
        name = name.replace(old, new)
    return name


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`...self_attn.in_proj_weight` holds query, key and value, one below the other."""
    prefix, kind = name.split("in_proj_")
    parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
    return {f"{prefix}{part}.{kind}": rows.clone() for part, rows in parts}
