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

import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import torch
import tyro

from opd import errors, lora, ranks
from opd.cli import Few, Finite, Range, Seconds, Seed, Texts, check_bounds, emptied, given_fields, known_names
from opd.data import Prompt
from opd.evaluation import tables
from opd.evaluation.records import Record, RecordFolder, read_pictures, sized_alike
from opd.evaluation.score import Batch, Row, Scorers, planned, score, with_known
from opd.evaluation.statistics import labels_of, summarise
from opd.files import LARGE, check_folder, digest, path_of, resolve, write_json
from opd.formats.export import completed, guidance_of
from opd.formats.hub import weight_files
from opd.formats.lora_files import find_adapter
from opd.formats.prompts import load_tasks
from opd.model import Model, Sampling
from opd.presets import DEFAULT
from opd.rewards import find_reward, specs_of


@dataclass(frozen=True)
class Arguments:
    model: str = DEFAULT.model
    """Pipeline directory or Hub id."""
    adapters: Texts = field(default_factory=lambda: dict(DEFAULT.teachers))
    """Name and source of each adapter. With another --model the miniature's are not used, nor are its prompts
    and scorers."""
    base: bool = True
    """Score the base too."""
    prompts: Texts = field(default_factory=lambda: dict(DEFAULT.prompts))
    """Task -> file of prompts that were trained on."""
    heldout: Texts = field(default_factory=lambda: dict(DEFAULT.heldout))
    """Task -> file of prompts never trained on. Given alone, no others are used, and so with --prompts."""
    rewards: Texts = field(default_factory=lambda: dict(DEFAULT.rewards))
    """Task -> its scorers, with commas between them: module:function_or_class, a short name, or a sum like
    0.7*a:b+0.3*c:d. The first is the task's own and makes the mean."""
    scorers: tuple[str, ...] = ()
    """Further scorers, asked about the pictures of every task."""
    reward_timeout: Seconds = 60.0
    """Seconds after which a call of a scorer is given up."""
    count: Annotated[int, Range(0, 10**6)] = 256
    """Images per task and split; 0 = every prompt, --per-prompt times."""
    per_prompt: Few = 1
    """Images of one prompt, each from its own noise."""
    steps: Few = 10
    """ODE steps. Not given: what is recorded with the adapters, 10 where nothing is."""
    guidance: Annotated[tuple[float, ...], Finite] = ()
    """Guidance of every model; several: a row for each. None: what is recorded with each adapter, 1 where
    nothing is."""
    seed: Seed = 0
    """Seed of the noise."""
    resolution: str = ""
    """Pixels per side, or HEIGHTxWIDTH. Not given: what is recorded with the adapters, or the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the transformer computes in: bfloat16, float16, float32, or auto (bfloat16 where the hardware
    has matrix units)."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one. Not given: as recorded with the adapters."""
    batch: Few = 128
    """Images per forward pass and call of a scorer."""
    records: str = ""
    """Folder for the pictures and their records; what it holds already is not made again."""
    pictures: str = ""
    """Folder of pictures to score instead of making some: one of --records, or one with a metadata.jsonl, a
    line each with "file_name" and "prompt". Scores are added to its records.jsonl."""
    out: str = ""
    """JSON file for the scores."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    args = without_the_miniature(args, given_fields(sys.argv[1:] if arguments is None else arguments))
    with errors.in_one_line(ValueError, OSError):
        check(args)
        device = ranks.start()
        if args.pictures:
            records, scorers = score_pictures(args, device)
        else:
            args = completed(args, arguments, ("steps", "resolution", "t5"))
            records, scorers = score_models(args, device)
        if ranks.rank() == 0:
            publish(args, records, scorers)


def score_models(args: Arguments, device: torch.device) -> tuple[list[Record], Scorers]:
    """The records of all rows, and the scorers. Pictures that --records holds are not made again."""
    files = {"train": args.prompts, "held-out": args.heldout}
    splits = {split: load_tasks(own) for split, own in files.items() if own}
    rows = rows_of(args)
    prompts = [prompt for pools in splits.values() for pool in pools.values() for prompt in pool]
    scorers = scorers_of(args, prompts)
    settings = settings_of(args, rows)
    batches = planned(rows, splits, settings, args.count, args.per_prompt, args.batch)
    folder = RecordFolder(args.records) if args.records else None
    if folder is not None:
        batches = with_known(batches, folder)
    scorers.load(device)
    model, asked = None, {record.asked: None for batch in batches if batch.row for record in batch.records}
    if asked:
        model = Model.plan(args.model, args.dtype, args.resolution, device, args.t5)
        model.load_with(args.adapters, list(asked))
        scorers.attempt(prompts, model.pixels)
    return score(batches, scorers, model, folder), scorers


def score_pictures(args: Arguments, device: torch.device) -> tuple[list[Record], Scorers]:
    """The records of --pictures, and the scorers. No model is loaded."""
    folder = RecordFolder(args.pictures)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"--pictures {args.pictures!r}: no such folder")
    records = read_pictures(folder)
    prompts = [Prompt(record.prompt, record.task, record.metadata) for record in records]
    scorers = scorers_of(args, prompts)
    scorers.load(device)
    pieces = sized_alike(folder.path, records, args.batch)
    scorers.attempt(prompts, folder.pictures(pieces[0][:1]).shape[-2:])
    return score([Batch(piece, None) for piece in pieces], scorers, None, folder), scorers


# ---- what is asked for -----------------------------------------------------------------------------


def without_the_miniature(args: Arguments, given: set[str]) -> Arguments:
    """Its adapters, prompts and scorers are defaults of its own model, and of no other's pictures."""
    if args.model != DEFAULT.model:
        return emptied(args, given, "adapters", "prompts", "heldout", "rewards")
    if "pictures" in given:
        return emptied(args, given, "rewards")
    if any(getattr(args, name) for name in given & {"prompts", "heldout"}):
        return emptied(args, given, "prompts", "heldout")
    return args


def check(args: Arguments) -> None:
    """Every argument that can be judged by itself. ValueError with its value and the flag."""
    check_bounds(args)
    lora.check_names("--adapters", args.adapters)
    if not (args.prompts or args.heldout or args.pictures):
        raise ValueError("--prompts and --heldout are both empty: give at least one TASK=FILE pair")
    if not args.base and not args.adapters:
        raise ValueError("--no-base without --adapters leaves nothing to score")
    if args.records and args.pictures:
        raise ValueError("--records makes pictures, --pictures scores some that exist; give one of them")
    if args.out:  # the work of hours would end in a file that cannot be written
        check_folder(args.out, above=True)
        if path_of(args.out).exists() and not path_of(args.out).is_file():
            raise ValueError(f"--out {args.out!r} is not a regular file; name a file such as scores.json")


def rows_of(args: Arguments) -> dict[str, Row]:
    """Base and adapters, each with its guidance; where --guidance names several, each with all of them."""
    names = dict.fromkeys([lora.BASE, *args.adapters])
    if not args.base:
        names = args.adapters
    if len(args.guidance) < 2:
        scales = guidance_of(args.adapters, *args.guidance)
        return {name: Row(name, Sampling(args.steps, args.seed, scales[name])) for name in names}
    every = {f"{name} g={scale:g}": (name, scale) for name in names for scale in args.guidance}
    return {row: Row(name, Sampling(args.steps, args.seed, scale)) for row, (name, scale) in every.items()}


def scorers_of(args: Arguments, prompts: list[Prompt]) -> Scorers:
    """Every task's own scorers, then those of --scorers. ValueError for a prompt that one cannot score."""
    found = {}
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        own = specs_of(args.rewards[task]) if task in args.rewards else []
        specs = dict.fromkeys([*own, *args.scorers])
        if not specs:
            fix = f"add --rewards {task}=module:function or --scorers"
            raise ValueError(f"task {task!r} has no scorer; {fix}")
        found[task] = [find_reward(spec) for spec in specs]
    if args.rewards != DEFAULT.rewards:  # which may have more tasks than are asked for
        known_names("--rewards", args.rewards, "tasks", found)
    scorers = Scorers(found, args.reward_timeout, strict=True)
    scorers.check_metadata(prompts)
    return scorers


def settings_of(args: Arguments, rows: dict[str, Row]) -> dict[str, dict]:
    """Row -> what its records say about the model."""
    shared = {name: getattr(args, name) for name in ("model", "resolution", "dtype", "t5")}
    transformer = resolve(args.model) / "transformer"
    if transformer.is_dir():
        shared["base sha256"] = digest(*weight_files(transformer), most=LARGE)
    settings = {}
    for name, row in rows.items():
        settings[name] = shared
        if row.adapter != lora.BASE:
            source = args.adapters[row.adapter]
            settings[name] = shared | {"source": source, "sha256": digest(find_adapter(source))}
    return settings


# ---- what comes out --------------------------------------------------------------------------------


def publish(args: Arguments, records: list[Record], scorers: Scorers) -> None:
    """Print the table and what must be known of it, and write the file if there is to be one."""
    cells = summarise(records, scorers.specs())
    print(tables.table(cells, scorers.first, note_of(args, records), labels_of(records), whole=True))
    for line in [*tables.remarks(records, scorers.specs()), *scorers.abouts()]:
        print(line)
    if args.out:
        used = [record for record in records if "guidance" in record.settings]
        whole = {
            "settings": vars(args),
            "guidance": {record.row: record.settings["guidance"] for record in used},
            "scores": tables.scores_of(cells, scorers.first),
            "cells": [asdict(cell) for cell in cells],
            "scorers": scorers.abouts(),
        }
        write_json(path_of(args.out), whole)


def note_of(args: Arguments, records: list[Record]) -> str:
    """How many pictures, and how they were made."""
    if args.pictures:
        return f"{len(records)} pictures of {args.pictures}"
    counts = f"n={args.count or 'all'} per-prompt={args.per_prompt} steps={args.steps}"
    return f"{counts} seed={args.seed} resolution={args.resolution or 'native'}"
