"""Cold starts by merging: against dense sums in float64, PEFT's weighted adapters, and published formulas."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from opd.families import sd3
from opd.formats import lora_files, merging
from opd.formats.merging import Part, Recipe
from opd.setup import student_start
from tests import tiny
from tests.tiny_lora import pairs, peft_dir

EQUAL = {"red": 0.5, "blue": 0.5}
UNEQUAL = {"red": 0.9, "blue": -0.3}


@pytest.fixture(scope="module")
def loras(world):
    """Two adapters of rank 4, written with alpha = rank, of which red's norm is the larger."""
    return {name: lora_files.read_lora(str(world / name)) for name in ("red", "blue")}


def merged(loras, weights=EQUAL, mode="svd", rank=8, alpha=20.0, density=1.0, seed=0):
    return merging.merge(loras, weights, Recipe(mode, rank, density, seed), alpha)


def dense_sum(loras, weights, module):
    """float64."""
    return sum(weights[name] * lora.update(module).double() for name, lora in loras.items())


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


# ---- the sum, exact and truncated --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 40])
def test_svd_is_the_best_approximation_of_the_dense_sum(rank, weights, loras):
    """Eckart-Young; two adapters of rank 4 are exact from rank 8 on."""
    start = merged(loras, weights, "svd", rank, alpha=3 * rank + 1)
    assert furthest(start, lambda m: best_of_rank(dense_sum(loras, weights, m), rank)) < 1e-5
    if rank >= 8:
        assert furthest(start, lambda m: dense_sum(loras, weights, m)) < 1e-5
    for module in start.A:
        assert start.A[module].shape == (rank, 32) and start.B[module].shape == (32, rank)


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("rank", [8, 11])
def test_cat_is_the_dense_sum(rank, weights, loras):
    start = merged(loras, weights, "cat", rank)
    assert furthest(start, lambda m: dense_sum(loras, weights, m)) < 1e-6
    for module in start.A:
        assert torch.equal(start.A[module][:4], loras["red"].A[module])


@pytest.mark.parametrize("mode", ["svd", "cat", "ties"])
def test_an_adapter_without_a_module_counts_as_zero_there(mode, tmp_path):
    both, one = pairs((3,), 1), dict(list(pairs((2,), 2).items())[:1])
    files = {"red": both, "blue": one}
    loras = {n: lora_files.read_lora(str(peft_dir(tmp_path / n, w))) for n, w in files.items()}
    start = merged(loras, mode=mode, rank=32)
    for module, (a, b) in both.items():
        mean = 0.5 * b @ a * 7 / 3
        if module in one:
            mean = mean + 0.5 * one[module][1] @ one[module][0] * 7 / 2
        if mode == "ties":  # a zero agrees with no sign: the mean is that of red alone
            mean = mean if module in one else 2 * mean
        if mode != "ties" or module not in one:
            assert (start.update(module) - mean).abs().max() < 1e-4


def test_spare_rank_of_a_start_learns(loras):
    """A rank-4 adapter in a student of rank 8: the same update, and a gradient for every row of A and column
    of B once the other has moved."""
    wide = merging.fitted(loras["red"], 8, 16.0)
    for module in wide.A:
        assert torch.allclose(wide.update(module), loras["red"].update(module), atol=1e-4)
        assert (wide.A[module].abs().amax(1) > 0).all() and (wide.B[module][:, 4:] == 0).all()


# ---- PEFT --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_model(world):
    model = PeftModel.from_pretrained(
        sd3.load_transformer(world / "pipeline", torch.float32), world / "red", adapter_name="red"
    )
    model.load_adapter(world / "blue", adapter_name="blue")
    return model


def by_peft(model, weights, kind, **settings):
    """module -> the update that PEFT merges."""
    model = copy.deepcopy(model)
    model.add_weighted_adapter(list(weights), list(weights.values()), "x", combination_type=kind, **settings)
    return lambda module: model.get_submodule(f"base_model.model.{module}").get_delta_weight("x")


@pytest.mark.parametrize(
    "mode, kind, weights, rank, density",
    [
        ("svd", "svd", UNEQUAL, 3, 1.0),
        ("cat", "cat", {"red": 0.9, "blue": 0.3}, 8, 1.0),
        ("ties", "ties_svd", EQUAL, 5, 0.3),
        ("ties", "ties_svd", EQUAL, 32, 0.7),
    ],
)
def test_merges_are_those_of_peft(mode, kind, weights, rank, density, loras, peft_model):
    """PEFT does not divide the mean of TIES by weights, so its weights are 1 where ours are 1 / K."""
    settings = {} if kind == "cat" else {"svd_rank": rank}
    theirs = weights
    if mode == "ties":
        settings["density"] = density
        theirs = dict.fromkeys(weights, 1.0)
    expected = by_peft(peft_model, theirs, kind, **settings)
    assert furthest(merged(loras, weights, mode, rank, density=density), expected) < 1e-4


# ---- TIES, DARE and the naive average by hand --------------------------------------------------------------


def parts_of(updates, weights):
    """Square updates, each as the product of itself and the identity."""
    size = len(updates[0])
    pairs = zip(updates, weights, strict=True)
    return [Part(str(k), w, torch.eye(size), torch.tensor(u)) for k, (u, w) in enumerate(pairs)]


@pytest.mark.parametrize(
    "weights, expected",
    [
        ([0.5, 0.5], [[3.0, 4.0], [0.0, -4.0]]),
        # Election: 3, 8 - 5, 0, -1; then the weighted mean of those that agree, times the sum of weights.
        ([1.0, 1.0], [[6.0, 8.0], [0.0, -8.0]]),
        ([3.0, 1.0], [[10.0, 16.0], [0.0, 12.0]]),
    ],
)
def test_ties_by_hand(weights, expected):
    """Of four entries three are kept; the top left ones agree, the others quarrel."""
    parts = parts_of([[[2.0, 4.0], [0.5, 3.0]], [[4.0, -3.0], [1.0, -4.0]]], weights)
    a, b = merging.ties(parts, Recipe("ties", 2, 0.75, 0), torch.Generator())
    assert torch.allclose(b @ a, torch.tensor(expected), atol=1e-5)


def test_dare_drops_entries_and_scales_up_the_rest(loras):
    """One adapter in full rank: every entry is 0 or 1 / density times what it was, in the right share."""
    density = 0.3
    one = {"red": loras["red"]}
    start = merged(one, {"red": 1.0}, "dare", rank=32, density=density)
    kept, count = 0, 0
    for module in start.A:
        before, after = one["red"].update(module), start.update(module)
        share = after / before
        is_kept = share > 0.5 / density
        clear = before.abs() > 1e-2 * before.abs().max()
        assert torch.allclose(share[clear & is_kept], torch.tensor(1 / density), rtol=1e-2)
        assert share[clear & ~is_kept].abs().max() < 0.05
        kept, count = kept + (clear & is_kept).sum().item(), count + clear.sum().item()
    assert abs(kept / count - density) < 4 * (density * (1 - density) / count) ** 0.5


def only(lora, module):
    return replace(lora, A={module: lora.A[module]}, B={module: lora.B[module]})


def test_dare_averages_to_the_sum_and_depends_on_the_seed(loras):
    module = next(iter(loras["red"].A))
    loras = {name: only(lora, module) for name, lora in loras.items()}
    drawn = [merged(loras, UNEQUAL, "dare", rank=32, density=0.5, seed=seed) for seed in range(60)]
    samples = torch.stack([start.update(module) for start in drawn])
    assert not torch.equal(samples[0], samples[1])
    again = merged(loras, UNEQUAL, "dare", rank=32, density=0.5, seed=0)
    assert torch.equal(again.update(module), samples[0])
    error = (samples.mean(0) - dense_sum(loras, UNEQUAL, module)).square().mean().sqrt()
    standard_error = samples.var(0).mean().sqrt() / 60**0.5
    assert 0.8 * standard_error < error < 1.2 * standard_error


@pytest.mark.parametrize("weights", [EQUAL, {"red": 0.9, "blue": 0.3}], ids=["equal", "unequal"])
def test_naive_averages_the_factors_apart_and_is_another_update(weights, loras, peft_model):
    start = merged(loras, weights, "naive", rank=4)

    def product_of_averages(module):
        a, b = (
            sum(weights[n] * getattr(lora, kind)[module].double() for n, lora in loras.items())
            for kind in "AB"
        )
        return b @ a

    assert furthest(start, product_of_averages) < 1e-5
    assert furthest(start, lambda m: dense_sum(loras, weights, m)) > 0.1
    # PEFT's "linear" takes the root of every weight into both factors.
    squared = {name: weight**2 for name, weight in weights.items()}
    assert furthest(start, by_peft(peft_model, squared, "linear")) < 1e-5


# ---- what is refused ---------------------------------------------------------------------------------------


def test_merge_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="--cold-start merge.*use --cold-start base"):
        merged({}, {})


def test_cat_says_which_rank_it_needs(loras):
    with pytest.raises(ValueError, match="ranks up to 8, and --rank is 7; use --rank 8 or more, or --merge"):
        merged(loras, mode="cat", rank=7)


def test_naive_refuses_other_ranks_other_layers_and_too_small_a_student(loras, world, tmp_path):
    with pytest.raises(ValueError, match="--merge naive keeps the adapters' rank: use --rank 4 or more"):
        merged(loras, mode="naive", rank=3)
    wider = loras | {"blue": tiny.random_lora(world / "pipeline", 5, rank=6)}
    with pytest.raises(ValueError, match=r"ranks here: {'red': 4, 'blue': 6}; use --merge svd"):
        merged(wider, mode="naive")
    fewer = lora_files.read_lora(str(peft_dir(tmp_path / "fewer", pairs((4,)))))
    with pytest.raises(ValueError, match=r"one rank and the same layers; ranks here: {'red': 4, 'blue': 0}"):
        merged(loras | {"blue": fewer}, mode="naive")


@pytest.mark.parametrize("config", [tiny.config, tiny.grpo_config, tiny.sft_config])
def test_adapters_of_another_base_are_refused_before_they_are_merged(config, world, tmp_path):
    other = peft_dir(tmp_path / "other", {m: (a[:, :16].clone(), b) for m, (a, b) in pairs().items()})
    changes = {"merge_from": {"red": str(world / "red"), "other": str(other)}, "cold_start": "merge"}
    settings = {"out": str(tmp_path / "run"), **changes}
    if config is tiny.sft_config:
        settings["data"] = str(tmp_path)
    with pytest.raises(ValueError, match="it was made for another base"):
        tiny.build(config(world, **settings))


# ---- the stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(merging.MERGES))
def test_distillation_starts_from_its_teachers_merged(mode, world, loras, tmp_path):
    cfg = tiny.config(world, cold_start="merge", merge=mode, rank=8, out=str(tmp_path), seed=3)
    cfg, model, *_ = tiny.build(cfg)
    start = merged(loras, mode=mode, rank=8, alpha=cfg.alpha, density=0.5, seed=3)
    for module in start.A:
        layer = model.transformer.get_submodule(module)
        for name in ("start", "student"):
            assert torch.equal(layer.lora_A[name].weight, start.A[module])
            assert torch.equal(layer.lora_B[name].weight, start.B[module])


def test_grpo_starts_from_a_merge_of_named_adapters(world, loras):
    sources = {name: str(world / name) for name in loras}
    weights = {"red": 0.25, "blue": 0.75}
    cfg = tiny.grpo_config(
        world, cold_start="merge", merge_from=sources, merge_weights=weights, merge="cat", rank=8
    )
    cfg.check(1)
    model = tiny.build(cfg)[1]
    start = student_start(cfg, model)
    assert furthest(start, lambda m: dense_sum(loras, weights, m)) < 1e-6
