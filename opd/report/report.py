"""What a run shows of its student: scores on the way, sample grids, and the table at the end."""

from dataclasses import asdict

import torch
from torch import Tensor

from opd import ranks, routing
from opd.config import DistillationConfig, Rollout, RunConfig, SFTConfig
from opd.data import Prompt, fair_sample
from opd.evaluation import tables
from opd.evaluation.records import LINES, Record, write_lines
from opd.evaluation.score import Row, Scorers, Splits, mean_score, planned, score
from opd.evaluation.statistics import ALL, labels_of, summarise
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
from opd.report.start import SHOWN, distances, head
from opd.report.tracker import Tracker
from opd.rewards import Reward, specs_of
from opd.runfolder import RunFolder
from opd.teachers import load_teachers, route_of


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
        self.cfg, self.model, self.data, self.folder = cfg, model, data, folder
        if folder.active:
            self.tracker = Tracker(cfg, folder.path)
        self.shown, self.teachers = {}, {}
        """Task -> the prompts of sample grids, and its teachers."""
        if not isinstance(data, Images):
            self.shown = shown_prompts(cfg, data)
        self.texts = [prompt.text for pool in self.shown.values() for prompt in pool]
        if isinstance(data, Images):
            self.texts = shown_texts(cfg, data)
        if isinstance(cfg, DistillationConfig):
            self.teachers = load_teachers(
                cfg, model, data | {f"{task}, shown": self.shown[task] for task in data}
            )
        self.above: dict[str, list[Tensor]] = {}
        """The rows above the student's in every grid: label -> pictures."""
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

    def begin(self, trained: Trained, done: int) -> None:
        """Say what will run, and show what it starts from. Where a run was killed between saving and showing
        step `done`, show that."""
        cfg = self.cfg
        for line in head(cfg, trained, self.data):
            say(line)
        if cfg.sample_every > 0:
            self.above = self.rows_above()
            file = self.folder.path / "samples" / f"{done:06d}.png"
            lacking = torch.tensor(float(self.folder.active and not file.is_file()), device=self.model.device)
            shown = done == 0 or due(done, cfg.sample_every, cfg.iterations)
            if shown and ranks.largest(lacking) > 0:
                self.sample_grid(trained, done)
            self.measure(trained, done)
        if done > 0:
            self.show(done)

    def rows_above(self) -> dict[str, list[Tensor]]:
        """The pictures of the base, and of each prompt's teacher (of several, the one that counts most) at
        the guidance that it teaches with."""
        cfg, everything = self.cfg, range(len(self.texts))
        if cfg.full:
            return {}
        guidance = cfg.deployed_guidance()
        rows = {f"base\nguidance {guidance:g}": self.pictures(BASE, guidance, list(everything))}
        if isinstance(cfg, DistillationConfig):
            taught = []
            for prompt in (prompt for pool in self.shown.values() for prompt in pool):
                shares = routing.shares(route_of(cfg, prompt), "route")
                taught.append(max(shares, key=lambda name: shares[name]))
            made = {}
            for name in dict.fromkeys(taught):
                adapter = name if name in self.model.teachers else cfg.adapter_of(name)
                columns = [column for column in everything if taught[column] == name]
                pictures = self.pictures(adapter, cfg.guidance_of(name), columns)
                made |= dict(zip(columns, pictures, strict=True))
            scales = {f"{cfg.guidance_of(name):g}" for name in taught}
            label = f"guidance {scales.pop()}" if len(scales) == 1 else "its guidance"
            rows[f"its teacher\n{label}"] = [made[column] for column in everything]
        return rows

    def pictures(self, adapter: str, guidance: float, columns: list[int]) -> list[Tensor]:
        """Of these columns of a sample grid, from noise that is the same for every adapter and step."""
        model = self.model
        if adapter in model.teachers:  # it has a transformer of its own
            model, adapter = model.teachers[adapter], BASE
        texts = [self.texts[column] for column in columns]
        return list(model.images(adapter, texts, columns, Sampling(self.cfg.eval_steps, 0, guidance)))

    def marks(self, images: list[Tensor]) -> list[str]:
        """What the first scorer of each prompt's task says of its picture; "" where none is given."""
        found = []
        for task, pool in self.shown.items():
            mine = torch.stack(images[len(found) : len(found) + len(pool)])
            if not is_scored(self.cfg) or task not in self.scorers.of_task:
                found += [""] * len(pool)
                continue
            metadata = [prompt.metadata for prompt in pool]
            reward = self.scorers.of_task[task][0]
            scores, _, _ = reward.start(
                mine, [p.text for p in pool], metadata, self.cfg.reward_timeout
            ).result()
            found += [f"{score:.2f}" for score in scores.tolist()]
        return found or [""] * len(images)

    def sample_grid(self, trained: Trained, done: int) -> None:
        """samples/STEP.png: the student's pictures under those of the base and of the teachers."""
        guidance = self.cfg.deployed_guidance()
        with trained.averaged():
            mine = self.pictures(trained.model.trained, guidance, list(range(len(self.texts))))
        if self.folder.active:
            rows = self.above | {f"student, step {done}\nguidance {guidance:g}": mine}
            notes = {name: self.marks(images) for name, images in rows.items()}
            grid = labelled_grid(rows, self.texts, notes=notes)
            save_image(grid, self.folder.path / "samples" / f"{done:06d}.png")
            self.tracker.picture("samples", grid, done)

    def measure(self, trained: Trained, done: int) -> dict:
        """{"distance": task -> how far the student is from its teacher, in percent of the base}, {} where it
        is not due or there is no teacher."""
        cfg = self.cfg
        if not self.teachers or not (done == 0 or due(done, cfg.sample_every, cfg.iterations)):
            return {}
        with trained.averaged():
            found = distances(cfg, self.model, self.teachers, self.shown)
        if not found:
            return {}
        words = ", ".join(f"{task} {value:.0f}" for task, value in found.items())
        say(f"step {done}: distance to the teachers in percent of the base's: {words}")
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
            records = self.records(rows, self.splits, cfg.eval_prompts)
        scorers = self.scorers
        cells = summarise(records, scorers.specs())
        note = f"n={cfg.eval_prompts} per task, {cfg.eval_steps} ODE steps, seed {cfg.seed}"
        routes = cfg.routes if isinstance(cfg, DistillationConfig) else {}
        lines = [tables.table(cells, scorers.first, note, labels_of(records), routes=routes)]
        self.scores = "\n".join([*lines, *tables.remarks(records, scorers.specs()), *scorers.abouts()])
        say(self.scores)
        if self.folder.active:
            path = self.folder.path
            write_lines(path / LINES, records)
            write_json(path / "cells.json", [asdict(cell) for cell in cells])
            write_json(path / "scores.json", tables.scores_of(cells, scorers.first))
            replace(path / "table.txt", lambda file: file.write_text(self.scores + "\n"))
        return list(dict.fromkeys(cell.task for cell in cells if cell.tag == ALL and cell.n == 0))

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


def shown_prompts(cfg: RunConfig, data: dict[str, list[Prompt]]) -> dict[str, list[Prompt]]:
    """What sample grids show of every task that is trained on, nine prompts in all: held-out ones where there
    are some, at a fixed stride, so that files sorted by kind show every kind."""
    pools = data
    if isinstance(cfg, Rollout) and cfg.heldout:
        pools = data | load_tasks(cfg.heldout)
    count = max(1, SHOWN // len(data))
    return {task: pools[task][:: max(1, len(pools[task]) // count)][:count] for task in data}


def is_scored(cfg: RunConfig) -> bool:
    """Whether the run compares prompts with scorers, on the way or at the end."""
    return not isinstance(cfg, SFTConfig) and (cfg.evaluate or cfg.watch_every > 0)


def splits(cfg: RunConfig, data: dict[str, list[Prompt]]) -> Splits:
    """The prompts of the table: of each task those held out or, where there are none, those of training."""
    found = {"train": {task: pool for task, pool in data.items() if task not in cfg.heldout}}
    if cfg.heldout:
        found["held-out"] = load_tasks(cfg.heldout)
    return {split: pools for split, pools in found.items() if pools}


def shown_texts(cfg: RunConfig, data: dict[str, list[Prompt]] | Images) -> list[str]:
    """Every text that a report will need: those of the grids and, where the run is scored, of the table."""
    if isinstance(data, Images):
        return list(dict.fromkeys(data.captions))[:SHOWN]
    texts = [prompt.text for pool in shown_prompts(cfg, data).values() for prompt in pool]
    if is_scored(cfg):
        count = max(cfg.eval_prompts * cfg.evaluate, cfg.watch_prompts * (cfg.watch_every > 0))
        for pools in splits(cfg, data).values():
            for pool in pools.values():
                texts += [prompt.text for _, prompt in fair_sample(pool, count)]
    return texts
