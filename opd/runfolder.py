"""A run folder: config.json, metrics.jsonl, sample grids, curves.png, checkpoints; and resuming from it."""

import errno
import fcntl
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from opd import shards
from opd.config import Logistics, RunConfig, Scores
from opd.files import check_folder, read_json, remove_temporaries, replace, write_json, write_safetensors
from opd.flags import require
from opd.identity import PATHS
from opd.optim import Trained, due
from opd.ranks import say
from opd.settings import field_names, read_config, stage_of, to_json

FREE = field_names(Logistics) | field_names(Scores)  # may change when a run resumes
STATE, CONTENTS = "state.safetensors", "contents.json"


class RunFolder:
    """Only the main rank writes (`active`); the others hold the same object and write nothing."""

    def __init__(self, cfg: RunConfig, active: bool):
        self.path, self.active, self.tracker = Path(cfg.out).expanduser(), active, None
        self.tracker_name, self.last = cfg.tracker, cfg.iterations
        self.keep_last, self.save_every = cfg.keep_last, cfg.save_every
        self.forced = cfg.force_resume
        self.saved = 0
        """Steps done in the saved state."""
        self.best = -math.inf
        """The highest mean score of those watched so far."""
        try:
            if cfg.tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
            elif cfg.tracker == "wandb":
                import wandb
        except ImportError as error:
            raise ValueError(
                f'--tracker {cfg.tracker} is not installed: pip install "flow-opd[{cfg.tracker}]"'
            ) from error
        if not active:
            return
        check_folder(cfg.out)
        self.refuse_strangers()
        self.check_same_run(cfg)
        self.lock()
        remove_temporaries(self.path)
        write_json(self.path / "config.json", to_json(cfg))
        if cfg.tracker == "tensorboard":
            self.tracker = SummaryWriter(self.path / "tensorboard")
        elif cfg.tracker == "wandb":
            self.tracker = wandb.init(project="flow-opd", config=to_json(cfg), dir=self.path)

    def lock(self) -> None:
        """Hold the folder while this process lives. ValueError if another process does: the two would mix
        their steps."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.held = open(self.path / "lock", "w")
        try:
            fcntl.lockf(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks is no reason not to train
            require(
                error.errno not in (errno.EACCES, errno.EAGAIN),
                f"{self.path} belongs to a run that is still going; stop that run or choose another --out",
            )

    def refuse_strangers(self) -> None:
        """ValueError where this run would overwrite what it did not make: the files of something else, a
        finished student, or whatever a link leads to."""
        found = {file.name for file in self.path.glob("*") if not file.name.startswith(".")} - {"lock"}
        for file in [*self.path.glob("*"), *self.path.glob("*/*")]:
            inside = file.relative_to(self.path).parts[0] != "wandb"
            require(not (inside and file.is_symlink()), f"{file} is a link; a run writes into its own folder")
        config = self.path / "config.json"
        ours = not found or (config.is_file() and is_settings(config))
        require(ours, f"{self.path} holds {min(found, default='')!r} and no run; choose an empty --out")
        lost = "student" in found and not self.has_state()
        way_out = f"no {STATE} to resume from; choose another --out, or delete that folder"
        require(not lost, f"{self.path} holds a student, but {way_out}")

    def check_same_run(self, cfg: RunConfig) -> None:
        """ValueError if the folder holds a run with other settings: resuming it would mix two runs.

        A run without a checkpoint is nothing to mix with. Where the contents of what it reads are known,
        `check_contents` compares them, and not the paths.
        """
        file = self.path / "config.json"
        resumes = file.is_file() and self.has_state()
        nothing = f"--force-resume: {self.path} holds no run to resume"
        require(resumes or not cfg.force_resume, nothing)
        if not resumes:
            return
        way_out = "choose another --out, or delete that folder"
        try:
            old = read_config(file)
        except ValueError as error:
            raise ValueError(f"{error}; {way_out}") from error
        if type(old) is not type(cfg):
            stages = f"stage {stage_of(old)}, and this is stage {stage_of(cfg)}"
            raise ValueError(f"{self.path} holds a run of {stages}; {way_out}")
        free = set(FREE)
        if (self.path / CONTENTS).is_file():
            free |= set(PATHS)
        changes = []
        for name, before in asdict(old).items():
            now = getattr(cfg, name)
            if name not in free and now != before:
                changes.append(f"{name} {before!r} -> {now!r}")
        self.refuse_changes(f"a run with other settings: {', '.join(changes)}; {way_out}", changes)

    def check_contents(self, contents: dict[str, str]) -> None:
        """ValueError if what the run reads is not what it began with; recorded by the run's first start."""
        file = self.path / CONTENTS
        if file.is_file() and self.has_state():
            old = read_json(file)
            changes = [name for name in {**old, **contents} if old.get(name) != contents.get(name)]
            way_out = "restore that, choose another --out, or add --force-resume to go on all the same"
            self.refuse_changes(f"a run that began with another {', '.join(changes)}; {way_out}", changes)
        write_json(file, contents)

    def refuse_changes(self, what: str, changes: list[str]) -> None:
        if changes and self.forced:
            say(f"--force-resume: {self.path} holds {what}")
        else:
            require(not changes, f"{self.path} holds {what}")

    # ---- saving and resuming ----

    def save(self, trained: Trained, done: int) -> None:
        """Checkpoint after `done` steps: the state to resume from, then the student, which a resumed run
        makes from the state if this one is killed between the two (collectives)."""
        self.save_state_of(trained, done)
        self.export(trained, done)

    def export(self, trained: Trained, done: int) -> None:
        """The student of the saved state, with the moving average if there is one (collectives)."""
        weights = trained.weights()
        if not self.active:
            return
        if due(done, self.save_every, self.last):
            trained.export(weights, self.path / "checkpoints" / f"{done:06d}")
            self.prune()
        trained.export(weights, self.path / "student")

    def prune(self) -> None:
        """Delete the checkpoints that are not among the last --keep-last."""
        if self.keep_last == 0:
            return
        numbers = sorted(int(file.name) for file in (self.path / "checkpoints").glob("[0-9]*"))
        for number in numbers[: -self.keep_last]:
            shutil.rmtree(self.path / "checkpoints" / f"{number:06d}")

    def save_best(self, trained: Trained, watched: dict[str, float]) -> None:
        """best/: the student with the highest mean of the watched scores so far (collectives)."""
        score = mean_score(watched)
        if not score > self.best:
            return
        self.best = score
        weights = trained.weights()
        if self.active:
            trained.export(weights, self.path / "best")

    def save_to_go_on(self, trained: Trained, done: int) -> None:
        """What a stopped run needs to go on after `done` steps, unless it is saved already (collectives)."""
        if done != self.saved:
            self.save_state_of(trained, done)

    def resume(self, trained: Trained) -> int:
        """Load the last checkpoint, if there is one; returns how many steps are done."""
        done = self.load_state_of(trained)
        self.saved = done
        if done > 0:
            say(f"resuming {self.path} after step {done}")
            self.export(trained, done)
        for row in self.metrics():
            if "watch" in row and row["step"] <= done and mean_score(row["watch"]) > self.best:
                self.best = mean_score(row["watch"])
        return done

    def has_state(self) -> bool:
        return (self.path / STATE).is_file() or shards.latest(self.path) > 0

    def save_state_of(self, trained: Trained, done: int) -> None:
        """One file, or, where all weights are trained, a directory with a part of each rank."""
        if trained.full:
            shards.save(self.path, done, trained.parts())
            self.saved = done
        else:
            self.save_state(done, trained.state())

    def load_state_of(self, trained: Trained) -> int:
        """The inverse; returns how many steps are done."""
        done = shards.latest(self.path)
        if trained.full and done > 0:
            shards.load(self.path, done, trained.parts())
            self.truncate_metrics(done)
            return done
        done, state = self.load_state()
        if state:
            trained.load(state)
        return done

    def save_state(self, done: int, tensors: dict[str, torch.Tensor]) -> None:
        if self.active:
            write_safetensors(self.path / STATE, tensors, {"step": str(done)})
        self.saved = done

    def load_state(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(steps done, tensors) of the last checkpoint; (0, {}) for a new run. Metrics past it are
        dropped."""
        file = self.path / STATE
        if not file.is_file():
            self.truncate_metrics(0)
            return 0, {}
        try:
            with safe_open(file, "pt") as state:
                done = int(state.metadata()["step"])
                tensors = {key: state.get_tensor(key) for key in state.keys()}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            previous = f"--cold-start {self.path / 'student'}"
            way_out = f"begin another run from its last student ({previous}), or delete the folder"
            raise OSError(f"{file} is damaged ({error}); {way_out}") from error
        self.truncate_metrics(done)
        return done, tensors

    def truncate_metrics(self, done: int) -> None:
        file = self.path / "metrics.jsonl"
        if not self.active or not file.is_file():
            return
        keep = []
        for line in file.read_text().splitlines(True):
            whole = line.endswith("\n")  # a kill may have cut the last line
            if whole and json.loads(line)["step"] <= done:
                keep.append(line)
        replace(file, lambda path: path.write_text("".join(keep)))

    # ---- logging ----

    def log(self, row: dict) -> None:
        """Append one line to metrics.jsonl; flat numbers also go to the tracker."""
        if not self.active:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        flat = {k: v for k, v in flatten(row).items() if isinstance(v, (int, float))}
        if self.tracker_name == "wandb":
            self.tracker.log(flat, step=row["step"])
        elif self.tracker_name == "tensorboard":
            for key, value in flat.items():
                self.tracker.add_scalar(key, value, row["step"])

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """A picture for the tracker."""
        if self.tracker_name == "wandb":
            from wandb import Image as Logged

            self.tracker.log({name: Logged(image)}, step=step)
        elif self.tracker_name == "tensorboard":
            self.tracker.add_image(name, np.asarray(image), step, dataformats="HWC")

    def metrics(self) -> list[dict]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def curves(self) -> None:
        """curves.png: rewards and held-out scores where a run logs some, else losses, and gradient norm over
        the steps. Needs matplotlib (pip install flow-opd[plot])."""
        if not self.active:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print('curves.png skipped: pip install "flow-opd[plot]" to get it')
            return
        rows = self.metrics()
        flat = [flatten(row) for row in rows]
        keys = sorted({key for row in flat for key in row})
        figure = Figure(figsize=(11, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        scores = [key for key in keys if key.startswith(("reward/", "watch/"))]
        losses = [key for key in keys if key == "loss" or key.endswith("/loss")]
        if scores:
            left.set(xlabel="step", ylabel="score")
        else:
            left.set(xlabel="step", ylabel="loss, nats per dimension", yscale="log")
        for key in scores or losses:
            steps = [row["step"] for row in flat if key in row]
            left.plot(steps, [row[key] for row in flat if key in row], label=key.removesuffix("/loss"))
        left.legend()
        right.plot([row["step"] for row in rows], [row["grad_norm"] for row in rows])
        right.set(xlabel="step", ylabel="gradient norm", yscale="log")
        replace(self.path / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def is_settings(file: Path) -> bool:
    """Whether a config.json is one of ours."""
    try:
        return "stage" in read_json(file)
    except ValueError:
        return False


def mean_score(watched: dict[str, float]) -> float:
    return sum(watched.values()) / len(watched)


def flatten(row: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a/b": 1}."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat
