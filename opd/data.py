"""Prompts, tasks, and who gets which sample: pure functions of (seed, step), so any number of ranks sees the
same batch."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Edit(NamedTuple):
    """What the encoders read of a prompt with source pictures."""

    text: str
    pictures: tuple[str, ...]
    """Paths, in the order in which the text may number them."""


Asked = str | Edit
"""What the encoders read of a prompt: its text, or its text and its source pictures."""


@dataclass(frozen=True)
class Prompt:
    text: str
    task: str
    metadata: dict = field(default_factory=dict, compare=False)
    source: str = field(default="", compare=False)
    """file:line"""
    pictures: tuple[str, ...] = ()
    """Paths of the source pictures, for families that edit; rewards find them in metadata["source"]."""

    @property
    def asked(self) -> Asked:
        return asked_of(self.text, self.pictures)


Pools = dict[str, list[Prompt]]
"""Task -> its prompts."""


def asked_of(text: str, pictures: tuple[str, ...]) -> Asked:
    return Edit(text, pictures) if pictures else text


# ---- randomness --------------------------------------------------------------------------------------------


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any tuple, e.g. (seed, "noise", step, state). The only source of randomness in
    training."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fair_sample(pool: list[Prompt], count: int, per_prompt: int = 1) -> list[tuple[int, Prompt]]:
    """`count` (noise index, prompt) pairs over count / per_prompt prompts: each of them once before any
    twice, each time with other noise. `count` 0: every prompt, `per_prompt` times.

    In a fixed shuffled order, because files are sorted by kind and their first lines are no fair sample.
    """
    order = permutation(len(pool), 0, "evaluate", 0)
    count = count or per_prompt * len(pool)
    prompts = min(len(pool), math.ceil(count / per_prompt))
    return [(index, pool[order[index % prompts]]) for index in range(count)]


# ---- the batch of a step -----------------------------------------------------------------------------------


def prompts_of_step(
    pools: Pools,
    mix: dict[str, int],
    count: int,
    seed: int,
    step: int,
    alternate: bool = False,
) -> list[Prompt]:
    """The `count` prompts of `step`, tasks interleaved in the ratio `mix`, each task's prompts in shuffled
    epochs.

    Position q = step * count + j of one endless sequence decides, so that no state is kept and over any
    stretch the ratio holds to within one round of `mix`. With `alternate` a step has prompts of one task, and
    the steps take turns.
    """
    cycle = interleave(mix)
    chosen = []
    for q in range(step * count, (step + 1) * count):
        turn = q
        if alternate:
            turn = step
        rounds, place = divmod(turn, len(cycle))
        task = cycle[place]
        nth = rounds * mix[task] + cycle[:place].count(task)
        if alternate:
            nth = nth * count + q % count
        epoch, position = divmod(nth, len(pools[task]))
        chosen.append(pools[task][permutation(len(pools[task]), seed, task, epoch)[position]])
    return chosen


@lru_cache(maxsize=64)
def permutation(size: int, seed: int, task: str, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, "epoch", task, epoch)).permutation(size)


def interleave(mix: dict[str, int]) -> list[str]:
    """{a: 3, b: 1} -> [a, a, b, a]: each task spread evenly over one round."""
    slots = [
        ((i + 0.5) / weight, order, task)
        for order, (task, weight) in enumerate(mix.items())
        for i in range(weight)
    ]
    return [task for *_, task in sorted(slots)]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank works on at once.

    `samples` index the step's global batch of prompts x group. `real` is False for padding, which keeps ranks
    in step and counts for nothing. `turn`: the samples of all ranks at this turn, so that a rank knows what
    the others run, and runs the same: collectives must match.
    """

    samples: list[int]
    real: bool
    turn: list[int]


def alike(shapes: dict[int, str]) -> list[list[int]]:
    """The numbers of each shape together: what can share a forward pass."""
    return [[n for n in shapes if shapes[n] == shape] for shape in dict.fromkeys(shapes.values())]


def micro_batches(
    kinds: dict[int, str], size: int, world: int, rank: int, shapes: dict[int, str] | None = None
) -> list[MicroBatch]:
    """Cut samples (number -> kind) into micro-batches of at most `size` and deal them to the ranks.

    Samples of one kind stay together, so few micro-batches hold several kinds. All ranks get the same number
    of micro-batches; where the numbers do not divide, padding fills up. `shapes`: of the samples' source
    pictures (Model.shapes); a micro-batch has one of them, since others do not stack, and the ranks may have
    several at a turn.
    """
    shapes = shapes or dict.fromkeys(kinds, "")
    order, chunks = list(dict.fromkeys(kinds.values())), []
    for numbers in alike({n: shapes[n] for n in kinds}):
        samples = sorted(numbers, key=lambda n: order.index(kinds[n]))
        turns = math.ceil(len(samples) / (size * world))
        pieces = np.array_split(samples, min(turns * world, len(samples)))
        chunks += [piece.tolist() for piece in pieces]
    real_chunks = len(chunks)
    while len(chunks) % world:
        chunks.append(chunks[-1])
    mine = []
    for first in range(0, len(chunks), world):
        number = first + rank
        turn = [n for chunk in chunks[first : first + world] for n in chunk]
        mine.append(MicroBatch(chunks[number], number < real_chunks, turn))
    return mine
