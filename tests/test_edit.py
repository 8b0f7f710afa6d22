"""Families that edit source pictures, against diffusers' own pipelines called with `image`."""

import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

import sample
import train
from opd import lora
from opd.cli import in_pixels
from opd.data import Edit
from opd.evaluation import evaluate, records
from opd.families import family_of, flux, flux2, flux_kontext, pictures_of, qwen_image_edit
from opd.formats import pictures as opd_pictures
from opd.formats.latents import write_samples
from opd.formats.pictures import read_image, size_of_image, to_tensor
from opd.formats.prompts import load_prompts
from opd.model import Model, Sampling
from opd.report import memory
from opd.report.card import write_card
from tests import forked, test_families, tiny, tiny_families
from tests.test_families import CPU, Fixture, Theirs, made, noise, packed, unpacked_flux, unpacked_qwen
from tests.test_family_runs import goes_on_and_two_ranks_are_one

SIZE = (8, 12)  # height, width of what is painted
LANDSCAPE, PORTRAIT = (100, 70), (64, 96)


KONTEXT = (
    (flux, "T5_TOKENS", 32),
    (pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 16), (24, 16), (16, 24)]),
)
QWEN = (
    (pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64),
    (pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64),
    (transformers, "Qwen2VLProcessor", tiny_families.PictureProcessor),
)
AREA = {"max_area": SIZE[0] * SIZE[1]}
FIXTURES = {
    "flux2": test_families.FIXTURES["flux2"],
    "flux_kontext": Fixture(
        flux_kontext, tiny_families.make_flux_kontext, "", packed, unpacked_flux, KONTEXT, 1, AREA
    ),
    "qwen_image_edit": Fixture(
        qwen_image_edit, tiny_families.make_qwen_image_edit, "", packed, unpacked_qwen, QWEN, 2
    ),
}


# For what is the same in every family, and what is where a prompt may have two pictures.
IN_ONE_FAMILY = pytest.mark.parametrize("case", ["flux_kontext"], indirect=True)
OF_TWO_PICTURES = pytest.mark.parametrize("case", ["flux2"], indirect=True)


@pytest.fixture(scope="module", params=FIXTURES)
def case(request, tmp_path_factory):
    """A row of FIXTURES with its saved pipeline and the paths of two source pictures."""
    folder = tmp_path_factory.mktemp("edit")
    for case in made(request.param, folder, FIXTURES):
        case.paths = []
        for number, size in enumerate((LANDSCAPE, PORTRAIT)):
            noise = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(number))
            picture = Image.fromarray(noise.byte().numpy()).resize(size)
            picture.save(folder / f"{number}.png")
            case.paths.append(str(folder / f"{number}.png"))
        yield case


def prompts_of(case) -> list[Edit]:
    """With as many source pictures as the family takes, and with one of another shape."""
    several = Edit("a red dot", tuple(case.paths[: case.fixture.most]))
    return [several, Edit("a circle", tuple(case.paths[1:])), Edit("two", tuple(case.paths[1:]))]


def ours(case, prompts: list[Edit], dtype: str = "float32") -> Model:
    return test_families.ours(case, in_pixels(*SIZE), prompts, dtype)


def theirs(case, x, prompt: Edit, guidance: float, dtype=torch.float32):
    """(at every step x, sigma and the velocity; the image) of the pipeline's own call."""
    pipe, pictures = Theirs(case, dtype=dtype), [Image.open(path) for path in prompt.pictures]
    images = pipe.run(x, 3, guidance, SIZE, image=pictures, prompt=prompt.text, **case.fixture.call)
    return pipe.steps, images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_velocities_and_pictures_are_the_pipelines(guidance, case):
    prompts = prompts_of(case)
    model = ours(case, prompts)
    assert family_of(case.pipeline) is case.family
    pictures = model.images(lora.BASE, prompts, [5, 0, 17], Sampling(3, 4, guidance))
    for prompt, index, picture in zip(prompts, [5, 0, 17], pictures, strict=True):
        steps, images = theirs(case, noise(model, index=(index,)), prompt, guidance)
        assert (picture - images[0]).abs().max() < 1e-4 and picture.shape[1:] == SIZE
        for x, sigma, velocity in steps:
            with torch.no_grad():
                v = model.velocity(x, sigma.expand(1), model.text([prompt]), guidance)
            assert (v - velocity).abs().max() < 1e-5 and velocity.std() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_in_bfloat16_too(guidance, case):
    """Each branch within 2^-7 of the pipeline's. v = g c - (g - 1) u multiplies their rounding, by 2 g - 1 at
    most; together they are nearer to the pipeline's than that is to its own in float32.
    """
    prompt = prompts_of(case)[0]
    model, exact = ours(case, [prompt], "bfloat16"), ours(case, [prompt])
    steps, _ = theirs(case, noise(model, index=(5,)), prompt, guidance, dtype=torch.bfloat16)
    for x, sigma, velocity in steps:
        sigma_B = sigma.expand(1)
        with torch.no_grad():
            v = model.velocity(x.float(), sigma_B, model.text([prompt]), guidance)
            exact_v = exact.velocity(x.float(), sigma_B, exact.text([prompt]), guidance)
        apart, rounded = (v - velocity.float()), velocity.float() - exact_v
        assert apart.abs().max() < (2 * guidance - 1) * 2**-7 * velocity.abs().max()
        assert apart.norm() < rounded.norm()


def test_kontext_takes_a_pictures_shape_in_whole_patches(monkeypatch):
    """As its pipeline does, by its own image processor; 4:5 at 1080 pixels is one that differs."""
    monkeypatch.setattr(flux_kontext.parts, "pixels", lambda folder: 8)
    processor, draw = VaeImageProcessor(vae_scale_factor=16), random.Random(0)
    sizes = [(1080, 1350), *((draw.randint(64, 900), draw.randint(64, 900)) for _ in range(60))]
    for width, height in sizes:
        rows, columns = processor.get_default_height_width(Image.new("L", (width, height)))
        preferred = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, wide, high = min((abs(columns / rows - w / h), w, h) for w, h in preferred)
        assert flux_kontext.picture_size(None, width, height) == (wide // 16 * 16, high // 16 * 16)
    assert flux_kontext.picture_size(None, 1080, 1350) == (880, 1184)
    with pytest.raises(ValueError, match="100x15 is too small"):
        flux_kontext.picture_size(None, 100, 15)


# ---- runs: one mixes painting and editing, where the family can both ----
@pytest.fixture(scope="module")
def world(case):
    """Task blue edits: pictures of two shapes, one prompt with as many as the family takes. Task red paints,
    or edits where the family does nothing else."""
    folder = tiny.furnish(case.pipeline.parent, case.family)
    one, other, most = case.paths[:1], case.paths[1:], case.paths[: case.fixture.most]
    rows = {"blue": {"a blue dot": one, "make it blue": other, "as both": most}}
    rows["red"] = dict.fromkeys(["a red dot", "redder"], one if case.family.EDITING.fewest else [])
    for task, prompts in rows.items():
        lines = [{"prompt": text, "image": [Path(p).name for p in paths]} for text, paths in prompts.items()]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def settings(world: Path, out: Path) -> dict:
    prompts = {task: str(world / f"{task}.jsonl") for task in ("red", "blue")}
    return {"prompts": prompts, "resolution": in_pixels(*SIZE), "out": str(out), "prompts_per_step": 6}


def test_a_step_pulls_the_student_to_the_teachers_of_both_tasks(world, tmp_path):
    """The gradient does not hang on how samples are cut into micro-batches, of which none has two shapes of
    pictures. The same step once more has a smaller loss."""
    gradients = []
    for micro_batch in (1, 8):
        cut = {"micro_batch": micro_batch, "group": 1, "steps": 2, "guidance": 2.0}
        cfg = tiny.config(world, **cut, **settings(world, tmp_path))
        *_, trained, stage = tiny.build(cfg)
        stage.accumulate(stage.plan(0))
        # The last block's text stream moves no picture.
        used = [p.grad.flatten().clone() for p in trained.parameters.values() if p.grad is not None]
        gradients.append(torch.cat(used))
    assert tiny.distance(*gradients) < 1e-4
    trained.update(0)
    first, second = stage.step(1)[0]["loss"], stage.step(1)[0]["loss"]
    assert 0 < second < first


@IN_ONE_FAMILY
@pytest.mark.parametrize("stage", [tiny.grpo_config, tiny.nft_config])
def test_rewards_that_see_the_source_move_the_policy(stage, case, world, tmp_path):
    changes = settings(world, tmp_path / "run") | {"prompts": {"blue": str(world / "blue.jsonl")}}
    rewards = {"blue": "tests.test_edit:like_the_source"}
    folder, model, *_ = tiny.run(stage(world, beta=0.1, train_rewards=rewards, sample_every=2, **changes))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in folder.metrics())
    prompts, sampling = prompts_of(case), Sampling(3, 4, 1.0)
    trained, base = (model.images(name, prompts, [0, 1, 2], sampling) for name in (model.trained, lora.BASE))
    assert (trained - base).abs().max() > 1e-3
    assert (tmp_path / "run" / "samples" / "000002.png").is_file()


def test_sft_drops_captions_and_keeps_their_sources(case, world, tmp_path):
    """What the loss (tests/test_sft.py) is given as conditions."""
    model = ours(case, prompts_of(case))
    rows = [{"prompt": "redder", "image": case.paths[:1]}, {"prompt": "bluer", "image": case.paths[1:]}]
    write_samples(tmp_path / "data", torch.zeros(2, *model.shape), rows)
    changes = {"data": str(tmp_path / "data"), "resolution": in_pixels(*SIZE), "prompts_per_step": 2}
    for dropped in (0.0, 1.0 - 1e-6):
        *_, stage = tiny.build(tiny.sft_config(world, caption_dropout=dropped, **changes))
        with mock.patch.object(Model, "velocity", autospec=True, side_effect=Model.velocity) as called:
            stage.step(0)
        shown = [text for call in called.call_args_list for text in call.args[3]]
        for row in rows:
            words = case.family.NEGATIVE if dropped else row["prompt"]
            (wanted,) = model.text([Edit(words, tuple(row["image"]))])
            (own,) = [text for text in shown if torch.equal(text["picture0"], wanted["picture0"])]
            torch.testing.assert_close(own["embeds"], wanted["embeds"], rtol=0, atol=1e-5)


def like_the_source(images_BCHW, prompts, metadata):
    sources = [Image.open(row["source"][0]).resize((1, 1)) for row in metadata]
    wanted_B3 = torch.tensor([source.getpixel((0, 0)) for source in sources]) / 255
    return -(images_BCHW.mean((2, 3)) - wanted_B3).abs().mean(1)


def main():
    """train.py with the small constants of the family that the environment names."""
    for module, name, value in FIXTURES[os.environ["FAMILY"]].constants:
        setattr(module, name, value)
    train.main()


@pytest.mark.parametrize("case", ["flux2", "qwen_image_edit"], indirect=True)
def test_a_run_goes_on_to_the_same_bits_and_two_ranks_are_one(case, world, tmp_path):
    def command(out: Path, **changes) -> list[str]:
        once = {"prompts_per_step": 4, "group": 1, "steps": 2, "save_every": 1}
        return forked.command_line(tiny.config(world, **settings(world, out) | once | changes))

    row = case.family.__name__.split(".")[-1]
    goes_on_and_two_ranks_are_one(tmp_path, command, 2, "tests.test_edit", FAMILY=row)


@OF_TWO_PICTURES
def test_sample_sees_the_source(case, tmp_path, capsys):
    """A picture is the model's own, and the grid has a row of sources."""
    prompt = prompts_of(case)[0]
    how = ["--model", str(case.pipeline), "--resolution", in_pixels(*SIZE), "--dtype", "float32"]
    how += ["--steps", "3", "--adapters"]
    about = ["--prompts", prompt.text, "--image", *prompt.pictures]
    sample.main([*how, *about, "--out", str(tmp_path)])
    (expected,) = ours(case, [prompt]).images(lora.BASE, [prompt], [0], Sampling(3, 0, 1.0))
    (file,) = tmp_path.glob("a-red-dot.0.base.png")
    assert (to_tensor(read_image(file)) - expected).abs().max() < 1 / 255
    assert "2 rows" in capsys.readouterr().out


def test_the_cards_code_edits_as_we_do(case, world, tmp_path):
    """With diffusers alone."""
    prompt, how = Edit("make it red", tuple(case.paths[:1])), {"guidance": 3.0, "eval_steps": 3}
    cfg = tiny.config(world, **settings(world, tmp_path) | how)
    model = ours(case, [prompt])
    student = tiny.save(tiny.random_lora(case.pipeline, seed=7, family=case.family), tmp_path / "student")
    write_card(student, cfg, model, 3, "")
    card = (student / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and "--prompts 'make it red' --image a.png" in card
    [code] = re.findall("```python\n(.*?)\n```", card, re.DOTALL)
    code = code.replace("THIS_FOLDER", str(student)).replace("a.png", case.paths[0])
    names = {"start": case.fixture.pack(noise(model, index=(0,)))}
    exec(code.replace("pipe(image", "pipe(output_type='pt', latents=start, image"), names)
    lora.attach(model.transformer, "mine", model.read_lora(str(student)), torch.float32)
    mine, base = (model.images(name, [prompt], [0], Sampling(3, 4, 3.0))[0] for name in ("mine", lora.BASE))
    assert (mine - names["image"]).abs().max() < 1e-4 and (mine - base).abs().max() > 1e-2


@OF_TWO_PICTURES
def test_memory_counts_the_tokens_of_the_source(case, world, tmp_path, capsys):
    cfg = tiny.config(world, **settings(world, tmp_path))
    model = Model.plan(str(case.pipeline), "float32", in_pixels(*SIZE), CPU, True)
    shapes = memory.picture_shapes(cfg, model)
    rows = [{"prompt": edit.text, "image": list(edit.pictures)} for edit in prompts_of(case)]
    write_samples(tmp_path / "data", torch.zeros(3, *model.shape), rows)
    for place, wanted in {"data": shapes, "elsewhere": {}}.items():
        finetuned = tiny.sft_config(world, data=str(tmp_path / place))
        assert memory.picture_shapes(finetuned, model) == wanted
    assert capsys.readouterr().out == ""  # --dry-run prints flags and comments alone
    model.prepare(prompts_of(case))
    latents = [pictures_of(condition).values() for condition in model.text(prompts_of(case))]
    assert sum(map(math.prod, shapes.values())) == max(sum(x.numel() for x in own) for own in latents)
    text = case.family.text_shapes(case.pipeline, True)
    few, many = (memory.activations(cfg, model, own) for own in (text, text | shapes))
    assert many > 1.2 * few


# ---- what is refused, before weights load ----
def refusal(pipeline: Path, folder: Path, images: list[str]) -> str:
    """What a prompt with these source pictures is refused with."""
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "redder", "image": images}))
    model = Model.plan(str(pipeline), "float32", in_pixels(*SIZE), CPU, True)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        model.prepare([p.asked for p in load_prompts(str(folder / "prompts.jsonl"), "t", None)])
    assert model.transformer is None and not model.conditioning.kept
    return str(error.value)


@IN_ONE_FAMILY
def test_pictures_that_nobody_can_read_are_refused(case, tmp_path, monkeypatch):
    large, other = Image.new("RGB", (80, 80)), Image.new("RGB", (80, 80), 1)
    large.save(tmp_path / "film.gif", save_all=True, append_images=[other])
    (tmp_path / "words.png").write_text("no picture")
    large.save(tmp_path / "large.png")
    Image.new("I;16", (80, 80), 30000).save(tmp_path / "deep.png")
    assert "deep.png': its pixels are greys of mode I;16" in refusal(case.pipeline, tmp_path, ["deep.png"])
    assert "prompts.jsonl:1: no source picture" in refusal(case.pipeline, tmp_path, ["none.png"])
    assert "film.gif': it has 2 frames" in refusal(case.pipeline, tmp_path, ["film.gif"])
    assert "words.png': cannot be read" in refusal(case.pipeline, tmp_path, ["words.png"])
    monkeypatch.setattr(opd_pictures, "MOST_PIXELS", 6399)
    assert "large.png': it is 80 x 80; make it smaller" in refusal(case.pipeline, tmp_path, ["large.png"])
    too_many = refusal(case.pipeline, tmp_path, ["large.png"] * 11)
    assert f"'redder' has 11 source pictures; {case.family.PIPELINE} takes" in too_many


def test_a_prompt_that_does_not_fit_the_pipeline_is_refused(case, tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    Image.new("RGB", (640, 64)).save(tmp_path / "long.png")
    text_alone = tiny.make_pipeline(tmp_path / "sd3")
    assert "StableDiffusion3Pipeline reads text alone" in refusal(text_alone, tmp_path, ["a.png"])
    if case.family.EDITING.fewest:
        assert "'redder' has 0 source pictures" in refusal(case.pipeline, tmp_path, [])
    if case.family is qwen_image_edit:
        Image.new("RGB", (6400, 10)).save(tmp_path / "thin.png")
        assert "thin.png': it is 6400 x 10 pixels; give" in refusal(case.pipeline, tmp_path, ["thin.png"])
    if case.family is flux2:
        assert "640 x 64 pixels; give it sides" in refusal(case.pipeline, tmp_path, ["long.png"])


@pytest.mark.parametrize("case", ["qwen_image_edit"], indirect=True)
def test_a_processor_without_its_vocabulary_is_refused(case, tmp_path):
    shutil.copytree(case.pipeline, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "processor" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="processor holds none of tokenizer.json"):
        Model.plan(str(tmp_path / "pipeline"), "float32", in_pixels(*SIZE), CPU, True)


@IN_ONE_FAMILY
def test_a_teacher_that_reads_text_alone_is_refused_by_its_name(case, world, tmp_path):
    teachers = {"red": str(tiny_families.make_flux(tmp_path / "flux")), "blue": str(world / "blue")}
    with pytest.raises(ValueError, match="^teacher 'red': prompt .* FluxPipeline reads text alone"):
        tiny.build(tiny.config(world, teachers=teachers, **settings(world, tmp_path)))


NO_PATHS = [(3, "expected a path or a list"), ([1], "expected a path or a list")]
NO_PATHS += [("a\0.png", "holds a NUL"), ("a" * 300, "no source picture")]


@pytest.mark.parametrize("image, reason", NO_PATHS)
def test_a_field_image_that_is_no_path_is_refused(image, reason, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "image": image}))
    with pytest.raises((ValueError, FileNotFoundError), match=f"p.jsonl:1: .*{reason}"):
        load_prompts(str(tmp_path / "p.jsonl"), "t", None)


def test_paths_are_written_as_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "ä b.png")
    rows = b"prompt,image\r\npainted,\r\nseen,\xc3\xa4 b.png\r\nat home,~/\xc3\xa4 b.png\r\n"
    (tmp_path / "p.csv").write_bytes(rows)
    own = [prompt.pictures for prompt in load_prompts(str(tmp_path / "p.csv"), "t", None)]
    assert own == [(), (str(tmp_path / "ä b.png"),), (str(tmp_path / "ä b.png"),)]
    (tmp_path / "p.csv").write_bytes(rows + b"two,\xc3\xa4 b.png,b.png")
    with pytest.raises(ValueError, match="p.csv:5: more fields than columns"):
        load_prompts(str(tmp_path / "p.csv"), "t", None)


def test_a_cameras_photo_is_upright_and_alone(tmp_path):
    """Turned by its header, or with a preview behind it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, preview = Image.new("RGB", (30, 20), "blue"), Image.new("RGB", (3, 2), "red")
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[preview])
    for name, size in {"turned.jpg": (20, 30), "two.jpg": (30, 20)}.items():
        assert read_image(tmp_path / name).size == size_of_image(str(tmp_path / name)) == size
    assert read_image(tmp_path / "two.jpg").getpixel((0, 0))[2] > 250


def test_a_mask_is_seen_from_where_the_source_is(tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "image": "a.png", "mask": "m.png"}))
    (prompt,) = load_prompts(str(tmp_path / "p.jsonl"), "t", None)
    assert prompt.metadata == {"source": [str(tmp_path / "a.png")], "mask": str(tmp_path / "m.png")}


@IN_ONE_FAMILY
def test_a_run_goes_on_for_more_steps_but_not_from_another_picture(case, world, tmp_path):
    """Of twenty pictures the first steps and the report read some."""
    for n in range(20):
        Image.new("RGB", (64, 64), (n, 0, 0)).save(tmp_path / f"{n}.png")
    lines = [json.dumps({"prompt": "redder", "image": f"{n}.png"}) for n in range(20)]
    (tmp_path / "blue.jsonl").write_text("\n".join(lines))
    changes = settings(world, tmp_path / "run") | {"prompts": {"blue": str(tmp_path / "blue.jsonl")}}
    changes |= {"prompts_per_step": 1, "group": 1, "steps": 2, "save_every": 1}
    for iterations in (1, 2):
        tiny.main(tiny.config(world, iterations=iterations, **changes), tmp_path)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "7.png")
    with pytest.raises(SystemExit, match="began with another source pictures"):
        tiny.main(tiny.config(world, iterations=3, **changes), tmp_path)


@IN_ONE_FAMILY
def test_records_are_of_one_source_picture(case, world, tmp_path, capsys):
    """One that is another file by now is refused; pictures that someone else made have sources too."""
    Image.new("RGB", LANDSCAPE).save(tmp_path / "a.png")
    prompts = tmp_path / "blue.jsonl"
    prompts.write_text(json.dumps({"prompt": "redder", "image": "a.png"}))
    how = ["--model", str(case.pipeline), "--resolution", in_pixels(*SIZE), "--steps", "2", "--adapters"]
    how += ["--prompts", f"blue={prompts}", "--heldout", "--records", str(tmp_path / "records")]
    command = [*how, "--count", "1", "--rewards", "blue=preservation"]
    evaluate.main(command)
    [line] = (tmp_path / "records" / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["sources"] == [str(tmp_path / "a.png")]
    Image.new("RGB", LANDSCAPE, "blue").save(tmp_path / "a.png")
    records.digest_of.cache_clear()  # as in a process of its own
    with pytest.raises(SystemExit, match="made otherwise: source sha256 '.*' -> '.*'"):
        evaluate.main(command)

    for name, size in {"source.png": LANDSCAPE, "result.png": SIZE}.items():
        Image.new("RGB", size, "blue").save(tmp_path / name)
    row = {"file_name": "result.png", "prompt": "redder", "image": "source.png", "task": "blue"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    evaluate.main(["--pictures", str(tmp_path), "--rewards", "blue=preservation"])
    [line] = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["sources"] == [str(tmp_path / "source.png")]
    assert json.loads(line)["scores"] == {"preservation": 1.0}
