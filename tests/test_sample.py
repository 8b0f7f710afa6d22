"""sample.py as a user runs it: PNG files, the grid, and the same image again from a PNG's metadata."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample

PROMPTS = ["a red circle", "two blue squares"]


def run(world, out, *more, prompts=PROMPTS, **changes):
    settings = dict(model=world / "pipeline", out=out, dtype="float32", steps="3", device="cpu") | changes
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    adapters = [f"{n}={world / n}" for n in ("red", "blue")]
    sample.main([*flags, "--adapters", *adapters, "--prompts", *prompts, *more])
    return {file.name: np.asarray(Image.open(file)) for file in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("images"))


ROWS = ("base", "red", "blue")
NAMES = {
    f"{slug}.{i}.{row}.png" for i, slug in enumerate(("a-red-circle", "two-blue-squares")) for row in ROWS
}


def test_one_png_per_row_and_prompt_and_a_grid_of_them(reference):
    assert set(reference) == NAMES | {"grid.png"}
    grid = reference["grid.png"]
    windows = np.lib.stride_tricks.sliding_window_view(grid, (120, 120, 3))[:, :, 0]
    places = []
    for row in ROWS:
        for i, slug in enumerate(("a-red-circle", "two-blue-squares")):
            tile = reference[f"{slug}.{i}.{row}.png"]
            assert tile.shape == (8, 8, 3) and tile.std() > 1
            corner = (windows[:, :, 0, 0] == tile[0, 0]).all(
                2
            )  # nearest enlargement: a tile's corner is its first pixel
            [place] = [
                p
                for p in np.argwhere(corner).tolist()
                if (windows[tuple(p)] == tile.repeat(15, 0).repeat(15, 1)).all()
            ]
            places.append(place)
    (top, left), *_ = places
    assert places == [[top + 124 * r, left + 124 * c] for r in range(3) for c in range(2)]
    assert grid.shape == (top + 3 * 124, left + 2 * 124, 3)


def test_rows_and_columns_differ(reference):
    images = [reference[name] for name in sorted(NAMES)]
    assert len({image.tobytes() for image in images}) == len(NAMES)


def test_the_same_command_makes_the_same_bytes(reference, world, tmp_path):
    def content():
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    assert all(np.array_equal(image, reference[name]) for name, image in run(world, tmp_path).items())
    first = content()
    run(world, tmp_path)
    assert content() == first


def test_the_batch_size_changes_nothing_but_rounding(reference, world, tmp_path):
    images = run(world, tmp_path, batch="1")
    assert all(np.abs(images[name].astype(int) - reference[name]).max() <= 1 for name in NAMES)


@pytest.mark.parametrize(
    "changes",
    [
        dict(seed="1"),
        dict(steps="4"),
        dict(guidance="3.0"),
        dict(sampler="sde"),
        dict(sampler="cps"),
        dict(resolution="16"),
        dict(dtype="bfloat16"),
    ],
)
def test_every_setting_changes_every_image(changes, reference, world, tmp_path):
    images = run(world, tmp_path, **changes)
    assert set(images) == set(reference) and not any(
        np.array_equal(images[name], reference[name]) for name in NAMES
    )


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_the_noise_level_is_that_of_the_sampler(sampler, world, tmp_path):
    more, less, none = (
        run(world, tmp_path / level, "--noise-level", level, sampler=sampler)[
            "a-red-circle.0.base.png"
        ].astype(int)
        for level in ("0.7", "0.2", "1e-6")
    )
    assert np.abs(less - none).mean() < np.abs(more - none).mean() and (less != none).any()


def test_several_images_per_prompt_have_their_own_noise(world, tmp_path):
    images = run(world, tmp_path, images="2")
    files = [
        f"{slug}.{i}.base.png" for i, slug in enumerate(("a-red-circle",) * 2 + ("two-blue-squares",) * 2)
    ]
    assert len({images[file].tobytes() for file in files}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(guidance="3.0", sampler="sde", seed="5"),
        dict(sampler="cps", dtype="bfloat16"),
        dict(dtype="bfloat16", images="3", batch="4"),
    ],
)
def test_again_repeats_a_png_from_its_metadata(changes, world, tmp_path, capsys):
    images = run(world, tmp_path / "a", **changes)
    for name in [n for n in images if re.match(r"two-blue-squares\.\d\.(base|blue)\.png", n)]:
        sample.main(
            [
                "--again",
                str(tmp_path / "a" / name),
                "--out",
                str(tmp_path / "b"),
                "--device",
                "cpu",
            ]
        )
        file = tmp_path / "b" / name
        assert capsys.readouterr().out.strip().endswith(str(file))
        assert np.array_equal(np.asarray(Image.open(file)), images[name])
        assert sample.read_settings(str(file)) == sample.read_settings(str(tmp_path / "a" / name)) | {
            "out": str(tmp_path / "b")
        }


def test_a_png_names_only_its_own_adapter(world, tmp_path):
    run(world, tmp_path)
    settings = json.loads(Image.open(tmp_path / "a-red-circle.0.red.png").info["flow-opd"])
    assert (
        settings["adapters"] == {"red": str(world / "red")}
        and settings["prompts"] == ["a red circle"]
        and settings["steps"] == 3
    )
    assert json.loads(Image.open(tmp_path / "a-red-circle.0.base.png").info["flow-opd"])["adapters"] == {}


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "a red circle\n\ntwo blue squares\n"),
        ("p.csv", "prompt,task\na red circle,x\ntwo blue squares,y\n"),
        ("p.jsonl", '{"prompt": "a red circle", "task": "x"}\n{"prompt": "two blue squares"}\n'),
    ],
)
def test_prompts_from_a_file(name, text, reference, world, tmp_path):
    (tmp_path / name).write_text(text)
    images = run(world, tmp_path / "out", prompts=[str(tmp_path / name)])
    assert all(np.array_equal(images[n], reference[n]) for n in reference)


@pytest.mark.parametrize(
    "prompt, slug", [("A red -- circle!", "a-red-circle"), ("x" * 300, "x" * 60), ("圆", "empty")]
)
def test_any_prompt_makes_a_file_name(prompt, slug, world, tmp_path):
    assert f"{slug}.0.base.png" in run(world, tmp_path, prompts=[prompt])


def write_plain(folder):
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    return str(folder / "plain.png")


def write_moved(folder):
    """A PNG whose adapter has moved since."""
    settings = {
        "adapters": {"gone": str(folder / "gone")},
        "adapter": "gone",
        "index": 0,
        "place": 0,
        "prompts": ["x"],
        "model": str(folder.parent),
    }
    info = PngInfo()
    info.add_text("flow-opd", json.dumps(settings))
    Image.new("RGB", (8, 8)).save(folder / "moved.png", pnginfo=info)
    return str(folder / "moved.png")


# (flags, what the one line must contain)
REFUSED = [
    (["--images", "0"], "--images is 0; it must be at least 1"),
    (["--guidance", "nan"], "--guidance is nan"),
    (["--sampler", "cps", "--noise-level", "3"], "--sampler cps needs --noise-level in (0, 1], got 3.0"),
    (["--steps", "0"], "at least 1"),
    (["--batch", "-1"], "at least 1"),
    (["--sampler", "sde", "--noise-level", "0"], "--sampler sde needs --noise-level above 0"),
    (["--model", "./nowhere"], "model './nowhere': no such file or directory"),
    (["--resolution", "6"], "resolution 6 does not fit this model"),
    (["--adapters", "x=./nowhere"], "adapter './nowhere': no such file or directory"),
    (["--adapters", "v1.0=RED"], "adapter name 'v1.0'"),
    (["--prompts"], "--prompts: give at least one"),
    (["--prompts", "x", " "], "none of them empty"),
    (["--prompts", "nowhere.txt"], "no file 'nowhere.txt'"),
    (["--device", "gpu9"], "--device 'gpu9'"),
    (["--again", "nowhere.png"], "--again 'nowhere.png': no such file"),
    (["--again", write_plain], "carries no settings of sample.py"),
    (["--again", write_moved], "is not a pipeline directory"),
    (["--again", __file__], "is not an image"),
]


@pytest.mark.parametrize("flags, message", REFUSED, ids=[" ".join(map(str, f[:2]))[:30] for f, _ in REFUSED])
def test_bad_input_ends_in_one_line(flags, message, world, tmp_path):
    flags = [f(tmp_path) if callable(f) else f.replace("RED", str(world / "red")) for f in flags]
    defaults = {
        "--model": world / "pipeline",
        "--out": tmp_path / "out",
        "--adapters": f"red={world / 'red'}",
    }
    rest = [str(part) for name, value in defaults.items() if name not in flags for part in (name, value)]
    with pytest.raises(SystemExit) as caught:
        sample.main([*flags, *rest])
    text = str(caught.value)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--sampler", "--dtype"])
def test_choices_are_listed(flag, capsys):
    with pytest.raises(SystemExit):
        sample.main([flag, "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_the_command_itself(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "sample.py",
            "--model",
            str(world / "pipeline"),
            "--adapters",
            "--prompts",
            "a red circle",
            "--out",
            str(tmp_path),
            "--steps",
            "1",
        ],
    )
    sample.main()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a-red-circle.0.base.png", "grid.png"]
    assert "1 rows x 1 images" in capsys.readouterr().out
