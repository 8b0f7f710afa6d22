"""Prompts become text conditions before they are needed: encoded in windows, kept on disk, encoders freed."""

import hashlib
import json
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from opd import ranks
from opd.families import Condition
from opd.files import reading
from opd.flags import require
from opd.text_cache import GB, PACK, TextCache

CACHE_GB = 10.0
LAYOUT = 2  # of what encode_prompts returns: raised where that changes, so that no cache holds both
WINDOW = 2048  # prompts that are encoded ahead at once, where the cache has room for three times as many


class Conditioning:
    """`conditioning(prompts)` -> a Condition per prompt on `device`. `prepare` encodes prompts before;
    `follow` and `ahead` do so window by window along a run."""

    def __init__(
        self,
        family: ModuleType,
        folder: Path,
        cache: str,
        dtype: torch.dtype,
        device: torch.device,
        t5: bool = True,
        cache_gb: float = CACHE_GB,
    ):
        """`cache`: directory of encoded prompts, at most `cache_gb` of them."""
        self.family, self.folder, self.dtype, self.device, self.t5 = family, folder, dtype, device, t5
        root = Path(cache).expanduser()
        self.cache = TextCache(root, root / fingerprint(family, folder, dtype, t5), cache_gb * GB)
        self.shown: list[str] = []
        """What `prepare` was asked for: never deleted."""
        self.needed: set[str] = set()
        """That and the window."""
        self.steps: list[list[str]] = []
        self.end = 0
        """The first step whose prompts are not encoded yet."""

    # ---- encoding ahead ----

    def prepare(self, prompts: list[str]) -> int:
        """Encode what the cache lacks of `prompts` and keep it. Returns how many that were. All ranks."""
        self.shown = list(dict.fromkeys([*self.shown, *prompts]))
        return self.encode_lacking(self.shown)

    def follow(self, steps: list[list[str]]) -> None:
        """The prompts of every step of the run, in order: what `ahead` encodes."""
        self.steps, self.end = steps, 0

    def ahead(self, step: int) -> None:
        """Before a step: where its window begins, encode the prompts of its steps. All ranks, every step."""
        if step < self.end:
            return
        room = self.window()
        window: dict[str, None] = {}
        self.end = step
        while self.end < len(self.steps):
            more = window | dict.fromkeys(self.steps[self.end])
            if len(more) > room and self.end > step:
                break
            window, self.end = more, self.end + 1
        self.encode_lacking([*self.shown, *window])

    def window(self) -> int:
        """How many prompts to encode at once: by what the largest prepared one takes, a third of the cache.
        The same on every rank."""
        largest = max((size(self.read(prompt)) for prompt in self.shown), default=1)
        return min(WINDOW, max(1, int(self.cache.limit / 3 / largest)))

    def encode_lacking(self, prompts: list[str]) -> int:
        """Each rank encodes its share of what the cache lacks; returns how many prompts that were in all."""
        self.needed = set(prompts)
        self.cache.refresh()
        self.cache.touch(prompts)
        self.cache.make_room(0, self.needed)
        lacking = [prompt for prompt in prompts if prompt not in self.cache]
        ranks.barrier()  # all have looked before the first one writes
        self.encode(lacking[ranks.rank() :: ranks.world()])
        ranks.barrier()
        self.cache.refresh()
        return len(lacking)

    def encode(self, prompts: list[str], batch: int = 32) -> None:
        """Write packs with the conditions of `prompts`; the encoders are here for that alone."""
        if not prompts:
            return
        with reading(f"text encoders of {self.folder}"):
            text = self.family.load_text(self.folder, self.dtype, self.device, self.t5)
        packed, used, written = {}, 0, 0
        with tqdm(total=len(prompts), desc="encode prompts", disable=ranks.rank() != 0) as bar:
            for i in range(0, len(prompts), batch):
                piece = prompts[i : i + batch]
                conditions = self.family.encode_prompts(text, piece, self.device)
                for prompt, condition in zip(piece, conditions, strict=True):
                    packed[prompt] = {name: tensor.cpu() for name, tensor in condition.items()}
                    finite = all(bool(tensor.isfinite().all()) for tensor in packed[prompt].values())
                    wrong = f"text encoders of {self.folder}: NaN or infinite numbers for {prompt[:60]!r}"
                    require(finite, f"{wrong}; get their weights anew, or use --dtype float32")
                    used += size(condition)
                if used >= PACK or i + batch >= len(prompts):
                    self.cache.write(packed, self.needed)
                    written += used
                    packed, used = {}, 0
                bar.set_postfix_str(f"{(written + used) / GB:.3g} GB in {self.cache.folder}")
                bar.update(len(piece))
        del text
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- reading ----

    def __call__(self, prompts: list[str]) -> list[Condition]:
        """A prompt that occurs several times is moved to the device once and shared."""
        on_device = {}
        for prompt in dict.fromkeys(prompts):
            condition = self.read(prompt)
            moved = {name: t.to(self.device, non_blocking=True) for name, t in condition.items()}
            on_device[prompt] = moved
        return [on_device[prompt] for prompt in prompts]

    def read(self, prompt: str) -> Condition:
        """On the CPU. One that is damaged, or that another run has deleted, is encoded again here."""
        condition = self.cache.read(prompt)
        if condition is None:
            self.cache.refresh()
            condition = self.cache.read(prompt)
        if condition is None:
            self.encode([prompt])
            condition = self.cache.read(prompt)
        return condition


class TextBatch:
    """The prompts of a micro-batch, and their conditions by encoder: these are made, and moved to the
    encoder's device, once and not at every state."""

    def __init__(self, prompts: list[str]):
        self.prompts = prompts
        self.made: dict[Conditioning, list[Condition]] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def by(self, conditioning: Conditioning) -> list[Condition]:
        """The conditions of all prompts as `conditioning` makes them."""
        if conditioning not in self.made:
            self.made[conditioning] = conditioning(self.prompts)
        return self.made[conditioning]

    def rows(self, rows: list[int]) -> "TextBatch":
        """Some of the prompts, with the conditions that are made so far."""
        part = TextBatch([self.prompts[b] for b in rows])
        for conditioning, conditions in self.made.items():
            part.made[conditioning] = [conditions[b] for b in rows]
        return part


def fingerprint(family: ModuleType, folder: Path, dtype: torch.dtype, t5: bool) -> str:
    """Names the encoders that make an embedding: every file of `family.TEXT` by path, size and time."""
    parts = [LAYOUT, str(folder.resolve()), str(dtype), t5]
    for name in sorted(family.TEXT):
        for file in sorted((folder / name).rglob("*")):
            stat = file.stat()
            parts.append((str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def size(condition: Condition) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in condition.values())
