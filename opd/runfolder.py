"""A run folder: config.json, metrics.jsonl, sample grids, curves.png, checkpoints; and resuming from it."""

import dataclasses
import errno
import fcntl
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from opd.config import Config, require
from opd.files import replace, write_json, write_safetensors

FREE = {"iterations", "out", "cache", "log_every", "save_every", "sample_every", "tracker", "evaluate", "rewards", "heldout",
        "eval_prompts", "eval_steps", "dry_run", "shard_size", "max_bad_steps", "reward_timeout", "watch_every",
        "watch_prompts", "cosine_every"}  # may change when a run resumes


class RunFolder:
    """Only the main rank writes (`active`); the others hold the same object and write nothing."""

    def __init__(self, cfg: Config, active: bool):
        self.path, self.active, self.tracker = Path(cfg.out).expanduser(), active, None
        self.tracker_name = cfg.tracker
        try:
            if cfg.tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
            elif cfg.tracker == "wandb":
                import wandb
        except ImportError as error:
            raise ValueError(f'--tracker {cfg.tracker} is not installed: pip install "flow-opd[{cfg.tracker}]"') from error
        if not active:
            return
        self.check_same_run(cfg)
        self.lock()
        write_json(self.path / "config.json", dataclasses.asdict(cfg))
        if cfg.tracker == "tensorboard":
            self.tracker = SummaryWriter(self.path / "tensorboard")
        elif cfg.tracker == "wandb":
            self.tracker = wandb.init(project="flow-opd", config=dataclasses.asdict(cfg), dir=self.path)

    def lock(self) -> None:
        """Hold the folder while this process lives. ValueError if another process does: the two would mix their steps."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.held = open(self.path / "lock", "w")
        try:
            fcntl.lockf(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks is no reason not to train
            require(error.errno not in (errno.EACCES, errno.EAGAIN),
                    f"{self.path} belongs to a run that is still going; stop that run or choose another --out")

    def check_same_run(self, cfg: Config) -> None:
        """ValueError if the folder holds a run with another configuration: resuming it would mix two runs."""
        if not (self.path / "config.json").is_file():
            return
        old, new = json.loads((self.path / "config.json").read_text()), json.loads(json.dumps(dataclasses.asdict(cfg)))
        changed = [k for k in new if k not in FREE and k in old and old[k] != new[k]]
        require(not changed or not (self.path / "state.safetensors").is_file(),
                f"{self.path} holds a run with other settings: " + ", ".join(f"{k} {old[k]!r} -> {new[k]!r}" for k in changed)
                + "; choose another --out, or delete that folder")

    # ---- resuming ----

    def load_state(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(steps done, tensors) of the last checkpoint; (0, {}) for a new run. Metrics past it are dropped."""
        file = self.path / "state.safetensors"
        if not file.is_file():
            self.truncate_metrics(0)
            return 0, {}
        with safe_open(file, "pt") as state:
            step, tensors = int(state.metadata()["step"]), {k: state.get_tensor(k) for k in state.keys()}
        self.truncate_metrics(step)
        return step, tensors

    def truncate_metrics(self, step: int) -> None:
        file = self.path / "metrics.jsonl"
        if self.active and file.is_file():
            lines = file.read_text().splitlines(True)
            keep = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]  # a kill cuts the last
            replace(file, lambda p: p.write_text("".join(keep)))

    def save_state(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        if self.active:
            write_safetensors(self.path / "state.safetensors", tensors, {"step": str(step)})

    # ---- logging ----

    def log(self, row: dict) -> None:
        """Append one line to metrics.jsonl; flat numbers also go to the tracker."""
        if not self.active:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        flat = {k: v for k, v in flatten(row).items() if isinstance(v, (int, float))}
        if self.tracker_name == "wandb":
            self.tracker.log(flat, step=row["step"])
        elif self.tracker_name == "tensorboard":
            for key, value in flat.items():
                self.tracker.add_scalar(key, value, row["step"])

    def metrics(self) -> list[dict]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def curves(self) -> None:
        """curves.png: loss per teacher (stage grpo: rewards and held-out scores) and gradient norm over the steps.
        Needs matplotlib (pip install flow-opd[plot])."""
        if not self.active:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("curves.png skipped: pip install matplotlib to get it")
            return
        rows = [row | {"flat": flatten(row)} for row in self.metrics()]
        keys = sorted({k for row in rows for k in row["flat"]})
        scores = [k for k in keys if k.startswith(("reward/", "watch/"))]
        figure = Figure(figsize=(11, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for key in scores or [k for k in keys if k == "loss" or k.endswith("/loss")]:
            points = [(row["step"], row["flat"][key]) for row in rows if key in row["flat"]]
            left.plot(*zip(*points), label=key.removesuffix("/loss"))
        left.set(xlabel="step", ylabel="score" if scores else "loss, nats per dimension", yscale="linear" if scores else "log")
        left.legend()
        right.plot([r["step"] for r in rows], [r["grad_norm"] for r in rows])
        right.set(xlabel="step", ylabel="gradient norm", yscale="log")
        replace(self.path / "curves.png", lambda p: figure.savefig(p, dpi=110, format="png"))


def flatten(row: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a/b": 1}."""
    flat = {}
    for key, value in row.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


# ---- pictures ------------------------------------------------------------------------------------------------

def to_pil(image_3HW: torch.Tensor, pixels: int) -> Image.Image:
    """[0, 1] float -> RGB, enlarged by a whole factor (nearest) to at least `pixels` per side."""
    array = (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(np.asarray(array))
    factor = max(1, -(-pixels // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def labelled_grid(rows: dict[str, list[torch.Tensor]], columns: list[str], pixels: int = 120) -> Image.Image:
    """One picture: a row of images (3, H, W) per name, a caption above every column."""
    tiles = {name: [to_pil(image, pixels) for image in images] for name, images in rows.items()}
    width, height = next(iter(tiles.values()))[0].size
    left, top, gap = 12 + 7 * max(map(len, rows)), 48, 4
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, caption in enumerate(columns):
        draw.multiline_text((left + c * (width + gap), 4), wrap(caption, max(6, width // 6)), fill="black", spacing=1)
    for r, (name, images) in enumerate(tiles.items()):
        y = top + r * (height + gap)
        draw.text((6, y + height // 2 - 6), name, fill="black")
        for c, image in enumerate(images):
            canvas.paste(image, (left + c * (width + gap), y))
    return canvas


def wrap(text: str, width: int) -> str:
    """At most three lines of `width` characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(line[:width] for line in lines[:3])


def save_image(image: Image.Image, path: Path, info=None) -> None:
    replace(path, lambda p: image.save(p, format="PNG", pnginfo=info))
