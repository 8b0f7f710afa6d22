"""This checkout against another commit: the real command, in processes of their own, taking turns."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.errors import require


def compare(
    root: Path, commit: str, iterations: int, rounds: int, flags: list[str], compile: bool = False
) -> str:
    """`train.py mini` in the checkout `root` and at `commit`, A B A B: seconds per update of both and their
    ratio, in words. `compile`: with --compile here, and there without, where the flag may be unknown.

    ValueError for a commit that git does not know, too few updates, and a run that fails.
    """
    require(iterations >= 3, f"--iterations is {iterations}; the first warms up, so at least 3 are needed")
    require(rounds >= 1, f"--rounds is {rounds}; it must be at least 1")
    name = resolve(root, commit)
    seconds = {"this checkout": [], f"{commit} ({name[:10]})": []}
    with tempfile.TemporaryDirectory(prefix="opd-bench-") as temporary:
        with checked_out(root, name, Path(temporary) / "tree") as tree:
            folders = dict(zip(seconds, (root, tree), strict=True))
            for turn in range(rounds):
                for number, (label, folder) in enumerate(folders.items()):
                    print(f"round {turn + 1} of {rounds}: {label}", file=sys.stderr, flush=True)
                    out = Path(temporary) / f"run-{turn}-{number}"
                    own = []
                    if compile and folder is root:
                        own = ["--compile"]
                    seconds[label].append(timed_run(folder, out, iterations, [*own, *flags]))
    return summary(seconds)


def resolve(root: Path, commit: str) -> str:
    """The full name of a commit. ValueError where there is none."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", commit + "^{commit}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    require(done.returncode == 0, f"--compare {commit!r}: git knows no such commit in {root}")
    return done.stdout.strip()


@contextmanager
def checked_out(root: Path, commit: str, folder: Path) -> Iterator[Path]:
    """A working tree of `commit` in `folder`, taken away afterwards."""
    git(root, "worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git(root, "worktree", "remove", "--force", str(folder))


def git(root: Path, *arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    require(done.returncode == 0, f"git {arguments[0]} {arguments[1]}: {done.stderr.strip()}")


def timed_run(folder: Path, out: Path, iterations: int, flags: list[str]) -> list[float]:
    """Seconds of every update of one run in `folder` but the first, from its metrics.jsonl."""
    command = [sys.executable, "train.py", "mini", "--iterations", str(iterations)]
    command += ["--no-evaluate", "--sample-every", "0"]
    # The cache names the checkout's folder, which is gone afterwards.
    command += ["--out", str(out), "--cache", str(out.with_name("cache")), *flags]
    # Modules are found in `folder`, whatever is installed; threads are the caller's OMP_NUM_THREADS.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    last = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1]
    require(done.returncode == 0, f"{' '.join(command[1:])} failed in {folder}: {last}")
    return seconds_of((out / "metrics.jsonl").read_text())


def seconds_of(metrics: str) -> list[float]:
    """From the lines of metrics.jsonl, without the first, which warms up."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    return [line["effective_batch"] / line["samples_per_second"] for line in lines[1:]]


def summary(seconds: dict[str, list[list[float]]]) -> str:
    """Per checkout the median over all updates, its spread over runs and updates; the ratio of the two."""
    lines, medians = [], []
    for label, runs in seconds.items():
        every = sorted(value for run in runs for value in run)
        medians.append(statistics.median(every))
        of_runs = ", ".join(f"{statistics.median(run):.4g}" for run in runs)
        spread = f"medians of runs {of_runs}; {every[0]:.4g} to {every[-1]:.4g} over {len(every)} updates"
        lines.append(f"{label:30} {medians[-1]:.4g} s per update ({spread})")
    faster = medians[1] / medians[0]
    lines.append(f"this checkout makes {faster:.3f} x the updates per second of the other")
    return "\n".join(lines)
