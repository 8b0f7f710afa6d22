"""LoRA adapters on one frozen base: attach, switch, save. Reading them: opd/formats/lora_files.py.

The student, every teacher and the anchor are adapters on the same transformer. Base weights are never copied:
K teachers cost K times their LoRA weights. `BASE` (adapter off) is the base itself and may teach or anchor
too.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch

from opd.files import write_json, write_safetensors
from opd.formats.lora_files import Lora, is_target
from opd.lora import LoraLinear

BASE = "base"  # the name that means: adapter off
EMA = "ema"  # the moving average of the adapter that is trained, where it teaches
STUDENT, START = "student", "start"  # the adapter being trained, and a frozen copy of where it started


# ---- on the model ------------------------------------------------------------------------------------------


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


# ---- saving ------------------------------------------------------------------------------------------------


def save_lora(
    folder: Path,
    weights: dict[str, torch.Tensor],
    name: str,
    rank: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write adapter `name` from full (unsharded) weights keyed as in `parameters_of`, each file whole or not
    at all. `metadata` (one key) goes into the file that is used without its folder.

    `adapter_model.safetensors` + `adapter_config.json` is a PEFT directory,
    `pytorch_lora_weights.safetensors` is for `pipe.load_lora_weights`. In both alpha / r is folded into B and
    the config says alpha = r: readers that look at no config (ComfyUI) mean the same update.
    """
    folded = {}
    for key, weight in weights.items():
        weight = weight.detach().cpu()
        if ".lora_B." in key:
            weight = weight * (alpha / rank)
        folded[key.replace(f".{name}.weight", ".weight")] = weight.to(dtype).contiguous()
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({key.partition(".lora_")[0] for key in folded}),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": "gaussian",
            "inference_mode": True,
        },
    )
    for_diffusers = {"transformer." + key: weight for key, weight in folded.items()}
    write_safetensors(folder / "pytorch_lora_weights.safetensors", for_diffusers, metadata)
    for_peft = {"base_model.model." + key: weight for key, weight in folded.items()}
    write_safetensors(folder / "adapter_model.safetensors", for_peft)


def save_transformer(
    folder: Path, transformer: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write all weights of the transformer as the `transformer/` directory of a pipeline, in `dtype`."""
    tensors = {n: w.cpu().to(dtype).contiguous() for n, w in weights.items()}
    tensors |= {
        n: b.cpu().contiguous() for n, b in transformer.named_buffers() if n in transformer.state_dict()
    }
    settings = json.loads(transformer.to_json_string())
    # FSDP gives a module that it shards a class of its own, which no other program knows.
    settings["_class_name"] = settings["_class_name"].removeprefix("FSDP")
    write_json(folder / "config.json", settings)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
