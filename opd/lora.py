"""A linear layer with several LoRA adapters, of which one at a time is in its slot.

    y = W x + B (s A x),  s = alpha / r

PEFT's layer casts and scales activations of full width; here A and B are cast to the activations' dtype, and
the scale meets them at rank size. Switching adapters costs an assignment per layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapters by name. `slot`: the name of the one in use, None for none."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.slot: str | None = None

    def add(self, name: str, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        """Adapter `name`: A (r, in), B (out, r), frozen until someone asks for gradients."""
        self.lora_A[name] = factor(a_RI)
        self.lora_B[name] = factor(b_OR)
        self.scale[name] = scale

    @property
    def weight(self) -> Tensor:
        """The base's: models look at the dtype of a layer's weight."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.slot is None:
            return y
        a_RI = self.lora_A[self.slot].weight.to(x.dtype)
        b_OR = self.lora_B[self.slot].weight.to(x.dtype)
        return y + F.linear(F.linear(x, a_RI) * self.scale[self.slot], b_OR)


def factor(weight: Tensor) -> nn.Linear:
    """A frozen linear layer without bias that holds one of the two matrices."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
