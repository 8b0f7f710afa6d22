"""What a run shows of its student: scores on the way, sample grids, and the table at the end."""

from dataclasses import asdict

import torch

from opd import ranks
from opd.config import DistillationConfig, RunConfig, SFTConfig
from opd.data import Prompt, fair_sample
from opd.evaluation import tables
from opd.evaluation.records import LINES, Record, write_lines
from opd.evaluation.score import Row, Scorers, Splits, mean_score, planned, score
from opd.evaluation.statistics import labels_of, summarise
from opd.files import replace, write_json
from opd.formats.latents import Images
from opd.formats.pictures import labelled_grid, save_image
from opd.formats.prompts import load_tasks
from opd.lora import BASE, START, STUDENT
from opd.model import Model, Sampling
from opd.optim import Trained, due
from opd.ranks import say
from opd.report.card import push_student, write_card
from opd.report.page import write_page
from opd.report.tracker import Tracker
from opd.rewards import Reward, specs_of
from opd.runfolder import RunFolder


class Report:
    """Every method is called on all ranks; rank 0 writes into the run folder."""

    def __init__(
        self,
        cfg: RunConfig,
        model: Model,
        data: dict[str, list[Prompt]] | Images,
        rewards: dict[str, Reward],
        folder: RunFolder,
    ):
        self.cfg, self.model, self.folder = cfg, model, folder
        if folder.active:
            self.tracker = Tracker(cfg, folder.path)
        self.texts = fixed_texts(data)
        self.scores = ""
        """The table, once there is one."""
        if is_scored(cfg):
            self.splits = splits(cfg, data)
            own = {task: [rewards[spec] for spec in specs_of(text)] for task, text in cfg.rewards.items()}
            self.scorers = Scorers(own, cfg.reward_timeout, strict=False)

    def log(self, row: dict) -> None:
        """A line of metrics.jsonl; its numbers also go to the tracker."""
        self.folder.log(row)
        if self.folder.active:
            self.tracker.log(row)

    def watch(self, trained: Trained, done: int) -> dict:
        """{"watch": the student's score on held-out prompts of every task, trained on or not}, {} where it is
        not due. A scorer that fails costs its score, never the run."""
        cfg = self.cfg
        if isinstance(cfg, SFTConfig) or not due(done, cfg.watch_every, cfg.iterations):
            return {}
        rows = {STUDENT: Row(self.model.trained, sampling_of(cfg, cfg.deployed_guidance()))}
        held_out = self.splits["held-out"]
        with trained.averaged():
            records = self.records(rows, {"held-out": held_out}, cfg.watch_prompts)
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

    def restore(self, trained: Trained, done: int) -> None:
        """Grid, cards and page of the saved step: a run may have been killed between saving and these."""
        if done == 0:
            return
        file = self.folder.path / "samples" / f"{done:06d}.png"
        lacking = torch.tensor(float(self.folder.active and not file.is_file()), device=self.model.device)
        if due(done, self.cfg.sample_every, self.cfg.iterations) and ranks.largest(lacking) > 0:
            self.sample_grid(trained, done)
        self.show(done)

    def sample_grid(self, trained: Trained, done: int) -> None:
        """The student's images of fixed prompts from fixed noise: samples/STEP.png."""
        with trained.averaged():
            sampling = Sampling(self.cfg.eval_steps, 0, self.cfg.deployed_guidance())
            images = self.model.images(self.model.trained, self.texts, list(range(len(self.texts))), sampling)
        if self.folder.active:
            grid = labelled_grid({f"{done}  guidance {sampling.guidance:g}": list(images)}, self.texts)
            save_image(grid, self.folder.path / "samples" / f"{done:06d}.png")
            self.tracker.picture("samples", grid, done)

    def table(self, trained: Trained) -> None:
        """Base, teachers, start and student on every task, trained and held-out prompts: table.txt and
        scores.json; behind them cells.json and records.jsonl. An image without a score is left out of its
        mean; without any the mean is NaN."""
        cfg = self.cfg
        if isinstance(cfg, SFTConfig) or cfg.full or not cfg.evaluate:
            return
        rows = rows_of_table(cfg)
        say(f"scoring {', '.join(rows)}")
        with trained.averaged():
            records = self.records(rows, self.splits, cfg.eval_prompts)
        scorers = self.scorers
        cells = summarise(records, scorers.specs())
        note = f"n={cfg.eval_prompts} per task and split, {cfg.eval_steps} ODE steps, seed {cfg.seed}"
        lines = [tables.table(cells, scorers.first, note, labels_of(records))]
        self.scores = "\n".join([*lines, *tables.remarks(records, scorers.specs()), *scorers.abouts()])
        say(self.scores)
        if self.folder.active:
            path = self.folder.path
            write_lines(path / LINES, records)
            write_json(path / "cells.json", [asdict(cell) for cell in cells])
            write_json(path / "scores.json", tables.scores_of(cells, scorers.first))
            replace(path / "table.txt", lambda file: file.write_text(self.scores + "\n"))

    def show(self, done: int) -> None:
        """As often as the run saves: a card beside each exported student, and report.html."""
        if due(done, self.cfg.save_every, self.cfg.iterations):
            self.write(done)

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
        write_page(path)


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


# ---- the prompts of a report -----------------------------------------------------------------------


def fixed_texts(data: dict[str, list[Prompt]] | Images) -> list[str]:
    """What the sample grids show: the first prompts of every task, nine in all, or the first nine
    captions."""
    if isinstance(data, Images):
        return list(dict.fromkeys(data.captions))[:9]
    per_task = max(1, 9 // len(data))
    return [prompt.text for pool in data.values() for prompt in pool[:per_task]]


def is_scored(cfg: RunConfig) -> bool:
    """Whether the run compares prompts with scorers, on the way or at the end."""
    return not isinstance(cfg, SFTConfig) and (cfg.evaluate or cfg.watch_every > 0)


def splits(cfg: RunConfig, data: dict[str, list[Prompt]]) -> Splits:
    """The prompts of the table: those of training and, if there are any, those held out."""
    if not cfg.heldout:
        return {"train": data}
    return {"train": data, "held-out": load_tasks(cfg.heldout)}


def shown_texts(cfg: RunConfig, data: dict[str, list[Prompt]] | Images) -> list[str]:
    """Every text that a report will need: those of the grids and, where the run is scored, of the table."""
    texts = fixed_texts(data)
    if is_scored(cfg):
        count = max(cfg.eval_prompts * cfg.evaluate, cfg.watch_prompts * (cfg.watch_every > 0))
        for pools in splits(cfg, data).values():
            for pool in pools.values():
                texts += [prompt.text for _, prompt in fair_sample(pool, count)]
    return texts
