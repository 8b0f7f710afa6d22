"""LoRA adapters on one frozen base: attach, switch. Files: opd/formats/lora_files.py, opd/formats/export.py.

The student, every teacher and the anchor are adapters on the same transformer. Base weights are never copied:
K teachers cost K times their LoRA weights. `BASE` (adapter off) is the base itself and may teach or anchor
too.
"""

from contextlib import contextmanager

import torch

from opd.formats.lora_files import Lora, is_target
from opd.lora import LoraLinear

BASE = "base"  # the name that means: adapter off
EMA = "ema"  # the moving average of the adapter that is trained, where it teaches
STUDENT, START = "student", "start"  # the adapter being trained, and a frozen copy of where it started


def attach(transformer: torch.nn.Module, name: str, lora: Lora, dtype: torch.dtype) -> None:
    """Add `lora` to the transformer as the frozen adapter `name` in `dtype`. ValueError for a name PyTorch
    cannot store."""
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r}: choose one that is not empty and has no dot")
    for module, a_RI in lora.A.items():
        layer = transformer.get_submodule(module)
        if isinstance(layer, torch.nn.Linear):
            layer = LoraLinear(layer)
            transformer.set_submodule(module, layer)
        # Copies: the student and the frozen memory of its start come from the same tensors.
        b_OR = lora.B[module].to(dtype, copy=True)
        layer.add(name, a_RI.to(dtype, copy=True), b_OR, lora.scale[module])
    transformer.lora_layers = [layer for layer in transformer.modules() if isinstance(layer, LoraLinear)]
    transformer.requires_grad_(False)


def fresh_lora(
    skeleton: torch.nn.Module, targets: tuple[str, ...], rank: int, alpha: float, seed: int
) -> Lora:
    """A new adapter: A ~ N(0, 1/r^2) (PEFT's "gaussian"), B = 0, so that it starts as the base."""
    generator = torch.Generator().manual_seed(seed)
    A, B = {}, {}
    for name, module in skeleton.named_modules():
        if isinstance(module, torch.nn.Linear) and is_target(name, targets):
            A[name] = torch.randn(rank, module.in_features, generator=generator) / rank
            B[name] = torch.zeros(module.out_features, rank)
    return Lora("fresh", "", A, B, {m: alpha / rank for m in A})


@contextmanager
def use(transformer: torch.nn.Module, name: str):
    """Run the transformer with adapter `name` (or BASE: none). No weight moves and no requires_grad flag
    changes. Where activations are recomputed, keep backward inside the `with`."""
    layers = lora_layers(transformer)
    assert name == BASE or any(name in layer.scale for layer in layers), f"no adapter {name!r} is attached"
    before = [layer.slot for layer in layers]
    for layer in layers:
        layer.switch(name)
    try:
        yield
    finally:
        for layer, slot in zip(layers, before, strict=True):
            layer.switch(slot)


def lora_layers(transformer: torch.nn.Module) -> list[LoraLinear]:
    """The layers with adapters, kept beside the transformer: walking its thousands of modules at every switch
    would take longer than the switch."""
    if not hasattr(transformer, "lora_layers"):
        return []
    return transformer.lora_layers


def parameters_of(transformer: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of adapter `name` by their full names, in a fixed order."""
    return {
        n: p for n, p in transformer.named_parameters() if f".lora_A.{name}." in n or f".lora_B.{name}." in n
    }
