"""Files of prompts: text, JSON lines and CSV."""

import csv
import io
import json
import re
from pathlib import Path

from opd.data import Prompt
from opd.files import resolve
from opd.formats.sources import source_pictures

LONGEST = 20_000
"""Characters of a prompt; encoders read some hundred tokens."""


def load_prompts(path: str, task: str, tasks: list[str] | None) -> list[Prompt]:
    """Read `.txt` (one prompt per line), `.jsonl` (objects with "prompt") or `.csv` (column prompt).

    A "task" field or column overrides `task` and must be among `tasks` (None: any). "image" names a source
    picture, or in JSON a list of them, seen from the file's folder. Every other field becomes metadata.
    FileNotFoundError / ValueError name the file, the line and the fix.
    """
    file = resolve(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts of task {task!r}: no file {path!r}")
    readers = {".txt": _read_txt, ".jsonl": read_jsonl, ".csv": _read_csv}
    if file.suffix not in readers:
        raise ValueError(f"prompts {path!r}: unknown ending {file.suffix!r}; use one of {', '.join(readers)}")
    prompts = []
    for number, row in readers[file.suffix](file):
        text, own_task = row.pop("prompt", None), row.pop("task", None) or task
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{path}:{number}: no prompt on this line; give it a non-empty "prompt"')
        require_prompt(text, f"{path}:{number}")
        if tasks is not None and own_task not in tasks:
            raise ValueError(
                f"{path}:{number}: unknown task {own_task!r}; known tasks: {', '.join(tasks)} "
                "(add TASK=FILE to --prompts, or correct the line)"
            )
        pictures = source_pictures(row, file.parent, f"{path}:{number}")
        prompts.append(Prompt(text.strip(), own_task, row, f"{path}:{number}", pictures))
    if not prompts:
        raise ValueError(f"prompts {path!r}: the file holds no prompt")
    return prompts


def require_prompt(text: str, where: str) -> None:
    """ValueError for a text that no encoder can take, or that would keep a tokenizer busy for minutes."""
    if len(text) > LONGEST:
        raise ValueError(f"{where}: a prompt of {len(text)} characters; at most {LONGEST} are read")
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{where}: the prompt holds a NUL or half a surrogate pair; save it as plain UTF-8")


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """(line number, line) of a UTF-8 file, blank lines left out. Unlike `splitlines`, U+2028 and its like do
    not end a line."""
    lines = read_utf8(file).split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_utf8(file: Path) -> str:
    """The text of a file. ValueError naming it where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from error


def _read_txt(file: Path):
    return [(number, {"prompt": line}) for number, line in numbered_lines(file)]


def read_jsonl(file: Path):
    """(line number, object) of every line. ValueError naming the line that is none."""
    for number, line in numbered_lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: not JSON ({error}); expected one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f'{file}:{number}: expected an object like {{"prompt": ...}}, got {line[:40]!r}')
        yield number, row


def _read_csv(file: Path):
    reader = csv.DictReader(io.StringIO(read_utf8(file), newline=""))
    try:
        header = reader.fieldnames or []
        rows = [(reader.line_num, dict(row)) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num + 1}: not CSV ({error})") from error
    if "prompt" not in header:
        raise ValueError(f"{file}:1: no column 'prompt' in the header {header!r:.200}")
    return rows


def load_tasks(files: dict[str, str]) -> dict[str, list[Prompt]]:
    """All prompts by task. A file may name its lines' tasks itself; every task must end up with prompts."""
    tasks = list(files)
    pools = {task: [] for task in tasks}
    for task, path in files.items():
        for prompt in load_prompts(path, task, tasks):
            pools[prompt.task].append(prompt)
    for task, pool in pools.items():
        if not pool:
            raise ValueError(
                f"task {task!r} has no prompts: every line of {files[task]!r} names another task"
            )
    return pools
