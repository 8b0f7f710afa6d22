"""A larger miniature for the OCR reward: 64 px signs in a real font, which PP-OCR reads without a mistake.

    python -m opd.mini.signs runs/mini-signs        # pipeline (untrained), data, prompts
    torchrun train.py mini-ocr-base                 # pretrain the base
    python -m opd.mini.build base runs/mini-signs/pipeline runs/mini-ocr-base/student runs/mini-signs/base
    torchrun train.py mini-ocr                      # grow its text teacher by the real reward; .[ocr]

A prompt asks for a letter, a digit and a letter, as the small miniature's signs do. The base learns from
captions of which a third of the characters are wrong, so it knows what to draw but not when. What came of it:
opd/mini/study/RESULTS.md, "A real reward".
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from opd.families import sd3
from opd.files import replace
from opd.mini import build, world

SIZE = 64
LETTERS, DIGITS = "ACEHKLNRTX", "2345679"  # no two of them look alike
POOLS = (LETTERS, DIGITS, LETTERS)
STRINGS = ["".join(characters) for characters in product(*POOLS)]
FONT = ImageFont.load_default(24)
HELD_OUT, CAPTION_ERROR = 140, 0.35
IMAGES = 24_000


def prompt_of(string: str) -> str:
    return f'a sign that says "{string}"'


def split() -> tuple[list[str], list[str]]:
    """(train, test) strings."""
    order = world.shuffled(STRINGS)
    return order[HELD_OUT:], order[:HELD_OUT]


def draw(string: str, rng: np.random.Generator) -> np.ndarray:
    """A sign, (64, 64, 3) uint8: dark letters, each in a place of its own, on a light panel before a tinted
    wall; the sign's height varies a little."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(110, 250, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    y = SIZE // 2 + int(rng.integers(-2, 3))
    pen.rectangle((2, y - 14, SIZE - 3, y + 14), fill=(245, 245, 245))
    for place, character in enumerate(string):
        pen.text((14 + 18 * place, y), character, font=FONT, fill=(20, 20, 20), stroke_width=1, anchor="mm")
    return np.array(picture)


def pairs(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Training pairs: images uint8 (count, 3, 64, 64), captions."""
    rng = np.random.default_rng(seed)
    train, test = split()
    never = {tuple(string) for string in test}
    images, captions = [], []
    for number in rng.integers(len(train), size=count):
        images.append(draw(train[number], rng))
        said = world.misworded(tuple(train[number]), POOLS, rng, CAPTION_ERROR, never)
        captions.append(prompt_of("".join(said)))
    return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w").contiguous(), captions


def make(folder: Path, images: int = IMAGES) -> None:
    """Pipeline, data and prompts below `folder`. Text encoders and VAE are the small miniature's: the VAE is
    convolutional, and what it makes of a sign is read as well as the sign."""
    build.build_pipeline(folder / "pipeline", latent=SIZE // 2, patch=4)
    vae = sd3.load_vae(folder / "pipeline")
    build.write_data(folder / "data", vae, *pairs(images, seed=0))
    for name, strings in zip(("train", "test"), split(), strict=True):
        lines = "".join(f"{prompt_of(string)}\n" for string in strings)
        replace(folder / f"{name}.txt", partial(Path.write_text, data=lines))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
