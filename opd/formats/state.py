"""The state that a run resumes from: safetensors files of torch.distributed.checkpoint in state/STEP/.

Every rank writes what it alone holds, and any number of ranks goes on from it. At any moment one state is
whole.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from opd import ranks
from opd.errors import require
from opd.files import LARGE, digest, read_json, write_json

STATE = "state"
DIGESTS = "digests.json"  # of the files of a state: what is missing or changed would go unseen


def latest_state(path: Path) -> int:
    """Steps done in the last whole state of a run folder; 0 if there is none."""
    return max([int(folder.name) for folder in whole_states(path)], default=0)


def whole_states(path: Path) -> list[Path]:
    return numbered(path / STATE)


def numbered(folder: Path, ending: str = "") -> list[Path]:
    """What a run has named by a step, such as 000020.png, rising; not what a user has copied to 000020.bak,
    or called 7.png."""
    steps = [path for path in folder.glob(f"*{ending}") if re.fullmatch(rf"\d{{6,}}{ending}", path.name)]
    return sorted(steps, key=lambda path: int(path.stem))


@contextmanager
def one_thread() -> Iterator[None]:
    """DCP writes in threads of its own. With a team of OpenMP threads each, which stay, libgomp counts more
    threads than cores and lets none spin: every step after the first save would take 1.7 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_state(path: Path, done: int, tensors: dict[str, Tensor]) -> None:
    """Write state/DONE, then delete the one before (collectives). OSError where there is no room for it,
    FloatingPointError for numbers from which no step leads on."""
    whole = path / STATE / f"{done:06d}"
    half = whole.with_name(f".{whole.name}.tmp")
    if whole.is_dir():
        return
    bad, way_out = not_finite(tensors), "lower --lr or --weight-decay; the state before is whole"
    if bad:
        raise FloatingPointError(f"after step {done} {bad[0]} holds NaN or infinite numbers; {way_out}")
    ranks.barrier()
    try:
        with one_thread():
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(half), save_distributed=True))
    except (CheckpointException, SafetensorError, OSError) as error:
        shutil.rmtree(half, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{whole} cannot be written ({reason}); the state before is whole") from error
    ranks.barrier()
    if ranks.rank() == 0:
        digests = {}
        for file in sorted(half.iterdir()):
            digests[file.name] = digest(file, most=LARGE)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        write_json(half / DIGESTS, digests)
        half.rename(whole)
        remove_earlier_states(path)
    ranks.barrier()


def remove_earlier_states(path: Path) -> None:
    for folder in whole_states(path)[:-1]:
        shutil.rmtree(folder)


def load_state(path: Path, done: int, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, sharded in any way, from state/DONE (collectives). OSError naming a damaged state, or
    one of other settings."""
    place, student = path / STATE / f"{done:06d}", path / "student"
    try:
        for name, known in read_json(place / DIGESTS).items():
            require(digest(place / name, most=LARGE) == known, f"{name} is not as it was written")
        reader = HuggingFaceStorageReader(str(place))
        stored = {name: kept.size for name, kept in reader.read_metadata().state_dict_metadata.items()}
        apart = misfit(stored, tensors)
        if not apart:
            dcp.load(tensors, storage_reader=reader)
            require(not not_finite(tensors), "NaN or infinite numbers")
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        way_out = f"begin another run from its last student ({student}), or delete the folder"
        raise OSError(f"{place} is damaged ({type(error).__name__}); {way_out}") from error
    if apart:
        way_out = f"go on with the former ones, or choose another --out (and --cold-start {student})"
        raise OSError(f"{place} does not fit these settings: {apart}; {way_out}")


def misfit(stored: dict[str, torch.Size], tensors: dict[str, Tensor]) -> str:
    """The first tensor that a state lacks, or has in another shape; "" where it fits."""
    for name, tensor in tensors.items():
        if name not in stored:
            return f"it has no {name}"
        if stored[name] != tensor.shape:
            return f"{name} is {tuple(stored[name])} in it, {tuple(tensor.shape)} here"
    return ""


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors with NaN or infinite numbers, one of each rank that has some (collectives)."""
    bad = [name for name, tensor in tensors.items() if not ranks.part(tensor).isfinite().all()]
    return [name for of_rank in ranks.gather(bad[:1]) for name in of_rank]
