"""Adapter files of the field: what other tools' files mean to PEFT and diffusers they mean here; what a plain
LoRA cannot say is refused with the reason."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from opd import lora
from opd.families import sd3
from opd.formats import lora_files
from opd.model import Model
from tests.tiny_lora import MODULES, TARGETS, keyed, pairs, peft_dir, single_file, under, velocity


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


ZERO, ONE = (rf"transformer_blocks\.{block}" for block in (0, 1))
PATTERNS = [
    {r"transformer_blocks\.\d+\.attn\.to_q": 3},
    {"^to_q": 3, rf"^{ZERO}\.attn\.to_out\.0": 5},  # the first is no layer's whole name
    {"to_.": 3, "to_q": 5},
    {"to_q": 5, "to_.": 3},
    {"0.attn.to_q|1.attn.to_out.0": 3},
    {".*to_q": 3, f"{ONE}.*": 5},
    {f"{ONE}.*": 5, ".*to_q": 3},
    {"o_q": 3, "attn_to_q": 3, "to_out": 5},  # none of them
    {r"(a+)+\.to_q": 3, r"\w+\.\d{1,2}\.attn\.to_q": 5},
]


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_are_matched_as_peft_matches_them(patterns, stabilised, base, tmp_path):
    settings = {"rank_pattern": {r".*\.to_out\.\d": 6}, "use_rslora": stabilised}
    peft_model(base, init_lora_weights=False, **settings).save_pretrained(tmp_path / "x")
    file = tmp_path / "x" / "adapter_config.json"
    # PEFT itself sorts the keys as it saves them, and takes them in the file's order as it loads them.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": patterns}))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "x").base_model.model
    mine = lora_files.read_lora(str(tmp_path / "x"))
    for module in MODULES:
        layer = theirs.get_submodule(module)
        assert mine.scale[module] == pytest.approx(layer.scaling["default"])
        assert (mine.update(module) - layer.get_delta_weight("default")).abs().max() < 1e-5


ENDLESS = {r"(.|..)+\d\d": 2}
PEFT = "only plain LoRAs can be attached"
SETTINGS = [
    *(
        ({"init_lora_weights": start}, start)
        for start in ("corda", "loftq", "lora_ga", "PiSSA", "of_tomorrow")
    ),
    ({"peft_type": "LOKR"}, f"peft_type 'LOKR'; {PEFT}"),
    ({"use_dora": True}, "use_dora: it is DoRA, but its magnitudes are not in the file"),
    ({"lora_bias": True}, f"lora_bias: it is with a bias in its factors; {PEFT}"),
    ({"bias": "all"}, "bias='all': the base's biases were trained too"),
    ({"modules_to_save": ["proj_out"]}, f"modules_to_save: .* trained whole beside it; {PEFT}"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: it is aLoRA"),
    ({"lora_alpha": 1e300}, "lora_alpha is 1e[+]300; it must be positive and finite"),
    ({"lora_alpha": 10**400}, "lora_alpha is '1000.*not a number"),
    ({"lora_alpha": 1e38}, "its update is too large for float32; its largest alpha is 1e[+]38"),
    ({"lora_alpha": True}, "lora_alpha is 'True', not a number"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
    ({"lora_alpha": [7]}, r"lora_alpha is '\[7\]', not a number"),
    ({"alpha_pattern": [1]}, r"alpha_pattern is '\[1\]', not a table"),
    ({"alpha_pattern": "to_q"}, "alpha_pattern is 'to_q', not a table"),
    ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern 'to_q' is 'x', not a number"),
    ({"alpha_pattern": {"(": 2}}, "cannot be matched .missing"),
    ({"alpha_pattern": ENDLESS}, "cannot be matched .regex timed out"),
    ({"alpha_pattern": {"((a{99}){99}){99}": 2}}, "counts too many repetitions"),
    ({"alpha_pattern": {"a{100000000}": 2}}, "counts too many repetitions"),
]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("settings, message", SETTINGS)
def test_settings_that_no_plain_lora_has_are_refused(settings, message, inside, tmp_path):
    """In PEFT's config, and in diffusers' metadata."""
    if inside:
        packed = {f"transformer.{name}": value for name, value in ({"lora_alpha": 7} | settings).items()}
        metadata = {"lora_adapter_metadata": json.dumps(packed)}
        refused(single_file(tmp_path / "x", keyed(pairs(), "transformer."), metadata), message)
    else:
        refused(peft_dir(tmp_path / "x", pairs(), **settings), message)


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
