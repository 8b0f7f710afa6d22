"""Adapter files: every format gives the update computed by hand, libraries' files mean what they mean there,
and the rest is refused by name."""

import copy
import json

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from opd import adapters
from opd.families import sd3
from opd.formats import lora_files
from opd.model import Model
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


def as_kohya(tensors):
    return {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for k, t in tensors.items()}


def flat(tensors):
    """OneTrainer's names: the layer's with _ for every dot."""
    split = {key: key.replace(".lora_", "|lora_").replace(".alpha", "|alpha") for key in tensors}
    names = {key: "lora_transformer_" + name.replace(".", "_") for key, name in split.items()}
    spelled = {key: name.replace("|", ".").replace("_weight", ".weight") for key, name in names.items()}
    return as_kohya({spelled[key]: tensor for key, tensor in tensors.items()})


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
    "alpha by escaped name": (
        lambda f, w: peft_dir(f, w, alpha_pattern={"^" + MODULES[1].replace(".", r"\."): 2.0}),
        (3,),
        lambda i: 2 if i == 1 else 7,
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
    "kohya's factors": (lambda f, w: single_file(f, as_kohya(with_alpha_keys(w))), (3,), lambda i: 5 + i),
    "flat names": (lambda f, w: single_file(f, flat(with_alpha_keys(w))), (3,), lambda i: 5 + i),
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
    lora = lora_files.read_lora(str(write(tmp_path / "x", weights)), sd3.convert_lora)
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


PUBLISHED = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_out.0 to_q to_v".split()


def test_a_published_teacher_loads_unchanged(base, world, tmp_path):
    """As Flow-GRPO saves its adapters, which the published teachers are: PEFT's save_pretrained of LoRAs of
    rank 32 and alpha 64 on the eight projections, without a hint at the task or at the base."""
    settings = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian"}
    wrapped = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=[f"attn.{name}" for name in PUBLISHED], **settings)
    ).eval()
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    model = Model.plan(str(world / "pipeline"), "float32", "", cpu, True)
    lora = model.read_lora(str(tmp_path))
    assert {a.shape[0] for a in lora.A.values()} == {32} and set(lora.scale.values()) == {2.0}
    transformer = copy.deepcopy(base)
    adapters.attach(transformer, "x", lora, torch.float32)
    assert (velocity(wrapped) - velocity(base)).abs().max() > 1e-2
    assert (under(transformer, "x") - velocity(wrapped)).abs().max() < 1e-5


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


# ---- foreign names -----------------------------------------------------------------------------------------

# Stability's names of every layer of a block, and how many times as wide as the block it is.
NATIVE = {
    "x_block.attn.qkv": (3, 1),
    "x_block.attn.proj": (1, 1),
    "x_block.attn2.qkv": (3, 1),
    "x_block.attn2.proj": (1, 1),
    "x_block.mlp.fc1": (4, 1),
    "x_block.mlp.fc2": (1, 4),
    "x_block.adaLN_modulation.1": (9, 1),
    "context_block.attn.qkv": (3, 1),
    "context_block.attn.proj": (1, 1),
    "context_block.mlp.fc1": (4, 1),
    "context_block.mlp.fc2": (1, 4),
    "context_block.adaLN_modulation.1": (6, 1),
}


def native_layers():
    """Layer by Stability's name -> (out, in) of a two-block SD3.5-Medium, 32 wide."""
    layers = {
        "context_embedder": (32, 48),
        "t_embedder.mlp.0": (32, 256),
        "t_embedder.mlp.2": (32, 32),
        "y_embedder.mlp.0": (32, 64),
        "y_embedder.mlp.2": (32, 32),
        "final_layer.linear": (16, 32),
        "final_layer.adaLN_modulation.1": (64, 32),
    }
    for block in (0, 1):
        for name, (out, inside) in NATIVE.items():
            layers[f"joint_blocks.{block}.{name}"] = (32 * out, 32 * inside)
    for absent in ("attn.proj", "mlp.fc1", "mlp.fc2"):  # the last block's text goes nowhere
        del layers[f"joint_blocks.1.context_block.{absent}"]
    layers["joint_blocks.1.context_block.adaLN_modulation.1"] = (64, 32)
    return layers


def checkpoint_by_diffusers(updates):
    """What diffusers' reader of single files makes of a checkpoint whose weights are `updates`."""
    whole = {f"{name}.weight": update for name, update in updates.items()}
    whole |= {f"{name}.bias": update[:, 0] for name, update in updates.items()}
    whole |= {"pos_embed": torch.zeros(1), "x_embedder.proj.weight": torch.zeros(1)}
    return convert_sd3_transformer_checkpoint_to_diffusers(whole | {"x_embedder.proj.bias": torch.zeros(1)})


@pytest.mark.parametrize("tool", ["kohya", "ComfyUI"])
def test_an_sd3_adapter_by_stabilitys_names_is_the_checkpoint_update(tool, tmp_path):
    """kohya's file has flat names and alpha 2, ComfyUI's dotted ones: every layer against diffusers' reader
    of checkpoints."""
    g = torch.Generator().manual_seed(0)
    tensors, updates = {}, {}
    for name, (out, inside) in native_layers().items():
        a, b = torch.randn(3, inside, generator=g), torch.randn(out, 3, generator=g)
        if tool == "kohya":
            layer = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b}
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
            updates[name] = 2 / 3 * b @ a
        else:
            layer = "diffusion_model." + name
            tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
            updates[name] = b @ a
    lora = lora_files.read_lora(str(single_file(tmp_path / "x", tensors)), sd3.convert_lora)
    theirs = checkpoint_by_diffusers(updates)
    layers = {key.removesuffix(".weight") for key in theirs if key.endswith(".weight")} - {"pos_embed.proj"}
    assert lora.A.keys() == layers and len(layers) == 7 + 18 + 15
    for layer in layers:
        torch.testing.assert_close(lora.update(layer), theirs[f"{layer}.weight"], rtol=1e-5, atol=1e-5)


def test_what_a_converter_loses_is_noticed(tmp_path):
    """Some of diffusers' converters drop layers that they do not know without a word."""

    def forgetful(tensors):
        return {k.replace("diffusion_model.", ""): t for k, t in tensors.items() if MODULES[1] not in k}

    source = str(single_file(tmp_path / "x", keyed(pairs(), "diffusion_model.")))
    assert lora_files.read_lora(source, sd3.convert_lora).A.keys() == set(MODULES)
    with pytest.raises(ValueError, match="of an update of norm .* only .* was recognised"):
        lora_files.read_lora(source, forgetful)


# ---- alpha that no file states -----------------------------------------------------------------------------


def test_a_file_without_alpha_says_so_and_takes_the_users(tmp_path, capsys):
    weights = pairs()
    source = str(single_file(tmp_path / "x", keyed(weights, "transformer.")))
    plain = lora_files.read_lora(source)
    told = capsys.readouterr()
    assert "states no alpha" in told.out + told.err and f"{source}:alpha=NUMBER" in told.out + told.err
    asked = lora_files.read_lora(f"{source}:alpha=6")
    told = capsys.readouterr()
    assert told.out + told.err == "" and asked.sha256 == plain.sha256
    for module, (a, b) in weights.items():
        torch.testing.assert_close(plain.update(module), b @ a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(asked.update(module), 6 / 3 * b @ a, rtol=1e-5, atol=1e-5)


def test_alpha_may_be_asked_for_behind_a_subfolder(world, monkeypatch):
    folders = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **which: str(world))
    monkeypatch.setattr(lora_files, "peft_config", lambda path, metadata: folders.append(path) or {})
    lora = lora_files.read_lora("owner/sub:red:alpha=1")
    assert folders[0].parent == world / "red" and set(lora.scale.values()) == {1 / 4}


# ---- what is refused ---------------------------------------------------------------------------------------


def changed(change):
    """Write the tensors of four modules after `change`."""

    def write(folder):
        tensors = keyed(pairs())
        change(tensors)
        return single_file(folder, tensors)

    return write


def added(name, *shape, dtype=torch.float32):
    return changed(lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)}))


def replaced(kind, change):
    """`change` one factor of the second module."""
    name = f"base_model.model.{MODULES[1]}.lora_{kind}.weight"
    return changed(lambda tensors: tensors.update({name: change(tensors[name])}))


def config(**settings):
    return lambda folder: peft_dir(folder, pairs(), **settings)


def with_metadata(text):
    return lambda folder: single_file(folder, keyed(pairs()), {"lora_adapter_metadata": text})


def text_file(folder):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    return folder


def cut_off(folder):
    path = single_file(folder, keyed(pairs()))
    path.write_bytes(path.read_bytes()[:-100])
    return path


def huge_header(folder):
    folder.mkdir()
    size = 32 * 2**20
    (folder / "any.safetensors").write_bytes(size.to_bytes(8, "little") + b" " * size)
    return folder / "any.safetensors"


def broken_config(folder):
    peft_dir(folder, pairs())
    (folder / "adapter_config.json").write_text("{")
    return folder


def empty(folder):
    folder.mkdir()
    return folder


def zero(kind):
    return changed(lambda tensors: [t.zero_() for k, t in tensors.items() if f"lora_{kind}" in k])


FIRST, SECOND = MODULES[:2]
HOSTILE = "(a+)+$"  # as a regular expression: minutes on a long name
REFUSED = {
    "empty directory": (empty, "neither adapter_model.safetensors nor"),
    "not safetensors": (text_file, "not a readable safetensors file"),
    "cut off": (cut_off, "not a readable safetensors file"),
    "a huge header": (huge_header, "has a header of 33554432 bytes"),
    "zero B": (zero("B"), "zero everywhere.*saved before training.*write 'base'"),
    "zero A": (zero("A"), "zero everywhere"),
    "nothing": (lambda f: single_file(f, {}), "0 A and 0 B factors"),
    "half a pair": (
        changed(lambda t: t.pop(f"base_model.model.{MODULES[2]}.lora_B.weight")),
        rf"4 A and 3 B factors.*{MODULES[2]}",
    ),
    "full model": (
        lambda f: single_file(f, {f"{FIRST}.weight": torch.ones(32, 32)}),
        rf"{FIRST}.weight' is no LoRA weight.*fully fine-tuned",
    ),
    "DoRA": (added(f"{FIRST}.lora_magnitude_vector", 32), f"{FIRST}.*is no LoRA weight but DoRA's"),
    "kohya's DoRA": (added(f"{FIRST}.dora_scale", 32), f"{FIRST}.*is no LoRA weight but DoRA's"),
    "LoKr": (added(f"{FIRST}.lokr_w1", 4, 4), f"{FIRST}.*is no LoRA weight but LoKr's"),
    "LoHa": (added(f"{FIRST}.hada_w1_a", 4, 4), f"{FIRST}.*is no LoRA weight but LoHa's"),
    "a bias": (added(f"{FIRST}.lora_B.bias", 32), f"{FIRST}.lora_B.bias' is no LoRA weight"),
    "a text encoder": (added("text_encoder.q_proj.lora_A.weight", 3, 32), "adapts a text encoder"),
    "kohya's text encoder": (added("lora_te1_q_proj.lora_down.weight", 3, 32), "adapts a text encoder"),
    "given twice": (added(f"transformer.{FIRST}.lora_A.weight", 3, 32), f"{FIRST} is given twice"),
    "integers": (replaced("A", lambda t: t.int()), f"{SECOND} holds torch.int32"),
    "complex": (replaced("B", lambda t: t.to(torch.complex64)), f"{SECOND} holds torch.complex64"),
    "NaN": (replaced("A", lambda t: t.fill_(torch.nan)), f"{SECOND} has values that are not finite"),
    "infinite": (replaced("B", lambda t: t.fill_(torch.inf)), f"{SECOND} has values that are not finite"),
    "a convolution": (replaced("A", lambda t: t[..., None, None]), f"{SECOND}.*only linear layers"),
    "other ranks": (replaced("B", lambda t: t[:, :2].contiguous()), f"{SECOND}.*rank 3 in A, 2 in B"),
    "rank 0": (
        changed(lambda t: t.update({k: v[:0] if "A" in k else v[:, :0].contiguous() for k, v in t.items()})),
        "rank 0 in A, 0 in B",
    ),
    "an absurd rank": (
        lambda f: single_file(f, keyed(pairs((33,)))),
        "rank 33 is more than the whole layer has",
    ),
    "alpha 0": (added(f"{FIRST}.alpha"), "some layers state an alpha, but not"),
    "alpha astray": (added("elsewhere.alpha"), "alpha without a layer.*elsewhere"),
    "no number": (config(lora_alpha="much"), "lora_alpha is 'much', not a number"),
    "config alpha 0": (config(lora_alpha=0), "lora_alpha is 0.0; it must be positive"),
    "config alpha NaN": (config(lora_alpha=float("nan")), "lora_alpha is nan; it must be positive"),
    "negative alpha": (config(alpha_pattern={FIRST: -2}), "alpha_pattern .* is -2.0; it must be positive"),
    "a regular expression": (config(alpha_pattern={r".*\.1\.attn.*": 2}), "is a regular expression"),
    "a hostile one": (config(alpha_pattern={HOSTILE: 2}), "is a regular expression; write out"),
    "a broken config": (broken_config, "adapter_config.json: not JSON"),
    "broken metadata": (with_metadata("["), "lora_adapter_metadata is no JSON object"),
    "a list of metadata": (with_metadata("[1]"), "lora_adapter_metadata is no JSON object"),
    "foreign names": (
        lambda f: single_file(f, keyed(pairs(), "diffusion_model.double_blocks.")),
        "'diffusion_model.double_blocks.*are not known for this model family",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_finite_lora_is_refused_by_layer(name, tmp_path):
    write, message = REFUSED[name]
    source = str(write(tmp_path / "x"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        lora_files.read_lora(source, sd3.convert_lora)
    assert repr(source) in str(caught.value)


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf"), -1.0])
def test_alpha_tensors_that_are_no_alpha_are_refused(alpha, tmp_path):
    tensors = with_alpha_keys(pairs()) | {f"{SECOND}.alpha": torch.tensor(alpha)}
    with pytest.raises(ValueError, match=f"the alpha of {SECOND} is .*; it must be positive and finite"):
        lora_files.read_lora(str(single_file(tmp_path / "x", tensors)))


@pytest.mark.parametrize(
    "asked, message",
    [
        ("7", "the file states its alpha, so leave out :alpha=7"),
        ("0", "the file states its alpha"),
        ("many", "the file states its alpha"),
    ],
)
def test_the_user_cannot_contradict_the_file(asked, message, tmp_path):
    source = str(peft_dir(tmp_path / "x", pairs()))
    with pytest.raises(ValueError, match=message):
        lora_files.read_lora(f"{source}:alpha={asked}")


@pytest.mark.parametrize("asked, message", [("many", "'many', not a number"), ("0", "must be positive")])
def test_an_alpha_that_is_no_alpha_is_refused(asked, message, tmp_path):
    source = str(single_file(tmp_path / "x", keyed(pairs())))
    with pytest.raises(ValueError, match=message):
        lora_files.read_lora(f"{source}:alpha={asked}")


def test_a_missing_file_is_named(tmp_path):
    source = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such file or directory") as caught:
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

    def download(repo, allow_patterns, ignore_patterns):
        calls.append((repo, allow_patterns))
        return str(world if "sub" in repo else world / "red")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    red, blue = lora_files.read_lora("owner/plain"), lora_files.read_lora("owner/sub:blue")
    assert red.sha256 == lora_files.read_lora(str(world / "red")).sha256
    assert blue.sha256 == lora_files.read_lora(str(world / "blue")).sha256 != red.sha256
    names = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert calls == [("owner/plain", names), ("owner/sub", [f"blue/{name}" for name in names])]


def test_a_subfolder_that_the_repository_lacks_is_named(world, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(world))
    with pytest.raises(
        FileNotFoundError, match="adapter 'owner/name:gone': owner/name holds no folder 'gone'"
    ):
        lora_files.read_lora("owner/name:gone")


def test_an_unreachable_hub_id_is_named(monkeypatch):
    def download(repo, allow_patterns, ignore_patterns):
        raise OSError("gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"adapter 'owner/name'.*\(OSError\); check the spelling"):
        lora_files.read_lora("owner/name")
