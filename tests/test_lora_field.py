"""Adapter files of the field: what other tools' files mean to PEFT and diffusers they mean here; what a plain
LoRA cannot say is refused with the reason."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opd import lora
from opd.families import sd3
from opd.formats import lora_files
from opd.model import Model
from tests.tiny_lora import MODULES, TARGETS, keyed, pairs, single_file, under, velocity


def peft_model(base, **config):
    """PEFT's model of rank 4 and alpha 8, after some training."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)} | config
    return get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()


def train(model):
    for name, factor in model.named_parameters():
        if ".lora_" in name:
            factor.data += 0.05 * torch.randn(factor.shape)


def ours(base, world, folder):
    """The velocity of the base under the adapter in `folder`."""
    plan = Model.plan(str(world / "pipeline"), "float32", "", torch.device("cpu"), True)
    transformer = copy.deepcopy(base)
    lora.attach(transformer, "x", plan.read_lora(str(folder)), torch.float32)
    return under(transformer, "x")


def refused(source, message, convert=sd3.convert_lora):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        lora_files.read_lora(str(source), convert)
    assert repr(str(source)) in str(caught.value) and "\n" not in str(caught.value)


# ---- PEFT's settings ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_start_changed_the_base_is_refused_until_peft_converts_it(
    start, base, world, tmp_path
):
    model = peft_model(base, init_lora_weights=start)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    train(model)
    expected = velocity(model)
    model.save_pretrained(tmp_path / "raw")
    message = (
        f"init_lora_weights='{start}', for which PEFT changes .*path_initial_model_for_weight_conversion"
    )
    refused(tmp_path / "raw", message)
    start_folder = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start_folder)
    assert (expected - velocity(base)).abs().max() > 1e-2
    assert (ours(base, world, tmp_path / "plain") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva", "mica", True])
def test_other_starts_of_peft_leave_the_base_alone(start, base, world, tmp_path):
    model = peft_model(base, init_lora_weights=start)
    train(model)
    model.save_pretrained(tmp_path / "x")
    assert (velocity(model) - velocity(base)).abs().max() > 1e-3
    assert (ours(base, world, tmp_path / "x") - velocity(model)).abs().max() < 1e-5


# ---- tensors that are no factors ---------------------------------------------------------------------------
OTHER_TENSORS = [
    ("lora_magnitude_vector", "but DoRA"),
    ("lora_magnitude_vector.default.weight", "but DoRA"),
    ("dora_scale", "but DoRA"),
    ("lokr_w1", "but LoKr, LoHa, OFT"),
    ("hada_w1_a", "but LoKr, LoHa, OFT"),
    ("lora_mid.weight", "but LoKr, LoHa, OFT or another kind"),
    ("lora_B.bias", r"but a bias in a factor \(lora_bias\)"),
    ("lora_up.bias", r"but a bias in a factor \(lora_bias\)"),
    ("bias", r"but a bias that was trained too \(bias='all'\)"),
    (
        "weight",
        r"but a layer's whole weights: trained beside a LoRA \(modules_to_save\), or a",
    ),
    ("modules_to_save.weight", r"but a layer's whole weights: trained beside a LoRA \(modules_to_save\)"),
    ("diff", "but the difference of whole weights"),
    ("diff_b", "but the difference of whole weights"),
    ("processor.qkv_lora1.down.weight", "but a LoRA by xlabs' or old diffusers' names; load and save"),
    ("to_q_lora.up.weight", "but a LoRA by xlabs' or old diffusers' names"),
    ("reshape_weight", "but something unknown"),
]


@pytest.mark.parametrize("end, reason", OTHER_TENSORS)
def test_other_tensors_are_refused_with_what_they_are(end, reason, tmp_path):
    key = f"base_model.model.{MODULES[0]}.{end}"
    tensors = keyed(pairs()) | {key: torch.ones(32)}
    refused(single_file(tmp_path / "x", tensors), f"'{key}' is no LoRA weight {reason}")
