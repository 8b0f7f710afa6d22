"""The miniature's study of recipes: every run of a table as data, run where its result is missing.

    python -m opd.study                        # what is missing, run by run; then the tables anew
    python -m opd.study --runs folded --seeds 0 1 2
    python -m opd.study --tables               # from the results alone

A run is a preset with fields and a seed. Its result is one small JSON file in opd/mini/results, so a study
can be stopped, continued and spread over machines. The tables in opd/mini/RESULTS.md are written from these
files alone, between the lines that name them.
"""

import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from opd.files import read_json, replace, write_json
from opd.flags import require
from opd.presets import PRESETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "opd/mini/results"
PAGE = ROOT / "opd/mini/RESULTS.md"
TASKS = ("compose", "text", "quality")

PAST = "--extrapolate compose=1.3 text=1.3 quality=1.3"
# Name -> (what the table calls it, flags on top of the preset `mini`).
RECIPES = {
    "plain": ("plain: at the teachers' own guidance 1", "--teacher-guidance 1"),
    "extrapolated": ("targets past the teachers, l = 1.3", f"--teacher-guidance 1 {PAST}"),
    "folded": ("**folded: teachers at guidance 2.5 (the default)**", ""),
    "both": ("folded and l = 1.3", PAST),
}


@dataclass(frozen=True)
class Arguments:
    runs: tuple[str, ...] = tuple(RECIPES)
    """Which recipes to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each recipe per seed."""
    out: str = "runs/study"
    """Where the run folders lie."""
    count: int = 256
    """Images per task, of prompts held out."""
    tables: bool = False
    """Run nothing; write the tables."""
    train: tuple[str, ...] = field(default_factory=tuple)
    """Further flags of train.py, for how it runs (such as --dtype float32), not for what it trains."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    unknown = [name for name in args.runs if name not in RECIPES]
    if unknown:
        sys.exit(f"error: --runs names {unknown[0]!r}; known: {', '.join(RECIPES)}")
    if not args.tables:
        for seed in args.seeds:
            for name in args.runs:
                if not result_file(name, seed).is_file():
                    run(args, name, seed)
    write_tables()


def run(args: Arguments, name: str, seed: int) -> None:
    """Train a recipe, score its student on held-out prompts, write the result."""
    folder = Path(args.out) / f"{name}-{seed}"
    flags = shlex.split(RECIPES[name][1])
    started = time.monotonic()
    alone = ["--no-evaluate", "--sample-every", "0", "--seed", str(seed), "--out", str(folder)]
    call([sys.executable, str(ROOT / "train.py"), "mini", *flags, *alone, *args.train])
    seconds = time.monotonic() - started
    scores = folder / "heldout.json"
    student = [f"student={folder / 'student'}"]
    only_heldout = ["--prompts", "--count", str(args.count), "--out", str(scores)]
    call([sys.executable, "-m", "opd.evaluate", "--adapters", *student, *only_heldout])
    held_out = read_json(scores)["scores"]["student"]["held-out"]
    result = {
        "recipe": name,
        "flags": RECIPES[name][1],
        "seed": seed,
        "iterations": PRESETS["mini"].iterations,
        "samples_per_step": PRESETS["mini"].samples_per_step(),
        "seconds_of_training": round(seconds),
        "commit": commit(),
        "images_per_task": args.count,
        "held_out": {task: held_out[task] for task in TASKS},
    }
    write_json(result_file(name, seed), result)


def call(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {shlex.join(command)} ended with {done.returncode}")


def commit() -> str:
    """The checkout's, or "" outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"


# ---- tables ----------------------------------------------------------------------------------------------


def write_tables() -> None:
    """Replace the tables in RESULTS.md, each between `<!-- table NAME -->` and `<!-- end -->`."""
    text = with_table(PAGE.read_text(), "recipes", recipes_table())
    replace(PAGE, lambda path: path.write_text(text))


def with_table(page: str, name: str, table: str) -> str:
    """`page` with another table of that name. ValueError where it has no place for one."""
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
    before, found, rest = page.partition(begin)
    require(bool(found) and end in rest, f"{PAGE} has no lines {begin.strip()} and {end.strip()}")
    _, _, after = rest.partition(end)
    return before + begin + table + end + after


def recipes_table() -> str:
    """A row per recipe: mean and standard deviation over the seeds that have a result."""
    lines = ["| | seeds | compose | text | quality | mean |", "|---|---|---|---|---|---|"]
    for name, (title, _) in RECIPES.items():
        results = [read_json(file) for file in sorted(RESULTS.glob(f"{name}-*.json"))]
        if not results:
            continue
        columns = {task: [result["held_out"][task] for result in results] for task in TASKS}
        columns["mean"] = [statistics.fmean(result["held_out"].values()) for result in results]
        cells = [spread(values) for values in columns.values()]
        lines.append(f"| {title} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """.345 ± .008, or the value alone."""
    mean = f"{statistics.fmean(values):.3f}".removeprefix("0")
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.3f}".replace("± 0", "± ")


if __name__ == "__main__":
    main()
