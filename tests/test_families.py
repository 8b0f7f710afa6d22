"""Every family of opd/families against diffusers' own pipeline. A new family needs a row in FIXTURES,
here or, where it edits pictures, in tests/test_edit.py."""

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline

from opd import families, kernels, lora
from opd.cli import in_pixels
from opd.data import seed_of
from opd.families import family_of, flux, flux2, flux_kontext, qwen_image, qwen_image_edit, sd3, z_image
from opd.formats import lora_files
from opd.model import Model, Sampling
from tests import tiny, tiny_families

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]  # of different lengths


def as_it_is(latents, *shape):
    return latents


def packed(x_BCHW):
    return FluxPipeline._pack_latents(x_BCHW, *x_BCHW.shape)


def unpacked_flux(tokens, shape):
    """The VAE halves pictures."""
    return FluxPipeline._unpack_latents(tokens, 2 * shape[1], 2 * shape[2], 2)


def unpacked_qwen(tokens, shape):
    return QwenImagePipeline._unpack_latents(tokens, 2 * shape[1], 2 * shape[2], 2).squeeze(2)


def unpacked_flux2(tokens, shape):
    ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(len(tokens), *shape))
    return Flux2KleinPipeline._unpack_latents_with_ids(tokens, ids, *shape[1:])


class Fixture(NamedTuple):
    """How the tests get at a family's tiny pipeline."""

    family: ModuleType
    build: Callable[[Path], Path]
    resolution: str = ""
    """What a run must be told where the pipeline's own size is large."""
    pack: Callable = as_it_is
    """Latents (B, C, H, W) as the pipeline takes them."""
    unpack: Callable = as_it_is
    """What the pipeline hands to its scheduler, and (C, H, W) -> (B, C, H, W)."""
    constants: tuple[tuple[object, str, object], ...] = ()
    """(module, name, a smaller value), for speed."""
    most: int = 0
    """Source pictures of a prompt."""
    call: dict = {}
    """Further arguments of the pipeline's call."""


FIXTURES = {
    "sd3": Fixture(sd3, tiny.make_pipeline),
    "sd3 with T5": Fixture(sd3, tiny.make_pipeline_with_t5),
    "z_image": Fixture(z_image, tiny_families.make_z_image),
    "flux": Fixture(flux, tiny_families.make_flux, "", packed, unpacked_flux, ((flux, "T5_TOKENS", 32),)),
    "flux2": Fixture(
        flux2, tiny_families.make_flux2, unpack=unpacked_flux2, constants=((flux2, "TOKENS", 48),), most=2
    ),
    "qwen_image": Fixture(qwen_image, tiny_families.make_qwen_image, "8", packed, unpacked_qwen),
}
DYNAMIC = {"use_dynamic_shifting": True}
SCHEDULERS = {"static": {"shift": 3.0}, "dynamic": DYNAMIC}
SCHEDULERS |= {"dynamic, linear": DYNAMIC | {"time_shift_type": "linear"}}


@pytest.fixture(scope="module", params=FIXTURES)
def case(request, tmp_path_factory):
    yield from made(request.param, tmp_path_factory.mktemp("family"))


def made(row: str, folder: Path, rows: dict[str, Fixture] = FIXTURES):
    """Yields a fixture, its family and its saved pipeline."""
    fixture = rows[row]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in fixture.constants:
            patch.setattr(module, name, value)
        fixture.build(folder / "pipeline")
        yield SimpleNamespace(fixture=fixture, family=fixture.family, pipeline=folder / "pipeline")


def ours(case, size: str = "", prompts: list = PROMPTS, dtype: str = "float32") -> Model:
    model = Model.plan(str(case.pipeline), dtype, size or case.fixture.resolution, CPU, True)
    model.prepare(prompts)
    model.load()
    return model


class Theirs:
    """The pipeline's own run: at every step x, sigma and the velocity that it handed to its scheduler."""

    def __init__(
        self, case, pipeline: Path | None = None, lora: Path | None = None, dtype: torch.dtype = torch.float32
    ):
        self.case = case
        kind = getattr(diffusers, case.family.PIPELINE)
        absent, _ = case.family.arguments(case.pipeline, True, 1.0)
        self.pipe = kind.from_pretrained(pipeline or case.pipeline, dtype=dtype, **absent)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.encode_prompt = remembered(self.pipe.encode_prompt)
        if lora is not None:
            self.pipe.load_lora_weights(lora)
        self.steps = []
        self.shape = None
        self.scheduler_step = self.pipe.scheduler.step
        self.pipe.scheduler.step = self.record

    def record(self, velocity, timestep, x, **options):
        sigma = self.pipe.scheduler.sigmas[len(self.steps)]
        unpack = self.case.fixture.unpack
        self.steps.append((unpack(x, self.shape), sigma, unpack(velocity, self.shape)))
        return self.scheduler_step(velocity, timestep, x, **options)

    def run(self, start, steps: int, guidance: float, size: tuple[int, int] = (8, 8), **edit):
        """Its images (B, 3, H, W) in [0, 1], of PROMPTS or of an edit."""
        self.shape = tuple(start.shape[1:])
        _, told = self.case.family.arguments(self.case.pipeline, True, guidance)
        if not edit:
            told["prompt"] = list(PROMPTS)  # some pipelines write into it
            if "negative_prompt" in told:  # as many as there are prompts
                told["negative_prompt"] = [told["negative_prompt"]] * len(PROMPTS)
        result = self.pipe(
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            latents=self.case.fixture.pack(start).to(self.pipe.dtype),
            output_type="pt",
            **told,
            **edit,
        )
        return result.images


def remembered(encode):
    answers = {}

    def encode_once(*arguments, **named):
        key = str((arguments, named))
        return answers[key] if key in answers else answers.setdefault(key, encode(*arguments, **named))

    return encode_once


def noise(model: Model, seed: int = 4, index: tuple = (5, 0, 17)) -> torch.Tensor:
    return kernels.normal((len(index), *model.shape), seed_of(seed, "start"), torch.tensor(index))


# ---------------------------------------------------------------- every family is its pipeline
@pytest.mark.parametrize(
    "family, tokens", [(flux, flux.T5_TOKENS), (flux2, flux2.TOKENS), (qwen_image, qwen_image.TOKENS)]
)
def test_prompts_are_as_long_as_the_pipelines(family, tokens):
    call = inspect.signature(getattr(diffusers, family.PIPELINE).__call__)
    assert call.parameters["max_sequence_length"].default == tokens


class Set(Exception):
    """The pipeline has set its noise levels."""


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sigmas_are_the_pipelines(scheduler, case, tmp_path):
    pipeline = tiny.with_scheduler(case.pipeline, tmp_path / "pipeline", SCHEDULERS[scheduler])
    theirs = Theirs(case, pipeline)
    theirs.pipe.transformer.register_forward_pre_hook(mock.Mock(side_effect=Set))
    for size in ((8, 8), (16, 8)):
        shape = case.family.latent_shape(pipeline, *size)
        for steps in (1, 4, 28):
            with pytest.raises(Set):
                theirs.run(torch.randn(3, *shape), steps, 1.0, size)
            levels = case.family.sigmas(pipeline, shape, steps)
            assert levels == theirs.pipe.scheduler.sigmas.tolist()
            assert len(levels) == steps + 1 and levels[0] == 1 and levels[-1] == 0


@pytest.mark.parametrize("size, guidance", [((8, 8), 1.0), ((16, 8), 3.0)])
def test_velocities_and_images_are_the_pipelines(size, guidance, case):
    model, theirs = ours(case, in_pixels(*size)), Theirs(case)
    images = theirs.run(noise(model), 4, guidance, size)
    assert images.shape[2:] == size == model.pixels
    text = model.text(PROMPTS)
    with torch.no_grad():
        for x, sigma, velocity in theirs.steps:
            v = model.velocity(x, sigma.expand(3), text, guidance)
            assert v.dtype == torch.float32 and velocity.std() > 0.1
            assert (v - velocity).abs().max() < 1e-5
    assert len(theirs.steps) == 4
    mine = model.images(lora.BASE, PROMPTS, [5, 0, 17], Sampling(4, 4, guidance))
    assert mine.std() > 0.05 and (mine - images).abs().max() < 1e-4


def test_the_networks_time_is_the_pipelines_in_bfloat16(case):
    """Bit for bit, at every step of a long walk: bfloat16 rounds half of these times to a neighbour."""
    times = []

    def remember(module, arguments, named):
        time = named["timestep"] if "timestep" in named else arguments[1]
        times.append(time[:1])

    theirs = Theirs(case)
    theirs.pipe.to(torch.bfloat16)
    theirs.pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    theirs.run(torch.randn(3, *case.family.latent_shape(case.pipeline, 8, 8)).bfloat16(), 28, 1.0, (8, 8))
    wanted, times[:] = list(times), []
    model = ours(case, "8", dtype="bfloat16")
    model.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        for sigma in model.sigmas(28)[:-1]:
            model.velocity(torch.zeros(1, *model.shape), torch.tensor([sigma]), model.text(PROMPTS[:1]), 1.0)
    assert len(times) == len(wanted) == 28
    assert [(t.dtype, float(t)) for t in times] == [(t.dtype, float(t)) for t in wanted]


@pytest.fixture(scope="module")
def model(case):
    """Left as it is by those who share it."""
    return ours(case)


def test_guidance_costs_one_forward(case, model):
    x, sigma_B, text = noise(model), torch.tensor([1.0, 0.5, 0.01]), model.text(PROMPTS)
    batches = []
    hook = model.transformer.register_forward_hook(lambda _, __, output: batches.append(len(output[0])))
    with torch.no_grad():
        plain, guided = (model.velocity(x, sigma_B, text, guidance) for guidance in (1.0, 3.0))
    hook.remove()
    assert (guided - plain).abs().max() > 1e-2
    assert batches == ([3, 3] if case.family.guide is None else [3, 6])


def test_velocity_of_a_sample_does_not_depend_on_its_batch(model):
    """PROMPTS and the negative prompt have different lengths: true of padding too."""
    x, sigma_B, text = noise(model), torch.tensor([1.0, 0.5, 0.01]), model.text(PROMPTS)
    with torch.no_grad():
        together = model.velocity(x, sigma_B, text, 3.0)
        for b in range(3):
            row = slice(b, b + 1)
            alone = model.velocity(x[row], sigma_B[row], text[row], 3.0)
            assert (alone[0] - together[b]).abs().max() < 1e-5


def test_an_adapter_is_what_it_is_to_the_pipeline(case, tmp_path):
    """By the names of other tools: tests/test_lora_field.py."""
    file = tiny.save(tiny.random_lora(case.pipeline, seed=7, family=case.family), tmp_path / "ours")
    model, theirs = ours(case), Theirs(case, lora=file)
    theirs.run(noise(model), 2, 3.0)
    text = model.text(PROMPTS)
    lora.attach(model.transformer, "mine", model.read_lora(str(file)), torch.float32)
    for x, sigma, velocity in theirs.steps:
        with torch.no_grad(), lora.use(model.transformer, "mine"):
            v = model.velocity(x, sigma.expand(3), text, 3.0)
        with torch.no_grad(), lora.use(model.transformer, lora.BASE):
            base = model.velocity(x, sigma.expand(3), text, 3.0)
        assert (v - velocity).abs().max() < 1e-5
        assert (base - velocity).abs().max() > 1e-2


def test_the_skeleton_is_the_transformer_without_storage(case):
    skeleton = case.family.skeleton(case.pipeline)
    real = case.family.load_transformer(case.pipeline, torch.bfloat16)
    shapes = {name: weight.shape for name, weight in real.named_parameters()}
    assert {name: weight.shape for name, weight in skeleton.named_parameters()} == shapes
    assert all(weight.is_meta for weight in skeleton.parameters())
    assert {weight.dtype for weight in real.parameters()} == {torch.bfloat16}
    assert not any(isinstance(module, diffusers.models.normalization.RMSNorm) for module in real.modules())
    assert not any(weight.requires_grad for weight in real.parameters()) and not real.training
    linears = [name for name, part in skeleton.named_modules() if isinstance(part, torch.nn.Linear)]
    for target in case.family.LORA_TARGETS:
        assert any(lora_files.is_target(name, [target]) for name in linears), target
    inside = sum(p.numel() for block in case.family.blocks(skeleton) for p in block.parameters())
    assert inside > 0.5 * sum(p.numel() for p in skeleton.parameters())


def test_shapes_and_scale_of_latents_and_images_fit_each_other(case):
    family, vae = case.family, case.family.load_vae(case.pipeline)
    shape = family.latent_shape(case.pipeline, 8, 8)
    assert shape[1] * family.pixels(case.pipeline) == 8
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = family.encode_images(vae, images)
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    assert torch.equal(latents, family.encode_images(vae, images))
    decoded = family.decode(vae, latents)
    assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1


def test_a_size_that_does_not_fit_is_refused(case):
    most = {"sd3": " up to 16", "z_image": " up to 32"}.get(case.family.__name__.split(".")[-1], "")
    for side in (-8, 0, 6, 7, *([36] if most else [])):
        for size in ((side, 8), (8, side)):
            message = f"{side} does not fit this model: use a multiple of 4{most}"
            with pytest.raises(ValueError, match=message):
                case.family.latent_shape(case.pipeline, *size)


def test_conditions_are_no_longer_than_predicted(case, model):
    shapes = case.family.text_shapes(case.pipeline, True)
    for condition in model.text(PROMPTS):
        assert condition.keys() == shapes.keys()
        for name, tensor in condition.items():
            assert tensor.shape[-1] == shapes[name][-1] and len(tensor) <= shapes[name][0]


# ---------------------------------------------------------------- finding a family
def test_a_family_is_found_by_the_pipelines_class(case):
    """And every family has a row here, and the whole contract."""
    assert family_of(case.pipeline) is case.family
    rows = {fixture.family for fixture in FIXTURES.values()} | {flux_kontext, qwen_image_edit}
    assert families.pipelines() == {family.PIPELINE: family.__name__.split(".")[-1] for family in rows}


@pytest.fixture
def own_families(monkeypatch, tmp_path):
    """A second folder of families, and in it one that cannot be imported."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    (tmp_path / "broken.py").write_text('PIPELINE = "BrokenPipeline"\nimport no_such_module\n')
    return tmp_path


def of_class(folder: Path, name: str) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def test_only_the_family_that_matches_is_imported(own_families, world):
    assert family_of(world / "pipeline") is sd3
    with pytest.raises(ImportError, match="no_such_module"):
        family_of(of_class(own_families, "BrokenPipeline"))
    with pytest.raises(ValueError, match="OtherPipeline; known pipelines: FluxPipeline, .*BrokenPipeline"):
        family_of(of_class(own_families, "OtherPipeline"))


@pytest.mark.parametrize("missing", ["NEGATIVE", "guide", "blocks"])
def test_a_family_that_breaks_the_contract_is_refused_by_name(missing, own_families):
    lines = [f"{part} = None" for part in families.CONTRACT if part not in (missing, "PIPELINE")]
    file = own_families / f"without_{missing}.py"
    file.write_text("\n".join(['PIPELINE = "NewPipeline"', *lines]))
    with pytest.raises(ValueError, match=rf"without_{missing}\.py lacks {missing}: "):
        family_of(of_class(own_families, "NewPipeline"))
