"""Folders of pictures as users have them, read as records.

records.jsonl + pictures     ours (opd/evaluation/records.py)
metadata.jsonl + pictures    a line each: "file_name" and "prompt", also row, split, task, tag
00000/metadata.jsonl, 00000/samples/0000.png     GenEval's
samples/PROMPT_000000.png                        T2I-CompBench's
"""

import json
import re
from pathlib import Path

from PIL import Image

from opd.data import numbered_lines
from opd.evaluation.records import LINES, Record
from opd.evaluation.score import pieces
from opd.flags import require

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OWN = ("file_name", "prompt", "row", "split", "task", "tag")


def read_folder(folder: Path, known: dict[str, Record]) -> tuple[list[Record], list[str]]:
    """(a record of every picture, the pictures that nothing is known about).

    `known`: what records.jsonl says. FileNotFoundError for missing pictures; ValueError for a line that is
    wrong, or a folder of which nothing can be told.
    """
    found = {}
    if (folder / "metadata.jsonl").is_file():
        found = read_lines_of_images(folder)
    elif any(folder.glob("*/metadata.jsonl")):
        found = read_geneval(folder)
    elif (folder / "samples").is_dir():
        found = read_compbench(folder)
    records = found | known
    wanted = f"{LINES}, metadata.jsonl, GenEval's 00000/metadata.jsonl or T2I-CompBench's samples/"
    require(
        bool(records), f"--pictures {str(folder)!r}: nothing says what its pictures show; expected {wanted}"
    )
    missing = [file for file in records if not (folder / file).is_file()]
    if missing:
        first = ", ".join(missing[:3])
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(records)} pictures are missing: {first}")
    there = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.suffix in PICTURES]
    return list(records.values()), [file for file in there if file not in records]


def batches_of(folder: Path, records: list[Record], size: int) -> list[list[Record]]:
    """Batches of at most `size`, each of one row, split and task, and of pictures of one size."""
    groups = {}
    for record in sorted(records, key=lambda record: record.file):
        key = (record.row, record.split, record.task, size_of(folder / record.file))
        groups.setdefault(key, []).append(record)
    return [batch for group in groups.values() for batch in pieces(group, size)]


def size_of(file: Path) -> tuple[int, int]:
    """(width, height). ValueError naming a file that is no picture."""
    try:
        with Image.open(file) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"{file}: not a readable picture ({error})") from error


def picture(folder: Path, file: str, task: str, prompt: str, metadata: dict, index: int) -> Record:
    """Of a picture that someone else made."""
    names = {"row": folder.name or "pictures", "split": "pictures", "task": task, "tag": ""}
    for name in names:
        if name in metadata:
            names[name] = str(metadata[name])
    rest = {name: value for name, value in metadata.items() if name not in OWN or name == "tag"}
    return Record(file=file, prompt=prompt, metadata=rest, index=index, seed=0, settings={}, **names)


def read_lines_of_images(folder: Path) -> dict[str, Record]:
    records = {}
    for number, row in objects(folder / "metadata.jsonl"):
        for name in ("file_name", "prompt"):
            text = isinstance(row.get(name), str) and row[name].strip()
            require(bool(text), f'{folder / "metadata.jsonl"}:{number}: no "{name}" on this line')
        file = row["file_name"]
        records[file] = picture(folder, file, "pictures", row["prompt"].strip(), row, number - 1)
    return records


def read_geneval(folder: Path) -> dict[str, Record]:
    """A numbered folder per prompt: its metadata in one line, its pictures in samples/."""
    records = {}
    for file in sorted(folder.glob("*/metadata.jsonl")):
        [(_, row), *more] = objects(file) or [(0, {})]
        text = "prompt" in row and not more
        require(text, f'{file}: expected one line with GenEval\'s metadata and its "prompt"')
        for index, image in enumerate(sorted((file.parent / "samples").glob("*.png"))):
            name = str(image.relative_to(folder))
            records[name] = picture(folder, name, "geneval", row["prompt"].strip(), row, index)
    return records


def read_compbench(folder: Path) -> dict[str, Record]:
    """The prompt is the name of the file."""
    records = {}
    for image in sorted((folder / "samples").glob("*.png")):
        match = re.fullmatch(r"(.+)_(\d{6})", image.stem)
        require(
            match is not None, f"{image}: expected PROMPT_000000.png, as T2I-CompBench names its pictures"
        )
        name = str(image.relative_to(folder))
        records[name] = picture(folder, name, "pictures", match[1], {}, int(match[2]))
    return records


def objects(file: Path) -> list[tuple[int, dict]]:
    """(line number, object) of a .jsonl. ValueError naming the line that is none."""
    rows = []
    for number, line in numbered_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error}); expected one object per line") from error
        require(isinstance(row, dict), f"{file}:{number}: expected an object, got {line[:40]!r}")
        rows.append((number, row))
    return rows
