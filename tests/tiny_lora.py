"""Adapter files for the tiny pipeline, written by hand or by PEFT, read or refused, and the velocity of the
model under an adapter."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from opd import lora
from opd.families import sd3
from opd.formats import lora_files
from tests import tiny

MODULES = [f"transformer_blocks.{block}.attn.{layer}" for block in (0, 1) for layer in ("to_q", "to_out.0")]
TARGETS = ("attn.to_q", "attn.to_out.0")
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 7.0, "target_modules": list(TARGETS)}
CONFIG |= {"a_future_key": {"x": [1]}}


def pairs(ranks=(3,), seed=0):
    """Random (A, B) per module; the model is 32 wide."""
    g = torch.Generator().manual_seed(seed)
    size = {m: ranks[i % len(ranks)] for i, m in enumerate(MODULES)}
    return {m: (torch.randn(r, 32, generator=g), torch.randn(32, r, generator=g)) for m, r in size.items()}


def keyed(weights, prefix="base_model.model."):
    named = {f"{prefix}{m}.lora_A.weight": a for m, (a, b) in weights.items()}
    return named | {f"{prefix}{m}.lora_B.weight": b for m, (a, b) in weights.items()}


def peft_dir(folder, weights, **config):
    folder.mkdir()
    save_file(keyed(weights), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def single_file(folder, tensors, metadata=None):
    folder.mkdir()
    save_file(tensors, folder / "any.safetensors", metadata)
    return folder / "any.safetensors"


def velocity(transformer):
    g = torch.Generator().manual_seed(0)
    x, embeds, pooled = (torch.randn(s, generator=g) for s in ((3, 4, 4, 4), (3, 24, 128), (3, 128)))
    with torch.no_grad():
        text = {"embeds": embeds, "pooled": pooled}
        return sd3.velocity(transformer, x, torch.tensor([1.0, 0.6, 0.1]), text)


def under(transformer, name):
    with lora.use(transformer, name):
        return velocity(transformer)


def peft_model(base, trained=False, **config):
    """PEFT's model of rank 4 and alpha 8 unless told."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)} | config
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    if trained:
        train(model)
    return model


def train(model):
    for name, factor in model.named_parameters():
        if ".lora_" in name:
            factor.data += 0.05 * torch.randn(factor.shape)


def ours(base, world, source):
    """The velocity of the base under the adapter that is there."""
    plan = tiny.planned(tiny.config(world))
    transformer = copy.deepcopy(base)
    lora.attach(transformer, "x", plan.read_lora(str(source)), torch.float32)
    return under(transformer, "x")


def alike(theirs, base, world, source):
    """That the base under the adapter that is there is PEFT's model."""
    assert (velocity(theirs) - velocity(base)).abs().max() > 1e-2
    assert (ours(base, world, source) - velocity(theirs)).abs().max() < 1e-5


def refused(source, message, convert=sd3.convert_lora):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        lora_files.read_lora(str(source), convert)
    assert repr(str(source)) in str(caught.value) and "\n" not in str(caught.value)
