"""Adapter files: every format gives the update computed by hand, libraries' files mean what they mean there,
and the rest is refused by name. What else is in the field: tests/test_lora_field.py."""

import json
from itertools import cycle

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict

from opd.families import sd3
from opd.formats import lora_files
from tests.tiny_lora import CONFIG, MODULES, alike, keyed, pairs, peft_dir, peft_model, refused, single_file


def in_a_checkpoint(folder, weights):
    """As Flow-GRPO leaves it."""
    folder.mkdir()
    peft_dir(folder / "lora", weights)
    return folder


def with_metadata(folder, weights):
    """As diffusers writes it."""
    config = CONFIG | {"alpha_pattern": {MODULES[2]: 1}}
    packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return single_file(folder, keyed(weights, "transformer."), {"lora_adapter_metadata": packed})


# write(folder, weights) -> path, ranks of the modules in turn, alphas in turn
FORMATS = [(in_a_checkpoint, [3], [7]), (with_metadata, [3, 2], [7, 7, 1, 7])]


@pytest.mark.parametrize("write, ranks, alphas", FORMATS)
def test_every_format_gives_the_update_computed_by_hand(write, ranks, alphas, tmp_path):
    """What PEFT and diffusers write is compared with what they read, below."""
    weights = pairs(ranks)
    lora = lora_files.read_lora(str(write(tmp_path / "x", weights)), sd3.convert_lora)
    assert set(lora.A) == set(MODULES)
    square = 0.0
    for (module, (a, b)), alpha in zip(weights.items(), cycle(alphas), strict=False):
        by_hand = b.double() @ a.double() * alpha / len(a)
        square += by_hand.square().sum().item()
        torch.testing.assert_close(lora.update(module).double(), by_hand, rtol=1e-5, atol=1e-5)
    assert lora.norm() == pytest.approx(square**0.5, rel=1e-5)


# ---- files written by the libraries themselves -------------------------------------------------------------
PUBLISHED = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_out.0 to_q to_v"
PUBLISHED = [f"attn.{name}" for name in PUBLISHED.split()]
PATTERNS = {"rank_pattern": {"attn.to_q": 5}, "alpha_pattern": {"1.attn.to_out.0": 2}}
STARTS = ["gaussian", "orthogonal", "eva", "mica", True]


def saved_by_peft(folder, model):
    model.save_pretrained(folder)


def saved_as_a_variant(folder, model):
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.fp16.safetensors")


def saved_by_diffusers(folder, model):
    tensors = get_peft_model_state_dict(model.base_model.model, adapter_name="default")
    metadata = _collate_lora_metadata({"transformer": model.base_model.model})
    StableDiffusion3Pipeline.save_lora_weights(folder, tensors, **metadata)


def saved_without_metadata(folder, model):
    StableDiffusion3Pipeline.save_lora_weights(folder, get_peft_model_state_dict(model.base_model.model))


@pytest.mark.parametrize(
    "save, config",
    [
        (saved_by_peft, PATTERNS),
        # As Flow-GRPO saves the published teachers: without a hint at the task or at the base.
        (saved_by_peft, {"r": 32, "lora_alpha": 64, "target_modules": PUBLISHED}),
        (saved_as_a_variant, {}),
        (saved_by_diffusers, {}),
        (saved_without_metadata, {"lora_alpha": 4}),
        # Starts that leave the base alone.
        *((saved_by_peft, {"init_lora_weights": start}) for start in STARTS),
    ],
)
def test_a_file_of_a_library_is_read_right(save, config, base, world, tmp_path):
    theirs = peft_model(base, trained=True, **{"init_lora_weights": False} | config)
    save(tmp_path / "saved", theirs)
    alike(theirs, base, world, tmp_path / "saved")


# ---- foreign names -----------------------------------------------------------------------------------------
def test_what_a_converter_loses_is_noticed(tmp_path):
    """Some of diffusers' converters drop layers that they do not know without a word."""

    def forgetful(tensors):
        return {k.replace("lycoris_", ""): t for k, t in tensors.items() if MODULES[1] not in k}

    source = str(single_file(tmp_path / "x", keyed(pairs(), "lycoris_")))
    assert lora_files.read_lora(source, sd3.convert_lora).A.keys() == set(MODULES)
    refused(source, "of an update of norm .* only .* was recognised", forgetful)


# ---- alpha that no file states -----------------------------------------------------------------------------
def test_a_file_without_alpha_says_so_and_takes_the_users(tmp_path, capsys):
    weights = pairs()
    source = str(single_file(tmp_path / "x", keyed(weights, "transformer.")))
    plain = lora_files.read_lora(source)
    assert f"{source}:alpha=NUMBER" in capsys.readouterr().out
    asked = lora_files.read_lora(f"{source}:alpha=6")
    assert capsys.readouterr().out == "" and asked.sha256 == plain.sha256
    for module, (a, b) in weights.items():
        torch.testing.assert_close(plain.update(module), b @ a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(asked.update(module), 6 / 3 * b @ a, rtol=1e-5, atol=1e-5)


def test_an_alpha_that_is_none_or_contradicts_the_file_is_refused(tmp_path):
    silent, states = str(single_file(tmp_path / "x", keyed(pairs()))), str(peft_dir(tmp_path / "y", pairs()))
    refused(f"{silent}:alpha=many", "alpha: could not convert string to float: 'many'")
    refused(f"{silent}:alpha=0", "must be positive")
    refused(f"{states}:alpha=7", "the file states its alpha, so leave out :alpha=7")


# ---- what is refused ---------------------------------------------------------------------------------------
def changed(change):
    """Write the tensors of four modules after `change`."""

    def write(folder):
        tensors = keyed(pairs())
        change(tensors)
        return single_file(folder, tensors)

    return write


def added(name, *shape):
    return changed(lambda tensors: tensors.update({name: torch.ones(shape)}))


def replaced(kind, change):
    """`change` one factor of the second module."""
    name = f"base_model.model.{SECOND}.lora_{kind}.weight"
    return changed(lambda tensors: tensors.update({name: change(tensors[name])}))


def alpha_nan(tensors):
    for module in MODULES:
        tensors[f"base_model.model.{module}.alpha"] = torch.tensor(torch.nan if module == SECOND else 5.0)


def zero_b(tensors):
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def of_bytes(content, name="adapter_model.safetensors"):
    def write(folder):
        (peft_dir(folder, pairs()) / name).write_bytes(content)
        return folder

    return write


FIRST, SECOND = MODULES[:2]
HUGE = (32 * 2**20).to_bytes(8, "little") + b" " * 32 * 2**20  # a header of as many bytes
REFUSED = {
    "nowhere": (lambda folder: folder, "no such file or directory"),
    "empty directory": (lambda folder: folder.mkdir() or folder, "neither adapter_model.safetensors nor"),
    "not safetensors": (of_bytes(b"version https://git-lfs.github.com/"), "SafetensorError"),
    "a huge header": (of_bytes(HUGE), "SafetensorError"),
    "a broken config": (of_bytes(b"{", "adapter_config.json"), "adapter_config.json: not JSON"),
    "broken metadata": (
        lambda folder: single_file(folder, keyed(pairs()), {"lora_adapter_metadata": "["}),
        "its lora_adapter_metadata: Expecting value",
    ),
    "nothing": (lambda folder: single_file(folder, {}), "0 A and 0 B factors"),
    "zero B": (changed(zero_b), "zero everywhere.*saved before training.*write 'base'"),
    "given twice": (added(f"transformer.{FIRST}.lora_A.weight", 3, 32), f"{FIRST} is given twice"),
    "integers": (replaced("A", lambda t: t.int()), f"{SECOND} holds torch.int32"),
    "NaN": (replaced("A", lambda t: t.fill_(torch.nan)), f"{SECOND} has values that are not finite"),
    "a convolution": (replaced("A", lambda t: t[..., None, None]), f"{SECOND}.*only linear layers"),
    "other ranks": (replaced("B", lambda t: t[:, :2].contiguous()), f"{SECOND}.*rank 3 in A, 2 in B"),
    "an absurd rank": (lambda folder: single_file(folder, keyed(pairs((33,)))), "rank 33 in A, 33 in B"),
    "alpha of some layers": (added(f"{FIRST}.alpha"), "some layers state an alpha, but not"),
    "alpha astray": (added("elsewhere.alpha"), "alpha without a layer.*elsewhere"),
    "alpha NaN": (changed(alpha_nan), f"the alpha of {SECOND} is nan; it must be positive and finite"),
    "foreign names": (
        lambda folder: single_file(folder, keyed(pairs(), "diffusion_model.double_blocks.")),
        "'diffusion_model.double_blocks.*are not known for this model family",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_finite_lora_is_refused_by_layer(name, tmp_path):
    write, message = REFUSED[name]
    refused(write(tmp_path / "x"), message)


def other_width(tensors):
    tensors[f"base_model.model.{SECOND}.lora_A.weight"] = torch.ones(3, 48)


def another_layer(name):
    factors = {f"{name}.lora_A.weight": torch.ones(3, 32), f"{name}.lora_B.weight": torch.ones(32, 3)}
    return lambda tensors: tensors.update(factors)


OTHER_BASES = [
    (other_width, rf"{SECOND} updates \(32, 48\), the base has \(32, 32\); it was made for another base"),
    (another_layer("transformer_blocks.9.attn.to_q"), r"1 of its 5 layers are not in the base: .*blocks.9"),
    (another_layer("text_encoder.q_proj"), "not in the base.*for another base, or for a text encoder too"),
]


@pytest.mark.parametrize("change, message", OTHER_BASES)
def test_adapters_of_another_base_are_refused(change, message, world, tmp_path):
    source = str(changed(change)(tmp_path / "bad"))
    adapter = lora_files.read_lora(source)
    with pytest.raises(ValueError, match=message) as caught:
        lora_files.check_fits(adapter, sd3.skeleton(world / "pipeline"))
    assert repr(source) in str(caught.value)
