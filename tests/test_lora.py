"""Our linear layer with adapters against PEFT's, which reads and writes the same files."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from opd import adapters
from opd.lora import LoraLinear
from tests import tiny


def pair(dtype, rank=4, alpha=6.0):
    """(ours, PEFT's) with the same base in `dtype` and the same float32 adapter "a"."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(24, 40).to(dtype).requires_grad_(False)
    a, b = torch.randn(rank, 24, generator=generator) / rank, torch.randn(40, rank, generator=generator)
    ours = LoraLinear(base)
    ours.add("a", a, b, alpha / rank)
    peft = torch.nn.Sequential(torch.nn.Linear(24, 40).to(dtype))
    peft[0].load_state_dict(base.state_dict())
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    inject_adapter_in_model(config, peft, adapter_name="a")
    peft[0].lora_A["a"].weight = torch.nn.Parameter(a.clone())
    peft[0].lora_B["a"].weight = torch.nn.Parameter(b.clone())
    for factor in (ours.lora_A, ours.lora_B):
        factor["a"].weight.requires_grad_(True)
    return ours, peft


# bfloat16: A x is rounded once to 8 bits here and computed in float32 there; 2^-8 of the largest term, twice.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_pefts(dtype, tolerance):
    ours, peft = pair(dtype)
    ours.switch("a")
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, reference = ours(x), peft(x)
    assert y.dtype == reference.dtype == dtype
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(upstream)
    reference.backward(upstream)
    pairs = [(y, reference)]
    for mine, theirs in ((ours.lora_A, peft[0].lora_A), (ours.lora_B, peft[0].lora_B)):
        assert mine["a"].weight.grad.dtype == torch.float32
        pairs.append((mine["a"].weight.grad, theirs["a"].weight.grad))
    for mine, theirs in pairs:
        assert (mine.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()
        assert theirs.float().norm() > 1e-2


# The sum of the weights and every product round once, to 2^-8 in bfloat16; the random adapter is as large as
# the base, so that half of an output may cancel.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_the_sum_of_the_weights_says_what_the_products_say(dtype, tolerance):
    ours, _ = pair(dtype)
    ours.switch("a")
    base, a, b = ours.base_layer, ours.lora_A["a"].weight, ours.lora_B["a"].weight
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    w, bias, x64 = base.weight.double(), base.bias.double(), x.double()
    expected = x64 @ (w + 1.5 * b.to(dtype).double() @ a.to(dtype).double()).T + bias
    for weight in (a, b):
        weight.requires_grad_(False)
    with torch.no_grad():
        at_once, few = ours(x), ours(x[:1])
    products = ours(x)
    assert at_once.dtype == dtype and not torch.equal(at_once, products)
    assert torch.equal(few, ours(x[:1]))  # 7 rows, 24 inputs: the products are cheaper
    for y in (at_once, products):
        assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_the_trained_adapter_says_the_same_with_and_without_gradients(dtype, tolerance):
    """GRPO compares log-probabilities of both: in bfloat16 a weight that is summed first would move them."""
    ours, _ = pair(dtype)
    ours.switch("a")
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        walked = ours(x)
    products = ours(x)
    assert torch.equal(walked, products) == (dtype == torch.bfloat16)
    assert (walked - products).norm() <= tolerance * products.norm()


def test_an_empty_slot_is_the_base_to_the_bit():
    ours, _ = pair(torch.float32)
    x = torch.randn(3, 24)
    assert torch.equal(ours(x), ours.base_layer(x))
    ours.switch("a")
    assert not torch.equal(ours(x), ours.base_layer(x))


def test_an_adapter_of_some_layers_leaves_the_others_alone(world):
    """A teacher may adapt fewer layers than the student: where it has none, the slot is empty."""
    model = tiny.build(tiny.config(world))[1]
    layers = adapters.lora_layers(model.transformer)
    assert len(layers) == sum(isinstance(m, LoraLinear) for m in model.transformer.modules()) > 8
    del layers[0].scale["red"]
    with adapters.use(model.transformer, "red"):
        assert layers[0].slot is None and {layer.slot for layer in layers[1:]} == {"red"}
    assert {layer.slot for layer in layers} == {None}


def test_a_model_may_ask_for_the_dtype_of_a_layer():
    """Some transformers read `layer.weight.dtype`, Z-Image's time embedding for one."""
    ours, _ = pair(torch.bfloat16)
    assert ours.weight is ours.base_layer.weight and ours.weight.dtype == torch.bfloat16
