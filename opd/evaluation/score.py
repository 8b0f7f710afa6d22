"""Pictures for the rows of a table, made and scored: what opd.evaluation and a run's report share.

A batch is scored while the next one is made. The batches are the same whatever the number of ranks and are
dealt to them whole, so pictures and scores are the same bits on any number.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from opd import ranks, signals
from opd.data import Pools, Prompt, alike, fair_sample
from opd.evaluation.records import Record, RecordFolder, in_8_bits, pieces, record_of, thumbnail_of
from opd.files import reading, remove_temporaries
from opd.formats.pictures import sizes
from opd.lora import BASE
from opd.model import Model, Sampling
from opd.rewards import Reward
from opd.rewards.scoring import Scoring

Splits = dict[str, Pools]  # split -> task -> prompts


@dataclass(frozen=True)
class Row:
    """What makes the pictures of a row of the table."""

    adapter: str
    sampling: Sampling


@dataclass(frozen=True)
class Batch:
    """Pictures of one row, split and task, which are made and scored together."""

    records: list[Record]
    row: Row | None  # what makes them; None: they lie in the folder of records


# ---- what is to be made --------------------------------------------------------------------------


def planned(
    rows: dict[str, Row],
    splits: Splits,
    settings: dict[str, dict],
    count: int,
    per_prompt: int = 1,
    batch: int = 128,
) -> list[Batch]:
    """The batches, of at most `batch` pictures, of all rows, splits and tasks, in order: `count` pictures of
    each task and split, `per_prompt` of a prompt (data.fair_sample); those of a batch have source pictures of
    the same sizes. `settings`: row -> what its records say about the model."""
    batches = []
    for name, row in rows.items():
        sampling = row.sampling
        made = {"adapter": row.adapter, "guidance": sampling.guidance, "steps": sampling.steps}
        made |= settings[name]
        for split, pools in splits.items():
            for pool in pools.values():
                sample = fair_sample(pool, count, per_prompt)
                records = [record_of(name, split, prompt, n, sampling.seed, made) for n, prompt in sample]
                for numbers in alike(source_sizes(records)):
                    own = [records[n] for n in numbers]
                    batches += [Batch(piece, row) for piece in pieces(own, batch)]
    return batches


def source_sizes(records: list[Record]) -> dict[int, str]:
    """By their numbers. ValueError naming a picture that cannot be read."""
    found = {}
    for n, record in enumerate(records):
        with reading(f"source pictures {record.sources}"):
            found[n] = sizes(record.asked)
    return found


def with_known(batches: list[Batch], folder: RecordFolder) -> list[Batch]:
    """The batches in their order (collectives). One that lies in `folder` in part is split: what is known
    keeps its scores, and no picture is made twice. ValueError for a picture that was made otherwise."""
    if ranks.rank() == 0:
        remove_temporaries(folder.path)
    known = folder.merge()
    for record in (record for batch in batches for record in batch.records if record.file in known):
        check_same(known[record.file], record, folder)

    def is_there(record: Record) -> bool:
        return record.file in known and folder.has_picture(record)

    filled = []
    for batch in batches:
        for there, records in groupby(batch.records, is_there):
            if there:
                filled.append(Batch([record.with_scores_of(known[record.file]) for record in records], None))
            else:
                filled.append(Batch(list(records), batch.row))
    ranks.barrier()  # all ranks have looked at the folder before one of them adds to it
    return filled


def check_same(known: Record, wanted: Record, folder: RecordFolder) -> None:
    """ValueError unless a picture that is there already was made as it would be now."""
    changed = wanted.changes_from(known)
    if changed:
        changes = ", ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in changed.items())
        other = f"{folder.path} holds {known.file} made otherwise: {changes}"
        raise ValueError(f"{other}; choose another --records, or delete that folder")


# ---- making and scoring --------------------------------------------------------------------------


def score(
    batches: list[Batch], scorers: "Scorers", model: Model | None = None, folder: RecordFolder | None = None
) -> list[Record]:
    """All records of `batches`, in their order, with all their scores (collectives). What is new is written
    into `folder` as soon as it is known."""
    todo = [batch for batch in batches if batch.row or scorers.lacking(batch.records)]
    new, started = [], ([], [])
    hidden = True if ranks.rank() > 0 or len(todo) < 3 else None  # None: where there is no terminal
    turns = list(dealt(todo, model.teachers if model else ()))
    for batch, counts in tqdm(turns, desc="score", disable=hidden, leave=False):
        images_BCHW = pictures(batch, model, folder)
        new += scorers.collect(started, folder)
        started = scorers.start(batch.records, images_BCHW) if counts else ([], [])
    new += scorers.collect(started, folder)
    scored = {record.file: record for part in ranks.gather(new) for record in part}
    if folder is not None:
        folder.merge()
    return [scored.get(record.file) or record for batch in batches for record in batch.records]


def dealt(batches: list[Batch], teachers: Collection[str]) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, and whether each counts. In one turn all ranks run the same transformer
    (collectives must match): the student's, or that of one of `teachers`, which have their own. What a rank
    has too few of are repetitions, which enter nothing."""
    groups = {}
    for batch in batches:
        groups.setdefault(transformer_of(batch, teachers), []).append(batch)
    for group in groups.values():
        for turn in range(math.ceil(len(group) / ranks.world())):
            place = turn * ranks.world() + ranks.rank()
            yield group[min(place, len(group) - 1)], place < len(group)


def transformer_of(batch: Batch, teachers: Collection[str]) -> str:
    """A name for what makes the pictures; "" where they are read."""
    if batch.row is None:
        return ""
    return batch.row.adapter if batch.row.adapter in teachers else BASE


def pictures(batch: Batch, model: Model | None, folder: RecordFolder | None) -> Tensor:
    """(B, 3, H, W), rounded as a PNG rounds them: made and kept in the folder, or read from there
    (collectives where the model is sharded)."""
    if batch.row is None:
        return folder.pictures(batch.records)
    prompts, index = [[getattr(record, name) for record in batch.records] for name in ("asked", "index")]
    images_BCHW = in_8_bits(model.images(batch.row.adapter, prompts, index, batch.row.sampling))
    if folder is not None:
        folder.keep(batch.records, images_BCHW)
    return images_BCHW


# A batch whose scores are under way: its records, and each scorer with the positions that it was asked about
# and its answer to come.
Started = tuple[list[Record], list[tuple[Reward, list[int], Scoring]]]


class Scorers:
    """The scorers of every task. With `strict` one that has never answered ends the command, before hours are
    spent on it; else, and later, a picture without a score is counted and has a reason."""

    def __init__(self, of_task: dict[str, list[Reward]], timeout: float, strict: bool):
        self.of_task, self.timeout, self.strict = of_task, timeout, strict
        self.first = {task: own[0].spec for task, own in of_task.items()}
        """Task -> its own scorer, which makes its mean."""
        self.answered = set()

    def check_metadata(self, prompts: list[Prompt]) -> None:
        """ValueError unless every scorer of its task can score every prompt."""
        for task, own in self.of_task.items():
            for scorer in own:
                scorer.check_metadata(task, [prompt for prompt in prompts if prompt.task == task])

    def load(self, device: torch.device) -> None:
        for scorer in self.each():
            scorer.load(device)

    def attempt(self, prompts: list[Prompt], pixels: tuple[int, int]) -> None:
        """Call every scorer once per task on grey images, before hours are spent on better ones."""
        for task, own in self.of_task.items():
            for scorer in own:
                scorer.check(task, [prompt for prompt in prompts if prompt.task == task], pixels)

    def lacking(self, records: list[Record]) -> bool:
        """Whether a record still lacks a score."""
        return any(record.lacks(own.spec) for record in records for own in self.of_task[record.task])

    def start(self, records: list[Record], images_BCHW: Tensor) -> Started:
        """Ask every scorer of the batch's task about the pictures that it has not scored."""
        asked = []
        for scorer in self.of_task[records[0].task]:
            places = [i for i, record in enumerate(records) if record.lacks(scorer.spec)]
            if places:
                prompts = [records[i].prompt for i in places]
                metadata = [records[i].metadata for i in places]
                answer = scorer.start(images_BCHW[places], prompts, metadata, self.timeout)
                asked.append((scorer, places, answer))
        thumbnails = map(thumbnail_of, images_BCHW)
        shown = [replace(record, thumbnail=t) for record, t in zip(records, thumbnails, strict=True)]
        return shown, asked

    def collect(self, started: Started, folder: RecordFolder | None) -> list[Record]:
        """Wait for the scores (a collective): the batch's records with them, written into `folder`."""
        records, asked = started
        signals.wait_until(lambda: all(answer.is_over() for *_, answer in asked))
        for scorer, places, answer in asked:
            scores_B, reasons, _ = answer.result()
            self.check(scorer, records[0], len(places), list(reasons.values()))
            for position, place in enumerate(places):
                if position in reasons:
                    records[place] = records[place].scored(scorer.spec, None, reasons[position])
                else:
                    records[place] = records[place].scored(scorer.spec, scores_B[position].item())
        if folder is not None and records:
            folder.append(records)
        return records

    def check(self, scorer: Reward, record: Record, count: int, reasons: list[str]) -> None:
        """ValueError for a scorer that has never answered, where that ends the command."""
        if len(reasons) < count:
            self.answered.add(scorer.spec)
        if self.strict and scorer.spec not in self.answered:
            missing = f"no score for {count} of {count} images of {record.row!r}: {'; '.join(reasons[:3])}"
            raise ValueError(f"task {record.task!r}: reward {scorer.spec!r} gave {missing}")

    def specs(self) -> list[str]:
        return list(dict.fromkeys(scorer.spec for scorer in self.each()))

    def abouts(self) -> list[str]:
        """What every scorer states about itself, a line each."""
        lines = {f"{name}: {about}": None for scorer in self.each() for name, about in scorer.about.items()}
        return list(lines)

    def each(self) -> list[Reward]:
        return [scorer for own in self.of_task.values() for scorer in own]


def mean_score(records: list[Record], scorer: str) -> float:
    """Over the pictures that have one; NaN if none has."""
    values = [record.scores[scorer] for record in records if not record.lacks(scorer)]
    return sum(values) / len(values) if values else math.nan
