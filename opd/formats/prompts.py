"""Files of prompts: text, JSON lines and CSV."""

import csv
import io
import json
import re
from pathlib import Path

from opd.data import Pools, Prompt
from opd.errors import require
from opd.files import reading, resolve
from opd.formats.pictures import source_pictures

TEXT_KEYS = ("prompt", "text", "caption")
"""The first of these that a line has is its prompt."""


def load_prompts(path: str, task: str, tasks: list[str] | None) -> list[Prompt]:
    """Read `.txt` (one prompt per line), `.jsonl` or `.csv` (a field or column of TEXT_KEYS).

    A "task" field or column overrides `task` and must be among `tasks` (None: any). "image" names a source
    picture, or in JSON a list of them, seen from the file's folder. Every other field becomes metadata.
    ValueError names the file, the line and the fix; FileNotFoundError a source picture that is not there.
    """
    file = resolve(path)
    readers = {".txt": read_txt, ".jsonl": read_jsonl, ".csv": read_csv}
    if file.suffix not in readers:
        raise ValueError(f"prompts {path!r}: unknown ending {file.suffix!r}; use one of {', '.join(readers)}")
    with reading(str(file)):
        content = file.read_text(encoding="utf-8-sig")
    prompts = []
    for number, row in readers[file.suffix](file, content):
        where, own_task = f"{path}:{number}", str(row.pop("task", None) or task)
        texts = [key for key in TEXT_KEYS if isinstance(row.get(key), str)]
        text = row.pop(texts[0]).strip() if texts else ""
        require(text != "", f"{where}: no prompt on this line; give it one under {', '.join(TEXT_KEYS)}")
        # No encoder can take these, and its window may begin hours later.
        odd = re.search("[\0\ud800-\udfff]", text)
        require(not odd, f"{where}: the prompt holds a NUL or half a surrogate pair; save it as plain UTF-8")
        require(
            own_task != "mean", f"{where}: tables call the mean over tasks 'mean'; give the task another name"
        )
        if tasks is not None and own_task not in tasks:
            fix = "add TASK=FILE to --prompts, or correct the line"
            raise ValueError(f"{where}: unknown task {own_task!r}; known tasks: {', '.join(tasks)} ({fix})")
        pictures = source_pictures(row, file.parent, where)
        prompts.append(Prompt(text, own_task, row, where, pictures))
    if not prompts:
        raise ValueError(f"prompts {path!r}: the file holds no prompt")
    return prompts


def lines_of(content: str) -> list[tuple[int, str]]:
    """(number, line) of those that are not blank. Unlike `splitlines`, U+2028 and its like do not end one."""
    return [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def read_txt(file: Path, content: str):
    """(line number, fields), as every reader's."""
    return [(number, {"prompt": line}) for number, line in lines_of(content)]


def read_jsonl(file: Path, content: str):
    """ValueError naming a line that is no object."""
    for number, line in lines_of(content):
        with reading(f"{file}:{number}: not JSON"):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f'{file}:{number}: expected an object like {{"prompt": ...}}, got {line[:40]!r}')
        yield number, row


def read_csv(file: Path, content: str):
    """A blank cell is no field."""
    reader = csv.DictReader(io.StringIO(content, newline=""))
    with reading(f"{file}: not CSV"):
        return [(reader.line_num, {key: row[key] for key in row if row[key]}) for row in reader]


def load_tasks(files: dict[str, str]) -> Pools:
    """All prompts by task. A file may name its lines' tasks itself; every task must end up with prompts."""
    tasks = list(files)
    pools = {task: [] for task in tasks}
    for task, path in files.items():
        for prompt in load_prompts(path, task, tasks):
            pools[prompt.task].append(prompt)
    for task, pool in pools.items():
        others = f"every line of {files[task]!r} names another task"
        require(len(pool) > 0, f"task {task!r} has no prompts: {others}")
    return pools
