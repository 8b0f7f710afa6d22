"""A student's files and what they mean to those who load them: ours, PEFT, diffusers, ComfyUI by a
transcription of its key map; and how the student is to be sampled."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from safetensors.torch import load_file

from opd import lora
from opd.families import sd3
from opd.formats import export, lora_files
from opd.formats.export import Deployment, guidance_of
from tests import tiny
from tests.tiny_lora import MODULES, under, velocity

DEPLOYED = Deployment("some/model", 2.5, "8", 2, True, 128)


@pytest.fixture(scope="module")
def base(world):
    return sd3.load_transformer(world / "pipeline", torch.float32)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(base, world, tmp_path_factory):
    """A student of rank 4, alpha 10 as saved, and its velocity."""
    folder, transformer = tmp_path_factory.mktemp("saved"), copy.deepcopy(base)
    student = tiny.random_lora(world / "pipeline", 5, rank=4, alpha=10.0)
    lora.attach(transformer, "student", student, torch.float32)
    weights = lora.parameters_of(transformer, "student")
    export.save_lora(folder, weights, "student", 4, 10.0, {export.KEY: DEPLOYED.text()})
    DEPLOYED.write(folder)
    return folder, under(transformer, "student")


def by_ours(base, world, source):
    transformer = copy.deepcopy(base)
    lora.attach(transformer, "x", lora_files.read_lora(str(source)), torch.float32)
    return under(transformer, "x")


def by_peft(base, world, folder):
    return velocity(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())


def by_diffusers(base, world, folder, **which):
    pipe = StableDiffusion3Pipeline.from_pretrained(
        world / "pipeline", transformer=copy.deepcopy(base), **tiny.NO_T5
    )
    pipe.load_lora_weights(folder, **which)
    return velocity(pipe.transformer)


SINGLE = "pytorch_lora_weights.safetensors"
READERS = {
    "ours": by_ours,
    "our reader of the diffusers file": lambda base, world, folder: by_ours(base, world, folder / SINGLE),
    "PEFT": by_peft,
    "diffusers": by_diffusers,
    "diffusers by file name": lambda *given: by_diffusers(*given, weight_name=SINGLE),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_we_save_means_the_same_to_everyone(read, base, world, saved):
    folder, expected = saved
    assert (expected - velocity(base)).abs().max() > 0.01
    assert (read(base, world, folder) - expected).abs().max() < 1e-5


def test_save_transformer_is_a_diffusers_directory(base, tmp_path):
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.get_submodule(MODULES[0]).weight += 0.1
    weights = dict(changed.named_parameters())
    export.save_transformer(tmp_path / "transformer", changed, weights, torch.float32)
    assert torch.equal(velocity(sd3.load_transformer(tmp_path, torch.float32)), velocity(changed))


# ---- ComfyUI -----------------------------------------------------------------------------------------------

# What its map of SD3's keys knows inside a block, by diffusers' names.
KNOWN = """
attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out
attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0 ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2
norm1.linear norm1_context.linear
""".split()
# The published configurations; what is not named is the class's default.
SIZES = {
    "SD3.5-Medium": {"num_layers": 24, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
    "SD3.5-Large": {"num_layers": 38, "pos_embed_max_size": 192},
}
SHARED = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16}
SHARED |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}


def read_by_comfyui(file, depth: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (B times the scale, A), by a transcription of its loader. Alpha is in a tensor beside the
    factors; without one the scale is 1, whatever any config says. A key that it does not know is an error."""
    tensors, updates, known = load_file(file), {}, set()
    for layer in (f"transformer_blocks.{block}.{name}" for block in range(depth) for name in KNOWN):
        for prefix in ("transformer.", "base_model.model."):
            b, a, alpha = (f"{prefix}{layer}.{part}" for part in ("lora_B.weight", "lora_A.weight", "alpha"))
            if b in tensors:
                scale = tensors[alpha].item() / len(tensors[a]) if alpha in tensors else 1.0
                updates[layer] = (scale * tensors[b], tensors[a])
                known |= {a, b, alpha}
    assert tensors.keys() <= known, sorted(tensors.keys() - known)[:3]
    return updates


@pytest.mark.parametrize("size, layers", [("SD3.5-Medium", 24 * 8 - 1), ("SD3.5-Large", 38 * 8 - 1)])
def test_both_files_of_a_student_work_in_comfyui_at_full_strength(size, layers, tmp_path):
    """Of rank 1: the names are what is real here. The last block's text has no output to adapt."""
    depth = SIZES[size]["num_layers"]
    width = {"num_attention_heads": depth, "caption_projection_dim": 64 * depth}
    with torch.device("meta"):
        skeleton = SD3Transformer2DModel(**SHARED, attention_head_dim=64, **width, **SIZES[size])
    adapter = lora.fresh_lora(skeleton, sd3.LORA_TARGETS, rank=1, alpha=2.0, seed=0)
    assert len(adapter.A) == layers
    weights = {f"{layer}.lora_A.x.weight": a for layer, a in adapter.A.items()}
    for layer, b in adapter.B.items():
        weights[f"{layer}.lora_B.x.weight"] = torch.full_like(b, 0.5)
    export.save_lora(tmp_path, weights, "x", rank=1, alpha=2.0)
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        updates = read_by_comfyui(tmp_path / file, depth)
        assert updates.keys() == adapter.A.keys()
        for layer, (scaled_b, a) in updates.items():
            assert torch.equal(scaled_b, torch.full_like(adapter.B[layer], 2.0 * 0.5))
            assert torch.equal(a, adapter.A[layer])


# ---- how it is to be sampled -------------------------------------------------------------------------------


def test_the_folder_and_the_single_file_say_it(saved, world, tmp_path):
    folder, _ = saved
    shutil.copy(folder / SINGLE, tmp_path / "alone.safetensors")
    sources = {"base": "base", "a": str(folder), "b": str(tmp_path / "alone.safetensors")}
    silent = {"c": str(world / "red")}
    assert guidance_of(sources | silent) == {"base": 1.0, "a": 2.5, "b": 2.5, "c": 1.0}
    assert guidance_of(sources, 2.0) == dict.fromkeys(sources, 2.0)


def with_record(folder, saved, text):
    """The student's folder with another deployment.json."""
    shutil.copytree(saved, folder)
    (folder / export.FILE).write_text(text)
    return {"a": str(folder)}


def test_an_edited_record_counts(saved, tmp_path):
    """The folder's file, not the metadata of the weights beside it."""
    text = json.dumps({"guidance": 4, "of a later version": 1})
    assert guidance_of(with_record(tmp_path / "edited", saved[0], text))["a"] == 4.0


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ('{"guidance": "high"}', "'guidance' is 'high'; it must be a finite number"),
    ],
)
def test_a_broken_record_is_named(text, message, saved, tmp_path):
    with pytest.raises(ValueError, match=f"{export.FILE}: .*{message}"):
        guidance_of(with_record(tmp_path / "broken", saved[0], text))
