"""Adapter files of the field: what other tools' files mean to PEFT and diffusers they mean here; what a plain
LoRA cannot say is refused with the reason."""

import copy
import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from peft import PeftModel
from safetensors.torch import save_file

from opd.families import flux, flux2, qwen_image, sd3, z_image
from opd.formats import lora_files
from opd.formats.export import recorded
from opd.formats.teacher_files import by_own_names
from tests.test_teachers import built
from tests.tiny_lora import MODULES, alike, keyed, pairs, peft_dir, peft_model, refused, single_file, train


# ---- PEFT's settings ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_a_start_that_changed_the_base_is_refused_until_peft_converts_it(start, base, world, tmp_path):
    model = peft_model(base, init_lora_weights=start)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    train(model)
    model.save_pretrained(tmp_path / "raw")
    way_out = "path_initial_model_for_weight_conversion"
    refused(tmp_path / "raw", f"init_lora_weights='{start}', for which PEFT changes .*{way_out}")
    start_folder = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "plain", **{way_out: start_folder})
    alike(model, base, world, tmp_path / "plain")


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


PEFT = "only plain LoRAs can be attached"
SETTINGS = [
    ({"init_lora_weights": "PiSSA"}, "init_lora_weights='PiSSA', for which PEFT changes"),
    ({"peft_type": "LOKR"}, f"peft_type 'LOKR'; {PEFT}"),
    ({"use_dora": True}, f"use_dora: {PEFT}"),
    ({"lora_bias": True}, f"lora_bias: {PEFT}"),
    ({"modules_to_save": ["proj_out"]}, f"modules_to_save: {PEFT}"),
    ({"bias": "all"}, "bias='all': the base's biases were trained too"),
    ({"alora_invocation_tokens": [1]}, f"alora_invocation_tokens: {PEFT}"),
    ({"lora_alpha": 1e300}, "lora_alpha is 1e[+]300; it must be positive and finite"),
    ({"lora_alpha": 1e38}, "its update is too large for float32; its largest alpha is 1e[+]38"),
    ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern 'to_q': could not convert string to float: 'x'"),
    ({"alpha_pattern": {"to_q": -2}}, "alpha_pattern 'to_q' is -2.0; it must be positive and finite"),
    ({"alpha_pattern": {"(": 2}}, "cannot be read .*missing"),
    ({"lora_alpha": True}, "lora_alpha: could not convert string to float: 'True'"),
    ({"alpha_pattern": {"((a{99}){99}){99}": 2}}, "counts too many repetitions"),
    ({"alpha_pattern": {r"(.|..)+\d\d": 2}}, "cannot be read .TimeoutError: regex timed out"),
]


@pytest.mark.parametrize("settings, message", SETTINGS)
def test_settings_that_no_plain_lora_has_are_refused(settings, message, tmp_path):
    refused(peft_dir(tmp_path / "x", pairs(), **settings), message)


# ---- tensors that are no factors ---------------------------------------------------------------------------
OTHER_TENSORS = ["lora_magnitude_vector", "lokr_w1", "lora_B.bias", "bias", "weight", "lora_mid.weight"]
OTHER_TENSORS += ["processor.qkv_lora1.down.weight", "to_q_lora.up.weight"]


@pytest.mark.parametrize("end", OTHER_TENSORS)
def test_other_tensors_are_refused(end, tmp_path):
    key = f"base_model.model.{MODULES[0]}.{end}"
    tensors = keyed(pairs()) | {key: torch.ones(32)}
    refused(single_file(tmp_path / "x", tensors), f"'{key}' is no factor of a plain LoRA")


# ---- prefixes, formats, families ---------------------------------------------------------------------------
PREFIXES = ["", "transformer.", "base_model.model.", "diffusion_model.", "module.", "_orig_mod."]
PREFIXES += ["base_model.model.transformer.", "transformer.base_model.model.", "module._orig_mod."]
PREFIXES += ["base_model.model._orig_mod.", "_orig_mod.base_model.model.", "module.diffusion_model."]
OWN = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"]
SINGLE = ["single_transformer_blocks.0.attn.to_out"]
JOINT = ["layers.0.attention.to_q", "layers.1.feed_forward.w1"]
FLAT = ["lora_unet_", "lora_transformer_", "lycoris_"]
# Per family the transformer's own names and what may stand before flat names: what no reader of diffusers
# knows is refused.
FAMILIES = {
    "sd3": (sd3, OWN, FLAT),
    "flux": (flux, OWN, ["lora_transformer_"]),
    "flux2": (flux2, OWN + SINGLE, []),
    "qwen_image": (qwen_image, OWN, ["lora_unet_"]),
    "z_image": (z_image, JOINT, ["lora_unet_"]),
}
# Spellings of A and B; all but the first two have an alpha beside them.
LAYOUTS = {"peft": ("lora_A", "lora_B"), "default": ("lora_A.default", "lora_B.default")}
LAYOUTS |= {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora.down", "lora.up")}


def written(layers, prefix, layout, sizes=None):
    """Random factors of rank 3 for layers of `sizes`, (96, 32) unless told; kohya's with alpha 2."""
    g = torch.Generator().manual_seed(0)
    tensors, (down, up) = {}, LAYOUTS[layout]
    for layer in layers:
        out, inside = sizes[layer] if sizes else (96, 32)
        a, b = torch.randn(3, inside, generator=g), torch.randn(out, 3, generator=g)
        name = prefix + (layer.replace(".", "_") if prefix in FLAT else layer)
        tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
        if "down" in down:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def updates_of(tensors, scale=1.0):
    """Layer -> update of a file by diffusers' names."""
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            found[layer.removeprefix("transformer.")] = scale * tensors[f"{layer}.lora_B.weight"] @ a
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_and_spellings_are_read_in_every_family_or_refused(family, layout, tmp_path):
    """As diffusers reads the plainest file."""
    module, own, read = FAMILIES[family]
    pipeline = getattr(diffusers, module.PIPELINE)
    scale = 2 / 3 if "down" in LAYOUTS[layout][0] else 1.0
    expected = updates_of(pipeline.lora_state_dict(written(own, "transformer.", "peft")), scale)
    assert len(expected) >= 2
    for number, prefix in enumerate(PREFIXES + FLAT):
        file = single_file(tmp_path / str(number), written(own, prefix, layout))
        if prefix in FLAT and prefix not in read:
            unknown = f"layer names like '{prefix}.*' are not known for this model family"
            refused(file, unknown, module.convert_lora)
            continue
        mine = lora_files.read_lora(str(file), module.convert_lora)
        assert mine.A.keys() == expected.keys(), prefix
        for layer, update in expected.items():
            torch.testing.assert_close(mine.update(layer), update, rtol=1e-5, atol=1e-5)


def test_a_compiled_block_is_the_block():
    name = "module.transformer_blocks.0._orig_mod.attn.to_q.lora_A.default.weight"
    assert lora_files.split_key(name) == (OWN[0], "A")


# Layers by their authors' names -> (out, in). First what several families share outside their blocks.
ENDS = {"final_layer.linear": (16, 32), "final_layer.adaLN_modulation.1": (64, 32)}
FLUX = ENDS | {"img_in": (32, 16), "time_in.in_layer": (32, 256), "time_in.out_layer": (32, 32)}
FLUX2 = FLUX | {"txt_in": (32, 96), "single_stream_modulation.lin": (96, 32)}
FLUX2 |= {f"double_stream_modulation_{stream}.lin": (192, 32) for stream in ("img", "txt")}
FLUX2 |= {"single_blocks.0.linear1": (288, 32), "single_blocks.0.linear2": (32, 128)}
for stream in ("img", "txt"):
    FLUX2 |= {f"double_blocks.0.{stream}_attn.qkv": (96, 32), f"double_blocks.0.{stream}_attn.proj": (32, 32)}
    FLUX2 |= {f"double_blocks.0.{stream}_mlp.0": (192, 32), f"double_blocks.0.{stream}_mlp.2": (32, 96)}
Z_IMAGE = {"layers.0.attention.qkv": (96, 32), "layers.0.attention.out": (32, 32)}
Z_IMAGE |= {"layers.0.adaLN_modulation.0": (128, 32), "layers.1.feed_forward.w2": (32, 64)}
# Stability's names of the layers of both halves of a block, and how many times as wide as the block they are.
BOTH = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
IMAGE = {"attn2.qkv": (3, 1), "attn2.proj": (1, 1), "adaLN_modulation.1": (9, 1)} | BOTH
TEXT = {"adaLN_modulation.1": (6, 1)} | BOTH
LAST_TEXT = {"adaLN_modulation.1": (2, 1), "attn.qkv": (3, 1)}  # it goes nowhere


def stabilitys_layers():
    """Layer by Stability's name -> (out, in) of a two-block SD3.5-Medium, 32 wide."""
    layers = ENDS | {"context_embedder": (32, 48), "y_embedder.mlp.0": (32, 64), "y_embedder.mlp.2": (32, 32)}
    layers |= {"t_embedder.mlp.0": (32, 256), "t_embedder.mlp.2": (32, 32)}
    for block, text in ((0, TEXT), (1, LAST_TEXT)):
        for half, sizes in (("x_block", IMAGE), ("context_block", text)):
            for name, (out, inside) in sizes.items():
                layers[f"joint_blocks.{block}.{half}.{name}"] = (32 * out, 32 * inside)
    return layers


def sd3_checkpoint(updates):
    """What diffusers' reader of single files makes of a checkpoint whose weights are `updates`: it wants
    biases, and what no adapter adapts."""
    none = dict.fromkeys(["pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias"], torch.zeros(1))
    biases = {name.replace(".weight", ".bias"): update[:, 0] for name, update in updates.items()}
    whole = convert_sd3_transformer_checkpoint_to_diffusers(updates | biases | none)
    return {n: t for n, t in whole.items() if n.endswith(".weight") and not n.startswith("pos_embed")}


# FLUX.1's; its reader of checkpoints knows no other width than 3072 of what linear1 brings forth.
FLUX1 = FLUX | {"txt_in": (32, 48), "vector_in.in_layer": (32, 24), "vector_in.out_layer": (32, 32)}
FLUX1 |= {"guidance_in.in_layer": (32, 256), "guidance_in.out_layer": (32, 32)}
FLUX1 |= {"single_blocks.0.linear1": (7 * 3072, 32), "single_blocks.0.linear2": (32, 160)}
FLUX1 |= {"single_blocks.0.modulation.lin": (96, 32)}
for stream in ("img", "txt"):
    parts = {"mod.lin": (6, 1), "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}
    FLUX1 |= {f"double_blocks.0.{stream}_{part}": (32 * a, 32 * b) for part, (a, b) in parts.items()}


def flux1_checkpoint(updates):
    """What a teacher by these names becomes; as SD3's it wants biases, and norms, which no adapter has."""
    blocks = ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0")
    norms = [f"{block}.norm.{part}_norm.scale" for block in blocks for part in ("query", "key")]
    biases = {name.replace(".weight", ".bias"): update[:, 0] for name, update in updates.items()}
    with torch.device("meta"):
        skeleton = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    whole = by_own_names(updates | biases | dict.fromkeys(norms, torch.zeros(1)), skeleton)
    assert whole.keys() == skeleton.state_dict().keys()
    return {n: t for n, t in whole.items() if n.endswith(".weight") and ".norm_" not in n}


# The modulations that streams share have no flat names in diffusers.
FLAT_FLUX2 = {name: size for name, size in FLUX2.items() if "stream_modulation" not in name}
# Per family its layers, diffusers' reader of checkpoints, and the prefixes that are read beside ComfyUI's.
CHECKPOINTS = {
    "SD3": (sd3, stabilitys_layers(), sd3_checkpoint, ["", "transformer.", *FLAT]),
    "FLUX.1": (flux, FLUX1, flux1_checkpoint, ["", "transformer."]),
    "FLUX.2": (flux2, FLUX2, convert_flux2_transformer_checkpoint_to_diffusers, ["", "transformer."]),
    "FLUX.2 by kohya": (flux2, FLAT_FLUX2, convert_flux2_transformer_checkpoint_to_diffusers, ["lora_unet_"]),
    "Z-Image": (z_image, Z_IMAGE, convert_z_image_transformer_checkpoint_to_diffusers, ["", "lora_unet_"]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_adapter_by_its_authors_names_is_the_checkpoint_update(name, tmp_path):
    """Every layer against diffusers' reader of checkpoints, which turns the last modulations. kohya's file
    has flat names and alpha 2, ComfyUI's dotted ones."""
    family, layers, convert, prefixes = CHECKPOINTS[name]
    for prefix in ("diffusion_model.", *prefixes):
        layout, scale = ("kohya", 2 / 3) if prefix in FLAT else ("peft", 1.0)
        tensors = written(layers, prefix, layout, layers)
        plain = updates_of(written(layers, "", "peft", layers), scale)
        mine = lora_files.read_lora(str(single_file(tmp_path / f"x{prefix}", tensors)), family.convert_lora)
        theirs = convert({f"{layer}.weight": update for layer, update in plain.items()})
        assert {f"{layer}.weight" for layer in mine.A} == theirs.keys()
        for layer in mine.A:
            torch.testing.assert_close(mine.update(layer), theirs[f"{layer}.weight"], rtol=1e-5, atol=1e-5)


# ---- some blocks, and files cut short ----------------------------------------------------------------------
BOTH_ENDS = [MODULES[0], MODULES[3]]
FEED = {"target_modules": ["ff.net.2", "to_q"], "exclude_modules": r".*1\.ff\.net\.2|.*to_q"}
SOME = [
    ({"layers_to_transform": [1], "layers_pattern": "transformer_blocks"}, (2, 4, MODULES[0])),
    ({"exclude_modules": r".*0\.attn\.to_q"}, (3, 4, MODULES[0])),
    ({"target_modules": BOTH_ENDS}, (2, 4, MODULES[1])),
    (FEED, (1, 2, "transformer_blocks.1.ff.net.2")),
]


@pytest.mark.parametrize("settings, expected", SOME)
def test_an_adapter_of_some_layers_is_read_and_said_to_be(settings, expected, base, world, tmp_path, capsys):
    model = peft_model(base, init_lora_weights=False, **settings)
    model.save_pretrained(tmp_path / "x")
    alike(model, base, world, tmp_path / "x")
    has, of, other = expected
    (line,) = capsys.readouterr().out.splitlines()
    assert f"adapts {has} of the base's {of} layers of its kinds; the others, like {other}, stay" in line


def test_of_a_run_folder_the_student_is_named(tmp_path):
    (tmp_path / "student").mkdir()
    refused(tmp_path, f"a run's student is {tmp_path / 'student'}")


def test_a_file_cut_short_is_refused(tmp_path):
    file = single_file(tmp_path / "x", keyed(pairs()))
    whole = file.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(file, "SafetensorError")
    for kind in "AB":
        tensors = keyed(pairs())
        del tensors[f"base_model.model.{MODULES[1]}.lora_{kind}.weight"]
        refused(single_file(tmp_path / kind, tensors), f"without partner: .*{MODULES[1]}")


# ---- the Hub -----------------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories of adapters by their own names -> what was fetched. Two files are in `owner/two`."""
    held = {"owner/one": ["own.safetensors"], "owner/two": ["a.safetensors", "b.safetensors"]}
    held |= {"owner/deep": ["README.md", "sub/own.safetensors"], "owner/none": ["README.md"]}
    fetched = []

    def download(repo, allow_patterns):
        names = [name for name in held[repo] if name in allow_patterns]
        fetched.extend(names)
        for name in names:
            (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(keyed(pairs(), "transformer."), tmp_path / repo / name)
        return str(tmp_path / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: held[repo])
    return fetched


def test_of_the_hub_an_adapter_is_read_by_its_own_name(hub, monkeypatch):
    sources = {"owner/one": "own.safetensors", "owner/two:b.safetensors": "b.safetensors"}
    for source in ("owner/deep", "owner/deep:sub", "owner/deep:sub/own.safetensors"):
        sources[source] = "sub/own.safetensors"
    for source, name in sources.items():
        hub.clear()
        assert set(lora_files.read_lora(f"{source}:alpha=6").scale.values()) == {2.0}
        assert set(hub) <= {name}  # nothing else, and once
    refused("owner/two", r"but 2 .safetensors files, \['a.safetensors', 'b.safetensors'\]: name one of them")
    refused("owner/none", "holds neither adapter_model.safetensors nor pytorch_lora_weights.safetensors$")
    refused("owner/two:c.safetensors", "owner/two has no 'c.safetensors'; check what follows")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", None)  # off the network
    assert lora_files.find_adapter("owner/one").name == "own.safetensors"


def test_what_is_said_beside_an_adapter_comes_with_it_from_the_hub(tmp_path, monkeypatch):
    """Its alpha and how to sample it, whichever way it is named."""
    repo, cache = tmp_path / "repo", tmp_path / "cache"
    repo.mkdir()
    folder = peft_dir(repo / "lora", pairs())
    (folder / "deployment.json").write_text(json.dumps({"guidance": 3.5}))

    def download(_, allow_patterns):
        kept = shutil.ignore_patterns(*allow_patterns)
        for path in repo.rglob("*.*"):
            name = str(path.relative_to(repo))
            if kept("", [name]):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    scale = lora_files.read_lora(str(folder)).scale
    for source in ("owner/name", "owner/name:lora", "owner/name:lora/adapter_model.safetensors"):
        shutil.rmtree(cache, ignore_errors=True)
        assert lora_files.read_lora(source).scale == scale
        assert recorded(source) == {"guidance": 3.5}


def test_a_teacher_of_the_hub_is_read_by_its_own_name(hub, world, tmp_path):
    for number, source in enumerate(("owner/one", "owner/two:b.safetensors", "owner/deep:sub")):
        _, model, *_ = built(world, tmp_path, source, out=str(tmp_path / f"out{number}"))
        assert "red" not in model.teachers and "owner" not in model.teachers
