"""The miniature's study: every run of a table as data, run where its result is missing.

    python -m opd.mini.study                        # what is missing, run by run; then tables and plots anew
    python -m opd.mini.study --runs mix-all student --seeds 0 1 2
    python -m opd.mini.study --tables               # from the results alone

A run (runs.py) is a preset with fields and a seed, or a model that is scored as it is. Its result is a small
JSON file in results/, so a study can be stopped, continued and spread over machines; delete one, and its run
is scored anew. Tables and plots of RESULTS.md and README.md are made from these files alone.
"""

import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from opd import errors, files
from opd.cli import Given, Range, check_bounds, parse
from opd.evaluation.statistics import ALL, MEASURES
from opd.files import read_json, read_metrics, write_json
from opd.mini.presets import MINI_SCORERS
from opd.mini.study import plots
from opd.mini.study.runs import PREPARED, RECIPES, REFERENCES, SFT_START, Recipe
from opd.mini.study.tables import MEASURED, PAGES, RESULTS, ROOT, load, with_tables
from opd.presets import PRESETS

QUALITY = MINI_SCORERS["quality"]
COUNT = 256  # images per task, of prompts held out
NAMES = (*RECIPES, *REFERENCES)


@dataclass(frozen=True)
class Arguments:
    runs: tuple[Literal[NAMES], ...] = NAMES
    """What to run."""
    seeds: Annotated[tuple[int, ...], Given("at least one"), Range(0, 10**6)] = (0, 1, 2)
    """A training run of each recipe per seed; what is only scored has seed 0."""
    out: str = "runs/study"
    """Where the run folders lie."""
    tables: bool = False
    """Run nothing; write the tables."""
    train: str = ""
    """Further flags of train.py, for how it runs (--train="--dtype float32"), not for what it trains."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    with errors.in_one_line(ValueError):
        check_bounds(args)
    if not args.tables:
        for name, seed in missing(args):
            run(args, name, seed)
    results = load(RESULTS)
    for page in PAGES:
        text = with_tables(page.read_text(), results)
        files.replace(page, lambda path, text=text: path.write_text(text))
    plots.draw(results)


def missing(args: Arguments) -> list[tuple[str, int]]:
    """(name, seed) of what is asked for and has no result."""
    runs = [(name, seed) for seed in args.seeds for name in args.runs if name in RECIPES]
    runs += [(name, 0) for name in args.runs if name in REFERENCES]
    return [(name, seed) for name, seed in runs if not result_file(name, seed).is_file()]


def run(args: Arguments, name: str, seed: int) -> None:
    """Make a result, and what it needs before."""
    about = {"recipe": name, "seed": seed, "commit": commit(), "images_per_task": COUNT}
    if name in REFERENCES:
        result = {"flags": REFERENCES[name].flags} | scores(args, name, seed)
    else:
        prepare(RECIPES[name].flags)
        for need in RECIPES[name].needs():
            # A committed result comes without its weights.
            if not (folder_of(args, need, seed) / "student").exists():
                run(args, need, seed)
        result = trained(args, name, seed)
    write_json(result_file(name, seed), about | result)


def prepare(flags: str) -> None:
    """Make the places that flags name, where they are not there."""
    if SFT_START in flags:
        for place, command in PREPARED.items():
            if not (ROOT / place).exists():
                call(shlex.split(command))


def trained(args: Arguments, name: str, seed: int) -> dict:
    """Train a recipe and score its student on held-out prompts."""
    recipe, folder = RECIPES[name], folder_of(args, name, seed)
    flags = filled(args, recipe, seed)
    cfg = parse([recipe.preset, *shlex.split(flags)], PRESETS)
    command = ["train.py", recipe.preset, *shlex.split(flags), "--no-evaluate", "--sample-every", "0"]
    command += ["--seed", str(seed), "--out", str(folder), *shlex.split(args.train)]
    started = time.monotonic()
    call(command)
    seconds = time.monotonic() - started
    metrics = read_metrics(folder / "metrics.jsonl")
    done = metrics[-1]["step"]
    # A signal ends a run well, so that it can go on.
    if done < cfg.iterations:
        sys.exit(f"error: {folder} was stopped after step {done}; run this again to go on")
    result = {
        "flags": flags,
        "iterations": cfg.iterations,
        "samples_per_step": cfg.samples_per_step(),
        "seconds_of_training": round(seconds),
    }
    return result | scores(args, name, seed) | curve(metrics)


def filled(args: Arguments, recipe: Recipe, seed: int) -> str:
    """The recipe's flags with the places of other recipes' students."""

    def place(found: re.Match) -> str:
        return shlex.quote(str(Path(args.out) / f"{found[1]}-{seed}" / "student"))

    return re.sub(r"\{of ([\w.-]+)\}", place, recipe.flags)


def scores(args: Arguments, name: str, seed: int) -> dict[str, dict]:
    """What of MEASURED a recipe's student has, {what: {task: number}}, or each of a reference's rows, {what:
    {row: {task: number}}}, on held-out prompts: "held_out", each task's own score; "errors", their standard
    errors; "quality_of", the quality of every task's pictures; "diversity", how far apart the pictures of one
    prompt are, where a task has several of one; "variety", those of different ones."""
    folder = folder_of(args, name, seed)
    rows, file = ["student"], folder / "heldout.json"
    command = ["-m", "opd.evaluation", "--adapters", f"student={folder / 'student'}", "--no-base"]
    if name in REFERENCES:
        rows = list(REFERENCES[name].titles)
        command = ["-m", "opd.evaluation", *shlex.split(REFERENCES[name].flags)]
    command += ["--prompts", "--count", str(COUNT)]
    call([*command, "--scorers", QUALITY, "--out", str(file)])
    found = {what: {row: {} for row in rows} for what in MEASURED}
    for cell in read_json(file)["cells"]:
        row, task = cell["row"], cell["task"]
        if cell["tag"] != ALL or row not in rows:
            continue
        if cell["scorer"] == MINI_SCORERS[task]:
            found["held_out"][row][task] = cell["mean"]
            found["errors"][row][task] = cell["error"]
        if cell["scorer"] == QUALITY:
            found["quality_of"][row][task] = cell["mean"]
        if cell["scorer"] in MEASURES:
            found[cell["scorer"]][row][task] = cell["mean"]
    found = {what: of_row for what, of_row in found.items() if any(of_row.values())}
    if name in REFERENCES:
        return found
    return {what: of_row["student"] for what, of_row in found.items()}


def curve(metrics: list[dict]) -> dict:
    """{"curve": scores that the run watched, with the samples and seconds of training before each}, {} where
    it watched none. Seconds: the median step's, times steps, since other work may stop a run for a while."""
    points = []
    step_seconds = statistics.median(line["effective_batch"] / line["samples_per_second"] for line in metrics)
    for line in metrics:
        if "watch" in line:
            step = line["step"]
            samples, seconds = step * line["effective_batch"], step * step_seconds
            points.append({"step": step, "samples": samples, "seconds": round(seconds)} | line["watch"])
    return {"curve": points} if points else {}


def call(arguments: list[str]) -> None:
    """A program of the repository, in its root."""
    done = subprocess.run([sys.executable, *arguments], check=False, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"error: python {shlex.join(arguments)} ended with {done.returncode}")


def commit() -> str:
    """The checkout's, or "" outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def folder_of(args: Arguments, name: str, seed: int) -> Path:
    return Path(args.out).absolute() / f"{name}-{seed}"


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"
