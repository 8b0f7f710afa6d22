"""The state of a full fine-tuning: every rank writes and reads its own part, and any number of ranks goes on
from it (torch.distributed.checkpoint). No tensor is gathered."""

import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from opd import ranks

FOLDER = "state"


def latest(run: Path) -> int:
    """Steps done in the last whole state below a run folder; 0 if there is none."""
    return max([int(folder.name) for folder in (run / FOLDER).glob("[0-9]*")], default=0)


def save(run: Path, done: int, tensors: dict[str, Tensor]) -> None:
    """Write state/DONE, then delete the one before: at any moment one of them is whole (collectives)."""
    whole = place(run, done)
    half = whole.with_name(f".{whole.name}.tmp")
    if whole.is_dir():
        return
    ranks.barrier()
    dcp.save(tensors, checkpoint_id=half)
    ranks.barrier()
    if ranks.rank() == 0:
        half.rename(whole)
        for folder in (run / FOLDER).glob("[0-9]*"):
            if folder != whole:
                shutil.rmtree(folder)
    ranks.barrier()


def load(run: Path, done: int, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, sharded in any way, from state/DONE (collectives). OSError naming a damaged state."""
    try:
        dcp.load(tensors, checkpoint_id=place(run, done))
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        way_out = f"copy {run / 'student'} into a pipeline and train that, or delete the folder"
        raise OSError(f"{place(run, done)} is damaged ({type(error).__name__}); {way_out}") from error


def place(run: Path, done: int) -> Path:
    return run / FOLDER / f"{done:06d}"
