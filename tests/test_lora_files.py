"""Adapter files: every format gives the update computed by hand, libraries' files mean what they mean there,
and the rest is refused by name."""

import copy
import json

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from opd import adapters, lora_files
from opd.families import sd3
from tests.tiny_lora import (
    CONFIG,
    MODULES,
    TARGETS,
    keyed,
    pairs,
    peft_dir,
    single_file,
    under,
    velocity,
)


@pytest.fixture(scope="module")
def base(world):
    return sd3.load_transformer(world / "pipeline", torch.float32)


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
    lora = lora_files.read_lora(str(write(tmp_path / "x", weights)))
    assert set(lora.A) == set(MODULES)
    square = 0.0
    for i, (module, (a, b)) in enumerate(weights.items()):
        if name == "bfloat16":
            a, b = a.bfloat16(), b.bfloat16()
        by_hand = b.double() @ a.double() * alpha(i) / len(a)
        square += by_hand.square().sum().item()
        torch.testing.assert_close(lora.update(module).double(), by_hand, rtol=1e-5, atol=1e-5)
    assert lora.norm() == pytest.approx(square**0.5, rel=1e-5)


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
    adapters.attach(transformer, "x", lora_files.read_lora(str(tmp_path)), torch.float32)
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
    adapters.attach(transformer, "x", lora_files.read_lora(str(tmp_path)), torch.float32)
    assert (under(transformer, "x") - velocity(inner)).abs().max() < 1e-5


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
        lora_files.read_lora(source)
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
    lora_files.check_fits(
        lora_files.read_lora(str(changed(lambda t: None)(tmp_path / "good"))), skeleton, sd3.LORA_TARGETS
    )
    source = str(changed(change)(tmp_path / "bad"))
    with pytest.raises(ValueError, match=message) as caught:
        lora_files.check_fits(lora_files.read_lora(source), skeleton, sd3.LORA_TARGETS)
    assert repr(source) in str(caught.value)


def test_hub_ids_with_and_without_subfolder(world, monkeypatch, tmp_path):
    calls = []

    def download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return str(world if "sub" in repo else world / "red")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    red, blue = lora_files.read_lora("owner/plain"), lora_files.read_lora("owner/sub:blue")
    assert red.sha256 == lora_files.read_lora(str(world / "red")).sha256
    assert blue.sha256 == lora_files.read_lora(str(world / "blue")).sha256 != red.sha256
    assert calls == [
        ("owner/plain", ["*.json", "*.safetensors"]),
        ("owner/sub", ["blue/*.json", "blue/*.safetensors"]),
    ]


def test_an_unreachable_hub_id_is_named(monkeypatch):
    def download(repo, allow_patterns):
        raise OSError("gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"adapter 'owner/name'.*\(OSError\); check the spelling"):
        lora_files.read_lora("owner/name")
