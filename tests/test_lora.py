"""LoRA on one base: our linear layer is PEFT's, and a model under an adapter is the one with it folded in;
cold starts by merging against dense means in float64, PEFT and the released script."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from opd import lora
from opd.families import sd3
from opd.formats import lora_files, merging
from opd.lora import LoraLinear
from opd.setup import student_start
from tests import tiny
from tests.tiny_lora import MODULES, pairs, peft_dir, under, velocity


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
    factors = [(ours.lora_A, peft[0].lora_A), (ours.lora_B, peft[0].lora_B)]
    grads = [tuple(factor["a"].weight.grad for factor in both) for both in factors]
    assert {mine.dtype for mine, _ in grads} == {torch.float32}
    for mine, theirs in [(y, reference), *grads]:
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
    ours.add("frozen", a.detach().to(dtype), b.detach().to(dtype), 1.5)
    ours.switch("frozen")
    with torch.no_grad():
        at_once = ours(x)
    products = ours(x)
    assert at_once.dtype == dtype and not torch.equal(at_once, products)
    for y in (at_once, products):
        assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize("name", ["a", "old"])
def test_the_trained_adapter_says_the_same_with_and_without_gradients(dtype, tolerance, name):
    """GRPO compares log-probabilities of both: in bfloat16 a weight that is summed first would move them. So
    does stage nft compare velocities with those of a frozen adapter that follows."""
    ours, _ = pair(dtype)
    ours.add("old", ours.lora_A["a"].weight.detach(), ours.lora_B["a"].weight.detach(), 1.5)
    ours.switch(name)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        walked = ours(x)
    ours.switch("a")
    products = ours(x)
    assert torch.equal(walked, products) == (dtype == torch.bfloat16)
    assert (walked - products).norm() <= tolerance * products.norm()


# ---- a model -----------------------------------------------------------------------------------------------
@pytest.fixture
def transformer(base, world):
    """With the adapters red and blue."""
    transformer = copy.deepcopy(base)
    for name in ("red", "blue"):
        lora.attach(transformer, name, lora_files.read_lora(str(world / name)), torch.float32)
    return transformer


def test_an_adapter_of_some_layers_leaves_the_others_alone(transformer):
    """A teacher may adapt fewer layers than the student: where it has none, the slot is empty."""
    layers = lora.lora_layers(transformer)
    assert len(layers) == sum(isinstance(m, LoraLinear) for m in transformer.modules()) > 8
    del layers[0].pairs["red"]
    with lora.use(transformer, "red"):
        assert layers[0].slot is None and {layer.slot for layer in layers[1:]} == {"red"}
    assert {layer.slot for layer in layers} == {None}


def test_use_nests_restores_and_leaves_requires_grad_alone(transformer, base):
    next(iter(lora.parameters_of(transformer, "blue").values())).requires_grad_(True)
    flags = {n: p.requires_grad for n, p in transformer.named_parameters()}
    red, blue, plain = (under(transformer, n) for n in ("red", "blue", "base"))
    assert torch.equal(plain, velocity(base))
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


@pytest.fixture(scope="module")
def loras(world):
    """Two adapters of rank 4, written with alpha = rank, of which red's norm is the larger."""
    return [lora_files.read_lora(str(world / name)) for name in ("red", "blue")]


def merged(loras, mode="svd", rank=8, alpha=20.0):
    return merging.merge(mode, loras, 1 / len(loras), rank, alpha)


def dense_mean(loras, module):
    """float64."""
    return sum(lora.update(module).double() for lora in loras) / len(loras)


def best_of_rank(update, rank):
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def furthest(lora, expected):
    """Largest deviation of the updates from `expected(module)`, relative to its largest entry."""
    distances = []
    for module in lora.A:
        wanted = expected(module)
        distances.append((lora.update(module) - wanted).abs().max() / wanted.abs().max())
    return max(distances)


@pytest.mark.parametrize("rank", [4, 8, 40])
def test_svd_is_the_best_approximation_of_the_dense_mean(rank, loras):
    """Eckart-Young; two adapters of rank 4 are exact from rank 8 on."""
    start = merged(loras, "svd", rank, alpha=3 * rank + 1)
    assert furthest(start, lambda m: best_of_rank(dense_mean(loras, m), rank)) < 1e-5
    if rank >= 8:
        assert furthest(start, lambda m: dense_mean(loras, m)) < 1e-5
    for module in start.A:
        assert start.A[module].shape == (rank, 32) and start.B[module].shape == (32, rank)


def test_an_adapter_without_a_module_counts_as_zero_there(tmp_path):
    both, one = pairs((3,), 1), dict(list(pairs((2,), 2).items())[:1])
    loras = [lora_files.read_lora(str(peft_dir(tmp_path / str(len(w)), w))) for w in (both, one)]
    start = merged(loras, rank=32)
    for module, (a, b) in both.items():
        mean = 0.5 * b @ a * 7 / 3
        if module in one:
            mean = mean + 0.5 * one[module][1] @ one[module][0] * 7 / 2
        assert (start.update(module) - mean).abs().max() < 1e-4


def test_spare_rank_of_a_start_learns(loras):
    """A rank-4 adapter in a student of rank 8: the same update, and a gradient for every row of A and column
    of B once the other has moved."""
    wide = merging.fitted(loras[0], 8, 16.0)
    for module in wide.A:
        assert torch.allclose(wide.update(module), loras[0].update(module), atol=1e-4)
        assert (wide.A[module].abs().amax(1) > 0).all() and (wide.B[module][:, 4:] == 0).all()


def test_the_naive_merge_is_pefts(loras, world):
    """PEFT's "linear" takes the root of every weight into both factors."""
    base = sd3.load_transformer(world / "pipeline", torch.float32)
    model = PeftModel.from_pretrained(base, world / "red", adapter_name="red")
    model.load_adapter(world / "blue", adapter_name="blue")
    model.add_weighted_adapter(["red", "blue"], [0.25] * 2, "x", combination_type="linear")

    def theirs(module):
        return model.get_submodule(f"base_model.model.{module}").get_delta_weight("x")

    assert furthest(merged(loras, "naive", rank=4), theirs) < 1e-5


# ---- what is refused ---------------------------------------------------------------------------------------
def test_naive_refuses_other_ranks_other_layers_and_too_small_a_student(loras, world, tmp_path):
    with pytest.raises(ValueError, match="--merge naive keeps the adapters' rank: use --rank 4 or more"):
        merged(loras, "naive", rank=3)
    wider = tiny.random_lora(world / "pipeline", 5, rank=6)
    fewer = lora_files.read_lora(str(peft_dir(tmp_path / "fewer", pairs((4,)))))
    for other, ranks in ((wider, r"\[4, 6\]"), (fewer, r"\[4, 0\]")):
        with pytest.raises(ValueError, match=f"one rank and the same layers.*: {ranks}; use --merge svd"):
            merged([loras[0], other], "naive")


# ---- the stages --------------------------------------------------------------------------------------------
def test_grpo_starts_from_a_merge_of_named_adapters_in_which_the_base_counts(world, loras):
    sources = {"red": str(world / "red"), "base": "base", "blue": str(world / "blue")}
    cfg = tiny.grpo_config(world, cold_start="merge", merge_from=sources, rank=8)
    cfg.check(1)
    start = student_start(cfg, tiny.build(cfg)[1], {})
    assert furthest(start, lambda m: 2 / 3 * dense_mean(loras, m)) < 1e-5


def test_zero_steps_save_the_merge_and_the_same_command_does_again(world, tmp_path, loras):
    cfg = tiny.config(world, out=str(tmp_path), cold_start="merge", iterations=0, rank=8)
    for _ in range(2):
        tiny.run(cfg)
    with pytest.raises(ValueError, match="run with other settings: rank 8 -> 4"):
        tiny.run(replace(cfg, rank=4))
    with pytest.raises(ValueError, match="holds a student, but no state/"):
        tiny.run(replace(cfg, iterations=2))
    student = lora_files.read_lora(str(tmp_path / "student"))
    assert furthest(student, lambda m: dense_mean(loras, m)) < 1e-5
