r"""Score a model and its adapters on every task, on trained and held-out prompts.

    python -m opd.evaluation                                        # the miniature's base and teachers
    python -m opd.evaluation --adapters student=runs/mini/student --out scores.json
    python -m opd.evaluation --model PATH --adapters a=PATH b=PATH \
        --prompts task=FILE --rewards task=module:function,module:another --records FOLDER
    python -m opd.evaluation --pictures FOLDER --scorers jpeg_compressibility     # makes no picture

With --records pictures and a JSON line of each are kept: the same command again goes on after a kill, and
asks only scorers that are new. Scorers are rewards: opd/rewards/__init__.py says what they are and how they
are named. What the numbers of a table are: opd/evaluation/statistics.py.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from opd import adapters, ranks
from opd.data import Prompt, load_tasks
from opd.evaluation import layouts, tables
from opd.evaluation import score as gallery
from opd.evaluation.records import Record, RecordFolder
from opd.evaluation.score import Asked, Batch, Judge, Row, Splits
from opd.evaluation.statistics import summarise
from opd.files import check_folder, digest, write_json
from opd.flags import Texts, at_least_one, not_negative, require, time_limit
from opd.formats.deployment import guidance_of
from opd.formats.lora_files import find_adapter
from opd.model import Model
from opd.presets import DEFAULT
from opd.rewards import Reward


@dataclass(frozen=True)
class Arguments:
    model: str = DEFAULT.model
    """Pipeline directory or Hub id."""
    adapters: Texts = field(default_factory=lambda: dict(DEFAULT.teachers))
    """Name and source of each adapter."""
    base: bool = True
    """Score the base too."""
    prompts: Texts = field(default_factory=lambda: dict(DEFAULT.prompts))
    """Task -> file of prompts that were trained on."""
    heldout: Texts = field(default_factory=lambda: dict(DEFAULT.heldout))
    """Task -> file of prompts never trained on."""
    rewards: Texts = field(default_factory=lambda: dict(DEFAULT.rewards))
    """Task -> its scorers, with commas between them: module:function_or_class, a short name, or a sum like
    0.7*a:b+0.3*c:d. The first is the task's own and makes the mean."""
    scorers: tuple[str, ...] = ()
    """Further scorers, asked about the pictures of every task."""
    reward_timeout: float = 60.0
    """Seconds after which a call of a scorer is given up."""
    count: int = 256
    """Images per task and split; 0 = every prompt, --per-prompt times."""
    per_prompt: int = 1
    """Images of one prompt, each from its own noise."""
    steps: int = 10
    """ODE steps."""
    guidance: tuple[float, ...] = ()
    """Guidance of every model; several: a row for each. None: what is recorded with each adapter, 1 where
    nothing is."""
    seed: int = 0
    """Seed of the noise."""
    resolution: str = ""
    """Pixels per side, or HEIGHTxWIDTH. None: what the model was made for."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the transformer computes in: bfloat16, float16, float32, or auto (bfloat16 where the hardware
    multiplies it)."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    batch: int = 128
    """Images per forward pass and call of a scorer."""
    records: str = ""
    """Folder for the pictures and their records; what it holds already is not made again."""
    pictures: str = ""
    """Folder of pictures to score instead of making some: one of --records, one with a metadata.jsonl, or
    laid out for GenEval or T2I-CompBench. Scores are added to its records.jsonl."""
    out: str = ""
    """JSON file for the scores."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        check(args)
        if args.pictures:
            records, scorers = score_folder(args)
        else:
            records, scorers = score_models(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if ranks.rank() == 0:
        publish(args, records, scorers)


# ---- what is asked for --------------------------------------------


def check(args: Arguments) -> None:
    """Every argument that can be judged by itself. ValueError with its value and the flag."""
    at_least_one(args, "per_prompt", "steps", "batch")
    not_negative(args, "count")
    for scale in args.guidance:
        require(math.isfinite(scale), f"--guidance is {scale}; it must be finite")
    time_limit(args, "reward_timeout")
    named = bool(args.prompts) or bool(args.heldout) or bool(args.pictures)
    require(named, "--prompts and --heldout are both empty: give at least one TASK=FILE pair")
    require(args.base or len(args.adapters) > 0, "--no-base without --adapters leaves nothing to score")
    both = bool(args.records) and bool(args.pictures)
    require(not both, "--records makes pictures, --pictures scores some that exist; give one of them")
    if args.out:
        check_writable(args.out)


def check_writable(out: str) -> None:
    """ValueError where a JSON file cannot be put: the work of hours would end in it."""
    path = Path(out)
    regular = path.is_file() or not path.exists()
    require(regular, f"--out {out!r} exists and is not a regular file; name a file such as scores.json")
    check_folder(out, above=True)


def read_splits(args: Arguments) -> Splits:
    """The prompts of those splits that have files."""
    splits = {}
    if args.prompts:
        splits["train"] = load_tasks(args.prompts)
    if args.heldout:
        splits["held-out"] = load_tasks(args.heldout)
    return splits


def rows_of(args: Arguments) -> dict[str, Row]:
    """Base and adapters, each with its guidance; where --guidance names several, each with all of them."""
    names = dict.fromkeys([adapters.BASE, *args.adapters])
    if not args.base:
        names = args.adapters
    if len(args.guidance) < 2:
        scales = guidance_of(args.adapters, *args.guidance)
        return {name: Row(name, scales[name]) for name in names}
    rows = {}
    for name in names:
        for scale in args.guidance:
            rows[f"{name} g={scale:g}"] = Row(name, scale)
    return rows


def scorers_of(args: Arguments, tasks: Iterable[str]) -> dict[str, list[Reward]]:
    """Task -> its scorers: its own, then those of --scorers."""
    wanted = {}
    for task in tasks:
        own = []
        if task in args.rewards:
            own = gallery.specs_of(args.rewards[task])
        specs = dict.fromkeys([*own, *args.scorers])
        fix = f"add --rewards {task}=module:function or --scorers"
        require(bool(specs), f"task {task!r} has no scorer; {fix}")
        wanted[task] = ",".join(specs)
    return gallery.find_scorers(wanted)


def check_prompts(scorers: dict[str, list[Reward]], prompts: list[Prompt]) -> None:
    """ValueError unless every prompt can be scored by every scorer of its task."""
    pools = {}
    for prompt in prompts:
        pools.setdefault(prompt.task, []).append(prompt)
    for task, pool in pools.items():
        for scorer in scorers[task]:
            scorer.check_metadata(task, pool)


def try_scorers(scorers: dict[str, list[Reward]], prompts: list[Prompt], pixels: tuple[int, int]) -> None:
    """Call every scorer once per task on grey images, before hours are spent on better ones."""
    for task, own in scorers.items():
        pool = [prompt for prompt in prompts if prompt.task == task]
        for scorer in own:
            scorer.check(task, pool, pixels)


# ---- making and scoring --------------------------------------------


def score_models(args: Arguments) -> tuple[list[Record], dict[str, list[Reward]]]:
    """The records of all rows, and each task's scorers. Pictures that --records holds are not made again."""
    splits = read_splits(args)
    prompts = [prompt for pools in splits.values() for pool in pools.values() for prompt in pool]
    rows = rows_of(args)
    scorers = scorers_of(args, dict.fromkeys(prompt.task for prompt in prompts))
    check_prompts(scorers, prompts)
    sampling = Asked(args.count, args.steps, args.seed, args.per_prompt, args.batch)
    batches = gallery.planned(rows, splits, sampling, settings_of(args, rows))
    device = ranks.start()
    folder = None
    if args.records:
        folder = RecordFolder(args.records)
        batches = gallery.with_known(batches, folder)
    load(scorers, device)
    model = None
    if any(not record.thumbnail for batch in batches for record in batch):
        model = Model.plan(args.model, args.dtype, args.resolution, device, args.t5)
        lacking = [record for batch in batches for record in batch if not record.thumbnail]
        model.load_with(args.adapters, list(dict.fromkeys(record.prompt for record in lacking)))
        try_scorers(scorers, prompts, model.pixels)

    def pictures(batch: Batch) -> Tensor:
        if batch[0].thumbnail:
            return folder.pictures(batch)
        images_BCHW = gallery.made(model, rows, batch)
        if folder is not None:
            folder.keep(batch, images_BCHW)
        return images_BCHW

    judge = Judge(scorers, args.reward_timeout, strict=True)
    return judge.records(batches, pictures, folder), scorers


def settings_of(args: Arguments, rows: dict[str, Row]) -> dict[str, dict]:
    """Row -> what its records say about the model."""
    shared = {name: getattr(args, name) for name in ("model", "resolution", "dtype", "t5")}
    settings = {}
    for name, row in rows.items():
        settings[name] = shared
        if row.adapter != adapters.BASE:
            source = args.adapters[row.adapter]
            settings[name] = shared | {"source": source, "sha256": digest(find_adapter(source))}
    return settings


def load(scorers: dict[str, list[Reward]], device: torch.device) -> None:
    for own in scorers.values():
        for scorer in own:
            scorer.load(device)


def score_folder(args: Arguments) -> tuple[list[Record], dict[str, list[Reward]]]:
    """The records of --pictures, and each task's scorers. No model is loaded."""
    path = Path(args.pictures).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"--pictures {args.pictures!r}: no such folder")
    device = ranks.start()
    folder = RecordFolder(path)
    records, strangers = layouts.read_folder(path, folder.merge())
    if strangers:
        few = ", ".join(strangers[:3])
        ranks.say(f"{len(strangers)} pictures of {path} are left out, as nothing says what they show: {few}")
    prompts = [Prompt(record.prompt, record.task, record.metadata) for record in records]
    scorers = scorers_of(args, dict.fromkeys(record.task for record in records))
    check_prompts(scorers, prompts)
    load(scorers, device)
    batches = layouts.batches_of(path, records, args.batch)
    try_scorers(scorers, prompts, tuple(folder.pictures(batches[0][:1]).shape[-2:]))
    judge = Judge(scorers, args.reward_timeout, strict=True)
    return judge.records(batches, folder.pictures, folder), scorers


# ---- what comes out --------------------------------------------


def publish(args: Arguments, records: list[Record], scorers: dict[str, list[Reward]]) -> None:
    """Print the table and what must be known of it, and write the file if there is to be one."""
    cells = summarise(records, gallery.divisors_of(scorers))
    first = {task: own[0].spec for task, own in scorers.items()}
    print(tables.table(cells, first, note_of(args, records)))
    for line in [*tables.remarks(cells, records), *gallery.abouts_of(scorers)]:
        print(line)
    if args.out:
        write_json(
            Path(args.out),
            {
                "settings": vars(args),
                "guidance": guidance_used(records),
                "scores": tables.scores_of(cells, first),
                "cells": [asdict(cell) for cell in cells],
                "scorers": gallery.abouts_of(scorers),
            },
        )


def note_of(args: Arguments, records: list[Record]) -> str:
    """How many pictures, and how they were made."""
    if args.pictures:
        return f"{len(records)} pictures of {args.pictures}"
    resolution = args.resolution or "native"
    count = args.count or "all"
    sampling = (
        f"n={count} per-prompt={args.per_prompt} steps={args.steps} guidance={said(guidance_used(records))}"
    )
    return f"{sampling} seed={args.seed} resolution={resolution}"


def guidance_used(records: list[Record]) -> dict[str, float]:
    """Row -> guidance, of those rows of which it is known."""
    return {record.row: record.settings["guidance"] for record in records if "guidance" in record.settings}


def said(scales: dict[str, float]) -> str:
    """One number where all rows share it, else each row's."""
    different = set(scales.values())
    if len(different) == 1:
        return f"{different.pop():g}"
    return ", ".join(f"{name} {scale:g}" for name, scale in scales.items())


if __name__ == "__main__":
    main()
