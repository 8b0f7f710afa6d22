"""Prompts, tasks, and who gets which sample: pure functions of (seed, step), so any number of ranks sees the
same batch."""

import csv
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from opd.files import resolve

LONGEST = 20_000
"""Characters of a prompt; encoders read some hundred tokens."""


@dataclass(frozen=True)
class Prompt:
    text: str
    task: str
    metadata: dict = field(default_factory=dict, compare=False)
    source: str = field(default="", compare=False)
    """file:line"""


# ---- files -------------------------------------------------------------------------------------------------


def load_prompts(path: str, task: str, tasks: list[str] | None) -> list[Prompt]:
    """Read `.txt` (one prompt per line), `.jsonl` (objects with "prompt") or `.csv` (column prompt).

    A "task" field or column overrides `task` and must be among `tasks` (None: any); every other field becomes
    metadata. FileNotFoundError / ValueError name the file, the line and the fix.
    """
    file = resolve(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts of task {task!r}: no file {path!r}")
    readers = {".txt": _read_txt, ".jsonl": read_jsonl, ".csv": _read_csv}
    if file.suffix not in readers:
        raise ValueError(f"prompts {path!r}: unknown ending {file.suffix!r}; use one of {', '.join(readers)}")
    prompts = []
    for number, row in readers[file.suffix](file):
        text, own_task = row.pop("prompt", None), row.pop("task", None) or task
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{path}:{number}: no prompt on this line; give it a non-empty "prompt"')
        require_prompt(text, f"{path}:{number}")
        if tasks is not None and own_task not in tasks:
            raise ValueError(
                f"{path}:{number}: unknown task {own_task!r}; known tasks: {', '.join(tasks)} "
                "(add TASK=FILE to --prompts, or correct the line)"
            )
        prompts.append(Prompt(text.strip(), own_task, row, f"{path}:{number}"))
    if not prompts:
        raise ValueError(f"prompts {path!r}: the file holds no prompt")
    return prompts


def require_prompt(text: str, where: str) -> None:
    """ValueError for a text that no encoder can take, or that would keep a tokenizer busy for minutes."""
    if len(text) > LONGEST:
        raise ValueError(f"{where}: a prompt of {len(text)} characters; at most {LONGEST} are read")
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{where}: the prompt holds a NUL or half a surrogate pair; save it as plain UTF-8")


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """(line number, line) of a UTF-8 file, blank lines left out. Unlike `splitlines`, U+2028 and its like do
    not end a line."""
    lines = read_utf8(file).split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_utf8(file: Path) -> str:
    """The text of a file. ValueError naming it where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from error


def _read_txt(file: Path):
    return [(number, {"prompt": line}) for number, line in numbered_lines(file)]


def read_jsonl(file: Path):
    """(line number, object) of every line. ValueError naming the line that is none."""
    for number, line in numbered_lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: not JSON ({error}); expected one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f'{file}:{number}: expected an object like {{"prompt": ...}}, got {line[:40]!r}')
        yield number, row


def _read_csv(file: Path):
    reader = csv.DictReader(io.StringIO(read_utf8(file), newline=""))
    try:
        header = reader.fieldnames or []
        rows = [(reader.line_num, dict(row)) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num + 1}: not CSV ({error})") from error
    if "prompt" not in header:
        raise ValueError(f"{file}:1: no column 'prompt' in the header {header!r:.200}")
    return rows


def load_tasks(files: dict[str, str]) -> dict[str, list[Prompt]]:
    """All prompts by task. A file may name its lines' tasks itself; every task must end up with prompts."""
    tasks = list(files)
    pools = {task: [] for task in tasks}
    for task, path in files.items():
        for prompt in load_prompts(path, task, tasks):
            pools[prompt.task].append(prompt)
    for task, pool in pools.items():
        if not pool:
            raise ValueError(
                f"task {task!r} has no prompts: every line of {files[task]!r} names another task"
            )
    return pools


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
    pools: dict[str, list[Prompt]],
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

    `samples` index the step's global batch of prompts x group. `real[b]` is 0 for padding, which keeps ranks
    in step and counts for nothing. `turn`: the samples of all ranks at this turn, so that a rank knows what
    the others run, and runs the same: collectives must match.
    """

    samples: list[int]
    real: list[int]
    turn: list[int]


def micro_batches(kinds: dict[int, str], size: int, world: int, rank: int) -> list[MicroBatch]:
    """Cut samples (number -> kind) into micro-batches of at most `size` and deal them to the ranks.

    Samples of one kind stay together, so few micro-batches hold several kinds. All ranks get the same number
    of micro-batches; where the numbers do not divide, padding (`real` = 0) fills up.
    """
    order = list(dict.fromkeys(kinds.values()))
    samples = sorted(kinds, key=lambda n: order.index(kinds[n]))
    turns = math.ceil(len(samples) / (size * world))
    chunks = [piece.tolist() for piece in np.array_split(samples, min(turns * world, len(samples)))]
    real_chunks = len(chunks)
    while len(chunks) % world:
        chunks.append(chunks[-1])
    mine = []
    for first in range(0, len(chunks), world):
        number = first + rank
        turn = [n for chunk in chunks[first : first + world] for n in chunk]
        is_real = int(number < real_chunks)
        mine.append(MicroBatch(chunks[number], [is_real] * len(chunks[number]), turn))
    return mine
