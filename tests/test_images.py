"""Images and latents for flow-matching fine-tuning: what is read, cropped, encoded and refused."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from opd.formats import images
from opd.model import Model


@pytest.fixture(scope="module")
def model(world):
    """Of 8 pixel images, 4 x 4 x 4 latents."""
    return planned(world)


def planned(world, size=""):
    cpu = torch.device("cpu")
    return Model.plan(str(world / "pipeline"), "float32", size, cpu, True)


def metadata(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    )
    return str(folder)


def picture(folder, name, size=(8, 8), mode="RGB", seed=0):
    """Smooth random colours, so that resampling is well defined."""
    coarse = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).convert(mode)
    folder.mkdir(exist_ok=True)
    image.save(folder / name)
    return np.asarray(image.convert("RGB"))


def by_hand(world, pixels_u8):
    """diffusers' VAE, and SD3's shift and scale as in the pipeline's config."""
    vae = AutoencoderKL.from_pretrained(world / "pipeline" / "vae")
    x = torch.from_numpy(np.stack(pixels_u8)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return (vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor


def test_images_are_encoded_as_by_hand(model, world, tmp_path):
    count = 19  # more than one batch
    arrays = [picture(tmp_path, f"{i}.png", seed=i) for i in range(count)]
    rows = [
        {"file_name": f"{i}.png", ("prompt", "text", "caption")[i % 3]: f"image {i}"} for i in range(count)
    ]
    data = images.load_images(metadata(tmp_path, rows), model)
    assert data.captions == [f"image {i}" for i in range(count)]
    torch.testing.assert_close(data.latents, by_hand(world, arrays), rtol=0, atol=1e-5)
    assert data.log_shift == pytest.approx(np.log(3.0))


@pytest.mark.parametrize("size", [(12, 8), (8, 13), (24, 16), (4, 4), (5, 9), (300, 8)])
def test_other_sizes_are_resized_and_cropped_in_the_middle(size, tmp_path):
    array = picture(tmp_path, "x.png", size)
    x = images.read_image(tmp_path / "x.png", 8, 8)
    assert x.shape == (3, 8, 8) and 0 <= x.min() and x.max() <= 1
    scale = 8 / min(size)
    if scale == 1:
        left, top = (size[0] - 8) // 2, (size[1] - 8) // 2
        assert np.array_equal(
            (x * 255).round().byte().permute(1, 2, 0).numpy(), array[top : top + 8, left : left + 8]
        )
    else:  # the centre of the picture stays the centre, up to resampling
        side = min(size) / 2
        middle = Image.fromarray(array).crop(
            (
                int(size[0] / 2 - side),
                int(size[1] / 2 - side),
                int(size[0] / 2 + side),
                int(size[1] / 2 + side),
            )
        )
        expected = np.asarray(middle.resize((8, 8), Image.Resampling.LANCZOS), dtype=np.float32) / 255
        assert np.abs(x.permute(1, 2, 0).numpy() - expected).mean() < 0.06


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    array = picture(tmp_path, "x.png", mode=mode)
    assert np.array_equal(
        (images.read_image(tmp_path / "x.png", 8, 8) * 255).round().byte().permute(1, 2, 0).numpy(), array
    )


def test_latents_are_taken_as_they_are(model, tmp_path):
    folder = metadata(tmp_path, [{"prompt": f"p{i}"} for i in range(3)])
    latents = torch.randn(3, 4, 4, 4).half()
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    data = images.load_images(folder, model)
    assert torch.equal(data.latents, latents) and data.captions == ["p0", "p1", "p2"]


BAD_METADATA = [
    (["{"], ":1: expected an object with one of"),
    ([{"prompt": "x"}, ["x"]], ":2: expected an object"),
    ([{"prompt": "x"}, {"label": "y"}], ":2: expected an object"),
    ([{"prompt": None}], ":1: expected an object"),
    ([], "metadata.jsonl is empty"),
]


@pytest.mark.parametrize("rows, message", BAD_METADATA)
def test_bad_metadata_is_refused_by_line(rows, message, model, tmp_path):
    with pytest.raises(ValueError) as caught:
        images.load_images(metadata(tmp_path, rows), model)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "rows, named",
    [
        (
            [{"prompt": "x", "file_name": "there.png"}, {"prompt": "y", "file_name": "gone.png"}],
            "1 images that do not exist, first: 'gone.png'",
        ),
        ([{"prompt": "x"}], 'line 1 has no "file_name"'),
    ],
)
def test_missing_images_are_named(rows, named, model, tmp_path):
    picture(tmp_path, "there.png")
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        images.load_images(metadata(tmp_path, rows), model)
    assert named in str(caught.value)


def test_missing_metadata_says_what_to_write(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data '.*nowhere': no metadata.jsonl; give one line"):
        images.load_images(str(tmp_path / "nowhere"), model)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"latents": torch.ones(2, 4, 4, 4)},
            "has shape (2, 4, 4, 4); with 3 captions and this model and --resolution it must be (3, 4, 4, 4)",
        ),
        ({"latents": torch.ones(3, 4, 8, 8)}, "must be (3, 4, 4, 4)"),
        ({"other": torch.ones(3, 4, 4, 4)}, "no tensor 'latents'"),
        (None, "no tensor 'latents'"),
    ],
)
def test_wrong_latents_are_refused(content, message, model, tmp_path):
    folder, file = metadata(tmp_path, [{"prompt": "x"}] * 3), tmp_path / "latents.safetensors"
    file.write_text("garbage") if content is None else save_file(content, file)
    with pytest.raises(ValueError) as caught:
        images.load_images(folder, model)
    assert message in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("size, count", [(5, 3), (7, 7), (3, 8), (1, 2)])
def test_every_image_once_per_epoch(size, count):
    data = images.Images({}, ["x"] * size, {})
    chosen = [n for step in range(40) for n in data.of_step(count, 0, step)]
    assert len(chosen) == 40 * count
    epochs = [tuple(chosen[i : i + size]) for i in range(0, len(chosen) - size + 1, size)]
    assert all(Counter(epoch) == Counter(range(size)) for epoch in epochs)
    assert size == 1 or len(set(epochs)) > 1
    assert data.of_step(count, 0, 9) == chosen[9 * count : 10 * count]
    assert size == 1 or [data.of_step(count, 1, s) for s in range(9)] != [
        data.of_step(count, 0, s) for s in range(9)
    ]
