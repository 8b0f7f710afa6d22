"""Files: finding what the user names, and writing so that nothing saved is ever lost or half-written."""

import hashlib
import json
import math
import operator
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

LARGE = 2**30  # bytes of a file of weights of which the ends tell enough: to hash 24 GB takes a minute
UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


def replace(path: Path, write) -> None:
    """Call `write(temporary_path)`, flush to disk, then rename over `path`; a link there is replaced, not
    followed. The file is as readable as the user's others."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a directory of its own: a killed library may leave a temporary file beside what it writes.
        with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as half:
            temporary = Path(half) / path.name
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~UMASK)
            os.replace(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSError that begins with `path` for whatever keeps it from being written, such as a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error})") from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """ValueError that begins with `what`, such as the name and path of a file, for whatever a library raises
    at the content that it finds there."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        reason = lines[0][:300]
        if not isinstance(error, ValueError | FileNotFoundError):
            reason = f"cannot be read ({type(error).__name__}: {reason})"
        raise ValueError(f"{what}: {reason}") from error


def remove_temporaries(folder: Path) -> None:
    """What `replace` left behind in `folder` and below when its process was killed. For folders of ours."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def digest(*files: Path, most: float = math.inf) -> str:
    """sha256 of what the files hold, one after the other; of one file, what sha256sum prints. Of a file of
    more than `most` bytes only its size and its first and last megabyte count."""
    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as content:
            if size > most:
                whole.update(str(size).encode() + content.read(2**20))
                content.seek(-(2**20), os.SEEK_END)
            while piece := content.read(2**24):
                whole.update(piece)
    return whole.hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {str(value)[:40]!r}")
    return value


def read_metrics(file: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, [] where there is none; a kill may have cut the last. ValueError
    naming a line that is none."""
    if not file.is_file():
        return []
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        with reading(f"{file}: line {number} is none of a run's log, delete it"):
            rows.append(json.loads(line))
            operator.index(rows[-1]["step"])
    return rows


def write_json(path: Path, value) -> None:
    """NaN and infinite numbers, which JSON does not know, become null."""
    text = json.dumps(known_to_json(value), indent=2, allow_nan=False) + "\n"
    replace(path, lambda p: p.write_text(text))


def known_to_json(value):
    if isinstance(value, dict):
        return {name: known_to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [known_to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """One metadata key at most: safetensors writes several in random order, and equal files should be equal
    bytes."""
    replace(path, lambda p: save_file(tensors, p, metadata=metadata or {"format": "pt"}))


def resolve(source: str) -> Path:
    """The local path that `source` names; it need not exist.

    A source that starts with opd/ and is not found from the current directory lies in this package: so the
    presets work from anywhere, and a run resumes in a checkout that has moved.
    """
    path = path_of(source)
    packaged = Path(__file__).parents[1] / source
    if not path.exists() and source.startswith("opd/") and packaged.exists():
        return packaged
    return path


def check_folder(out: str, above: bool = False) -> None:
    """ValueError where --out, or the folder above it, can be no folder that is written into: the nearest
    thing on the way that exists must be one."""
    path = path_of(out).absolute()
    if above:
        path = path.parent
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"--out {out!r}: {str(path)!r} is not a directory; name another place")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = f"{str(path)!r} cannot be written into ({error.strerror})"
        raise ValueError(f"--out {out!r}: {reason}; name another place") from error


def path_of(source: str | Path) -> Path:
    """A path as the user writes it, such as ~/x. ValueError for what no file system can name."""
    text = str(source)
    if "\0" in text or len(text.encode(errors="replace")) > 4096:
        raise ValueError(f"{text[:60]!r} cannot be a path: it holds a NUL byte, or is too long")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text[:60]!r}: there is no such home directory") from error
