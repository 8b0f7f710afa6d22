"""Latents with captions: read from images or as they are, refused, drawn by the teachers for an SFT start."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from opd.data import fair_sample
from opd.formats import lora_files
from opd.formats.latents import Images, load_images
from opd.formats.prompts import load_prompts
from opd.model import Sampling
from tests import tiny


@pytest.fixture(scope="module")
def model(world):
    """With red's and blue's adapters, and their prompts encoded: 8 pixel images, 4 x 4 x 4 latents."""
    return tiny.build(tiny.config(world))[1]


def metadata(folder, rows):
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def picture(folder, name, size=(8, 8), mode="RGB", seed=0):
    """Smooth random colours, so that resampling is well defined."""
    coarse = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).convert(mode)
    image.save(folder / name)
    return np.asarray(image.convert("RGB"))


def test_images_are_encoded_as_by_hand(model, world, tmp_path):
    """diffusers' VAE, and SD3's shift and scale as in the pipeline's config; more images than a batch, of
    which two give their middles."""
    count, keys = 19, ("prompt", "text", "caption")
    arrays = [picture(tmp_path, f"{i}.png", seed=i) for i in range(count)]
    arrays[1] = picture(tmp_path, "1.png", (12, 8), mode="RGBA")[:, 2:10]
    arrays[2] = picture(tmp_path, "2.png", (8, 14))[3:11]
    rows = [{"file_name": f"{i}.png", keys[i % 3]: f"image {i}"} for i in range(count)]
    data = load_images(metadata(tmp_path, rows), model)
    assert data.captions == [f"image {i}" for i in range(count)]
    vae = AutoencoderKL.from_pretrained(world / "pipeline" / "vae")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean
    expected = (expected - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(data.latents, expected, rtol=0, atol=1e-5)
    assert data.log_shift == pytest.approx(np.log(3.0))


ROW = {"prompt": "x", "file_name": "there.png"}
LATENTS = {"latents": torch.ones(3, 4, 4, 4)}


WRONG_LINES = [
    (["{"], "metadata.jsonl:1: not JSON"),
    ([ROW, {"label": "y"}], "metadata.jsonl:2: no prompt on this line; give it one under"),
    ([], "metadata.jsonl': the file holds no prompt"),
    ([ROW, ROW | {"file_name": "gone.png"}], "1 images that do not exist, first: "),
    ([ROW, {"prompt": "x"}], 'metadata.jsonl:2 has no "file_name"'),
]


@pytest.mark.parametrize("rows, message", WRONG_LINES)
def test_a_wrong_line_is_named(rows, message, model, tmp_path):
    picture(tmp_path, "there.png")
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        load_images(metadata(tmp_path, rows), model)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="holds no metadata.jsonl; give one line"):
        load_images(str(tmp_path / "nowhere"), model)


@pytest.mark.parametrize(
    "content, message",
    [
        (LATENTS, ""),
        ({"latents": torch.ones(2, 4, 4, 4)}, r"shape \(2, 4, 4, 4\); with 3 captions .* \(3, 4, 4, 4\)"),
        ({"latents": torch.full((3, 4, 4, 4), torch.nan)}, "3 latents hold NaN or infinity"),
        (None, "SafetensorError"),
    ],
)
def test_latents_are_taken_as_they_are_or_refused(content, message, model, tmp_path):
    folder, file = metadata(tmp_path, [{"prompt": "x"}] * 3), tmp_path / "latents.safetensors"
    file.write_text("garbage") if content is None else save_file(content, file)
    if not message:
        assert torch.equal(load_images(folder, model).latents, content["latents"])
        return
    with pytest.raises(ValueError, match=f"latents.safetensors.*{message}"):
        load_images(folder, model)


@pytest.mark.parametrize("size, count", [(5, 3), (7, 7), (3, 8), (1, 2)])
def test_every_image_once_per_epoch(size, count):
    data = Images(None, ["x"] * size, 0.0)
    chosen = [n for step in range(40) for n in data.of_step(count, 0, step)]
    assert len(chosen) == 40 * count
    epochs = [tuple(chosen[i : i + size]) for i in range(0, len(chosen) - size + 1, size)]
    assert all(Counter(epoch) == Counter(range(size)) for epoch in epochs)
    assert size == 1 or len(set(epochs)) > 1
    assert data.of_step(count, 0, 9) == chosen[9 * count : 10 * count]


def sampled(world, out, *more):
    """`sample.py --save latents`, for 7 samples of each task."""
    folders = ["--model", world / "pipeline", "--out", out]
    names = [f"{name}={world / name}" for name in ("red", "blue")]
    files = [f"{name}={world / name}.txt" for name in ("red", "blue")]
    flags = "--save latents --count 7 --steps 3 --batch 4 --dtype float32 --device cpu".split()
    sample.main([str(flag) for flag in [*flags, *folders, "--adapters", *names, "--tasks", *files, *more]])
    lines = (out / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(out / "latents.safetensors")["latents"]


@pytest.fixture(scope="module")
def everything(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "all"
    return out, *sampled(world, out)


def test_every_task_is_sampled_by_its_teacher(everything, world, model):
    """Seven samples of five and of four prompts: all prompts, some twice with other noise."""
    _, rows, latents = everything
    assert [row["task"] for row in rows] == ["red"] * 7 + ["blue"] * 7
    assert latents.shape == (14, 4, 4, 4) and latents.dtype == torch.float16
    for task, part in (("red", slice(0, 7)), ("blue", slice(7, 14))):
        prompts = [row["prompt"] for row in rows[part]]
        cases = fair_sample(load_prompts(str(world / f"{task}.txt"), task, None), 7)
        assert prompts == [prompt.text for _, prompt in cases] and set(prompts) == set(tiny.PROMPTS[task])
        expected = model.latents(task, prompts, list(range(7)), Sampling(3, 0, 1.0))
        assert (latents[part].float() - expected).abs().max() < 2e-3 * expected.abs().max()
    assert len({tuple(latent.flatten().tolist()) for latent in latents}) == 14


def test_two_commands_make_an_sft_start(everything, world, tmp_path):
    """The latents reach the loss as they were sampled; the student learns; distillation starts from it."""
    data, rows, latents = everything
    out = tmp_path / "sft"
    tiny.main(tiny.sft_config(world, out=str(out), data=str(data), prompts_per_step=8), tmp_path)
    images = load_images(str(data), tiny.build(tiny.config(world))[1])
    assert torch.equal(images.latents, latents)
    assert images.captions == [row["prompt"] for row in rows]
    student = out / "student"
    _, model, *_ = tiny.build(tiny.config(world, cold_start=str(student)))
    layer = model.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    start = lora_files.read_lora(str(student)).update("transformer_blocks.0.attn.to_q")
    ours = layer.lora_A["student"].scale * layer.lora_B["student"].weight @ layer.lora_A["student"].weight
    assert start.norm() > 0.01 and torch.allclose(ours, start, atol=1e-5)


def test_samples_are_never_overwritten(everything, world):
    with pytest.raises(SystemExit, match="holds a metadata.jsonl; choose another folder, or delete"):
        sampled(world, everything[0])
