"""What a run shows of its student: scores on the way, sample grids, and the table at the end."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from opd import ranks, signals
from opd.config import DistillationConfig, RunConfig, SFTConfig
from opd.data import Pools
from opd.evaluation import tables
from opd.evaluation.records import LINES, Record, write_lines
from opd.evaluation.score import Row, Scorers, Splits, mean_score, planned, score
from opd.evaluation.statistics import ALL, labels_of, summarise
from opd.files import replace, write_json
from opd.formats.latents import Images
from opd.formats.pictures import labelled_grid, save_image, source_row
from opd.lora import BASE, EMA, START, STUDENT
from opd.model import Model, Sampling
from opd.optim import Trained, due
from opd.ranks import say
from opd.report.card import push_student, write_card
from opd.report.page import Run, write_page
from opd.report.shown import Shown, routed
from opd.report.start import distances, head
from opd.report.tracker import Tracker
from opd.rewards import Rewards, specs_of
from opd.runfolder import RunFolder
from opd.teachers import load_teachers, main_teacher


class Report:
    """Every method is called on all ranks; rank 0 writes into the run folder."""

    def __init__(
        self,
        cfg: RunConfig,
        model: Model,
        data: Pools | Images,
        shown: Shown,
        rewards: Rewards,
        folder: RunFolder,
    ):
        self.cfg, self.model, self.data, self.shown, self.folder = cfg, model, data, shown, folder
        if folder.active:
            self.tracker = Tracker(cfg, folder.path)
        self.prompts = [prompt for pool in shown.grid.values() for prompt in pool]
        self.teachers, self.routes, self.sources = {}, {}, set()
        if isinstance(cfg, DistillationConfig):
            self.teachers = load_teachers(cfg, model, routed(data, shown.measured))
            self.routes, self.sources = cfg.routes, {*cfg.teachers.values()}
        self.kept_above = {}
        """What `above` made for the first grid, which stays but for the row of a moving average."""
        self.scores, self.cells = "", []
        """The table and its numbers, once there are some."""
        self.scorers = Scorers({}, math.inf, strict=False)
        if shown.splits:
            own = {task: [rewards[spec] for spec in specs_of(text)] for task, text in cfg.rewards.items()}
            self.scorers = Scorers(own, cfg.reward_timeout, strict=False)

    def begin(self, trained: Trained, done: int) -> None:
        """Say what will run, and show what it starts from: of step `done`, what a run that was stopped there
        has not shown."""
        for line in head(self.cfg, trained, self.data):
            say(line)
        known = {name for row in self.folder.metrics() if row["step"] == done for name in row}
        if self.grid_file(done).is_file():
            known.add("grid")
        self.show(trained, done, ranks.gather(known)[0])

    def log(self, row: dict) -> None:
        """A line of metrics.jsonl; its numbers also go to the tracker."""
        self.folder.log(row)
        if self.folder.active:
            self.tracker.log(row)

    def show(self, trained: Trained, done: int, known: set[str] = frozenset()) -> None:
        """What is due after step `done` and not `known`: scores and distances in the log, the student with
        the best scores, the grid, and as often as the run saves a card beside each student and the page."""
        cfg, found = self.cfg, {}
        if "watch" not in known:
            found |= self.watch(trained, done)
        if "distance" not in known:
            found |= self.measure(trained, done)
        if "watch" in found:
            self.folder.save_best(trained, found["watch"])
        if found and done > 0:
            self.log({"step": done} | found)
        if "grid" not in known and due(done, cfg.sample_every, cfg.iterations):
            self.sample_grid(trained, done)
        if done > 0 and due(done, cfg.save_every, cfg.iterations):
            self.write(done)

    def watch(self, trained: Trained, done: int) -> dict:
        """{"watch": the student's score on held-out prompts of every task, trained on or not}, {} where it is
        not due. A scorer that fails costs its score, never the run."""
        cfg = self.cfg
        if isinstance(cfg, SFTConfig) or done == 0 or not due(done, cfg.watch_every, cfg.iterations):
            return {}
        rows = {STUDENT: Row(self.model.trained, sampling_of(cfg, cfg.deployed_guidance()))}
        held_out = self.shown.splits["held-out"]
        with trained.averaged():
            records = self.records(rows, {"held-out": held_out}, cfg.watch_prompts)
        for line in tables.remarks(records, self.scorers.specs()):
            say(f"step {done}: {line}")
        scores = {}
        for task in held_out:
            own = [record for record in records if record.task == task]
            scores[task] = mean_score(own, self.scorers.first[task])
        return {"watch": scores}

    def records(self, rows: dict[str, Row], splits: Splits, count: int) -> list[Record]:
        """`count` pictures per row, split and task, made and scored; no picture is kept (collectives)."""
        cfg = self.cfg
        shared = {"model": cfg.model, "dtype": cfg.dtype, "t5": cfg.t5}
        settings = dict.fromkeys(rows, shared | {"resolution": self.model.resolution})
        batches = planned(rows, splits, settings, count, batch=cfg.micro_batch)
        return score(batches, self.scorers, self.model)

    def above(self) -> dict[str, tuple[list[Tensor], list[str]]]:
        """The rows above the student's in a grid: label -> pictures and marks."""
        cfg = self.cfg
        if cfg.full:
            return {}
        guidance = cfg.deployed_guidance()
        rows = {f"base\nguidance {guidance:g}": self.pictures(BASE, guidance, range(len(self.prompts)))}
        if isinstance(cfg, DistillationConfig):
            rows |= self.taught(cfg)
        return {label: (pictures, self.marks(pictures)) for label, pictures in rows.items()}

    def taught(self, cfg: DistillationConfig) -> dict[str, list[Tensor]]:
        """The row of each prompt's teacher, at the guidance that it teaches with; {} where none has one."""
        names = [main_teacher(cfg, prompt) for prompt in self.prompts]
        white = torch.ones(3, *self.model.pixels)
        row, scales = [white] * len(names), set()
        for name in dict.fromkeys(names):
            if name is None:
                continue
            columns = [column for column, taught in enumerate(names) if taught == name]
            guidance = cfg.guidance_of(name)
            scales.add(f"guidance {guidance:g}")
            pictures = self.pictures(cfg.adapter_of(name), guidance, columns)
            for column, picture in zip(columns, pictures, strict=True):
                row[column] = picture
        if not scales:
            return {}
        label = scales.pop() if len(scales) == 1 else "its guidance"
        return {f"its teacher\n{label}": row}

    def pictures(self, adapter: str, guidance: float, columns: Sequence[int]) -> list[Tensor]:
        """Of these columns of a sample grid, from noise that is the same for every adapter and step."""
        asked = [self.prompts[column].asked for column in columns]
        sampling = Sampling(self.cfg.eval_steps, 0, guidance)
        return list(self.model.images(adapter, asked, columns, sampling))

    def marks(self, images: list[Tensor]) -> list[str]:
        """What the first scorer of each prompt's task says of its picture, if rank 0 asks it; "" where none
        is given (a collective)."""
        marks, first, asked = [""] * len(images), 0, {}
        for task, pool in self.shown.grid.items():
            if self.folder.active and task in self.scorers.of_task:
                mine = torch.stack(images[first : first + len(pool)])
                texts, metadata = [prompt.text for prompt in pool], [prompt.metadata for prompt in pool]
                reward = self.scorers.of_task[task][0]
                asked[first] = reward.start(mine, texts, metadata, self.cfg.reward_timeout)
            first += len(pool)
        signals.wait_until(lambda: all(scoring.is_over() for scoring in asked.values()))
        for first, scoring in asked.items():
            scores = scoring.result()[0].tolist()
            marks[first : first + len(scores)] = [f"{score:.2f}" for score in scores]
        return marks

    def sample_grid(self, trained: Trained, done: int) -> None:
        """The student's pictures under those of the base and of the teachers."""
        guidance = self.cfg.deployed_guidance()
        with trained.averaged():
            mine = self.pictures(trained.model.trained, guidance, range(len(self.prompts)))
        label = f"student, step {done}\nguidance {guidance:g}"
        if not self.kept_above or EMA in self.sources:
            self.kept_above = self.above()
        rows = self.kept_above | {label: (mine, self.marks(mine))}
        if self.folder.active:
            images = {name: pictures for name, (pictures, _) in rows.items()}
            notes = {name: marks for name, (_, marks) in rows.items()}
            sources = source_row(self.prompts, self.model.pixels)
            notes |= {name: [""] * len(cells) for name, cells in sources.items()}
            grid = labelled_grid(sources | images, [prompt.text for prompt in self.prompts], notes=notes)
            save_image(grid, self.grid_file(done))
            self.tracker.picture("samples", grid, done)

    def grid_file(self, done: int) -> Path:
        return self.folder.path / "samples" / f"{done:06d}.png"

    def measure(self, trained: Trained, done: int) -> dict:
        """{"distance": task -> how far the student is from its teacher, in percent of the base}, {} where it
        is not due or there is no teacher."""
        cfg = self.cfg
        if not self.teachers or not due(done, cfg.sample_every, cfg.iterations):
            return {}
        with trained.averaged():
            found = distances(cfg, self.model, self.teachers, self.shown.measured)
        if not found:
            return {}
        words = ", ".join(f"{task} {value:.0f}" for task, value in found.items())
        about = "percent of the base's (0: as the teacher; pictures are as good long before)"
        say(f"step {done}: distance to the teachers in {about}: {words}")
        return {"distance": found}

    def table(self, trained: Trained) -> list[str]:
        """Base, teachers, start and student on every task: table.txt and scores.json; behind them cells.json
        and records.jsonl. An image without a score is left out of its mean; without any the mean is NaN.
        Returns the tasks that have such a mean."""
        cfg = self.cfg
        if isinstance(cfg, SFTConfig) or cfg.full or not cfg.evaluate:
            return []
        rows = rows_of_table(cfg)
        say(f"scoring {', '.join(rows)}")
        with trained.averaged():
            records = self.records(rows, self.shown.splits, cfg.eval_prompts)
        scorers = self.scorers
        self.cells = cells = summarise(records, scorers.specs())
        note = f"n={cfg.eval_prompts} per task, {cfg.eval_steps} ODE steps, seed {cfg.seed}"
        lines = [tables.table(cells, scorers.first, note, labels_of(records), self.routes)]
        self.scores = "\n".join([*lines, *tables.remarks(records, scorers.specs()), *scorers.abouts()])
        say(self.scores)
        if self.folder.active:
            path = self.folder.path
            write_lines(path / LINES, records)
            write_json(path / "cells.json", [asdict(cell) for cell in cells])
            write_json(path / "scores.json", tables.scores_of(cells, scorers.first))
            replace(path / "table.txt", lambda file: file.write_text(self.scores + "\n"))
        return list(dict.fromkeys(cell.task for cell in cells if cell.tag == ALL and cell.n == 0))

    def close(self) -> None:
        """Card and page with all that is known in the end; then the upload, if there is to be one."""
        self.write(self.cfg.iterations)
        if self.folder.active and self.cfg.push:
            say(push_student(self.folder.path / "student", self.cfg.push))

    def write(self, done: int) -> None:
        if not self.folder.active:
            return
        path = self.folder.path
        for student in (path / "student", path / "checkpoints" / f"{done:06d}"):
            if student.is_dir():
                write_card(student, self.cfg, self.model, done, self.scores)
        rows = self.folder.metrics()
        write_page(Run(path, self.cfg, rows, self.cells, self.scorers.first, self.routes, self.scores))


def rows_of_table(cfg: RunConfig) -> dict[str, Row]:
    """Base and start are sampled as the student is, teachers as they taught."""
    deployed = sampling_of(cfg, cfg.deployed_guidance())
    rows = {BASE: Row(BASE, deployed)}
    if isinstance(cfg, DistillationConfig):
        for name in cfg.teachers:
            label, guidance = name, cfg.guidance_of(name)
            if name in cfg.teacher_guidances or name == BASE and guidance != deployed.guidance:
                label = f"{name} g={guidance:g}"
            rows[label] = Row(cfg.adapter_of(name), sampling_of(cfg, guidance))
    if cfg.cold_start != "base":
        rows[START] = Row(START, deployed)
    rows[STUDENT] = Row(STUDENT, deployed)
    return rows


def sampling_of(cfg: RunConfig, guidance: float) -> Sampling:
    return Sampling(cfg.eval_steps, cfg.seed, guidance)
