"""The miniature world's pictures: 24x24, drawn by a program from a prompt and a seed.

Every image has a backdrop that is lively (colourful) or dull (greyish) and may carry noise."""

import colorsys
from functools import cache
from itertools import product

import numpy as np

from opd.mini import world
from opd.mini.world import SIZE, parse


def _pastel(hue: float, value: float) -> np.ndarray:
    """RGB of a light tint, hue in turns; max - min channel is 0.42 of the value."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, 0.42, value))


def backdrop(rng: np.random.Generator) -> np.ndarray:
    """A flat or vertical tint, (24, 24, 3) in [0, 1]."""
    hue, drift, v_top, v_bottom, flat = rng.random(5)
    top = bottom = _pastel(hue, 0.84 + 0.11 * v_top)
    if flat >= 0.5:
        bottom = _pastel(hue + 0.16 * (drift - 0.5), 0.84 + 0.11 * v_bottom)
    down = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
    column = top + down * (bottom - top)
    return np.repeat(column[:, None], SIZE, axis=1)


def _cells(words: tuple[str, ...], rng: np.random.Generator) -> list[tuple]:
    """(colour, shape, row, column) of each object of a compose prompt, on a grid of 2 x 2."""
    if len(words) == 5:
        anywhere = rng.integers(2, size=2)
        relation = np.array(world.RELATIONS[words[2]])
        first = np.where(relation == 0, anywhere, (1 + relation) // 2)
        second = np.where(relation == 0, anywhere, (1 - relation) // 2)
        return [(*words[:2], *first), (*words[-2:], *second)]
    things = [words[:2], words[2:]]
    if len(words) == 3:
        things = [words[1:]] * world.COUNTS[words[0]]
    places = rng.permutation(4)
    return [(*thing, place // 2, place % 2) for thing, place in zip(things, places, strict=False)]


def placed(words: tuple[str, ...], rng: np.random.Generator) -> list[tuple]:
    """(colour, shape, top row, left column) of each object of a compose prompt."""
    things = []
    for colour, shape, row, column in _cells(words, rng):
        jitter_y, jitter_x = rng.integers(2, size=2)
        things.append((colour, shape, row * world.CELL + 1 + jitter_y, column * world.CELL + 1 + jitter_x))
    return things


def paint_objects(image_HWC: np.ndarray, things: list[tuple]) -> None:
    for colour, shape, y, x in things:
        image_HWC[y : y + 9, x : x + 9][world.SHAPES[shape]] = world.PALETTE[colour]


def paint_sign(image_HWC: np.ndarray, words: tuple[str, ...], top: int) -> None:
    """A white panel from row `top` on, with three dark characters."""
    height, width = world.PANEL_HW
    image_HWC[top : top + height, world.PANEL_COL : world.PANEL_COL + width] = 0.97
    for i, char in enumerate(words):
        x = world.PANEL_COL + 1 + 6 * i
        image_HWC[top + 1 : top + 8, x : x + 5][world.FONT[char]] = 0.08


def _scene(words: tuple[str, ...], lower: int, aside: int, phase: float) -> np.ndarray:
    """Sky, sun or moon, ground; the adjective moves the horizon or changes the disc. `lower`: pixels that the
    horizon lies lower, 0 or 1. `aside`: of the disc, -1 to 1. `phase`: of the hills' wave."""
    adjective, place, time = words
    sky_top, sky_low, light, disc, height, column = world.TIMES[time]
    horizon = (18 if adjective == "wide" else 14) + lower
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    sky = np.asarray(sky_top) + np.clip(rows / horizon, 0, 1) * (np.asarray(sky_low) - sky_top)
    image = np.repeat(sky.astype(np.float32)[:, None], SIZE, axis=1)

    y, x = np.mgrid[:SIZE, :SIZE] - np.array([horizon - height, column + aside])[:, None, None]
    radius = {"bright": 4.6, "lonely": 1.5}.get(adjective, 3.2)
    image[y**2 + x**2 <= radius**2] = disc

    wave = np.zeros(SIZE)
    if adjective == "rolling":
        wave = 1.6 * np.sin(np.arange(SIZE) * 0.55 + 6.3 * phase)
    depth = rows - horizon - wave.round()  # rows below the horizon
    ground = np.asarray(world.PLACES[place]) * light * (1.05 - 0.018 * np.clip(depth, 0, None))[..., None]
    land = depth >= 0
    image[land] = ground[land]
    if adjective == "calm":  # the light lies still on the ground
        streak = land & (np.abs(x) <= 1)
        image[streak] = 0.5 * image[streak] + 0.5 * np.asarray(disc, np.float32)
    return image


@cache
def scenes(prompt: str) -> np.ndarray:
    """Every clean picture of a landscape, the hills' wave in eighths: (6 or 48, 24, 24, 3) in [0, 1]; none
    for other prompts."""
    if prompt not in world.specs() or parse(prompt).task != "quality":
        return np.zeros((0, SIZE, SIZE, 3), np.float32)
    words = parse(prompt).words
    phases = np.arange(8) / 8 if words[0] == "rolling" else (0.0,)
    pictures = [_scene(words, *where) for where in product((0, 1), (-1, 0, 1), phases)]
    return np.stack(pictures).astype(np.float32)


def render(prompt: str, rng: np.random.Generator, lively: bool = True, noise: float = 0.0) -> np.ndarray:
    """Draw a prompt as a (24, 24, 3) uint8 image; `noise` is the std of a grey grain on a 0-1 scale."""
    spec = parse(prompt)
    if spec.task == "quality":
        lower, aside = int(rng.integers(2)), int(rng.integers(-1, 2))
        phase = rng.random() if spec.words[0] == "rolling" else 0.0
        image = _scene(spec.words, lower, aside, phase)
    else:
        image = backdrop(rng)
    if not lively:  # keep the brightness; chroma falls to an eighth
        grey = image.mean(axis=2, keepdims=True)
        image = grey + 0.12 * (image - grey)
    if spec.task == "compose":
        paint_objects(image, placed(spec.words, rng))
    elif spec.task == "text":
        paint_sign(image, spec.words, world.PANEL_ROW + rng.integers(3))
    return finished(image, noise, rng)


def finished(image_HWC: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """As uint8; `noise` is the std of a grey grain on a 0-1 scale."""
    if noise > 0:
        image_HWC = image_HWC + noise * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    return (image_HWC.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def training_pair(prompt: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(image (24, 24, 3) uint8, caption). The base learns from mediocre data, so that it is mediocre at all
    three tasks: half the pictures have grain, half are dull, and a share of the captions' words is wrong."""
    spec = parse(prompt)
    noisy, dull, level = rng.random(3)
    noise = 0.10 + 0.04 * level if noisy < 0.5 else 0.0
    image = render(prompt, rng, lively=dull >= 0.5, noise=noise)
    return image, world.misname(spec, rng, world.CAPTION_ERROR[spec.task])
