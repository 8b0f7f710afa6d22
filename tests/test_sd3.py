"""The SD3 family against diffusers' own pipeline, and the cache of encoded prompts."""

import os
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import opd.conditioning
from kernels import normal
from opd import adapters, sd3
from opd.conditioning import Conditioning
from opd.data import seed_of
from opd.files import find_pipeline
from opd.model import Model, compute_dtype
from opd.rollout import sample

CPU = torch.device("cpu")
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told
PROMPTS = ["a red circle", "two blue squares", "a dot"]


def save_with_t5(world, folder):
    """The tiny pipeline with a third encoder: a T5 of one layer."""
    words = ["<pad>", "</s>", "<unk>", *"a two red blue circle squares dot".split()]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(3)
    encoder = T5EncoderModel(T5Config(d_model=128, d_kv=32, d_ff=64, num_layers=1, num_heads=4, vocab_size=words.get_vocab_size()))
    pipe = StableDiffusion3Pipeline.from_pretrained(
        world / "pipeline", text_encoder_3=encoder.eval(),
        tokenizer_3=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_t5(world, tmp_path_factory):
    return save_with_t5(world, tmp_path_factory.mktemp("t5") / "pipeline")


def model_at(folder, cache, t5=True):
    model = Model.plan(sd3, str(folder), "float32", 0, str(cache), CPU, t5)
    model.conditioning.prepare([*PROMPTS, ""])
    model.load()
    return model


@pytest.mark.parametrize("bf16, amx, device, wanted", [
    (False, False, "cpu", torch.float32), (True, False, "cpu", torch.bfloat16), (False, True, "cpu", torch.bfloat16),
    (False, False, "cuda", torch.bfloat16)])
def test_auto_is_bfloat16_only_where_the_hardware_has_it(bf16, amx, device, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype("auto", torch.device(device)) == wanted
    assert compute_dtype("float16", torch.device(device)) == torch.float16


# ---- sampling equals diffusers' own -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("t5", [False, True])
def test_ode_sampling_is_the_diffusers_pipelines(t5, guidance, world, with_t5, tmp_path):
    folder = with_t5 if t5 else world / "pipeline"
    model = model_at(folder, tmp_path)
    index = [5, 0, 17]
    latents = sample(sd3, model.transformer, model.conditioning(PROMPTS), model.conditioning([""]), model.grid(7), model.shape,
                     seed=4, index=torch.tensor(index), guidance=guidance)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **({} if t5 else NO_T5))
    pipe.set_progress_bar_config(disable=True)
    start = normal((3, *model.shape), seed_of(4, "start"), torch.tensor(index))
    theirs = pipe(PROMPTS, height=8, width=8, num_inference_steps=7, guidance_scale=guidance, negative_prompt=[""] * 3, latents=start,
                  max_sequence_length=128 if t5 else pipe.tokenizer_max_length, output_type="latent").images
    assert theirs.std() > 0.5 and (latents - theirs).abs().max() < 1e-4
    images = model.images(adapters.BASE, PROMPTS, index, steps=7, seed=4, guidance=guidance)
    assert images.std() > 0.05 and (images - sd3.decode(model.vae, theirs)).abs().max() < 1e-4


def test_images_depend_on_seed_and_index_and_not_on_their_neighbours(world, tmp_path):
    model = model_at(world / "pipeline", tmp_path)
    for settings in (dict(guidance=3.0), dict(guidance=1.0, rollout="sde"), dict(guidance=1.0, rollout="cps")):
        def draw(seed, *which):
            return model.images(adapters.BASE, [PROMPTS[i] for i in which], [10 + i for i in which], steps=3, seed=seed, **settings)
        together = draw(0, 0, 1, 2)
        assert (draw(0, 2, 0) - together[[2, 0]]).abs().max() < 1e-5
        assert (draw(1, 0, 1, 2) - together).abs().max() > 0.01
        assert (together[0] - together[1]).abs().max() > 0.01


def test_velocity_of_a_sample_does_not_depend_on_its_batch(world, tmp_path):
    model = model_at(world / "pipeline", tmp_path)
    x, sigma = torch.randn(3, *model.shape), torch.tensor([1.0, 0.5, 0.01])
    with torch.no_grad():
        together = sd3.velocity(model.transformer, x, sigma, model.conditioning(PROMPTS))
        for b in range(3):
            alone = sd3.velocity(model.transformer, x[b:b + 1], sigma[b:b + 1], model.conditioning(PROMPTS[b:b + 1]))
            assert (alone[0] - together[b]).abs().max() < 1e-5


def test_the_timestep_stays_float32_under_a_bfloat16_model():
    """In bfloat16, 901 would become 900."""
    seen = {}

    def transformer(**inputs):
        seen.update(inputs)
        return (inputs["hidden_states"],)
    v = sd3.velocity(transformer, torch.ones(1, 4, 4, 4), torch.tensor([0.901]), (torch.ones(1, 24, 128).bfloat16(), None))
    assert v.dtype == torch.bfloat16 and seen["timestep"].dtype == torch.float32
    assert seen["timestep"].item() == pytest.approx(901, abs=1e-3)


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t5, tokens", [(True, 12 + 128), (False, 12 + 12)])
def test_t5_adds_128_tokens_and_can_be_left_out(t5, tokens, with_t5, tmp_path):
    encoders = sd3.load_text_encoders(with_t5, torch.float32, CPU, t5)
    assert (encoders.text_encoder_3 is not None) == t5
    embeds_BLD, pooled_BP = sd3.encode_prompts(encoders, PROMPTS, CPU)
    assert embeds_BLD.shape == (3, tokens, 128) and pooled_BP.shape == (3, 128)
    assert (embeds_BLD[:, 12:].abs().max() > 0) == t5  # without T5 its part is zeros


def conditioning(folder, cache, **changes):
    return Conditioning(sd3, folder, str(cache), torch.float32, CPU, **changes)


def test_every_prompt_is_encoded_once_and_read_back_exactly(world, tmp_path, monkeypatch):
    first = conditioning(world / "pipeline", tmp_path)
    assert first.prepare([*PROMPTS, PROMPTS[0]], batch=2) == 3
    encoders = sd3.load_text_encoders(world / "pipeline", torch.float32, CPU, True)
    for got, expected in zip(first(PROMPTS[::-1]), sd3.encode_prompts(encoders, PROMPTS[::-1], CPU)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

    def never(*_):
        raise AssertionError("the encoders were loaded again")
    monkeypatch.setattr(sd3, "load_text_encoders", never)
    second = conditioning(world / "pipeline", tmp_path)
    assert second.prepare(PROMPTS) == 0
    assert all(map(torch.equal, second(PROMPTS), first(PROMPTS)))
    with pytest.raises(AssertionError, match="loaded again"):
        second.prepare(["a new prompt"])


def test_the_cache_is_keyed_by_encoders_dtype_and_t5(world, with_t5, tmp_path):
    caches = {conditioning(world / "pipeline", tmp_path).cache, conditioning(with_t5, tmp_path).cache,
              conditioning(with_t5, tmp_path, t5=False).cache,
              Conditioning(sd3, with_t5, str(tmp_path), torch.bfloat16, CPU).cache}
    assert len(caches) == 4
    copy = tmp_path / "copy"
    shutil.copytree(world / "pipeline", copy)
    before = conditioning(copy, tmp_path)
    assert before.prepare(PROMPTS) == 3
    os.utime(copy / "transformer" / "config.json")  # not an encoder
    assert conditioning(copy, tmp_path).prepare(PROMPTS) == 0
    os.utime(copy / "text_encoder_2" / "model.safetensors", ns=(1, 1))
    assert conditioning(copy, tmp_path).cache != before.cache
    assert conditioning(copy, tmp_path).prepare(PROMPTS) == 3


def test_memory_is_bounded_and_eviction_only_costs_a_read(world, tmp_path, monkeypatch):
    c = conditioning(world / "pipeline", tmp_path)
    c.prepare(PROMPTS)
    expected = c(PROMPTS)
    each = c.used // 3
    monkeypatch.setattr(opd.conditioning, "MEMORY", 2 * each)
    small = conditioning(world / "pipeline", tmp_path)
    assert all(map(torch.equal, small(PROMPTS), expected))
    assert len(small.memory) == 2 and small.used == 2 * each
    assert all(map(torch.equal, small(PROMPTS), expected))  # the evicted one comes back from disk
    monkeypatch.setattr(opd.conditioning, "MEMORY", 1)
    assert all(map(torch.equal, small(PROMPTS), expected)) and len(small.memory) == 1


# ---- images and shapes ---------------------------------------------------------------------------------------------


def test_latents_are_scaled_as_diffusers_scales_them(world):
    vae = sd3.load_vae(world / "pipeline")
    pipe = StableDiffusion3Pipeline.from_pretrained(world / "pipeline", **NO_T5)
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = sd3.encode_images(vae, image)
    with torch.no_grad():
        mean = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mean
        decoded = pipe.vae.decode(mean).sample
    torch.testing.assert_close(latents, (mean - 0.1) * 0.8)
    theirs = pipe.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(sd3.decode(vae, latents), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resolution, shape", [(8, (4, 4, 4)), (4, (4, 2, 2)), (16, (4, 8, 8))])
def test_latent_shape(resolution, shape, world):
    assert sd3.latent_shape(world / "pipeline", resolution) == shape
    assert sd3.image_tokens(world / "pipeline", shape) == (shape[1] // 2) ** 2


@pytest.mark.parametrize("resolution", [-8, 6, 9, 20])
def test_resolutions_that_do_not_fit_are_refused(resolution, world):
    with pytest.raises(ValueError, match=f"resolution {resolution} does not fit this model: use a multiple of 4 up to 16"):
        sd3.latent_shape(world / "pipeline", resolution)


def test_the_default_resolution_is_the_models(world):
    assert sd3.default_resolution(world / "pipeline") == 8


def test_the_skeleton_has_the_weights_names_and_shapes_without_storage(world):
    skeleton, real = sd3.skeleton(world / "pipeline"), sd3.load_transformer(world / "pipeline", torch.bfloat16)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())
    assert {p.dtype for p in real.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in real.parameters())
    assert [id(b) for b in sd3.blocks(real)] == [id(b) for b in real.transformer_blocks]


@pytest.mark.parametrize("make, error, message", [
    (lambda f: None, FileNotFoundError, "model '{}': no such file or directory"),
    (lambda f: f.mkdir(), ValueError, "model '{}' is not a pipeline directory: it has no model_index.json"),
    (lambda f: f.write_text("x"), ValueError, "model '{}' is not a pipeline directory"),
    (lambda f: (f.mkdir(), (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')), ValueError,
     "model '{}' is a FluxPipeline; this family loads a StableDiffusion3Pipeline (choose another with --family)"),
])
def test_what_is_no_pipeline_is_refused(make, error, message, tmp_path):
    source = tmp_path / "model"
    make(source)
    with pytest.raises(error) as caught:
        find_pipeline(str(source), sd3.PIPELINE)
    assert message.format(source) in str(caught.value)
