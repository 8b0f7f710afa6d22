"""Pictures for the rows of a table, made and scored: what opd.evaluation and a run's reports share.

A batch of pictures is scored while the next is made. The batches are the same whatever the number of ranks
and are dealt to them whole, so pictures and scores are the same bits on any number.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from opd import ranks
from opd.data import Prompt, permutation
from opd.evaluation.records import Record, RecordFolder, in_8_bits, record_of, thumbnail_of
from opd.flags import require
from opd.model import Model, Sampling
from opd.rewards import Reward, find_reward
from opd.rewards.scoring import Scoring

Splits = dict[str, dict[str, list[Prompt]]]  # split -> task -> prompts
Batch = list[Record]


@dataclass(frozen=True)
class Row:
    """What a row of the table is made with."""

    adapter: str
    guidance: float


@dataclass(frozen=True)
class Asked:
    """How many pictures, and how."""

    count: int
    """Pictures per task and split; 0 = every prompt, `per_prompt` times."""
    steps: int
    seed: int
    per_prompt: int = 1
    """Pictures of one prompt, each from its own noise."""
    batch: int = 128


# ---- what is to be made --------------------------------------------------------------------------


def planned(rows: dict[str, Row], splits: Splits, sampling: Asked, settings: dict[str, dict]) -> list[Batch]:
    """The batches of all pictures, in order; each has one row, split and task. `settings`: row -> what its
    records say about how it was sampled."""
    batches = []
    for name, row in rows.items():
        said = {"adapter": row.adapter, "guidance": row.guidance, "steps": sampling.steps} | settings[name]
        for split, pools in splits.items():
            for pool in pools.values():
                records = []
                for index, prompt in cases_of(pool, sampling.count, sampling.per_prompt):
                    records.append(record_of(name, split, prompt, index, sampling.seed, said))
                batches += pieces(records, sampling.batch)
    return batches


def cases_of(pool: list[Prompt], count: int, per_prompt: int = 1) -> list[tuple[int, Prompt]]:
    """`count` (noise index, prompt) pairs over count / per_prompt prompts: each of them once before any
    twice, each time with other noise.

    In a fixed shuffled order, because files are sorted by kind and their first lines are no fair sample.
    """
    order = permutation(len(pool), 0, "evaluate", 0)
    count = count or per_prompt * len(pool)
    prompts = min(len(pool), math.ceil(count / per_prompt))
    return [(index, pool[order[index % prompts]]) for index in range(count)]


def pieces(records: Batch, size: int) -> list[Batch]:
    return [records[start : start + size] for start in range(0, len(records), size)]


def dealt(batches: list[Batch]) -> list[tuple[Batch, bool]]:
    """This rank's batches, and whether each counts: ranks get the same number of them (collectives must
    match), and those that a rank has too few of are repetitions, which enter nothing."""
    mine = []
    for turn in range(math.ceil(len(batches) / ranks.world())):
        place = turn * ranks.world() + ranks.rank()
        counts = place < len(batches)
        mine.append((batches[min(place, len(batches) - 1)], counts))
    return mine


def with_known(batches: list[Batch], folder: RecordFolder) -> list[Batch]:
    """The batches, those whose pictures all lie in `folder` with what is known of them. A batch that is not
    whole is made anew, so that its pictures do not depend on where a run was killed (collectives).
    ValueError for a picture that was made otherwise."""
    known = folder.merge()
    filled = []
    for batch in batches:
        for record in batch:
            if record.file in known:
                check_same(known[record.file], record, folder)
        if all(record.file in known and folder.has_picture(record) for record in batch):
            batch = [known[record.file] for record in batch]
        filled.append(batch)
    ranks.barrier()  # all ranks have seen the same folder before one of them adds to it
    return filled


def check_same(known: Record, wanted: Record, folder: RecordFolder) -> None:
    """ValueError unless a picture that is there already was made as it would be now."""
    before = known.settings | {"seed": known.seed, "prompt": known.prompt}
    now = wanted.settings | {"seed": wanted.seed, "prompt": wanted.prompt}
    changes = []
    for name in before | now:
        if name not in before or name not in now or before[name] != now[name]:
            old = before[name] if name in before else "nothing"
            new = now[name] if name in now else "nothing"
            changes.append(f"{name} {old!r} -> {new!r}")
    way_out = "choose another --records, or delete that folder"
    other = f"{folder.path} holds {known.file} made otherwise: {', '.join(changes)}"
    require(not changes, f"{other}; {way_out}")


def made(model: Model, rows: dict[str, Row], batch: Batch) -> Tensor:
    """The pictures (B, 3, H, W) of a batch, rounded as a PNG rounds them (collectives where the model is
    sharded)."""
    first = batch[0]
    row = rows[first.row]
    images_BCHW = model.images(
        row.adapter,
        [record.prompt for record in batch],
        [record.index for record in batch],
        Sampling(first.settings["steps"], first.seed, row.guidance),
    )
    return in_8_bits(images_BCHW)


# ---- scoring -------------------------------------------------------------------------------------


def specs_of(text: str) -> list[str]:
    """`--rewards TASK=SPEC,SPEC`: the scorers of a task. The first is the task's own, in means and curves."""
    return [spec.strip() for spec in text.split(",")]


def abouts_of(scorers: dict[str, list[Reward]]) -> list[str]:
    """What every scorer states about itself, a line each."""
    lines = {}
    for own in scorers.values():
        for scorer in own:
            for name, about in scorer.about.items():
                lines[name] = f"{name}: {about}"
    return list(lines.values())


def find_scorers(rewards: dict[str, str]) -> dict[str, list[Reward]]:
    """Task -> its scorers, each found once. ValueError naming one that cannot be."""
    found = {}
    for text in rewards.values():
        for spec in specs_of(text):
            if spec not in found:
                found[spec] = find_reward(spec)
    return {task: [found[spec] for spec in specs_of(text)] for task, text in rewards.items()}


def divisors_of(scorers: dict[str, list[Reward]]) -> dict[str, float]:
    """Scorer -> what its raw score is divided by in the paper's averages; 1 for a sum, which has no scale."""
    divisors = {}
    for own in scorers.values():
        for scorer in own:
            divisors[scorer.spec] = scorer.divisor
    return divisors


class Judge:
    """Scores pictures. With `strict` a scorer that has never answered ends the command, before hours are
    spent on it; else, and later, a picture without a score is counted and has a reason."""

    def __init__(self, scorers: dict[str, list[Reward]], timeout: float, strict: bool):
        self.scorers, self.timeout, self.strict = scorers, timeout, strict
        self.answered = set()

    def records(
        self, batches: list[Batch], pictures: Callable[[Batch], Tensor], folder: RecordFolder | None
    ) -> list[Record]:
        """All records of `batches`, in their order, with all their scores (collectives). `pictures` makes or
        reads a batch (B, 3, H, W). What is new is written into `folder` as soon as it is known."""
        todo = [batch for batch in batches if self.is_open(batch)]
        new = []
        running = None
        for batch, counts in dealt(todo):
            images_BCHW = pictures(batch)
            if running is not None:
                new += self.finish(*running, folder)
            running = None
            if counts:
                running = self.start(batch, images_BCHW)
        if running is not None:
            new += self.finish(*running, folder)
        everywhere = ranks.gather([asdict(record) for record in new])
        judged = {values["file"]: Record(**values) for part in everywhere for values in part}
        if folder is not None:
            folder.merge()
        everything = [record for batch in batches for record in batch]
        return [judged[record.file] if record.file in judged else record for record in everything]

    def is_open(self, batch: Batch) -> bool:
        """Whether a picture is still to be made, or lacks a score."""
        for record in batch:
            if not record.thumbnail or any(record.lacks(own.spec) for own in self.scorers[record.task]):
                return True
        return False

    def start(
        self, batch: Batch, images_BCHW: Tensor
    ) -> tuple[Batch, list[tuple[Reward, list[int], Scoring]]]:
        """The batch with its thumbnails, and per scorer the positions that it is asked about."""
        work = []
        for scorer in self.scorers[batch[0].task]:
            places = [i for i, record in enumerate(batch) if record.lacks(scorer.spec)]
            if places:
                prompts = [batch[i].prompt for i in places]
                metadata = [batch[i].metadata for i in places]
                work.append(
                    (scorer, places, scorer.start(images_BCHW[places], prompts, metadata, self.timeout))
                )
        shown = []
        for record, image in zip(batch, images_BCHW, strict=True):
            shown.append(replace(record, thumbnail=thumbnail_of(image)))
        return shown, work

    def finish(
        self, batch: Batch, work: list[tuple[Reward, list[int], Scoring]], folder: RecordFolder | None
    ) -> Batch:
        """The batch with what its scorers said, kept in `folder`."""
        for scorer, places, scoring in work:
            scores, reasons, _ = scoring.result()
            self.check(scorer, batch[0], len(places), reasons)
            for position, place in enumerate(places):
                value, reason = float(scores[position]), ""
                if position in reasons:
                    value, reason = None, reasons[position]
                batch[place] = batch[place].scored(scorer.spec, value, reason)
        if folder is not None:
            folder.append(batch)
        return batch

    def check(self, scorer: Reward, record: Record, count: int, reasons: dict[int, str]) -> None:
        if len(reasons) < count:
            self.answered.add(scorer.spec)
        if not self.strict or scorer.spec in self.answered:
            return
        first = "; ".join(list(reasons.values())[:3])
        missing = f"no score for {len(reasons)} of {count} images of {record.row!r}"
        raise ValueError(f"task {record.task!r}: reward {scorer.spec!r} gave {missing}: {first}")


def mean_score(records: list[Record], scorer: str) -> float:
    """Over the pictures that have one; NaN if none has."""
    values = [record.scores[scorer] for record in records if record.scores[scorer] is not None]
    if not values:
        return math.nan
    return sum(values) / len(values)
