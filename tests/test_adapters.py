"""Adapters on the model: under one it is the model with it folded in; saved, fresh and merged ones."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from opd import adapters
from opd.families import sd3
from opd.formats import lora_files
from tests.tiny_lora import MODULES, pairs, peft_dir, under, velocity

# ---- on the model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(world):
    return sd3.load_transformer(world / "pipeline", torch.float32)


def folded(base, update, share=1.0):
    """A dense copy of the base with `update(module)` added to its weights."""
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for module in update:
            dense.get_submodule(module).weight += share * update[module]
    return dense


def dense_update(folder):
    """The update of a PEFT directory, straight from its tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors}
    return {
        m: tensors[f"base_model.model.{m}.lora_B.weight"] @ tensors[f"base_model.model.{m}.lora_A.weight"]
        for m in names
    }


def attached(base, world, *names):
    transformer = copy.deepcopy(base)
    for name in names:
        adapters.attach(transformer, name, lora_files.read_lora(str(world / name)), torch.float32)
    return transformer


def test_each_adapter_equals_its_folded_copy_and_the_base_is_untouched(base, world):
    transformer = attached(base, world, "red", "blue")
    plain = velocity(base)
    for name in ("red", "blue", "red"):  # and none leaks into the next
        expected = velocity(folded(base, dense_update(world / name)))
        assert (under(transformer, name) - expected).abs().max() < 1e-5
        assert (expected - plain).abs().max() > 0.01
        assert torch.equal(under(transformer, adapters.BASE), plain)


def test_use_nests_restores_and_leaves_requires_grad_alone(base, world):
    transformer = attached(base, world, "red", "blue")
    adapters.parameters_of(transformer, "blue")[
        "transformer_blocks.0.attn.to_q.lora_A.blue.weight"
    ].requires_grad_(True)
    flags = {n: p.requires_grad for n, p in transformer.named_parameters()}
    red, blue, plain = (under(transformer, n) for n in ("red", "blue", "base"))
    with adapters.use(transformer, "red"):
        with adapters.use(transformer, "base"):
            assert torch.equal(under(transformer, "blue"), blue) and torch.equal(velocity(transformer), plain)
        assert torch.equal(velocity(transformer), red)
        with pytest.raises(KeyError), adapters.use(transformer, "blue"):
            raise KeyError
        assert torch.equal(velocity(transformer), red)
        assert flags == {n: p.requires_grad for n, p in transformer.named_parameters()}
    with pytest.raises(AssertionError, match="no adapter 'green'"), adapters.use(transformer, "green"):
        pass


def test_only_the_adapter_in_use_gets_gradients(base, world):
    transformer = attached(base, world, "red", "blue")
    for name in ("red", "blue"):
        for p in adapters.parameters_of(transformer, name).values():
            p.requires_grad_(True)
    with adapters.use(transformer, "red"):
        x, embeds, pooled = torch.randn(1, 4, 4, 4), torch.randn(1, 24, 128), torch.randn(1, 128)
        sd3.velocity(
            transformer, x, torch.tensor([0.5]), {"embeds": embeds, "pooled": pooled}
        ).square().sum().backward()
    gradients = {n: p.grad for n, p in adapters.parameters_of(transformer, "red").items()}
    # The last block's text queries reach no output, so their gradient is zero.
    assert all(
        g.abs().max() > 0
        for n, g in gradients.items()
        if not n.startswith("transformer_blocks.1.attn.add_q_proj")
    )
    assert all(p.grad is None for n, p in transformer.named_parameters() if ".red." not in n)


def test_teachers_add_their_lora_bytes_and_nothing_else(base, world):
    transformer = copy.deepcopy(base)
    before = {p.data_ptr(): p.nbytes for p in transformer.parameters()}
    lora = lora_files.read_lora(str(world / "red"))
    for k in range(3):
        adapters.attach(transformer, f"t{k}", lora, torch.bfloat16)
    after = {p.data_ptr(): p.nbytes for p in transformer.parameters()}
    per_teacher = sum(2 * t.numel() for t in [*lora.A.values(), *lora.B.values()])
    assert before.items() <= after.items() and sum(after.values()) - sum(before.values()) == 3 * per_teacher
    assert not any(p.requires_grad for p in transformer.parameters())


def test_ranks_may_differ_between_modules_and_teachers(base, tmp_path):
    weights = pairs((3, 2))
    transformer = copy.deepcopy(base)
    adapters.attach(
        transformer, "a", lora_files.read_lora(str(peft_dir(tmp_path / "a", weights))), torch.float32
    )
    adapters.attach(
        transformer, "b", lora_files.read_lora(str(peft_dir(tmp_path / "b", pairs((5,))))), torch.float32
    )
    expected = velocity(folded(base, {m: b @ a * 7 / len(a) for m, (a, b) in weights.items()}))
    assert (under(transformer, "a") - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["v1.0", ""])
def test_names_that_cannot_be_stored_are_refused(name, base, world):
    with pytest.raises(ValueError, match=f"adapter name '{name}'"):
        adapters.attach(copy.deepcopy(base), name, lora_files.read_lora(str(world / "red")), torch.float32)


# ---- fresh and merged --------------------------------------------------------------------------------------


def test_a_fresh_lora_starts_at_the_base_with_pefts_spread(base, world):
    lora = adapters.fresh_lora(sd3.skeleton(world / "pipeline"), sd3.LORA_TARGETS, rank=64, alpha=8.0, seed=3)
    transformer = copy.deepcopy(base)
    adapters.attach(transformer, "x", lora, torch.float32)
    assert torch.equal(under(transformer, "x"), velocity(base))
    reference = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=64, target_modules=list(sd3.LORA_TARGETS), init_lora_weights="gaussian"),
    )
    theirs = {
        n.removeprefix("base_model.model.").partition(".lora_A")[0]: p
        for n, p in reference.named_parameters()
        if ".lora_A." in n
    }
    assert set(theirs) == set(lora.A)
    assert torch.cat([*lora.A.values()]).std() == pytest.approx(
        torch.cat([*theirs.values()]).std().item(), rel=0.02
    )
    again = adapters.fresh_lora(sd3.skeleton(world / "pipeline"), sd3.LORA_TARGETS, 64, 8.0, seed=4)
    assert not torch.equal(again.A[MODULES[0]], lora.A[MODULES[0]])
