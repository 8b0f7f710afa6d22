"""Records: a JSON line per picture, which says how it was made and what every scorer gave it.

A folder of them holds the pictures as ROW/SPLIT/TASK/NUMBER.png and the lines in records.jsonl, sorted by
file, so that any number of ranks writes the same. While scoring goes on every rank appends to a part of its
own; a run that was killed leaves parts, which the next one takes over.
"""

import base64
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from opd import ranks
from opd.data import Asked, Prompt, asked_of
from opd.files import digest, path_of, reading, writing
from opd.files import replace as replace_file
from opd.formats.latents import find_files, load_captions
from opd.formats.pictures import read_image, save_image, to_pil, to_tensor

LINES = "records.jsonl"
THUMBNAIL = 8  # pixels per side


@dataclass(frozen=True)
class Record:
    file: str
    """Of the picture, seen from the folder; what a record is known by, even where no picture is kept."""
    row: str  # of the table: a name for model, adapter and guidance
    split: str
    task: str
    tag: str  # the prompt's kind within its task (GenEval: counting, position, ...), "" without one
    prompt: str
    metadata: dict  # the other fields of the prompt's line
    index: int  # the picture's noise is a function of (seed, index)
    seed: int
    settings: dict  # how it was sampled
    sources: list[str] = field(default_factory=list)
    """Paths of the source pictures of an edit."""
    thumbnail: str = ""  # 8 x 8 pixels, RGB bytes in base64: what diversity is measured on
    scores: dict[str, float | None] = field(default_factory=dict)
    """Scorer -> its raw value; null where it gave none."""
    reasons: dict[str, str] = field(default_factory=dict)  # scorer -> why it gave none

    @property
    def asked(self) -> Asked:
        return asked_of(self.prompt, tuple(self.sources))

    def lacks(self, scorer: str) -> bool:
        return self.scores.get(scorer) is None

    def changes_from(self, known: "Record") -> dict[str, tuple]:
        """Name -> (before, now) of what makes another picture of the same file, as far as both say it."""
        before = known.settings | {"seed": known.seed, "prompt": known.asked}
        now = self.settings | {"seed": self.seed, "prompt": self.asked}
        both = [name for name in before if name in now]
        return {name: (before[name], now[name]) for name in both if before[name] != now[name]}

    def with_scores_of(self, known: "Record") -> "Record":
        """This record with the scores of a known one, if scorers would see the same picture and metadata."""
        if self.changes_from(known) or self.metadata != known.metadata:
            return self
        return replace(self, thumbnail=known.thumbnail, scores=known.scores, reasons=known.reasons)

    def scored(self, scorer: str, value: float | None, reason: str = "") -> "Record":
        """This record with one more value, or the reason why there is none."""
        reasons = {name: text for name, text in self.reasons.items() if name != scorer}
        if reason:
            reasons[scorer] = reason
        return replace(self, scores=self.scores | {scorer: value}, reasons=reasons)


def record_of(row: str, split: str, prompt: Prompt, index: int, seed: int, settings: dict) -> Record:
    """The record of a picture that is to be made."""
    place = "/".join(quote(name, safe="= ") for name in (row, split, prompt.task))
    if prompt.pictures:
        settings = settings | {"source sha256": digest_of(prompt.pictures)}
    return Record(
        file=f"{place}/{index:06d}.png",
        row=row,
        split=split,
        task=prompt.task,
        tag="" if prompt.metadata.get("tag") is None else str(prompt.metadata["tag"]),
        prompt=prompt.text,
        metadata=prompt.metadata,
        index=index,
        seed=seed,
        settings=settings,
        sources=list(prompt.pictures),
    )


@cache
def digest_of(pictures: tuple[str, ...]) -> str:
    """Of source pictures: others under the same names make other records."""
    return digest(*map(Path, pictures))


# ---- pictures as numbers -------------------------------------------------------------------------


def in_8_bits(images_BCHW: Tensor) -> Tensor:
    """What a PNG of them holds: scorers see the same whether pictures were just made or are read again."""
    return (images_BCHW.clamp(0, 1) * 255).round() / 255


def thumbnail_of(image_3HW: Tensor) -> str:
    if not image_3HW.isfinite().all():
        return ""
    small = to_pil(image_3HW, 1).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return base64.b64encode(small.tobytes()).decode()


# ---- a folder of them ----------------------------------------------------------------------------


class RecordFolder:
    """Every method that is not about one's own batch is called on all ranks."""

    def __init__(self, path: str):
        self.path = path_of(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{path!r} is a file; name a folder")
        self.part = self.path / f"records.part-{ranks.rank()}.jsonl"

    def merge(self) -> dict[str, Record]:
        """File -> record, of records.jsonl and of every part; the parts become lines of records.jsonl."""
        if ranks.rank() == 0:
            known = read_lines(self.path / LINES)
            parts = sorted(self.path.glob("records.part-*.jsonl"))
            for part in parts:
                known |= read_lines(part, cut=True)
            if parts:
                write_lines(self.path / LINES, [known[name] for name in sorted(known)])
            for part in parts:
                part.unlink()
        ranks.barrier()
        known = read_lines(self.path / LINES)
        ranks.barrier()  # all ranks have seen the same before one of them adds to it
        return known

    def has_picture(self, record: Record) -> bool:
        return (self.path / record.file).is_file()

    def pictures(self, records: list[Record]) -> Tensor:
        """(B, 3, H, W), as they were scored when they were made."""
        return torch.stack([to_tensor(read_image(self.path / record.file)) for record in records])

    def keep(self, records: list[Record], images_BCHW: Tensor) -> None:
        """Save pictures. ValueError for one that is not finite."""
        for record, image in zip(records, images_BCHW, strict=True):
            if not image.isfinite().all():
                what = f"the picture of {record.row!r} for {record.prompt!r}"
                raise ValueError(f"{what} is not finite; try --dtype float32")
            save_image(to_pil(image, 1), self.path / record.file)

    def append(self, records: list[Record]) -> None:
        """Lines of this rank's part, on disk when this returns."""
        self.path.mkdir(parents=True, exist_ok=True)
        with writing(self.part), open(self.part, "a") as file:
            file.write(lines_of(records))


def lines_of(records: list[Record]) -> str:
    return "".join(json.dumps(asdict(record)) + "\n" for record in records)


def write_lines(file: Path, records: list[Record]) -> None:
    replace_file(file, lambda path: path.write_text(lines_of(records)))


def read_lines(file: Path, cut: bool = False) -> dict[str, Record]:
    """File -> record; {} where there is no such file. `cut`: a kill may have left half a line at the end,
    which is then left out. ValueError naming the line that is none."""
    if not file.is_file():
        return {}
    lines = file.read_text().split("\n")
    if cut:
        lines.pop()
    known = {}
    for number, line in enumerate(lines, 1):
        if line:
            with reading(f"{file}:{number}: no record"):
                record = Record(**json.loads(line))
            known[record.file] = record
    return known


# ---- pictures that someone else made ---------------------------------------------------------------


def read_pictures(folder: RecordFolder) -> list[Record]:
    """Those that were made here, and those of metadata.jsonl: a line each with "file_name" and "prompt", also
    row, split, task, tag, and image, an edit's source. Without that file all that records.jsonl knows
    (collectives).

    FileNotFoundError for missing pictures; ValueError where nothing is known, or for a wrong line.
    """
    known = folder.merge()
    records = list(known.values())
    if not known or (folder.path / "metadata.jsonl").is_file():
        records = [record for record in records if made_here(record)]
        prompts = load_captions(folder.path)
        files = find_files(folder.path, prompts)
        for index, (prompt, picture) in enumerate(zip(prompts, files, strict=True)):
            file, settings = prompt.metadata.pop("file_name"), {"picture sha256": digest(picture)}
            place = {"row": folder.path.name or "pictures", "split": "pictures"}
            for name in place.keys() & prompt.metadata.keys():
                place[name] = str(prompt.metadata.pop(name))
            record = record_of(place["row"], place["split"], prompt, index, seed=0, settings=settings)
            record = replace(record, file=file)
            if file not in known:
                records.append(record)
            elif not made_here(known[file]):
                records.append(record.with_scores_of(known[file]))
    missing = [record.file for record in records if not folder.has_picture(record)]
    if missing:
        count = f"{len(missing)} of {len(records)} pictures"
        raise FileNotFoundError(f"{folder.path}: {count} are missing: {', '.join(missing[:3])}")
    return records


def made_here(record: Record) -> bool:
    """Whether it says how its picture was sampled."""
    return "steps" in record.settings


def sized_alike(folder: Path, records: list[Record], size: int) -> list[list[Record]]:
    """Lists of at most `size`, each of one row, split and task, and of pictures of one size."""
    groups = {}
    for record in sorted(records, key=lambda record: record.file):
        with reading(f"image {str(folder / record.file)!r}"), Image.open(folder / record.file) as image:
            key = (record.row, record.split, record.task, image.size)
        groups.setdefault(key, []).append(record)
    return [piece for group in groups.values() for piece in pieces(group, size)]


def pieces(records: list[Record], size: int) -> list[list[Record]]:
    return [records[start : start + size] for start in range(0, len(records), size)]
