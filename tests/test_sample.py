"""sample.py as a user runs it: PNG files that say how they were made, and the grid."""

import json

import numpy as np
import pytest
from PIL import Image

import sample

PROMPTS = ["a red circle", "two blue squares"]
SLUGS = ["a-red-circle", "two-blue-squares"]
ROWS = ("base", "red", "blue")
NAMES = {f"{slug}.{i}.{row}.png" for i, slug in enumerate(SLUGS) for row in ROWS}


def run(world, out, *more, prompts=PROMPTS, **changes):
    settings = dict(model=world / "pipeline", out=out, dtype="float32", steps="3", device="cpu") | changes
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    adapters = [f"{name}={world / name}" for name in ("red", "blue")]
    sample.main([*flags, "--adapters", *adapters, "--prompts", *prompts, *more])
    return {file.name: np.asarray(Image.open(file)) for file in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("images"))


def test_one_png_per_row_and_prompt_and_a_grid_of_them(reference):
    """Every image is another; enlarged fifteen times it is a tile of the grid, in its row and column."""
    assert set(reference) == NAMES | {"grid.png"}
    assert len({reference[name].tobytes() for name in NAMES}) == len(NAMES)
    windows = np.lib.stride_tricks.sliding_window_view(reference["grid.png"], (120, 120, 3))[:, :, 0]
    places = []
    for row in ROWS:
        for i, slug in enumerate(SLUGS):
            tile = reference[f"{slug}.{i}.{row}.png"]
            assert tile.shape == (8, 8, 3) and tile.std() > 1
            corners = np.argwhere((windows[:, :, 0, 0] == tile[0, 0]).all(2)).tolist()
            enlarged = tile.repeat(15, 0).repeat(15, 1)
            [place] = [corner for corner in corners if (windows[tuple(corner)] == enlarged).all()]
            places.append(place)
    (top, left), *_ = places
    assert places == [[top + 124 * r, left + 124 * c] for r in range(3) for c in range(2)]


def test_the_same_command_makes_the_same_bytes_whatever_was_there(reference, world, tmp_path):
    (tmp_path.parent / "p.csv").write_text("\n".join(["prompt", *PROMPTS]))
    for prompts in (PROMPTS, [str(tmp_path.parent / "p.csv")]):
        images = run(world, tmp_path, prompts=prompts)
        assert all(np.array_equal(images[name], reference[name]) for name in reference)
    smaller = run(world, tmp_path, batch="1")
    assert all(np.abs(smaller[name].astype(int) - reference[name]).max() <= 1 for name in NAMES)


CHANGES = ["seed 1", "steps 4", "guidance 3.0", "resolution 16", "dtype bfloat16"]


@pytest.mark.parametrize("flag, value", [change.split() for change in CHANGES])
def test_every_setting_changes_every_image(flag, value, reference, world, tmp_path):
    images = run(world, tmp_path, **{flag: value})
    assert set(images) == set(reference)
    assert not any(np.array_equal(images[name], reference[name]) for name in NAMES)


def test_several_images_of_a_prompt_differ_and_each_says_how_it_was_made(world, tmp_path):
    images = run(world, tmp_path, images="3", seed="5")
    names = [name for name in images if name.startswith("two-blue") and not name.endswith("red.png")]
    assert len({images[name].tobytes() for name in names}) == len(names) == 6
    for name in names:
        made = json.loads(Image.open(tmp_path / name).info["flow-opd"])
        own = {} if name.endswith("base.png") else {"blue": str(world / "blue")}
        assert made["adapters"] == own and made["prompts"] == ["two blue squares"] and made["seed"] == 5
        assert name == f"two-blue-squares.{made['index']}.{made['adapter']}.png"


# (flags, what the one line must contain)
REFUSED = [
    (["--model", "./nowhere"], "model './nowhere': no such file or directory"),
    (["--adapters", "v1.0=RED"], "--adapters: the name 'v1.0' is empty or has a dot"),
    (["--adapters", "base=RED"], "--adapters: the name 'base' is taken; choose another"),
    (["--adapters", "keys=RED"], "--adapters: the name 'keys' is taken; choose another"),
    (["--prompts", "~nobody-of-this-name/x.txt"], "'~nobody-of-this-name/x.txt': there is no such home"),
    (["--out", "/proc/x"], "--out '/proc/x': '/proc' cannot be written into"),
    (["--prompts", "x", " "], "none of them empty"),
    (["--prompts", "x", "RED.txt"], "red.txt' is a file; give one file"),
    (["--prompts", "x.TXT"], "prompts 'x.TXT': unknown ending '.TXT'"),
    (["--device", "gpu9"], "--device 'gpu9'"),
]


@pytest.mark.parametrize("flags, message", REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_bad_input_ends_in_one_line(flags, message, world, tmp_path):
    red = str(world / "red")
    flags = [flag.replace("RED", red) for flag in flags]
    defaults = {"--model": world / "pipeline", "--out": tmp_path / "out", "--adapters": f"red={red}"}
    rest = [str(part) for name, value in defaults.items() if name not in flags for part in (name, value)]
    with pytest.raises(SystemExit) as caught:
        sample.main([*flags, *rest])
    text = str(caught.value)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert not (tmp_path / "out").exists()
