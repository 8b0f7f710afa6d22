"""LoRA on one base: our linear layer is PEFT's, and a model under an adapter is the one with it folded in."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from opd import lora
from opd.families import sd3
from opd.formats import lora_files
from opd.lora import LoraLinear
from tests.tiny_lora import MODULES, under, velocity

# ---- one layer ---------------------------------------------------------------------------------------------


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
    compared = [(y, reference)]
    for mine, theirs in ((ours.lora_A, peft[0].lora_A), (ours.lora_B, peft[0].lora_B)):
        assert mine["a"].weight.grad.dtype == torch.float32
        compared.append((mine["a"].weight.grad, theirs["a"].weight.grad))
    for mine, theirs in compared:
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


# ---- a model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(world):
    return sd3.load_transformer(world / "pipeline", torch.float32)


def folded(base, update):
    """A dense copy of the base with `update[module]` added to its weights."""
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for module in update:
            dense.get_submodule(module).weight += update[module]
    return dense


def dense_update(folder):
    """The update of a PEFT directory whose alpha is its rank, straight from its tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model."): b @ tensors[f"{name}.lora_A.weight"]
        for name in {key.partition(".lora_")[0] for key in tensors}
        for b in [tensors[f"{name}.lora_B.weight"]]
    }


def attached(base, **sources):
    """A copy of the base with adapters by name."""
    transformer = copy.deepcopy(base)
    for name, source in sources.items():
        lora.attach(transformer, name, lora_files.read_lora(str(source)), torch.float32)
    return transformer


@pytest.fixture
def transformer(base, world):
    return attached(base, red=world / "red", blue=world / "blue")


def test_each_adapter_equals_its_folded_copy_and_the_base_is_untouched(transformer, base, world):
    plain = velocity(base)
    for name in ("red", "blue", "red"):  # and none leaks into the next
        expected = velocity(folded(base, dense_update(world / name)))
        assert (under(transformer, name) - expected).abs().max() < 1e-5
        assert (expected - plain).abs().max() > 0.01
        assert torch.equal(under(transformer, lora.BASE), plain)


def test_an_adapter_of_some_layers_leaves_the_others_alone(transformer):
    """A teacher may adapt fewer layers than the student: where it has none, the slot is empty."""
    layers = lora.lora_layers(transformer)
    assert len(layers) == sum(isinstance(m, LoraLinear) for m in transformer.modules()) > 8
    del layers[0].scale["red"]
    with lora.use(transformer, "red"):
        assert layers[0].slot is None and {layer.slot for layer in layers[1:]} == {"red"}
    assert {layer.slot for layer in layers} == {None}


def test_use_nests_restores_and_leaves_requires_grad_alone(transformer, base):
    next(iter(lora.parameters_of(transformer, "blue").values())).requires_grad_(True)
    flags = {n: p.requires_grad for n, p in transformer.named_parameters()}
    red, blue, plain = (under(transformer, n) for n in ("red", "blue", "base"))
    with lora.use(transformer, "red"):
        with lora.use(transformer, "base"):
            assert torch.equal(under(transformer, "blue"), blue) and torch.equal(velocity(transformer), plain)
        assert torch.equal(velocity(transformer), red)
        with pytest.raises(KeyError), lora.use(transformer, "blue"):
            raise KeyError
        assert torch.equal(velocity(transformer), red)
        assert flags == {n: p.requires_grad for n, p in transformer.named_parameters()}
    with pytest.raises(AssertionError, match="no adapter 'green'"), lora.use(transformer, "green"):
        pass


def test_only_the_adapter_in_use_gets_gradients(transformer):
    for name in ("red", "blue"):
        for p in lora.parameters_of(transformer, name).values():
            p.requires_grad_(True)
    x, text = torch.randn(1, 4, 4, 4), {"embeds": torch.randn(1, 24, 128), "pooled": torch.randn(1, 128)}
    with lora.use(transformer, "red"):
        sd3.velocity(transformer, x, torch.tensor([0.5]), text).square().sum().backward()
    for name, p in transformer.named_parameters():
        # The last block's text queries reach no output, so their gradient is zero.
        if ".red." in name and not name.startswith("transformer_blocks.1.attn.add_q_proj"):
            assert p.grad.abs().max() > 0, name
        assert ".red." in name or p.grad is None


def test_teachers_add_their_lora_bytes_and_nothing_else(base, world):
    transformer = copy.deepcopy(base)
    before = {p.data_ptr(): p.nbytes for p in transformer.parameters()}
    red = lora_files.read_lora(str(world / "red"))
    for k in range(3):
        lora.attach(transformer, f"t{k}", red, torch.bfloat16)
    after = {p.data_ptr(): p.nbytes for p in transformer.parameters()}
    per_teacher = sum(2 * t.numel() for t in [*red.A.values(), *red.B.values()])
    assert before.items() <= after.items() and sum(after.values()) - sum(before.values()) == 3 * per_teacher
    assert not any(p.requires_grad for p in transformer.parameters())


def test_a_fresh_lora_starts_at_the_base_with_pefts_spread(base, world):
    def fresh(seed):
        return lora.fresh_lora(sd3.skeleton(world / "pipeline"), sd3.LORA_TARGETS, 64, 8.0, seed)

    mine, transformer = fresh(3), copy.deepcopy(base)
    lora.attach(transformer, "x", mine, torch.float32)
    assert torch.equal(under(transformer, "x"), velocity(base))
    config = LoraConfig(r=64, target_modules=list(sd3.LORA_TARGETS), init_lora_weights="gaussian")
    reference = get_peft_model(copy.deepcopy(base), config).named_parameters()
    theirs = {name.partition(".lora_A")[0]: p for name, p in reference if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in theirs} == set(mine.A)
    spread, wanted = (torch.cat([*half]).std().item() for half in (mine.A.values(), theirs.values()))
    assert spread == pytest.approx(wanted, rel=0.02)
    assert not torch.equal(fresh(4).A[MODULES[0]], mine.A[MODULES[0]])
