"""Cold starts by merging: against dense means in float64, PEFT and the released script."""

import pytest
import torch
from peft import PeftModel

from opd.families import sd3
from opd.formats import lora_files, merging
from opd.setup import student_start
from tests import tiny
from tests.tiny_lora import pairs, peft_dir


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


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 40])
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


def test_naive_averages_the_factors_apart_and_is_another_update(loras):
    """As the released script does: the mean of all A and the mean of all B, whose product has cross terms."""
    start = merged(loras, "naive", rank=4)

    def product_of_means(module):
        a = sum(lora.A[module].double() for lora in loras) / 2
        b = sum(lora.scale[module] * lora.B[module].double() for lora in loras) / 2
        return b @ a

    assert furthest(start, product_of_means) < 1e-5
    assert furthest(start, lambda m: dense_mean(loras, m)) > 0.1


@pytest.mark.parametrize(
    "mode, kind, weight, far", [("svd", "svd", 0.5, 1e-4), ("naive", "linear", 0.25, 1e-5)]
)
def test_merges_are_those_of_peft(mode, kind, weight, far, loras, world):
    """PEFT's "linear" takes the root of every weight into both factors."""
    base = sd3.load_transformer(world / "pipeline", torch.float32)
    model = PeftModel.from_pretrained(base, world / "red", adapter_name="red")
    model.load_adapter(world / "blue", adapter_name="blue")
    model.add_weighted_adapter(["red", "blue"], [weight] * 2, "x", combination_type=kind, svd_rank=4)

    def theirs(module):
        return model.get_submodule(f"base_model.model.{module}").get_delta_weight("x")

    assert furthest(merged(loras, mode, rank=4), theirs) < far


# ---- what is refused ---------------------------------------------------------------------------------------


def test_merge_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="--cold-start merge.*use --cold-start base"):
        merging.merge("svd", [], 1.0, 8, 8.0)


def test_naive_refuses_other_ranks_other_layers_and_too_small_a_student(loras, world, tmp_path):
    with pytest.raises(ValueError, match="--merge naive keeps the adapters' rank: use --rank 4 or more"):
        merged(loras, "naive", rank=3)
    wider = tiny.random_lora(world / "pipeline", 5, rank=6)
    fewer = lora_files.read_lora(str(peft_dir(tmp_path / "fewer", pairs((4,)))))
    for other, ranks in ((wider, r"\[4, 6\]"), (fewer, r"\[4, 0\]")):
        with pytest.raises(ValueError, match=f"one rank and the same layers.*: {ranks}; use --merge svd"):
            merged([loras[0], other], "naive")


def test_adapters_of_another_base_are_refused_before_they_are_merged(world, tmp_path):
    other = peft_dir(tmp_path / "other", {m: (a[:, :16].clone(), b) for m, (a, b) in pairs().items()})
    sources = {"red": str(world / "red"), "other": str(other)}
    changes = {"merge_from": sources, "cold_start": "merge", "out": str(tmp_path / "run")}
    for cfg in (tiny.config(world, **changes), tiny.sft_config(world, data=str(tmp_path), **changes)):
        with pytest.raises(ValueError, match="it was made for another base"):
            tiny.build(cfg)


# ---- the stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(merging.MERGES))
def test_distillation_starts_from_its_teachers_merged(mode, world, loras, tmp_path):
    cfg = tiny.config(world, cold_start="merge", merge=mode, rank=8, out=str(tmp_path))
    cfg, model, *_ = tiny.build(cfg)
    start = merged(loras, mode, rank=8, alpha=cfg.alpha)
    for module in start.A:
        layer = model.transformer.get_submodule(module)
        for name in ("start", "student"):
            assert torch.equal(layer.lora_A[name].weight, start.A[module])
            assert torch.equal(layer.lora_B[name].weight, start.B[module])


def test_grpo_starts_from_a_merge_of_named_adapters_in_which_the_base_counts(world, loras):
    sources = {"red": str(world / "red"), "base": "base", "blue": str(world / "blue")}
    cfg = tiny.grpo_config(world, cold_start="merge", merge_from=sources, rank=8)
    cfg.check(1)
    start = student_start(cfg, tiny.build(cfg)[1])
    assert furthest(start, lambda m: 2 / 3 * dense_mean(loras, m)) < 1e-5
