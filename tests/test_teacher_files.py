"""Files of teachers: told apart by what they hold, refused where they cannot teach this student."""

import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.families import sd3
from opd.families._sd3_names import BLOCK, OUTSIDE
from opd.formats import lora_files
from opd.formats.lora_files import read_lora
from opd.formats.teacher_files import KINDS, Whole, holds_transformer, read_transformer
from opd.model import Model
from tests import tiny
from tests.test_teachers import WEIGHTS, answer, built, furnished

LAYER = "transformer_blocks.1.attn.to_q.weight"


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    return furnished(world, tmp_path_factory.mktemp("teachers"))


@pytest.mark.parametrize("form", ["full", "parent", "shards", "one.safetensors"])
def test_a_full_teacher_answers_like_the_adapter_that_is_in_its_weights(form, world, place, tmp_path):
    assert len(list((place / "shards").glob("*.safetensors"))) > 2
    cfg, model, *_ = built(world, tmp_path, place / form)
    expected = answer(*built(world, tmp_path, world / "red", out=str(tmp_path / "other"))[:2], "red")
    assert (answer(cfg, model, "red") - expected).abs().max() < 1e-5
    assert (answer(cfg, model, "red") - answer(cfg, model, "blue")).abs().max() > 0.01
    assert not any(p.requires_grad for p in model.teachers["red"].transformer.parameters())


def test_a_full_teacher_reads_the_prompts_that_the_student_has_encoded(world, place, tmp_path, monkeypatch):
    loads, load = [], sd3.load_text
    monkeypatch.setattr(sd3, "load_text", lambda *given: loads.append(given) or load(*given))
    counts = []
    for teacher in (world / "red", place / "full"):
        loads.clear()
        built(world, tmp_path, teacher, out=str(tmp_path / teacher.name))
        counts.append(len(loads))
    assert counts[0] == counts[1] > 0


def test_a_full_teacher_is_held_in_the_compute_dtype(world, place, tmp_path):
    _, model, *_ = built(world, tmp_path, place / "full", dtype="bfloat16")
    own = model.teachers["red"].transformer
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}


def test_kinds_on_the_hub_are_told_apart_before_their_weights_are_fetched(
    world, place, tmp_path, monkeypatch, capsys
):
    fetched = {}
    folders = {"owner/two": world, "owner/full": place, "owner/larger": place / "larger"}

    def download(repo, allow_patterns):
        fetched.setdefault(repo, []).append(allow_patterns)
        return str(folders[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # of a README that is not there
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda repo, use_safetensors: folders[repo])
    for source in ("owner/two:blue", "owner/full:full", "owner/larger"):
        _, model, *_ = built(world, tmp_path, source, out=str(tmp_path / source))
        assert ("red" in model.teachers) == (source != "owner/two:blue")
    sha256 = read_lora(str(world / "blue")).sha256
    assert f"teacher red: owner/two:blue  sha256 {sha256[:12]} " in capsys.readouterr().out
    kinds = {repo: first for repo, (first, *_) in fetched.items()}
    assert kinds == {
        "owner/two": [f"blue/{name}" for name in KINDS],
        "owner/full": [f"full/{name}" for name in KINDS],
        "owner/larger": KINDS,
    }
    assert fetched["owner/full"][1:] == [["full/*.json", "full/*.safetensors"]]


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(sd3, "load_transformer", None)


def refused(world, tmp_path, teacher, message, **changes):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        built(world, tmp_path, teacher, **changes)
    assert str(teacher) in str(caught.value) and "\n" not in str(caught.value)


def edited(file, **values):

    def change(folder):
        config = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps(config))

    return change


def other_channels(folder):
    edited("transformer/config.json", in_channels=8)(folder)
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["pos_embed.proj.weight"] = tensors["pos_embed.proj.weight"].repeat(1, 2, 1, 1)
    save_file(tensors, file)


def one_stage(folder):
    """Of the VAE, so that latents are as wide as pictures."""
    kinds = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    edited("vae/config.json", block_out_channels=[8], **kinds)(folder)


def ddim(folder):
    shutil.rmtree(folder / "scheduler")
    diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")


OTHER_LATENTS = [
    (edited("vae/config.json", scaling_factor=1.5), "VAE's scaling_factor is 1.5, the student's 0.8"),
    (one_stage, r"shape .* is \(4, 8, 8\), the student's"),
    (other_channels, r"shape .* is \(8, 4, 4\), the student's \(4, 4, 4\)"),
    (ddim, "scheduler: DDIMScheduler is not for flow matching; put a FlowMatchEuler"),
    (edited("model_index.json", _class_name="OtherPipeline"), "OtherPipeline; known pipelines: "),
]


@pytest.mark.parametrize("change, message", OTHER_LATENTS)
def test_other_latents_are_refused(change, message, world, place, tmp_path, no_weights):
    teacher = shutil.copytree(place / "larger", tmp_path / "teacher")
    change(teacher)
    refused(world, tmp_path, teacher, message)


OTHERS = [
    (LAYER, None, "missing"),
    (LAYER.replace("1", "2"), (32, 32), "unknown"),
    (LAYER, (48, 32), "of another shape"),
]


@pytest.mark.parametrize("name, shape, problem", OTHERS)
def test_other_architectures_are_refused(name, shape, problem, world, place, tmp_path, no_weights):
    tensors = load_file(place / "full" / WEIGHTS)
    tensors.pop(name, None)
    if shape:
        tensors[name] = torch.ones(shape)
    shutil.copytree(place / "full", tmp_path / "full")
    message = rf"1 weights are {problem}: \['{name}'\]; to learn from .* a whole pipeline's directory"
    save_file(tensors, tmp_path / "full" / WEIGHTS)
    save_file(tensors, tmp_path / "x.safetensors")
    for teacher in ("full", "x.safetensors"):
        refused(world, tmp_path, tmp_path / teacher, message)


def test_scaled_8_bit_weights_are_refused_by_name(world, tmp_path, no_weights):
    """In the base and in a pipeline that teaches: without its scales a float8 weight is another one."""
    base = shutil.copytree(world / "pipeline", tmp_path / "base")
    file, scale = base / "transformer" / WEIGHTS, LAYER.replace("weight", "scale_weight")
    save_file(load_file(file) | {scale: torch.ones(1)}, file)
    message = rf"1 weights are unknown: \['{scale}'"
    refused(world, tmp_path, base, message)
    with pytest.raises(ValueError, match=message) as caught:
        built(world, tmp_path, world / "red", model=str(base))
    assert str(base) in str(caught.value)


def test_a_config_of_another_architecture_is_refused(world, place, tmp_path, no_weights):
    teacher = shutil.copytree(place / "full", tmp_path / "teacher")
    edited("config.json", num_attention_heads=4, attention_head_dim=8)(teacher)
    refused(world, tmp_path, teacher, "is 4 in its config.json, 2 in the base's|is 8 in")
    edited("config.json", _class_name="FluxTransformer2DModel")(teacher)
    refused(world, tmp_path, teacher, "_class_name is 'FluxTransformer2DModel' in its config.json")


def test_a_full_teacher_without_weights_or_a_part_of_them_is_named(world, place, tmp_path, no_weights):
    teacher = shutil.copytree(place / "shards", tmp_path / "teacher")
    shard = min(teacher.glob("*.safetensors"))
    shard.unlink()
    refused(world, tmp_path, teacher, shard.name)
    (teacher / f"{WEIGHTS}.index.json").unlink()
    refused(world, tmp_path, teacher, f"teacher has no {WEIGHTS}; load it with diffusers .*it holds .*00002")


def by_stability(own):
    """Names and shapes of SD3's tensors in Stability's code. pos_embed has no layer."""
    blocks = {f"{half}_block.attn.ln_{p}": (f"attn.norm_{a}{p}",) for half, a in HALVES for p in "qk"}
    layers = {f"joint_blocks.{i}.{a}": [f"transformer_blocks.{i}.{b}" for b in bs] for i in (0, 1)
              for a, bs in (BLOCK | blocks).items()}  # fmt: skip
    layers |= {"x_embedder.proj": ["pos_embed.proj"]} | {a: [b] for a, b in OUTSIDE.items()}
    tensors = {"pos_embed": own["pos_embed.pos_embed"]}
    for name, parts in layers.items():
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in own:
                tensors[f"{name}.{kind}"] = torch.cat([own[f"{part}.{kind}"] for part in parts])
    return tensors


HALVES = [("x", ""), ("context", "added_")]


def test_a_transformer_by_its_authors_names_is_what_diffusers_reads(world, tmp_path):
    """Alone in its file, and beside a VAE. FLUX.1's names: tests/test_lora_field.py."""
    pipeline, file = world / "pipeline", tmp_path / "x.safetensors"
    model = Model.plan(str(pipeline), "float32", "", torch.device("cpu"), True)
    g = torch.Generator().manual_seed(0)
    tensors = by_stability(model.family.load_transformer(pipeline, torch.float32).state_dict())
    tensors = {name: torch.randn(tensor.shape, generator=g) for name, tensor in tensors.items()}
    save_file(tensors, file)
    kind = diffusers.SD3Transformer2DModel
    expected = kind.from_single_file(str(file), config=str(pipeline), subfolder="transformer")
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    for content in (tensors, named | {"first_stage_model.x.weight": torch.ones(2)}):
        save_file(content, file)
        assert holds_transformer(file, model.skeleton)
        teacher = Whole(str(file), model, read_transformer(file, model), False).load(None)
        torch.testing.assert_close(teacher.transformer.state_dict(), expected.state_dict(), rtol=0, atol=0)

    del content[next(name for name in content if name.endswith(".weight"))]
    save_file(content, file)
    with pytest.raises(ValueError, match="1 weights are missing|cannot be converted: .*KeyError: '"):
        read_transformer(file, model)


def test_places_that_cannot_be_are_refused(world, place, tmp_path, no_weights):
    adapter = {"teacher_devices": {"red": "offload"}}
    message = "--teacher-devices red=offload: .* is an adapter on the"
    refused(world, tmp_path, world / "red", message, **adapter)
    nowhere = {"teacher_devices": {"red": "nowhere"}}
    refused(world, tmp_path, place / "larger", "--teacher-devices 'nowhere': .*nowhere", **nowhere)


def test_what_is_said_of_a_teacher_that_is_merged_is_said_once(world, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    tensors = load_file(world / "red/adapter_model.safetensors")
    save_file({name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, file)
    built(world, tmp_path, file, cold_start="merge")
    assert capsys.readouterr().out.count("states no alpha") == 1


def test_a_students_single_file_needs_no_alpha(world, tmp_path, capsys):
    tiny.run(tiny.config(world, out=str(tmp_path / "run"), alpha=3.0, iterations=1))
    student = tmp_path / "run/student"
    capsys.readouterr()
    norms = [read_lora(str(student / name)).norm() for name in lora_files.WEIGHTS]
    assert norms[0] == pytest.approx(norms[1]) and "alpha" not in capsys.readouterr().out


def test_whole_teachers_cannot_be_merged(world, place, tmp_path):
    message = r"the teachers \['red'\] are no adapters.*--merge-from, or use --cold-start base"
    with pytest.raises(ValueError, match=message):
        built(world, tmp_path, place / "larger", cold_start="merge")
    own = {"blue": str(world / "blue")}
    built(world, tmp_path, place / "larger", cold_start="merge", merge_from=own)
