"""LoRA adapters on one frozen base: attach, switch, and the linear layer that holds several of them.

The student, every teacher and the anchor are adapters on the same transformer. Base weights are never copied:
K teachers cost K times their LoRA weights. `BASE` (adapter off) is the base itself and may teach or anchor
too. Files: opd/formats/lora_files.py reads them, opd/formats/export.py writes them.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.formats.lora_files import Lora, is_target

BASE = "base"  # the name that means: adapter off
EMA = "ema"  # the moving average of the adapter that is trained, where it teaches
OLD = "old"  # stage nft: what follows the adapter that is trained, and makes the images
WITHOUT_WEIGHTS = (BASE, EMA)  # sources of a teacher that the model holds anyway, as the adapter of that name
STUDENT, START = "student", "start"  # the adapter being trained, and a frozen copy of where it started


def check_names(flag: str, sources: dict[str, str]) -> None:
    """ValueError for a name that no adapter can have: PyTorch stores them beside its own attributes, routes
    are written with * and +, and `base` is the base."""
    for name, source in sources.items():
        if name == "" or set(name) & set(".*+"):
            raise ValueError(f"{flag}: the name {name!r} is empty or has a dot, * or +; choose another")
        if hasattr(nn.ModuleDict(), name) or (name == BASE and source != BASE):
            raise ValueError(f"{flag}: the name {name!r} is taken; choose another")


def attach(transformer: nn.Module, name: str, lora: Lora, dtype: torch.dtype) -> None:
    """Add `lora` to the transformer as the frozen adapter `name` in `dtype`."""
    for module, a_RI in lora.A.items():
        layer = transformer.get_submodule(module)
        if isinstance(layer, nn.Linear):
            layer = LoraLinear(layer)
            transformer.set_submodule(module, layer)
        # Copies: the student and the frozen memory of its start come from the same tensors.
        b_OR = lora.B[module].to(dtype, copy=True)
        layer.add(name, a_RI.to(dtype, copy=True), b_OR, lora.scale[module])
    transformer.lora_layers = [layer for layer in transformer.modules() if isinstance(layer, LoraLinear)]
    transformer.requires_grad_(False)


def fresh_lora(skeleton: nn.Module, targets: tuple[str, ...], rank: int, alpha: float, seed: int) -> Lora:
    """A new adapter: A ~ N(0, 1/r^2) (PEFT's "gaussian"), B = 0, so that it starts as the base."""
    generator = torch.Generator().manual_seed(seed)
    A, B = {}, {}
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear) and is_target(name, targets):
            A[name] = torch.randn(rank, module.in_features, generator=generator) / rank
            B[name] = torch.zeros(module.out_features, rank)
    return Lora("fresh", "", A, B, {m: alpha / rank for m in A})


@contextmanager
def use(transformer: nn.Module, name: str):
    """Run the transformer with adapter `name` (or BASE: none). No weight moves and no requires_grad flag
    changes. Where activations are recomputed, keep backward inside the `with`."""
    layers = lora_layers(transformer)
    assert name == BASE or any(name in layer.pairs for layer in layers), f"no adapter {name!r} is attached"
    before = [layer.slot for layer in layers]
    for layer in layers:
        layer.switch(name)
    try:
        yield
    finally:
        for layer, slot in zip(layers, before, strict=True):
            layer.switch(slot)


@contextmanager
def merged(layers: list["LoraLinear"]):
    """Inside, layers hold the sums that they would make in their forward pass."""
    for layer in layers:
        layer.__dict__["held_OI"] = layer.whole()
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__["held_OI"] = None


def lora_layers(transformer: nn.Module) -> list["LoraLinear"]:
    """The layers with adapters, kept beside the transformer: walking its thousands of modules at every switch
    would take longer than the switch."""
    if not hasattr(transformer, "lora_layers"):
        return []
    return transformer.lora_layers


def parameters_of(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name` by their full names, in a fixed order."""
    return {
        n: p for n, p in transformer.named_parameters() if f".lora_A.{name}." in n or f".lora_B.{name}." in n
    }


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapters by name, of which one at a time is in its slot.

        y = W x + B (s A x),  s = alpha / r

    PEFT's layer casts and scales activations of full width; here A and B are cast to the activations' dtype,
    and the scale meets them at rank size. Switching costs two assignments per layer.

    In a pass without gradients the adapter meets the weight:

        y = (W + s B A) x

    That sum is made anew in every pass and costs less than the two products and the addition at the width of
    the activations, so that a teacher runs at the base's speed and no second copy of a weight stays. An
    adapter of another precision than the weight's is left beside it.

    The forward pass reads no adapter's name, only what the switch put into the slot. A compiled block is
    given the sums from outside (`merged`): one graph serves the base and teachers of every rank.
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.slot: str | None = None
        """The name of the adapter in use, None for none."""
        # Modules, not their weights: where parameters are sharded, FSDP exchanges the weights. In a tuple,
        # which does not register them a second time.
        self.in_slot: tuple[nn.Module, nn.Module] | None = None
        self.pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        """What each adapter puts there."""
        self.held_OI: Tensor | None = None
        """What `whole` gave, while the block around it is `merged`."""

    def add(self, name: str, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        """Adapter `name`: A (r, in), B (out, r), frozen until someone asks for gradients."""
        self.lora_A[name] = factor(a_RI)
        self.lora_B[name] = factor(b_OR)
        self.lora_A[name].register_buffer("scale", torch.tensor(scale), persistent=False)
        self.pairs[name] = self.lora_A[name], self.lora_B[name]

    def switch(self, name: str | None) -> None:
        """Put adapter `name` into the slot; where this layer has none of that name, nothing."""
        here = name in self.pairs
        # Into __dict__: a Module's own assignment looks for parameters first, ten times as slow, and every
        # pass of every teacher switches some hundred layers.
        self.__dict__["slot"] = name if here else None
        self.__dict__["in_slot"] = self.pairs[name] if here else None

    @property
    def weight(self) -> Tensor:
        """The base's: models look at the dtype of a layer's weight."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        whole_OI = self.held_OI
        if whole_OI is None:
            whole_OI = self.whole()
        if whole_OI is not None:
            return F.linear(x, whole_OI, self.base_layer.bias)
        if self.in_slot is None:
            return self.base_layer(x)
        first, second = self.in_slot
        a_RI, b_OR = first.weight.to(x.dtype), second.weight.to(x.dtype)
        return self.base_layer(x) + F.linear(F.linear(x, a_RI) * first.scale, b_OR)

    def whole(self) -> Tensor | None:
        """The weight with the adapter in it; None in a pass that needs the two apart."""
        if torch.is_grad_enabled():
            return None
        weight_OI = self.base_layer.weight.detach()
        if self.in_slot is None:
            return weight_OI
        first, second = self.in_slot
        # In half precision the sum rounds otherwise than the products. What is kept in float32 is trained, or
        # follows what is, and is compared with passes that have gradients: log-probabilities, velocities.
        if first.weight.dtype != weight_OI.dtype:
            return None
        a_RI, b_OR = first.weight.to(weight_OI.dtype), second.weight.to(weight_OI.dtype)
        return torch.addmm(weight_OI, b_OR * first.scale, a_RI)


def factor(weight: Tensor) -> nn.Linear:
    """A frozen linear layer without bias that holds one of the two matrices."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
