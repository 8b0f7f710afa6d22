"""The miniature world's edits: what is asked of a picture, how it looks before and after, and who scores it.

- recolour: `make the blue circle red`    of two objects on a backdrop
- write:    `write "K7A" on the sign`     of a sign with other characters
- paint:    `a calm sea at dawn`          of nothing: the world's landscapes, by the same weights

Pictures are the world's, each pixel four wide: FLUX.2 takes no source of less than 64 pixels a side, and
makes a token of 16 x 16. The prompt files name pictures, so they are drawn once, with the masks of what may
change:

    python -m opd.mini.edits runs/mini-edits
"""

import json
import sys
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opd.files import replace
from opd.mini import drawing, rewards, world

SCALE = 4
SIZE = SCALE * world.SIZE
TASKS = ("recolour", "write", "paint")
EDITED = TASKS[:2]
HELD_OUT = 128  # prompts of a task that edits, a picture each
TRAINED = 480  # at most, of a task that edits
# The base is a mediocre editor: a share of the words of its instructions is wrong, and a share of its
# pictures after the edit has little to do with the one before.
CAPTION_ERROR = {"recolour": 0.1, "write": 0.25}
FORGETFUL = 0.3


@dataclass(frozen=True)
class Edit:
    """One edit, reduced to what decides it."""

    task: str
    before: tuple[str, ...]  # words of the picture: colour, shape, colour, shape; or three characters
    change: tuple[str, ...]  # (shape, its new colour); or the new characters

    @property
    def prompt(self) -> str:
        if self.task == "write":
            return f'write "{"".join(self.change)}" on the sign'
        shape, colour = self.change
        return f"make the {self.before[self.before.index(shape) - 1]} {shape} {colour}"

    @property
    def after(self) -> tuple[str, ...]:
        if self.task == "write":
            return self.change
        shape, colour = self.change
        words = list(self.before)
        words[words.index(shape) - 1] = colour
        return tuple(words)


@cache
def split(task: str) -> tuple[list[Edit], list[Edit]]:
    """(train, test) edits. The objects before a test edit are in no picture of a training edit; its string is
    in none."""
    if task == "write":
        train, test = ([world.parse(prompt).words for prompt in part] for part in world.split("text"))
        train = world.shuffled(train)
        before = [*train[1:], train[0]]
        return tuple(
            [Edit(task, *pair) for pair in zip(before, part, strict=False)] for part in (train, test)
        )
    scenes = [
        (first, shape, second, other)
        for shape, other in combinations(world.SHAPES, 2)
        for first, second in product(world.PALETTE, repeat=2)
    ]
    scenes = world.shuffled(scenes)
    held = HELD_OUT // 8  # eight edits of a scene: either shape, four other colours
    train, test = edits_of(scenes[held:]), edits_of(scenes[:held])
    return [edit for edit in train if edit.after not in scenes[:held]], test


def edits_of(scenes: list[tuple[str, ...]]) -> list[Edit]:
    edits = []
    for scene in scenes:
        for colour, shape in (scene[:2], scene[2:]):
            edits += [Edit("recolour", scene, (shape, new)) for new in world.PALETTE if new != colour]
    return edits


def draw(edit: Edit, rng: np.random.Generator, forgetful: bool = False) -> list[np.ndarray]:
    """[before, after, mask], (24, 24, 3) uint8 each; the mask is white where the picture may change.
    `forgetful`: the picture after has a backdrop and places of its own."""
    layout = arranged(edit, rng)
    other = arranged(edit, rng) if forgetful else layout
    pictures = [painted(edit.task, edit.before, *layout), painted(edit.task, edit.after, *other)]
    mask = np.zeros_like(pictures[0])
    if edit.task == "write":
        (y, x), (height, width) = layout[1][0], world.PANEL_HW
    else:
        (y, x), (height, width) = layout[1][edit.before.index(edit.change[0]) // 2], (9, 9)
    mask[y : y + height, x : x + width] = 1
    return [drawing.finished(picture, 0.0, rng) for picture in (*pictures, mask)]


def arranged(edit: Edit, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """A backdrop, and top row and left column of the sign or of each object."""
    backdrop = drawing.backdrop(rng)
    if edit.task == "write":
        return backdrop, [(world.PANEL_ROW + int(rng.integers(3)), world.PANEL_COL)]
    return backdrop, [thing[2:] for thing in drawing.placed(edit.before, rng)]


def painted(task: str, words: tuple[str, ...], backdrop: np.ndarray, places: list) -> np.ndarray:
    image = backdrop.copy()
    if task == "write":
        drawing.paint_sign(image, words, top=places[0][0])
    else:
        named = zip(words[::2], words[1::2], places, strict=True)
        drawing.paint_objects(image, [(colour, shape, *place) for colour, shape, place in named])
    return image


def misread(edit: Edit, rng: np.random.Generator) -> str:
    """An instruction for `edit`, each of whose content words is wrong with probability CAPTION_ERROR."""
    pools = [world.LETTERS, world.DIGITS, world.LETTERS]
    if edit.task == "recolour":
        pools = [edit.before[1::2], tuple(world.PALETTE)]
    words = world.misworded(edit.change, pools, rng, CAPTION_ERROR[edit.task], world.held_out())
    return Edit(edit.task, edit.before, words).prompt


# ---- scorers: (images_BCHW in [0, 1], prompts, metadata) -> scores_B, on the world's own pixels ------------


def recolour(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 where the objects are those after the edit and no others, else 0."""
    return rewards.compose_strict(small(images_BCHW), prompts, metadata)


def write(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 - edit distance / length between the sign and the string of the instruction."""
    return rewards.text(small(images_BCHW), prompts, metadata)


def paint(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """The world's quality: the landscape asked for, without grain, in lively colours."""
    return rewards.quality(small(images_BCHW), prompts, metadata)


def small(images_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(images_BCHW.float(), SCALE)


# ---- files -------------------------------------------------------------------------------------------------


def large(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def record_of(edit: Edit) -> dict:
    """GenEval's record of the picture after a recolouring; {} for signs."""
    if edit.task == "write":
        return {}
    return world.Spec("compose", edit.after).metadata


def seeded(task: str, count: int, number: int) -> np.random.Generator:
    """What draws the picture of line `number` of a task's prompt file of `count` lines."""
    return np.random.default_rng([TASKS.index(task), count, number])


def write_prompts(folder: Path) -> None:
    """The prompt files of every task, and the pictures and masks that they name."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for task, name in product(EDITED, ("train", "test")):
        train, test = split(task)
        edits = {"train": world.shuffled(train)[:TRAINED], "test": test[:HELD_OUT]}[name]
        lines = []
        for number, edit in enumerate(edits):
            files = [f"pictures/{task}.{name}.{number}{part}.png" for part in ("", ".mask")]
            before, _, mask = draw(edit, seeded(task, len(edits), number))
            for file, picture in zip(files, (before, mask), strict=True):
                Image.fromarray(large(picture)).save(folder / file)
            row = record_of(edit) | {"prompt": edit.prompt, "image": files[0], "mask": files[1]}
            lines.append(json.dumps(row) + "\n")
        replace(folder / f"{task}.{name}.jsonl", partial(Path.write_text, data="".join(lines)))
        print(f"{folder}/{task}.{name}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_prompts(Path(sys.argv[1]))
