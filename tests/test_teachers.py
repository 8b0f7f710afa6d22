"""Teachers of every kind are asked as they would answer by themselves, and students learn from them. Their
files are tested in tests/test_teacher_files.py."""

import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from opd import lora
from opd.evaluation import evaluate
from opd.families import sd3
from opd.teachers import load_teacher
from tests import tiny, tiny_families

PROMPTS = ["a red circle", "two blue squares", "a blue dot"]
PATTERN = "tests.test_teachers:pattern"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pattern(images, prompts, metadata):
    signs = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).sign()
    return 100 * (images * signs).mean((1, 2, 3))


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    return furnished(world, tmp_path_factory.mktemp("teachers"))


def furnished(world, folder):
    """`full/`: the base with red's update in its weights, in every form in which such a thing is kept; and
    `larger/`: a pipeline of three wider blocks with text encoders of its own and the same VAE."""
    tiny.fold(world, "red", folder / "full")
    (folder / "full" / "deployment.json").write_text("{}")  # as a run of --full leaves it
    shutil.copytree(folder / "full", folder / "parent" / "transformer")
    whole = SD3Transformer2DModel.from_pretrained(folder / "full")
    whole.save_pretrained(folder / "shards", max_shard_size="100KB")
    tensors = load_file(folder / "full" / WEIGHTS)
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, folder / "one.safetensors")
    larger = tiny.make_pipeline(folder / "larger", layers=3, heads=3, encoders=(11, 12))
    shutil.rmtree(larger / "vae")
    shutil.copytree(world / "pipeline" / "vae", larger / "vae")
    return folder


def built(world, tmp_path, teacher, **changes):
    teachers = {"red": str(teacher), "blue": str(world / "blue")}
    return tiny.build(tiny.config(world, **{"teachers": teachers, "out": str(tmp_path / "run")} | changes))


def states():
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 4, 4, generator=g), torch.tensor([1.0, 0.6, 0.1])


def answer(cfg, model, name):
    model.prepare(PROMPTS)
    for own in model.teachers.values():
        own.prepare(PROMPTS)
    return load_teacher(cfg, model, name)(*states(), PROMPTS)


def velocity(model, adapter, guidance=1.0):
    with lora.use(model.transformer, adapter), torch.no_grad():
        return model.velocity(*states(), model.text(PROMPTS), guidance)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_pipeline_answers_with_its_own_weights_encoders_and_guidance(guidance, world, place, tmp_path):
    """Against diffusers alone: its encoders, its transformer, guidance by the formula."""
    changes = {"teacher_guidances": {"red": guidance}, "teacher_guidance": 4.0}
    cfg, model, *_ = built(world, tmp_path, place / "larger", **changes)
    pipe = StableDiffusion3Pipeline.from_pretrained(place / "larger", **sd3.NO_T5)
    tokens = pipe.tokenizer_max_length  # of the absent T5: as many zeros as CLIP has tokens
    how = {"negative_prompt": [""] * 3, "max_sequence_length": tokens}
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, None, None, **how)
    x, sigma = states()

    def by_pipe(embeds, pooled):
        return pipe.transformer(x, embeds, pooled, 1000 * sigma, return_dict=False)[0]

    with torch.no_grad():
        v, v_uncond = by_pipe(embeds, pooled), by_pipe(negative, negative_pooled)
    expected = v_uncond + guidance * (v - v_uncond)
    assert (answer(cfg, model, "red") - expected).abs().max() < 1e-4
    assert len(model.teachers["red"].transformer.transformer_blocks) == 3
    assert len(model.transformer.transformer_blocks) == 2


def test_the_base_of_another_family_with_the_same_latents_teaches(world, tmp_path):
    """Z-Image's tiny pipeline with the VAE and so the latents of the SD3 student."""
    other = tiny_families.make_z_image(tmp_path / "z_image")
    shutil.rmtree(other / "vae")
    shutil.copytree(world / "pipeline" / "vae", other / "vae")
    cfg, model, *_, stage = built(world, tmp_path, other)
    assert model.teachers["red"].family.PIPELINE == "ZImagePipeline"
    assert answer(cfg, model, "red").shape == (3, 4, 4, 4)
    assert stage.step(0)[0]["loss"] > 0


def test_the_table_scores_a_pipeline_by_its_own_weights_encoders_and_guidance(world, place, tmp_path):
    """Its row is that of an evaluation in which it is the model itself."""
    scores = {"rewards": dict.fromkeys(("red", "blue"), PATTERN), "evaluate": True, "eval_prompts": 5}
    changes = scores | {"teacher_guidances": {"red": 2.5}, "eval_steps": 2, "out": str(tmp_path)}
    teachers = {"red": str(place / "larger"), "blue": str(world / "blue")}
    tiny.run(tiny.config(world, teachers=teachers, iterations=0, **changes))
    table = json.loads((tmp_path / "scores.json").read_text())
    assert list(table) == ["base", "red g=2.5", "blue", "student"]
    files = [f"{task}={world / task}.txt" for task in ("red", "blue")]
    flags = ["--model", place / "larger", "--out", tmp_path / "alone.json"]
    flags += ["--prompts", *files, "--rewards", *(f"{task}={PATTERN}" for task in ("red", "blue"))]
    flags += "--adapters --heldout --count 5 --steps 2 --guidance 2.5 --dtype float32".split()
    evaluate.main([str(flag) for flag in flags])
    alone = json.loads((tmp_path / "alone.json").read_text())["scores"]["base"]
    assert table["red g=2.5"]["train"] == pytest.approx(alone["train"], rel=1e-4)
    assert table["red g=2.5"]["train"] != pytest.approx(table["base"]["train"], rel=1e-2)


def test_the_moving_average_of_the_student_teaches(world, tmp_path):
    changes = {"teachers": {"self": "ema", "blue": str(world / "blue")}, "routes": {"red": "self"}}
    cfg, model, _, trained, stage = built(world, tmp_path, "", ema=0.5, **changes)
    before = answer(cfg, model, "self")
    for step in range(3):
        stage.step(step)
    now = velocity(model, "student")
    with trained.averaged():
        averaged = velocity(model, "student")
    after = answer(cfg, model, "self")
    torch.testing.assert_close(after, averaged)  # a frozen adapter is summed with the weights first
    assert min((after - other).abs().max() for other in (before, now)) > 1e-3
    # And it is saved and resumed as before.
    state = trained.state()
    cfg, model, _, other, _ = built(world, tmp_path, "", ema=0.5, out=str(tmp_path / "other"), **changes)
    with torch.no_grad():
        for name, tensor in other.state().items():
            tensor.copy_(state[name])
    assert torch.equal(answer(cfg, model, "self"), after)


@pytest.mark.parametrize("kind, where", [("full", "offload"), ("larger", "cpu")])
def test_an_offloaded_teacher_answers_the_same(kind, where, world, place, tmp_path):
    """On a CPU both places are one, so only the answer and the way there can be seen: layers with hooks."""
    cfg, model, *_ = built(world, tmp_path, place / kind, teacher_devices={"red": where})
    expected = answer(*built(world, tmp_path, place / kind, out=str(tmp_path / "other"))[:2], "red")
    assert torch.equal(answer(cfg, model, "red"), expected)
    hooked = [hasattr(m, "_diffusers_hook") for m in model.teachers["red"].transformer.modules()]
    assert any(hooked) == (where == "offload")


def test_a_teacher_may_have_the_name_of_stage_nfts_old_policy(world):
    """It is no part of what is trained and saved."""
    sources = {"old": str(world / "red"), "blue": str(world / "blue")}
    *_, trained, stage = tiny.build(tiny.config(world, teachers=sources, routes={"red": "old"}))
    assert stage.step(0)[0]["old"]["loss"] > 0
    assert not [name for name in trained.state() if name.startswith("old/")]
