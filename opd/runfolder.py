"""A run folder: whose it is, what it logs, and the students that it holds.

config.json       the settings          metrics.jsonl   a line per step
contents.json     what the run reads    state/STEP/     everything to resume from
student/, best/, checkpoints/STEP/      students as users load them
"""

import errno
import fcntl
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from opd import ranks
from opd.cli import field_names
from opd.config import STAGES, Logistics, RunConfig, Scores
from opd.errors import require
from opd.files import (
    check_folder,
    path_of,
    read_json,
    read_metrics,
    remove_temporaries,
    replace,
    write_json,
    writing,
)
from opd.formats.settings import read_config, to_json
from opd.formats.state import STATE, latest_state, load_state, numbered, remove_earlier_states, save_state
from opd.optim import Trained, due
from opd.ranks import say

FREE = field_names(Logistics) | field_names(Scores)  # may change when a run resumes
CONTENTS = "contents.json"
# The settings that name what a run reads: they may change where the contents stay.
PATHS = ("model", "teachers", "prompts", "cold_start", "merge_from", "data")


# ---- whose folder it is ------------------------------------------------------------------------------------


def claim(cfg: RunConfig) -> tuple[Path, object]:
    """Make the run folder this process's: (its path, a lock to hold while the process lives).

    ValueError where that would overwrite what the run did not make, mix it with another run, or take it from
    one that is still going.
    """
    path = path_of(cfg.out)
    check_folder(cfg.out)
    refuse_strangers(cfg, path)
    check_same_run(cfg, path)
    path.mkdir(parents=True, exist_ok=True)
    held = open(path / "lock", "w")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks is no reason not to train
        if error.errno in (errno.EACCES, errno.EAGAIN):
            going = f"{path} belongs to a run that is still going"
            raise ValueError(f"{going}; stop that run or choose another --out") from error
    remove_temporaries(path)
    if not goes_on(cfg, path):  # else the former settings stand until `resume` has loaded their state
        write_json(path / "config.json", to_json(cfg))
    return path, held


def refuse_strangers(cfg: RunConfig, path: Path) -> None:
    """ValueError for the files of something else, a finished student, or whatever a link leads to."""
    found = {file.name for file in path.glob("*") if not file.name.startswith(".")} - {"lock"}
    for file in [*path.glob("*"), *path.glob("*/*")]:
        inside = file.relative_to(path).parts[0] != "wandb"
        require(not (inside and file.is_symlink()), f"{file} is a link; a run writes into its own folder")
    config = path / "config.json"
    try:
        ours = not found or "stage" in read_json(config)
    except (OSError, ValueError):
        ours = False
    require(ours, f"{path} holds {min(found, default='')!r} and no run; choose an empty --out")
    lost = "student" in found and not goes_on(cfg, path)
    way_out = f"no {STATE}/ to resume from; choose another --out, or delete that folder"
    require(not lost, f"{path} holds a student, but {way_out}")


def goes_on(cfg: RunConfig, path: Path) -> bool:
    """Whether a run folder holds what this run goes on from: a state, or without steps the same student."""
    config = path / "config.json"
    if not config.is_file():
        return False
    merged = (path / "student").is_dir() and read_json(config).get("iterations") == 0
    return latest_state(path) > 0 or merged and cfg.iterations == 0


def check_same_run(cfg: RunConfig, path: Path) -> None:
    """ValueError if the folder holds a run with other settings: resuming it would mix two runs.

    A run that nothing goes on from is nothing to mix with. Where the contents of what it reads are known,
    `RunFolder.check_contents` compares them, and not the paths.
    """
    resumes = goes_on(cfg, path)
    require(resumes or not cfg.force_resume, f"--force-resume: {path} holds no run to resume")
    if not resumes:
        return
    done, way_out = latest_state(path), "choose another --out, or delete that folder"
    past = f"{path} is {done} steps along, past --iterations {cfg.iterations}"
    require(done <= cfg.iterations, f"{past}; {way_out}")
    read_metrics(path / "metrics.jsonl")  # refuses a damaged one before weights load
    try:
        old = read_config(path / "config.json", STAGES)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    if type(old) is not type(cfg):
        stages = f"stage {old.stage}, and this is stage {cfg.stage}"
        raise ValueError(f"{path} holds a run of {stages}; {way_out}")
    free = set(FREE)
    if (path / CONTENTS).is_file():
        free |= set(PATHS)
    changes = []
    for name, before in asdict(old).items():
        now = getattr(cfg, name)
        if name not in free and now != before:
            changes.append(f"{name} {before!r} -> {now!r}")
    what = f"{path} holds a run with other settings: {', '.join(changes)}; {way_out}"
    refuse_changes(what, changes, cfg.force_resume)


def refuse_changes(what: str, changes: list[str], forced: bool) -> None:
    if changes and forced:
        say(f"--force-resume: {what}")
    else:
        require(not changes, what)


# ---- at work -----------------------------------------------------------------------------------------------


class RunFolder:
    """Only the main rank writes (`active`); the others hold the same object and write nothing."""

    def __init__(self, cfg: RunConfig, active: bool):
        self.cfg, self.active, self.path = cfg, active, path_of(cfg.out)
        self.saved = 0
        """Steps done in the saved state."""
        self.logged = 0
        """The step of the log's last line."""
        self.best = -math.inf
        """The highest mean score of those watched so far."""
        self.contents: dict[str, str] = {}
        """What the run reads, by content, once it is checked."""
        if active:
            self.path, self.held = claim(cfg)

    def check_contents(self, contents: dict[str, str]) -> None:
        """ValueError if what the run reads is not what it began with; `resume` records it."""
        file = self.path / CONTENTS
        if file.is_file() and goes_on(self.cfg, self.path):
            old = read_json(file)
            changes = [name for name in {**old, **contents} if old.get(name) != contents.get(name)]
            way_out = f"restore that, choose another --out (--cold-start {self.path / 'student'} takes the "
            way_out += "student along), or add --force-resume to go on all the same"
            what = f"{self.path} holds a run that began with another {', '.join(changes)}; {way_out}"
            refuse_changes(what, changes, self.cfg.force_resume)
        self.contents = contents

    def resume(self, trained: Trained) -> int:
        """Go on from the last state, if there is one; returns how many steps are done (collectives)."""
        done = latest_state(self.path)
        if done > 0:
            say(f"resuming {self.path} after step {done}")
            load_state(self.path, done, trained.state())
            ranks.barrier()  # all ranks have read it
            if self.active:
                remove_earlier_states(self.path)  # a kill may have kept the save from it
        self.record()
        self.truncate(done)
        ranks.barrier()  # before others read what is left
        self.saved = done
        if done > 0:
            self.export(trained, done)
        for row in self.metrics():
            if "watch" in row and fmean(row["watch"].values()) > self.best:
                self.best = fmean(row["watch"].values())
        return done

    def record(self) -> None:
        """What the next start insists on: these settings, and the contents if they were checked."""
        if self.active:
            write_json(self.path / "config.json", to_json(self.cfg))
            if self.contents:
                write_json(self.path / CONTENTS, self.contents)

    def save(self, trained: Trained, done: int) -> None:
        """Checkpoint after `done` steps: the state to resume from, then the student, which a resumed run
        makes from the state if this one is killed between the two (collectives)."""
        self.save_to_go_on(trained, done)
        self.export(trained, done)

    def save_to_go_on(self, trained: Trained, done: int) -> None:
        """What a stopped run needs to go on after `done` steps, unless it is saved already (collectives)."""
        if done != self.saved:
            save_state(self.path, done, trained.state())
            self.saved = done

    def export(self, trained: Trained, done: int) -> None:
        """The student of the saved state, with the moving average if there is one (collectives)."""
        weights = trained.weights()
        if not self.active:
            return
        if due(done, self.cfg.save_every, self.cfg.iterations):
            trained.export(weights, self.path / "checkpoints" / f"{done:06d}")
            if self.cfg.keep_last > 0:
                for folder in numbered(self.path / "checkpoints")[: -self.cfg.keep_last]:
                    shutil.rmtree(folder)
        trained.export(weights, self.path / "student")

    def save_best(self, trained: Trained, watched: dict[str, float]) -> None:
        """best/: the student with the highest mean of the watched scores so far (collectives)."""
        score = fmean(watched.values())
        if not score > self.best:
            return
        self.best = score
        weights = trained.weights()
        if self.active:
            trained.export(weights, self.path / "best")

    # ---- logging ----

    def log(self, row: dict) -> None:
        """A line of metrics.jsonl; what is said later of the same step joins it."""
        file = self.path / "metrics.jsonl"
        if self.active and row["step"] == self.logged:
            *rows, last = self.metrics()
            self.rewrite([*rows, last | row])
        elif self.active:
            with writing(file), open(file, "a") as log:
                log.write(json.dumps(row) + "\n")
        self.logged = row["step"]

    def metrics(self) -> list[dict]:
        return read_metrics(self.path / "metrics.jsonl")

    def truncate(self, done: int) -> None:
        """Drop the log's lines and the sample grids past the state that the run goes on from; without one,
        all grids: they may be another run's."""
        if not self.active:
            return
        if (self.path / "metrics.jsonl").is_file():
            self.rewrite([row for row in self.metrics() if row["step"] <= done])
        for grid in numbered(self.path / "samples", ".png"):
            if done == 0 or int(grid.stem) > done:
                grid.unlink()

    def rewrite(self, rows: list[dict]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace(self.path / "metrics.jsonl", lambda path: path.write_text(text))
        self.logged = max((row["step"] for row in rows), default=0)
