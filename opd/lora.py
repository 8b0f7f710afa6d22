"""A linear layer with several LoRA adapters, of which one at a time is in its slot.

    y = W x + B (s A x),  s = alpha / r

PEFT's layer casts and scales activations of full width; here A and B are cast to the activations' dtype, and
the scale meets them at rank size. Switching adapters costs two assignments per layer.

In a pass without gradients that has at least as many rows as inputs, the adapter meets the weight instead:

    y = (W + s B A) x

That sum is made anew in every pass and costs less than the two products and the addition at the width of the
activations, so that a teacher runs at the base's speed and no second copy of a weight stays.

The forward pass reads no adapter's name, only what the switch put into the slot: a compiled layer then sees
tensors, of whatever adapter, and one graph serves all adapters of a shape and dtype.
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
        # Modules, not their weights: where parameters are sharded, FSDP exchanges the weights. In a tuple,
        # which does not register them a second time.
        self.in_slot: tuple[nn.Module, nn.Module] | None = None

    def add(self, name: str, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        """Adapter `name`: A (r, in), B (out, r), frozen until someone asks for gradients."""
        self.lora_A[name] = factor(a_RI)
        self.lora_B[name] = factor(b_OR)
        self.lora_A[name].register_buffer("scale", torch.tensor(scale), persistent=False)
        self.scale[name] = scale

    def switch(self, name: str | None) -> None:
        """Put adapter `name` into the slot; where this layer has none of that name, nothing."""
        self.slot = self.in_slot = None
        if name in self.scale:
            self.slot = name
            self.in_slot = self.lora_A[name], self.lora_B[name]

    @property
    def weight(self) -> Tensor:
        """The base's: models look at the dtype of a layer's weight."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.in_slot is None:
            return self.base_layer(x)
        first, second = self.in_slot
        a_RI, b_OR = first.weight.to(x.dtype), second.weight.to(x.dtype)
        # In half precision the sum rounds otherwise than the products, and the log-probabilities of the
        # adapter that is trained are compared with those of passes that have gradients.
        alike = x.dtype == torch.float32 or not first.weight.requires_grad
        if alike and not torch.is_grad_enabled() and x.shape[:-1].numel() >= x.shape[-1]:
            merged_OI = torch.addmm(self.base_layer.weight, b_OR * first.scale, a_RI)
            return F.linear(x, merged_OI, self.base_layer.bias)
        return self.base_layer(x) + F.linear(F.linear(x, a_RI) * first.scale, b_OR)


def factor(weight: Tensor) -> nn.Linear:
    """A frozen linear layer without bias that holds one of the two matrices."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
