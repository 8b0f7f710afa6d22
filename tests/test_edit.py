"""Families that edit source pictures, against diffusers' own pipelines called with `image`."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from opd import kernels, lora
from opd.cli import in_pixels
from opd.data import Edit, seed_of
from opd.families import family_of, flux, flux2, flux_kontext, qwen_image_edit
from opd.model import Model, Sampling
from tests import tiny_families
from tests.test_families import packed, unpacked_flux, unpacked_flux2, unpacked_qwen

CPU = torch.device("cpu")
SIZE = (8, 12)  # height, width of what is painted
LANDSCAPE, PORTRAIT = (100, 70), (64, 96)


class Fixture(NamedTuple):
    """How the tests get at the tiny pipeline of a family that edits."""

    family: ModuleType
    build: Callable[[Path], Path]
    constants: tuple[tuple[object, str, object], ...]
    """(module, name, a smaller value), for speed."""
    pack: Callable
    """As in tests/test_families.py."""
    unpack: Callable
    most: int
    """Source pictures of a prompt."""
    call: dict = {}
    """Further arguments of the pipeline."""


FIXTURES = {
    "flux2": Fixture(
        flux2,
        tiny_families.make_flux2,
        ((flux2, "TOKENS", 48),),
        lambda x_BCHW: x_BCHW,
        unpacked_flux2,
        2,
    ),
    "flux_kontext": Fixture(
        flux_kontext,
        tiny_families.make_flux_kontext,
        (
            (flux, "T5_TOKENS", 32),
            (pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 16), (24, 16), (16, 24)]),
        ),
        packed,
        unpacked_flux,
        1,
        {"max_area": SIZE[0] * SIZE[1]},
    ),
    "qwen_image_edit": Fixture(
        qwen_image_edit,
        tiny_families.make_qwen_image_edit,
        (
            (pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64),
            (pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64),
            (transformers, "Qwen2VLProcessor", tiny_families.PictureProcessor),
        ),
        packed,
        unpacked_qwen,
        2,
    ),
}


@pytest.fixture(scope="module", params=FIXTURES)
def case(request, tmp_path_factory):
    yield from made(request.param, tmp_path_factory.mktemp("edit"))


def made(row: str, folder: Path):
    """Yields a row of FIXTURES with its saved pipeline and the paths of two source pictures."""
    fixture = FIXTURES[row]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in fixture.constants:
            patch.setattr(module, name, value)
        fixture.build(folder / "pipeline")
        paths = []
        for number, size in enumerate((LANDSCAPE, PORTRAIT)):
            noise = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(number))
            picture = Image.fromarray(noise.byte().numpy()).resize(size)
            picture.save(folder / f"{number}.png")
            paths.append(str(folder / f"{number}.png"))
        pipeline = folder / "pipeline"
        yield SimpleNamespace(fixture=fixture, family=fixture.family, pipeline=pipeline, paths=paths)


def prompts_of(case) -> list[Edit]:
    """With as many source pictures as the family takes, and with one of another shape."""
    several = Edit("a red dot", tuple(case.paths[: case.fixture.most]))
    return [several, Edit("a circle", tuple(case.paths[1:])), Edit("two", tuple(case.paths[1:]))]


def ours(case, prompts: list[Edit], dtype: str = "float32") -> Model:
    model = Model.plan(str(case.pipeline), dtype, in_pixels(*SIZE), CPU, True)
    model.prepare(prompts)
    model.load()
    return model


def start(model: Model, index: int) -> torch.Tensor:
    return kernels.normal((1, *model.shape), seed_of(4, "start"), torch.tensor([index]))


def theirs(case, x, prompt: Edit, guidance: float, adapter: Path | None = None, dtype=torch.float32):
    """(at every step x, sigma and the velocity; the image) of the pipeline's own call."""
    pipe = getattr(diffusers, case.family.PIPELINE).from_pretrained(case.pipeline, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    steps, scheduler_step, shape = [], pipe.scheduler.step, tuple(x.shape[1:])

    def record(velocity, timestep, latents, **options):
        sigma = pipe.scheduler.sigmas[len(steps)]
        steps.append((case.fixture.unpack(latents, shape), sigma, case.fixture.unpack(velocity, shape)))
        return scheduler_step(velocity, timestep, latents, **options)

    pipe.scheduler.step = record
    _, told = case.family.arguments(case.pipeline, True, guidance)
    images = pipe(
        image=[Image.open(path) for path in prompt.pictures],
        prompt=prompt.text,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        latents=case.fixture.pack(x).to(dtype),
        output_type="pt",
        **told,
        **case.fixture.call,
    ).images
    return steps, images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_velocities_and_pictures_are_the_pipelines(guidance, case):
    prompts = prompts_of(case)
    model = ours(case, prompts)
    assert family_of(case.pipeline) is case.family
    pictures = model.images(lora.BASE, prompts, [5, 0, 17], Sampling(3, 4, guidance))
    for prompt, index, picture in zip(prompts, [5, 0, 17], pictures, strict=True):
        steps, images = theirs(case, start(model, index), prompt, guidance)
        assert (picture - images[0]).abs().max() < 1e-4 and picture.shape[1:] == SIZE
        for x, sigma, velocity in steps:
            with torch.no_grad():
                v = model.velocity(x, sigma.expand(1), model.text([prompt]), guidance)
            assert (v - velocity).abs().max() < 1e-5 and velocity.std() > 0.1


def test_in_bfloat16_too(case):
    prompt = prompts_of(case)[0]
    model = ours(case, [prompt], "bfloat16")
    steps, _ = theirs(case, start(model, 5), prompt, 1.0, dtype=torch.bfloat16)
    for x, sigma, velocity in steps:
        with torch.no_grad():
            v = model.velocity(x.float(), sigma.expand(1), model.text([prompt]), 1.0)
        assert (v - velocity.float()).abs().max() < 2**-7 * velocity.abs().max()
