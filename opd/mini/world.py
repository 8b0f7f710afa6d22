"""The miniature world: what can be asked for, and how prompts are split. opd/mini/drawing.py draws it.

Three families, each with a scoring program in `opd/mini/rewards.py`:

- compose: "two red circles", "a blue square left of a green circle" (stands for GenEval)
- text:    a sign that says "K7A"                                    (stands for OCR)
- quality: "a calm sea at dawn"                                      (stands for open prompts)

A prompt is a handful of content words (`Spec.words`); everything else follows from them.

    python -m opd.mini.world                       # rewrite the prompt files in opd/mini/prompts
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

SIZE, CELL = 24, 12
TASKS = ("compose", "text", "quality")
# Share of wrong content words in the base's captions, so that it knows what to draw but not when: what RL can
# mend. A sign scores by the character, a relation is right only if all five of its words are, and the base is
# far from what its captions allow there, so text takes a higher rate.
CAPTION_ERROR = {"compose": 0.10, "text": 0.35, "quality": 0.12}
HELD_OUT = {"compose": 256, "text": 256, "quality": 24}
PROMPT_DIR = Path(__file__).parent / "prompts"

# Objects are saturated; backdrops are pastel or grey, 0.45 or more away from every one of these.
PALETTE = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.05, 0.50, 0.10),
    "blue": (0.10, 0.15, 0.80),
    "yellow": (0.95, 0.80, 0.05),
    "purple": (0.50, 0.05, 0.60),
}
_Y, _X = np.mgrid[-4:5, -4:5]
SHAPES = {
    "circle": _X**2 + _Y**2 <= 19,
    "square": np.ones((9, 9), bool),
    "triangle": np.abs(_X) <= (_Y + 5) // 2,
}
COUNTS = {"a": 1, "two": 2, "three": 3, "four": 4}
# Where the first object is, seen from the second: (rows, columns).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

# 5x7 glyphs, one binary row per number; look-alikes (B/8, O/0, S/5, ...) are left out.
FONT_ROWS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
FONT = {c: np.array([[int(b) for b in row] for row in rows.split()], bool) for c, rows in FONT_ROWS.items()}
LETTERS = tuple(c for c in FONT if c.isalpha())
DIGITS = tuple(c for c in FONT if c.isdigit())
PANEL_ROW, PANEL_COL, PANEL_HW = 6, 2, (9, 19)  # top row before jitter, left column, (height, width)

ADJECTIVES = ("calm", "wide", "rolling", "bright", "lonely")
PLACES = {
    "sea": (0.20, 0.52, 0.74),
    "lake": (0.28, 0.70, 0.68),
    "desert": (0.90, 0.68, 0.42),
    "meadow": (0.50, 0.76, 0.34),
    "canyon": (0.80, 0.47, 0.32),
    "heath": (0.68, 0.46, 0.78),
}
# phrase: (sky at the top, sky at the horizon, light on the ground, disc, its row above the horizon, column)
TIMES = {
    "at dawn": ((0.58, 0.66, 0.96), (0.98, 0.66, 0.62), 0.95, (1.00, 0.93, 0.70), 3, 6),
    "at noon": ((0.38, 0.66, 0.96), (0.60, 0.84, 0.98), 1.00, (1.00, 0.96, 0.66), 10, 12),
    "at dusk": ((0.52, 0.34, 0.70), (0.98, 0.60, 0.34), 0.80, (1.00, 0.82, 0.50), 3, 18),
    "at night": ((0.08, 0.12, 0.42), (0.22, 0.31, 0.52), 0.68, (0.95, 0.95, 0.86), 9, 17),
}

SLOTS = {
    "count": tuple(COUNTS),
    "color": tuple(PALETTE),
    "shape": tuple(SHAPES),
    "relation": tuple(RELATIONS),
    "letter": LETTERS,
    "digit": DIGITS,
    "adjective": ADJECTIVES,
    "place": tuple(PLACES),
    "time": tuple(TIMES),
}
GRAMMAR = {
    ("compose", 3): ("count", "color", "shape"),
    ("compose", 4): ("color", "shape", "color", "shape"),
    ("compose", 5): ("color", "shape", "relation", "color", "shape"),
    ("text", 3): ("letter", "digit", "letter"),
    ("quality", 3): ("adjective", "place", "time"),
}


@dataclass(frozen=True)
class Spec:
    """One prompt, reduced to its content words."""

    task: str  # compose, text or quality
    words: tuple[str, ...]  # the words that decide the picture; their kinds are `GRAMMAR[task, len(words)]`

    @property
    def kinds(self) -> tuple[str, ...]:
        return GRAMMAR[self.task, len(self.words)]

    @property
    def prompt(self) -> str:
        w = self.words
        if self.task == "text":
            return f'a sign that says "{"".join(w)}"'
        if self.task == "quality":
            return f"a {' '.join(w)}"
        if len(w) == 3:
            return " ".join(w) + ("s" if COUNTS[w[0]] > 1 else "")
        link = w[2] if len(w) == 5 else "and"
        return f"a {w[0]} {w[1]} {link} a {w[-2]} {w[-1]}"

    @property
    def metadata(self) -> dict:
        """GenEval's record (the related object comes second and points at the first); {} for the others."""
        w = self.words
        if self.task != "compose":
            return {}
        tag, include = "two_object", [{"class": s, "count": 1, "color": c} for c, s in (w[:2], w[-2:])]
        if len(w) == 3:
            tag = "single_object" if COUNTS[w[0]] == 1 else "counting"
            include = [{"class": w[2], "count": COUNTS[w[0]], "color": w[1]}]
        elif len(w) == 5:
            tag, include = "position", [include[1], {**include[0], "position": [w[2], 0]}]
        return {"tag": tag, "include": include, "prompt": self.prompt}


# --- prompts ---------------------------------------------------------------------------------


def parse(prompt: str) -> Spec:
    """The spec whose prompt this is; ValueError when the world has no such prompt."""
    if prompt not in specs():
        forms = "see opd/mini/prompts for its forms"
        raise ValueError(f"{prompt!r} is not a prompt of the miniature world; {forms}")
    return specs()[prompt]


@cache
def specs() -> dict[str, Spec]:
    """Every prompt that the grammar can spell, in a fixed order, and its spec."""
    found = {}
    for (task, _), kinds in GRAMMAR.items():
        for words in product(*(SLOTS[kind] for kind in kinds)):
            spec = Spec(task, words)
            found[spec.prompt] = spec
    return found


def all_prompts(task: str) -> list[str]:
    """Every prompt of a task, in a fixed order. Related objects differ in colour and in shape."""
    return [prompt for prompt, spec in specs().items() if spec.task == task and _is_asked(spec)]


def _is_asked(spec: Spec) -> bool:
    same = [spec.words[0] == spec.words[-2], spec.words[1] == spec.words[-1]]
    if len(spec.words) == 5:
        return not any(same)
    return len(spec.words) == 3 or not all(same)


def _composition(prompt: str) -> str:
    """One key per picture: "A left of B" and "B right of A" share it, so they are held out together."""
    w = parse(prompt).words
    if len(w) < 4:
        return prompt
    flip = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    mirrored = Spec("compose", w[-2:] + tuple(flip[r] for r in w[2:-2]) + w[:2])
    return min(prompt, mirrored.prompt)


def shuffled(keys) -> list:
    """A fixed order that depends on no library's random generator."""
    return sorted(keys, key=lambda k: hashlib.sha256(str(k).encode()).hexdigest())


@cache
def split(task: str) -> tuple[list[str], list[str]]:
    """(train, test) prompts; no composition, string or scene of test occurs in train, nor has the base seen
    it."""
    prompts = all_prompts(task)
    if task == "compose":
        quota = {"single_object": 3, "counting": 13, "two_object": 40, "position": 80}  # compositions
        tags = {_composition(p): parse(p).metadata["tag"] for p in prompts}
        held = set()
        for tag, count in quota.items():
            held.update(shuffled(key for key in tags if tags[key] == tag)[:count])
    else:
        held = set(shuffled(prompts)[: HELD_OUT[task]])
    test = [p for p in prompts if _composition(p) in held]
    assert len(test) == HELD_OUT[task], (task, len(test))
    return [p for p in prompts if _composition(p) not in held], test


def prompt_files() -> dict[str, str]:
    """File name -> content of the prompt files."""
    files = {}
    for task in TASKS:
        for name, lines in zip(("train", "test"), split(task), strict=True):
            ending = "txt"
            if task == "compose":
                lines, ending = [json.dumps(parse(prompt).metadata) for prompt in lines], "jsonl"
            files[f"{task}.{name}.{ending}"] = "\n".join(lines) + "\n"
    return files


# --- wrong captions -------------------------------------------------------------------------


@cache
def held_out() -> frozenset[tuple[str, ...]]:
    """The words of every held-out prompt."""
    return frozenset(parse(prompt).words for task in TASKS for prompt in split(task)[1])


def misname(spec: Spec, rng: np.random.Generator, rate: float) -> str:
    """The caption, each of whose content words is wrong with probability `rate`."""
    pools = [SLOTS[kind] for kind in spec.kinds]
    return Spec(spec.task, misworded(spec.words, pools, rng, rate, held_out())).prompt


def misworded(
    words: tuple[str, ...],
    pools: Sequence[Sequence[str]],
    rng: np.random.Generator,
    rate: float,
    never: Collection[tuple[str, ...]],
) -> tuple[str, ...]:
    """The words, each replaced with probability `rate` by another of its pool. Wrong words are drawn again
    while they are in `never`: training sees nothing that is held out."""
    wrong = rng.random(len(words)) < rate
    if not wrong.any():
        return words
    for _ in range(20):
        said = list(words)
        for place in wrong.nonzero()[0]:
            others = [word for word in pools[place] if word != words[place]]
            said[place] = others[rng.integers(len(others))]
        if tuple(said) not in never:
            return tuple(said)
    return words


if __name__ == "__main__":
    for name, content in prompt_files().items():
        (PROMPT_DIR / name).write_text(content, encoding="utf-8")
