"""--tracker: numbers and pictures go to TensorBoard or Weights & Biases as well."""

from pathlib import Path

import numpy as np
from PIL import Image

from opd.config import RunConfig
from opd.files import reading
from opd.formats.settings import to_json
from opd.rewards.inputs import need


def check_tracker(name: str) -> None:
    """ValueError where --tracker names a package that is not installed."""
    if name != "none":
        with reading(f"--tracker {name}"):
            need(name, name)


class Tracker:
    """Where rank 0 sends a run's numbers and pictures, if anywhere."""

    def __init__(self, cfg: RunConfig, path: Path):
        self.board = self.wandb = None
        if cfg.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(path / "tensorboard")
        elif cfg.tracker == "wandb":
            import wandb

            self.wandb = wandb.init(project="flow-opd", config=to_json(cfg), dir=path)

    def log(self, row: dict) -> None:
        flat = {key: value for key, value in flatten(row).items() if isinstance(value, int | float)}
        if self.wandb is not None:
            self.wandb.log(flat, step=row["step"])
        if self.board is not None:
            for key, value in flat.items():
                self.board.add_scalar(key, value, row["step"])

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        if self.wandb is not None:
            from wandb import Image as Logged

            self.wandb.log({name: Logged(image)}, step=step)
        if self.board is not None:
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")


def flatten(row: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a/b": 1}."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat
