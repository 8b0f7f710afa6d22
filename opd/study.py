"""The miniature's study of recipes: every run of a table as data, run where its result is missing.

    python -m opd.study                        # what is missing, run by run; then the tables anew
    python -m opd.study --runs folded --seeds 0 1 2
    python -m opd.study --tables               # from the results alone

A run (opd/mini/runs.py) is a preset with fields and a seed, or a model that is scored as it is. Its result
is one small JSON file in opd/mini/results, so a study can be stopped, continued and spread over machines. The
tables in opd/mini/RESULTS.md and README.md are written from these files alone, between the lines that name
them.
"""

import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from opd.config import Distil
from opd.files import read_json, replace, write_json
from opd.flags import require
from opd.mini.runs import EVERYWHERE, PREPARED, RECIPES, REFERENCES, TABLES, TASKS, Recipe
from opd.presets import MINI_HELDOUT, MINI_SCORERS, PRESETS
from opd.settings import parse
from opd.statistics import ALL

ROOT = Path(__file__).parents[1]
QUALITY = MINI_SCORERS["quality"]
SCORES = ("held_out", "errors", "quality_of")
RESULTS = ROOT / "opd/mini/results"
# Page -> the tables in it.
PAGES = {
    ROOT / "opd/mini/RESULTS.md": ("recipes", "starts", "rivals", "other teachers"),
    ROOT / "README.md": ("recipes",),
}


# ---- running ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    runs: tuple[str, ...] = (*RECIPES, *REFERENCES)
    """What to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A training run of each recipe per seed; what is only scored has seed 0."""
    out: str = "runs/study"
    """Where the run folders lie."""
    count: int = 256
    """Images per task, of prompts held out."""
    tables: bool = False
    """Run nothing; write the tables."""
    train: str = ""
    """Further flags of train.py, for how it runs (--train="--dtype float32"), not for what it trains."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    known = [*RECIPES, *REFERENCES]
    unknown = [name for name in args.runs if name not in known]
    if unknown:
        sys.exit(f"error: --runs names {unknown[0]!r}; known: {', '.join(known)}")
    if not args.tables:
        for name, seed in missing(args):
            run(args, name, seed)
    write_tables()


def missing(args: Arguments) -> list[tuple[str, int]]:
    """(name, seed) of what has no result."""
    wanted = [(name, seed) for seed in args.seeds for name in args.runs if name in RECIPES]
    wanted += [(name, 0) for name in args.runs if name in REFERENCES]
    return [(name, seed) for name, seed in wanted if not result_file(name, seed).is_file()]


def run(args: Arguments, name: str, seed: int) -> None:
    """Make a result, and what it needs before."""
    folder = Path(args.out).absolute() / f"{name}-{seed}"
    about = {"recipe": name, "seed": seed, "commit": commit(), "images_per_task": args.count}
    if name in REFERENCES:
        reference = REFERENCES[name]
        prepare(reference.needs)
        found = scored(args, folder, reference.flags, reference.tasks)
        result = {"flags": reference.flags}
        for what, rows in found.items():
            result[what] = {row: rows[row] for row in reference.titles}
    else:
        prepare(RECIPES[name].needs)
        result = trained(args, folder, RECIPES[name], seed)
    write_json(result_file(name, seed), about | result)


def prepare(needs: tuple[str, ...]) -> None:
    for place in needs:
        if not (ROOT / place).exists():
            call(shlex.split(PREPARED[place]))


def trained(args: Arguments, folder: Path, recipe: Recipe, seed: int) -> dict:
    """Train a recipe and score its student on held-out prompts."""
    flags = shlex.split(recipe.flags)
    cfg = parse([recipe.preset, *flags], PRESETS)
    started = time.monotonic()
    alone = ["--no-evaluate", "--sample-every", "0", "--seed", str(seed), "--out", str(folder)]
    call(["train.py", recipe.preset, *flags, *alone, *shlex.split(args.train)])
    seconds = time.monotonic() - started
    student = f"--adapters student={shlex.quote(str(folder / 'student'))}"
    result = {
        "flags": recipe.flags,
        "iterations": cfg.iterations,
        "samples_per_step": cfg.samples_per_step(),
        "seconds_of_training": round(seconds),
    }
    for what, rows in scored(args, folder, student, recipe.tasks).items():
        result[what] = rows["student"]
    if isinstance(cfg, Distil) and cfg.diagnose_every > 0:
        result["gap_closed"] = gap_closed((folder / "metrics.jsonl").read_text())
    return result


def scored(args: Arguments, folder: Path, flags: str, tasks: tuple[str, ...]) -> dict[str, dict]:
    """{what: {row of opd.evaluate: {task: number}}} on held-out prompts: "held_out", each task's own score;
    "errors", the standard errors of these; "quality_of", the quality of every task's pictures."""
    file = folder / "heldout.json"
    prompts = [f"{task}={MINI_HELDOUT[task]}" for task in tasks]
    call(
        ["-m", "opd.evaluate", *shlex.split(flags), "--prompts", "--heldout", *prompts]
        + ["--count", str(args.count), "--scorers", QUALITY, "--out", str(file)]
    )
    found = {what: {} for what in SCORES}
    for cell in read_json(file)["cells"]:
        row, task = cell["row"], cell["task"]
        if cell["tag"] != ALL:
            continue
        if cell["scorer"] == MINI_SCORERS[task]:
            found["held_out"].setdefault(row, {})[task] = cell["mean"]
            found["errors"].setdefault(row, {})[task] = cell["error"]
        if cell["scorer"] == QUALITY:
            found["quality_of"].setdefault(row, {})[task] = cell["mean"]
    return found


def gap_closed(metrics: str) -> dict[str, float]:
    """{"fixed": share, "visited": share} of the way from base to teacher, in the last line of metrics.jsonl
    that has it: the mean over teachers and noise levels."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    last = [line for line in lines if "fixed" in line][-1]
    shares = {}
    for states in ("fixed", "visited"):
        levels = [share for teacher in last[states].values() for share in teacher["gap"].values()]
        shares[states] = round(statistics.fmean(levels), 4)
    return shares


def call(arguments: list[str]) -> None:
    """A program of the repository, in its root."""
    done = subprocess.run([sys.executable, *arguments], check=False, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"error: python {shlex.join(arguments)} ended with {done.returncode}")


def commit() -> str:
    """The checkout's, or "" outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"


# ---- tables ----------------------------------------------------------------------------------------------


def write_tables() -> None:
    for page, names in PAGES.items():
        text = with_tables(page.read_text(), names)
        replace(page, lambda path, text=text: path.write_text(text))


def with_tables(page: str, names: tuple[str, ...]) -> str:
    for name in names:
        page = with_table(page, name, table(name))
    return page


def with_table(page: str, name: str, table: str) -> str:
    """`page` with another table between `<!-- table NAME -->` and `<!-- end -->`. ValueError where it has no
    place for one."""
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
    before, found, rest = page.partition(begin)
    require(bool(found) and end in rest, f"the page has no lines {begin.strip()} and {end.strip()}")
    _, _, after = rest.partition(end)
    return before + begin + table + end + after


def table(name: str) -> str:
    """A row per recipe or model: mean and standard deviation over the seeds that have a result."""
    rows = [row for run in TABLES[name] for row in rows_of(run)]
    if name in EVERYWHERE:
        return everywhere(rows)
    columns = ["seeds", *TASKS, "mean"]
    with_gap = any("gap_closed" in result for _, results in rows for result in results)
    if with_gap:
        columns += ["gap closed, fixed states", "visited states"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for title, results in rows:
        cells = [str(len(results)), *cells_of(results)]
        if with_gap:
            cells += gap_cells(results)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def everywhere(rows: list[tuple[str, list[dict]]]) -> str:
    """A table with the quality of every task's pictures: its mean over the three is `quality of all`, which
    the mean of three takes instead of the quality of landscapes."""
    columns = [
        "seeds",
        *TASKS,
        "quality of shapes",
        "of signs",
        "of all",
        "mean of compose, text, quality of all",
    ]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for title, results in rows:
        cells = [str(len(results)), *cells_of(results)[: len(TASKS)]]
        for task in ("compose", "text"):
            cells.append(spread([result["quality_of"][task] for result in results]))
        cells.append(spread([quality_of_all(result) for result in results]))
        cells.append(spread([mean_of_three(result) for result in results]))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def quality_of_all(result: dict) -> float:
    return statistics.fmean(result["quality_of"].values())


def mean_of_three(result: dict) -> float:
    own = result["held_out"]
    return statistics.fmean([own["compose"], own["text"], quality_of_all(result)])


def rows_of(name: str) -> list[tuple[str, list[dict]]]:
    """(title, results) of each row that has a result."""
    results = [read_json(file) for file in sorted(RESULTS.glob("*.json"))]
    results = [result for result in results if result["recipe"] == name]
    if not results:
        return []
    if name in RECIPES:
        return [(RECIPES[name].title, results)]
    found = []
    for row, title in REFERENCES[name].titles.items():
        found.append((title, [{what: results[0][what][row] for what in SCORES if what in results[0]}]))
    return found


def cells_of(results: list[dict]) -> list[str]:
    """A cell per task and the mean; empty where the tasks are not all scored."""
    cells = []
    for task in TASKS:
        cells.append(spread([result["held_out"][task] for result in results if task in result["held_out"]]))
    whole = [result["held_out"].values() for result in results if len(result["held_out"]) == len(TASKS)]
    return [*cells, spread([statistics.fmean(scores) for scores in whole])]


def gap_cells(results: list[dict]) -> list[str]:
    if "gap_closed" not in results[0]:
        return ["", ""]
    return [spread([result["gap_closed"][states] for result in results]) for states in ("fixed", "visited")]


def spread(values: list[float]) -> str:
    """.345 ± .008, the value alone, or nothing."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}".removeprefix("0")
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.3f}".replace("± 0", "± ")


if __name__ == "__main__":
    main()
