r"""Make prompts for the GenEval and OCR rewards, as many as are asked for, without a download.

    python -m opd.rewards.prompts geneval --count 50000 --out geneval_train.jsonl
    python -m opd.rewards.prompts geneval --count 500 --split test --out geneval_test.jsonl
    python -m opd.rewards.prompts ocr --count 20000 --out ocr_train.txt

GenEval: prompt, tag and clauses in GenEval's own schema. OCR: the text to be written in double quotes.

What a prompt asks for, the order of its objects aside, lies in train or in test by its own hash, so files
of the two splits are disjoint. A prompt repeats only where its kind has run out of new ones (there are 80
single objects)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from opd import errors
from opd.cli import Count, Range, Seed, Shares, check_bounds
from opd.data import interleave, seed_of
from opd.files import replace
from opd.formats.prompts import load_prompts
from opd.rewards.geneval import CLASSES, COLOURS, RELATIONS, TAGS
from opd.rewards.ocr import target_of

NUMBERS = {2: "two", 3: "three", 4: "four"}
ENDINGS = {"geneval": ".jsonl", "ocr": ".txt"}
TEST_SHARE = 10  # one in so many scenes or texts belongs to the test split
TRIES = 200  # draws in search of a new prompt before a repeated one is taken


@dataclass(frozen=True)
class Arguments:
    kind: Annotated[Literal["geneval", "ocr"], tyro.conf.Positional]
    """What the prompts are for."""
    out: str
    """File to write: .jsonl for geneval, .txt for ocr."""
    count: Count = 1000
    """Prompts."""
    seed: Seed = 0
    """Other seeds give other prompts of the same split."""
    split: Literal["train", "test"] = "train"
    """Which of two disjoint sets they come from."""
    mix: Annotated[Shares, Range(1, 10_000)] = field(default_factory=lambda: dict.fromkeys(TAGS, 1))
    """GenEval: tag -> its share. position=7 counting=5 color_attr=3 colors=1 two_object=1 gives most prompts
    to the tags that a base model fails most often."""
    without: tuple[str, ...] = ()
    """Prompt files whose scenes or texts are left out: those you evaluate on, such as GenEval's own 553."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    with errors.in_one_line(ValueError, FileNotFoundError):
        check(args)
        known = [prompt for file in args.without for prompt in load_prompts(file, "--without", None)]
        if args.kind == "ocr":
            taken = {text_key(prompt.text) for prompt in known}
            lines = ocr_prompts(args.count, args.seed, args.split, taken)
        else:
            taken = {scene_key(prompt.metadata) for prompt in known}
            rows = geneval_prompts(args.count, args.seed, args.split, args.mix, taken)
            lines = [json.dumps(row) for row in rows]
    replace(Path(args.out), lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    print(f"{len(lines)} prompts, {len(set(lines))} of them different, in {args.out}")


def check(args: Arguments) -> None:
    check_bounds(args)
    if not args.out.endswith(ENDINGS[args.kind]):
        raise ValueError(f"--out {args.out!r}: {args.kind} prompts are a {ENDINGS[args.kind]} file")
    if not args.mix or not set(args.mix) <= set(TAGS):
        raise ValueError(f"--mix {args.mix}: give a share to some of {', '.join(TAGS)}")


def distinct(draws: list[Callable], split: str, taken: set, key_of: Callable, text_of: Callable) -> list:
    """A prompt of the split from each of `draws`: the first whose text was not drawn before, or after many
    tries the last. `taken`: keys to leave out; ValueError if that leaves none."""
    prompts, seen = [], set()
    for draw in draws:
        fitting = None
        for _ in range(TRIES):
            candidate = draw()
            key = key_of(candidate)
            if split_of(key) == split and key not in taken:
                fitting = candidate
                if text_of(candidate) not in seen:
                    break
        if fitting is None:
            raise ValueError(f"--without leaves no {split} prompt of a kind; name fewer files")
        prompts.append(fitting)
        seen.add(text_of(fitting))
    return prompts


def split_of(key) -> str:
    """train or test, a function of what is asked for and of nothing else."""
    return "test" if seed_of("split of prompts", key) % TEST_SHARE == 0 else "train"


# ---- GenEval --------------------------------------------


def geneval_prompts(count: int, seed: int, split: str, mix: dict[str, int], taken: set) -> list[dict]:
    """Rows with tag, include, prompt, and exclude where the tag has it. `taken`: scenes to leave out."""
    rng = np.random.default_rng(seed_of(seed, "geneval prompts", split))
    tags = interleave(mix)
    draws = [partial(scene, tags[number % len(tags)], rng) for number in range(count)]
    return distinct(draws, split, taken, scene_key, lambda row: row["prompt"])


def scene_key(row: dict) -> tuple:
    """What a row asks for, the order of its objects and their direction aside."""
    if "tag" not in row or "include" not in row:
        raise ValueError(f"no GenEval metadata (tag, include) in {row!r}")
    things = [(clause["class"], clause["count"], clause.get("color", "")) for clause in row["include"]]
    return (row["tag"], *sorted(things))


def scene(tag: str, rng) -> dict:
    """A row of one tag. counting: one more than asked for is an `exclude` clause. position: the thing that
    the other is placed by comes first in `include`, and second in the prompt."""
    exclude = {}
    if tag == "single_object":
        (name,) = _some(rng, CLASSES, 1)
        include = [_clause(name)]
        text = _a(name)
    elif tag == "two_object":
        first, second = _some(rng, CLASSES, 2)
        include = [_clause(first), _clause(second)]
        text = f"{_a(first)} and {_a(second)}"
    elif tag == "counting":
        (name,) = _some(rng, CLASSES, 1)
        (number,) = _some(rng, tuple(NUMBERS), 1)
        include = [_clause(name, number)]
        exclude = {"exclude": [_clause(name, number + 1)]}
        text = f"{NUMBERS[number]} {name}{'es' if name.endswith('s') else 's'}"
    elif tag == "colors":
        (name,) = _some(rng, CLASSES[1:], 1)  # no coloured persons
        (colour,) = _some(rng, COLOURS, 1)
        include = [_clause(name) | {"color": colour}]
        text = f"{_a(colour)} {name}"
    elif tag == "position":
        first, second = _some(rng, CLASSES, 2)
        (relation,) = _some(rng, RELATIONS, 1)
        include = [_clause(second), _clause(first) | {"position": [relation, 0]}]
        text = f"{_a(first)} {relation} {_a(second)}"
    else:  # color_attr
        first, second = _some(rng, CLASSES[1:], 2)
        colour, other = _some(rng, COLOURS, 2)
        include = [_clause(first) | {"color": colour}, _clause(second) | {"color": other}]
        text = f"{_a(colour)} {first} and {_a(other)} {second}"
    return {"tag": tag, "include": include, "prompt": f"a photo of {text}"} | exclude


def _clause(name: str, count: int = 1) -> dict:
    return {"class": name, "count": count}


def _some(rng, choices: Sequence, count: int) -> list:
    """`count` different ones of `choices`."""
    return [choices[index] for index in rng.choice(len(choices), size=count, replace=False)]


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


# ---- OCR --------------------------------------------

PLACES = """\
a shop window with a sign that says|a road sign that reads|a neon sign glowing with the words
a coffee mug printed with|a chalkboard in a café that says|a book whose cover is titled
a T-shirt with the words|a wooden board carved with|a birthday cake with the icing
a train station display showing|a movie poster with the title|a hand-painted banner reading
a brass plaque engraved with|a cardboard box stamped|a postcard that says
a ticket printed with|a wall with the graffiti|a laptop sticker that says
a protest placard with the words|a market stall with a label that reads""".replace("\n", "|").split("|")
STYLES = """\
at night in the rain|in the morning sun|as a close-up|in the style of a watercolour|on a busy street
on a quiet beach|as a studio photograph|in soft evening light|in an old town
in a snowy village""".replace("\n", "|").split("|")
ADJECTIVES = """
Open Fresh Golden Silent Little Brave Early Hidden Lucky Modern Northern Plain Quick Royal Simple Sunny Tiny
Useful Warm Young Bright Clever Distant Eastern Final Gentle Happy Local Mellow Noble Proud Rustic Urban
Velvet Wild Blue Green Secret Famous
""".split()
NOUNS = """
Garden River Coffee Market Harbor Library Museum Bakery Bridge Castle Dragon Engine Forest Guitar Island
Kitchen Lantern Mountain Novel Ocean Parade Queen Rocket Summer Theater Umbrella Village Window Zebra
Academy Balloon Compass Diamond Express Feather Gallery Horizon Journey Kingdom Legend Meadow Number Orchard
Planet Quarter Railway Station Ticket Universe Voyage Weekend Festival Moon Tea House Bread Music Winter
""".split()
VERBS = """
Enjoy Visit Save Protect Discover Follow Remember Build Share Choose Watch Trust Respect Join Meet Find
""".split()


def ocr_prompts(count: int, seed: int, split: str, taken: set) -> list[str]:
    """Such as `a road sign that reads "Visit the Golden Bakery", at night in the rain`. `taken`: text keys to
    leave out."""
    rng = np.random.default_rng(seed_of(seed, "ocr prompts", split))
    return distinct([partial(_sign, rng)] * count, split, taken, text_key, text_key)


def text_key(prompt: str) -> str:
    """The text to be written, as the OCR reward compares it."""
    return target_of(prompt).replace(" ", "").lower()


def _sign(rng) -> str:
    (place,) = _some(rng, PLACES, 1)
    (style,) = _some(rng, STYLES, 1)
    return f'{place} "{_text(rng)}", {style}'


def _text(rng) -> str:
    """1 to 5 words, now and then with a number."""
    (adjective,) = _some(rng, ADJECTIVES, 1)
    noun, other = _some(rng, NOUNS, 2)
    (verb,) = _some(rng, VERBS, 1)
    number = int(rng.integers(1, 1000))
    shapes = (
        f"{adjective} {noun}",
        f"{adjective} {noun} {other}",
        f"{noun} and {other}",
        f"{verb} the {noun}",
        f"{verb} the {adjective} {noun}",
        f"{noun} {number}",
        f"{adjective} {noun} No. {number}",
        f"Only {number} {noun}s Left!",
    )
    (text,) = _some(rng, shapes, 1)
    return text


if __name__ == "__main__":
    main()
