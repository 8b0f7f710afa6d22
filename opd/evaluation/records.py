"""Records: a JSON line per picture, which says how it was made and what every scorer gave it.

A folder of them holds the pictures as ROW/SPLIT/TASK/NUMBER.png and the lines in records.jsonl, sorted by
file, so that any number of ranks writes the same. While scoring goes on every rank appends to a part of its
own; a run that was killed leaves parts, which the next one takes over.
"""

import base64
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from opd import ranks
from opd.data import Prompt
from opd.files import replace as replace_file
from opd.flags import require
from opd.formats.pictures import save_image, to_pil

LINES = "records.jsonl"
THUMBNAIL = 8  # pixels per side


@dataclass(frozen=True)
class Record:
    file: str
    """Of the picture, seen from the folder; what a record is known by, even where no picture is kept."""
    row: str
    """Of the table: a name for model, adapter and guidance."""
    split: str
    task: str
    tag: str
    """The prompt's kind within its task (GenEval: counting, position, ...), "" without one."""
    prompt: str
    metadata: dict
    """The other fields of the prompt's line."""
    index: int
    """The picture's noise is a function of (seed, index)."""
    seed: int
    settings: dict
    """How it was sampled."""
    thumbnail: str = ""
    """8 x 8 pixels, RGB bytes in base64: what diversity is measured on."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Scorer -> its raw value; null where it gave none."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Scorer -> why it gave none."""

    def lacks(self, scorer: str) -> bool:
        return scorer not in self.scores or self.scores[scorer] is None

    def scored(self, scorer: str, value: float | None, reason: str) -> "Record":
        """This record with one more value, or the reason why there is none."""
        reasons = {name: text for name, text in self.reasons.items() if name != scorer}
        if reason:
            reasons[scorer] = reason
        return replace(self, scores=self.scores | {scorer: value}, reasons=reasons)


def record_of(row: str, split: str, prompt: Prompt, index: int, seed: int, settings: dict) -> Record:
    """The record of a picture that is to be made."""
    place = "/".join(quote(name, safe="= ") for name in (row, split, prompt.task))
    tag = ""
    if "tag" in prompt.metadata:
        tag = str(prompt.metadata["tag"])
    return Record(
        file=f"{place}/{index:06d}.png",
        row=row,
        split=split,
        task=prompt.task,
        tag=tag,
        prompt=prompt.text,
        metadata=prompt.metadata,
        index=index,
        seed=seed,
        settings=settings,
    )


# ---- pictures as numbers -------------------------------------------------------------------------


def in_8_bits(images_BCHW: Tensor) -> Tensor:
    """What a PNG of them holds: scorers see the same whether pictures were just made or are read again."""
    return (images_BCHW.clamp(0, 1) * 255).round() / 255


def thumbnail_of(image_3HW: Tensor) -> str:
    if not image_3HW.isfinite().all():
        return ""
    small = to_pil(image_3HW, 1).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return base64.b64encode(small.tobytes()).decode()


def read_picture(file: Path) -> Tensor:
    """(3, H, W) float32 in [0, 1]. ValueError naming a file that is no picture."""
    try:
        with Image.open(file) as image:
            data = bytearray(image.convert("RGB").tobytes())
            width, height = image.size
    except OSError as error:
        raise ValueError(f"{file}: not a readable picture ({error})") from error
    pixels_HWC = torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3)
    return pixels_HWC.permute(2, 0, 1).float() / 255


# ---- a folder of them ----------------------------------------------------------------------------


class RecordFolder:
    """Every method that is not about one's own batch is called on all ranks."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        require(self.path.is_dir() or not self.path.exists(), f"{str(path)!r} is a file; name a folder")
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
        ranks.barrier()
        return known

    def has_picture(self, record: Record) -> bool:
        return (self.path / record.file).is_file()

    def pictures(self, batch: list[Record]) -> Tensor:
        """(B, 3, H, W), as they were scored when they were made."""
        return torch.stack([read_picture(self.path / record.file) for record in batch])

    def keep(self, batch: list[Record], images_BCHW: Tensor) -> None:
        """Save pictures. ValueError for one that is not finite."""
        for record, image in zip(batch, images_BCHW, strict=True):
            broken = f"the picture of {record.row!r} for {record.prompt!r} is not finite; try --dtype float32"
            require(bool(image.isfinite().all()), broken)
            save_image(to_pil(image, 1), self.path / record.file)

    def append(self, batch: list[Record]) -> None:
        """Lines of this rank's part, on disk when this returns."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.part, "a") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in batch)


def write_lines(file: Path, records: list[Record]) -> None:
    lines = [json.dumps(asdict(record)) + "\n" for record in records]
    replace_file(file, lambda path: path.write_text("".join(lines)))


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
            record = from_line(line, f"{file}:{number}")
            known[record.file] = record
    return known


def from_line(line: str, where: str) -> Record:
    """ValueError with `where` for a line that is no record."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    wanted = {setting.name for setting in fields(Record)}
    fits = isinstance(values, dict) and values.keys() == wanted
    require(fits, f"{where}: no record; expected an object with {', '.join(sorted(wanted))}")
    return Record(**values)
