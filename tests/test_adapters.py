"""Adapters: every format gives the same dense update, and the model under an adapter is the model with it
folded in."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import opd.files
from opd import adapters
from opd.families import sd3
from tests import tiny

MODULES = [f"transformer_blocks.{block}.attn.{layer}" for block in (0, 1) for layer in ("to_q", "to_out.0")]
TARGETS = ("attn.to_q", "attn.to_out.0")
CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 7.0,
    "target_modules": list(TARGETS),
    "a_future_key": {"x": [1]},
}


def pairs(ranks=(3,), seed=0):
    """Random (A, B) per module; the model is 32 wide."""
    g = torch.Generator().manual_seed(seed)
    size = {m: ranks[i % len(ranks)] for i, m in enumerate(MODULES)}
    return {m: (torch.randn(r, 32, generator=g), torch.randn(32, r, generator=g)) for m, r in size.items()}


def keyed(weights, prefix="base_model.model.", suffix=".weight"):
    return {
        f"{prefix}{m}.lora_{kind}{suffix}": t
        for m, ab in weights.items()
        for kind, t in zip("AB", ab, strict=True)
    }


def peft_dir(folder, weights, **config):
    folder.mkdir()
    save_file(keyed(weights), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def single_file(folder, tensors, metadata=None):
    folder.mkdir()
    save_file(tensors, folder / "any.safetensors", metadata)
    return folder / "any.safetensors"


def with_alpha_keys(weights):
    return keyed(weights, "") | {f"{m}.alpha": torch.tensor(5.0 + i) for i, m in enumerate(MODULES)}


def diffusers_metadata(**config):
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in (CONFIG | config).items()})
    }


# name: (write(folder, weights) -> path, ranks, alpha of the i-th module)
FORMATS = {
    "PEFT directory": (lambda f, w: peft_dir(f, w), (3,), lambda i: 7),
    "the file in it": (lambda f, w: peft_dir(f, w) / "adapter_model.safetensors", (3,), lambda i: 7),
    "ranks differ": (lambda f, w: peft_dir(f, w, rank_pattern={"attn.to_out.0": 2}), (3, 2), lambda i: 7),
    "alpha by name": (
        lambda f, w: peft_dir(f, w, alpha_pattern={MODULES[1]: 2.0}),
        (3,),
        lambda i: 2 if i == 1 else 7,
    ),
    "alpha by suffix": (
        lambda f, w: peft_dir(f, w, alpha_pattern={"to_q": 2.0}),
        (3,),
        lambda i: 7 if i % 2 else 2,
    ),
    "alpha by regex": (
        lambda f, w: peft_dir(f, w, alpha_pattern={r".*\.1\.attn.*": 2.0}),
        (3,),
        lambda i: 2 if i > 1 else 7,
    ),
    "no alpha_pattern": (
        lambda f, w: peft_dir(f, w, alpha_pattern=None, rank_pattern=None),
        (3,),
        lambda i: 7,
    ),
    "rank-stabilised": (
        lambda f, w: peft_dir(f, w, use_rslora=True, alpha_pattern={"to_q": 2.0}),
        (3,),
        lambda i: 3**0.5 * (7 if i % 2 else 2),
    ),
    "transformer.": (lambda f, w: single_file(f, keyed(w, "transformer.")), (3, 2), lambda i: (3, 2)[i % 2]),
    "base_model.model.": (lambda f, w: single_file(f, keyed(w)), (3,), lambda i: 3),
    "no prefix": (lambda f, w: single_file(f, keyed(w, "")), (3,), lambda i: 3),
    "default in names": (lambda f, w: single_file(f, keyed(w, suffix=".default.weight")), (3,), lambda i: 3),
    "alpha keys": (lambda f, w: single_file(f, with_alpha_keys(w)), (3,), lambda i: 5 + i),
    "metadata": (
        lambda f, w: single_file(f, keyed(w, "transformer."), diffusers_metadata()),
        (3,),
        lambda i: 7,
    ),
    "metadata pattern": (
        lambda f, w: single_file(
            f, keyed(w, "transformer."), diffusers_metadata(alpha_pattern={MODULES[2]: 1})
        ),
        (3, 2),
        lambda i: 1 if i == 2 else 7,
    ),
    "bfloat16": (
        lambda f, w: peft_dir(f, {m: (a.bfloat16(), b.bfloat16()) for m, (a, b) in w.items()}),
        (3,),
        lambda i: 7,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_update_computed_by_hand(name, tmp_path):
    write, ranks, alpha = FORMATS[name]
    weights = pairs(ranks)
    lora = adapters.read_lora(str(write(tmp_path / "x", weights)))
    assert set(lora.A) == set(MODULES)
    square = 0.0
    for i, (module, (a, b)) in enumerate(weights.items()):
        if name == "bfloat16":
            a, b = a.bfloat16(), b.bfloat16()
        by_hand = b.double() @ a.double() * alpha(i) / len(a)
        square += by_hand.square().sum().item()
        torch.testing.assert_close(lora.update(module).double(), by_hand, rtol=1e-5, atol=1e-5)
    assert lora.norm() == pytest.approx(square**0.5, rel=1e-5)


# ---- on the model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(world):
    return sd3.load_transformer(world / "pipeline", torch.float32)


def velocity(transformer):
    g = torch.Generator().manual_seed(0)
    x, embeds, pooled = (torch.randn(s, generator=g) for s in ((3, 4, 4, 4), (3, 24, 128), (3, 128)))
    with torch.no_grad():
        return sd3.velocity(
            transformer, x, torch.tensor([1.0, 0.6, 0.1]), {"embeds": embeds, "pooled": pooled}
        )


def folded(base, update, share=1.0):
    """A dense copy of the base with `update(module)` added to its weights."""
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for module in update:
            dense.get_submodule(module).weight += share * update[module]
    return dense


def dense_update(folder, scale):
    """The update of a PEFT directory, straight from its tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors}
    return {
        m: scale
        * tensors[f"base_model.model.{m}.lora_B.weight"]
        @ tensors[f"base_model.model.{m}.lora_A.weight"]
        for m in names
    }


def attached(base, world, *names):
    transformer = copy.deepcopy(base)
    for name in names:
        adapters.attach(transformer, name, adapters.read_lora(str(world / name)), torch.float32)
    return transformer


def under(transformer, name):
    with adapters.use(transformer, name):
        return velocity(transformer)


def test_each_adapter_equals_its_folded_copy_and_the_base_is_untouched(base, world):
    transformer = attached(base, world, "red", "blue")
    plain = velocity(base)
    for name in ("red", "blue", "red"):  # and none leaks into the next
        expected = velocity(folded(base, dense_update(world / name, 8 / 4)))
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
    lora = adapters.read_lora(str(world / "red"))
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
        transformer, "a", adapters.read_lora(str(peft_dir(tmp_path / "a", weights))), torch.float32
    )
    adapters.attach(
        transformer, "b", adapters.read_lora(str(peft_dir(tmp_path / "b", pairs((5,))))), torch.float32
    )
    expected = velocity(folded(base, {m: b @ a * 7 / len(a) for m, (a, b) in weights.items()}))
    assert (under(transformer, "a") - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["v1.0", ""])
def test_names_that_cannot_be_stored_are_refused(name, base, world):
    with pytest.raises(ValueError, match=f"adapter name '{name}'"):
        adapters.attach(copy.deepcopy(base), name, adapters.read_lora(str(world / "red")), torch.float32)


# ---- files written by the libraries themselves -------------------------------------------------------------


def peft_model(base):
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=list(TARGETS),
        rank_pattern={"attn.to_q": 5},
        alpha_pattern={"1.attn.to_out.0": 2},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(base), config).eval()


def test_a_directory_saved_by_peft_is_read_right(base, tmp_path):
    model = peft_model(base)
    model.save_pretrained(tmp_path)
    transformer = copy.deepcopy(base)
    adapters.attach(transformer, "x", adapters.read_lora(str(tmp_path)), torch.float32)
    expected = velocity(model)
    assert (expected - velocity(base)).abs().max() > 1e-3
    assert (under(transformer, "x") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_saved_by_diffusers_is_read_right(metadata, base, tmp_path):
    inner = copy.deepcopy(base)
    torch.manual_seed(0)
    inner.add_adapter(
        LoraConfig(
            r=3, lora_alpha=7 if metadata else 3, target_modules=list(TARGETS), init_lora_weights=False
        )
    )
    extra = _collate_lora_metadata({"transformer": inner}) if metadata else {}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(inner), **extra)
    transformer = copy.deepcopy(base)
    adapters.attach(transformer, "x", adapters.read_lora(str(tmp_path)), torch.float32)
    assert (under(transformer, "x") - velocity(inner)).abs().max() < 1e-5


# ---- saving ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(base, world, tmp_path_factory):
    """A student of rank 4, alpha 10 as saved, and its velocity."""
    folder, transformer = tmp_path_factory.mktemp("saved"), copy.deepcopy(base)
    adapters.attach(
        transformer, "student", tiny.random_lora(world / "pipeline", 5, rank=4, alpha=10.0), torch.float32
    )
    adapters.save_lora(folder, adapters.parameters_of(transformer, "student"), "student", 4, 10.0)
    return folder, under(transformer, "student")


def by_ours(base, world, source):
    transformer = copy.deepcopy(base)
    adapters.attach(transformer, "x", adapters.read_lora(str(source)), torch.float32)
    return under(transformer, "x")


def by_diffusers(base, world, source, **which):
    pipe = StableDiffusion3Pipeline.from_pretrained(
        world / "pipeline", transformer=copy.deepcopy(base), text_encoder_3=None, tokenizer_3=None
    )
    pipe.load_lora_weights(source, **which)
    return velocity(pipe.transformer)


@pytest.mark.parametrize(
    "read",
    [
        by_ours,
        lambda base, world, source: by_ours(base, world, source / "pytorch_lora_weights.safetensors"),
        lambda base, world, source: velocity(PeftModel.from_pretrained(copy.deepcopy(base), source).eval()),
        by_diffusers,
        lambda base, world, source: by_diffusers(
            base, world, source, weight_name="pytorch_lora_weights.safetensors"
        ),
    ],
    ids=["ours", "our reader of the diffusers file", "PEFT", "diffusers", "diffusers by file name"],
)
def test_what_we_save_means_the_same_to_everyone(read, base, world, saved):
    folder, expected = saved
    assert (expected - velocity(base)).abs().max() > 0.01
    assert (read(base, world, folder) - expected).abs().max() < 1e-5


def test_save_transformer_is_a_diffusers_directory(base, tmp_path):
    changed = folded(base, {MODULES[0]: torch.ones(32, 32)}, 0.1)
    adapters.save_transformer(
        tmp_path / "transformer", changed, dict(changed.named_parameters()), torch.float32
    )
    assert torch.equal(velocity(sd3.load_transformer(tmp_path, torch.float32)), velocity(changed))


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


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 40])
def test_merge_is_the_truncated_svd_of_the_mean_update(rank, world):
    """Two rank-4 teachers: exact from rank 8 on, below it the best approximation (Eckart-Young)."""
    loras = [adapters.read_lora(str(world / n)) for n in ("red", "blue")]
    merged = adapters.merge(loras, rank, alpha=3 * rank + 1)
    for module in loras[0].A:
        mean = sum(lora.update(module).double() for lora in loras) / 2
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert merged.A[module].shape == (rank, 32) and merged.B[module].shape == (32, rank)
        assert (merged.update(module) - best).abs().max() < 1e-5 * s[0]
        if rank >= 8:
            assert (merged.update(module) - mean).abs().max() < 1e-5 * s[0]
        a, b = (sum(getattr(lora, kind)[module] for lora in loras) / 2 for kind in "AB")
        assert (merged.update(module) - loras[0].scale[module] * b @ a).abs().max() > 0.1 * s[0]


def test_merge_counts_a_teacher_without_a_module_as_zero_there(tmp_path):
    both, one = pairs((3,), 1), dict(list(pairs((2,), 2).items())[:1])
    loras = [adapters.read_lora(str(peft_dir(tmp_path / n, w))) for n, w in (("both", both), ("one", one))]
    merged = adapters.merge(loras, 8, 8.0)
    for module, (a, b) in both.items():
        mean = 0.5 * b @ a * 7 / 3 + (0.5 * one[module][1] @ one[module][0] * 7 / 2 if module in one else 0)
        assert (merged.update(module) - mean).abs().max() < 1e-4


def test_spare_rank_of_a_start_learns(world):
    """A rank-4 adapter in a student of rank 8: the same update, and a gradient for every row of A and column
    of B once the other has moved."""
    lora = adapters.read_lora(str(world / "red"))
    wide = adapters.merge([lora], 8, 16.0)
    for module in lora.A:
        assert torch.allclose(wide.update(module), lora.update(module), atol=1e-4)
        assert (wide.A[module].abs().amax(1) > 0).all() and (wide.B[module][:, 4:] == 0).all()


def test_merge_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="--cold-start merge.*use --cold-start base"):
        adapters.merge([], 4, 4.0)


# ---- what is refused ---------------------------------------------------------------------------------------


def changed(change):
    """Write the tensors of two modules after `change`."""

    def write(folder):
        tensors = keyed(pairs())
        change(tensors)
        return single_file(folder, tensors)

    return write


def text_file(folder):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    return folder


def empty(folder):
    folder.mkdir()
    return folder


def zero(kind):
    return changed(lambda tensors: [t.zero_() for k, t in tensors.items() if f"lora_{kind}" in k])


UNREADABLE = {
    "missing": (lambda f: f, FileNotFoundError, "no such file or directory"),
    "empty directory": (empty, FileNotFoundError, "neither adapter_model.safetensors nor"),
    "not safetensors": (text_file, ValueError, "not a readable safetensors file"),
    "zero B": (zero("B"), ValueError, "zero everywhere.*saved before training.*write 'base'"),
    "zero A": (zero("A"), ValueError, "zero everywhere"),
    "half a pair": (
        changed(lambda t: t.pop(f"base_model.model.{MODULES[2]}.lora_B.weight")),
        ValueError,
        rf"4 lora_A and 3 lora_B.*{MODULES[2]}",
    ),
    "full model": (
        lambda f: single_file(f, {f"{MODULES[0]}.weight": torch.ones(32, 32)}),
        ValueError,
        rf"{MODULES[0]}.weight' is no LoRA weight.*fully fine-tuned",
    ),
    "DoRA": (
        changed(lambda t: t.update({f"{MODULES[0]}.lora_magnitude_vector": torch.ones(32)})),
        ValueError,
        "lora_magnitude_vector' is no LoRA weight",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_adapters_are_refused_by_name(name, tmp_path):
    write, error, message = UNREADABLE[name]
    source = str(write(tmp_path / "x"))
    with pytest.raises(error, match=message) as caught:
        adapters.read_lora(source)
    assert repr(source) in str(caught.value)


def without_a_module(tensors):
    for kind in "AB":
        tensors.pop(f"base_model.model.{MODULES[3]}.lora_{kind}.weight")


def other_width(tensors):
    tensors[f"base_model.model.{MODULES[1]}.lora_A.weight"] = torch.ones(3, 48)


def extra_block(tensors):
    tensors |= {
        f"base_model.model.transformer_blocks.9.attn.to_q.lora_{k}.weight": torch.ones(s)
        for k, s in (("A", (3, 32)), ("B", (32, 3)))
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (without_a_module, rf"lacks 1 of these layers: \['{MODULES[3]}'\]; the file is incomplete"),
        (
            other_width,
            rf"{MODULES[1]} updates \(32, 48\), the base has \(32, 32\); it was made for another base",
        ),
        (extra_block, r"layers that the base lacks: \['transformer_blocks.9.attn.to_q'\] \(1 of 5\)"),
    ],
)
def test_adapters_of_another_base_are_refused(change, message, world, tmp_path):
    skeleton = sd3.skeleton(world / "pipeline")
    adapters.check_fits(
        adapters.read_lora(str(changed(lambda t: None)(tmp_path / "good"))), skeleton, sd3.LORA_TARGETS
    )
    source = str(changed(change)(tmp_path / "bad"))
    with pytest.raises(ValueError, match=message) as caught:
        adapters.check_fits(adapters.read_lora(source), skeleton, sd3.LORA_TARGETS)
    assert repr(source) in str(caught.value)


def test_hub_ids_with_and_without_subfolder(world, monkeypatch, tmp_path):
    calls = []

    def download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return str(world if "sub" in repo else world / "red")

    monkeypatch.setattr(opd.files, "snapshot_download", download)
    red, blue = adapters.read_lora("owner/plain"), adapters.read_lora("owner/sub:blue")
    assert red.sha256 == adapters.read_lora(str(world / "red")).sha256
    assert blue.sha256 == adapters.read_lora(str(world / "blue")).sha256 != red.sha256
    assert calls == [
        ("owner/plain", ["*.json", "*.safetensors"]),
        ("owner/sub", ["blue/*.json", "blue/*.safetensors"]),
    ]


def test_an_unreachable_hub_id_is_named(monkeypatch):
    def download(repo, allow_patterns):
        raise OSError("gated")

    monkeypatch.setattr(opd.files, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"adapter 'owner/name'.*\(OSError\); check the spelling"):
        adapters.read_lora("owner/name")
