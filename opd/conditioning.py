"""Prompts become text conditions once: encoded in batches, kept on disk by prompt, encoders freed."""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

from opd import ranks
from opd.families import Condition
from opd.files import write_safetensors


class Conditioning:
    """`conditioning(prompts)` -> a Condition per prompt on `device`; `prepare` encodes them before."""

    def __init__(
        self,
        family: ModuleType,
        folder: Path,
        cache: str,
        dtype: torch.dtype,
        device: torch.device,
        t5: bool = True,
        limit: int = 4 * 2**30,
    ):
        """`cache`: directory of encoded prompts. `limit`: bytes kept in memory; the rest is read again."""
        self.family, self.folder, self.dtype, self.device, self.t5 = family, folder, dtype, device, t5
        self.cache = Path(cache).expanduser() / fingerprint(family, folder, dtype, t5)
        self.limit = limit
        self.memory: OrderedDict[str, Condition] = OrderedDict()
        self.used = 0

    def prepare(self, prompts: list[str], batch: int = 32) -> int:
        """Encode what the cache lacks (on rank 0), free the encoders. Returns how many it lacked."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).is_file()]
        if missing and ranks.rank() == 0:
            self.encode(missing, batch)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        ranks.barrier()
        return len(missing)

    def encode(self, prompts: list[str], batch: int) -> None:
        """Write one file per prompt, with whatever tensors its condition has."""
        text = self.family.load_text(self.folder, self.dtype, self.device, self.t5)
        for i in range(0, len(prompts), batch):
            piece = prompts[i : i + batch]
            conditions = self.family.encode_prompts(text, piece, self.device)
            for prompt, condition in zip(piece, conditions, strict=True):
                tensors = {name: tensor.cpu().contiguous() for name, tensor in condition.items()}
                write_safetensors(self.path(prompt), tensors)

    def __call__(self, prompts: list[str]) -> list[Condition]:
        """A prompt that occurs several times is moved to the device once and shared."""
        on_device = {}
        for prompt in dict.fromkeys(prompts):
            condition = self.read(prompt)
            moved = {name: t.to(self.device, non_blocking=True) for name, t in condition.items()}
            on_device[prompt] = moved
        return [on_device[prompt] for prompt in prompts]

    def read(self, prompt: str) -> Condition:
        """From memory or disk, on the CPU; what was read first is forgotten first."""
        if prompt in self.memory:
            return self.memory[prompt]
        condition = load_file(self.path(prompt))
        self.memory[prompt] = condition
        self.used += size(condition)
        while self.used > self.limit and len(self.memory) > 1:
            _, forgotten = self.memory.popitem(last=False)
            self.used -= size(forgotten)
        return condition

    def path(self, prompt: str) -> Path:
        key = hashlib.sha256(prompt.encode()).hexdigest()
        return self.cache / key[:2] / f"{key}.safetensors"


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
    parts = [str(folder.resolve()), str(dtype), t5]
    for name in sorted(family.TEXT):
        for file in sorted((folder / name).rglob("*")):
            stat = file.stat()
            parts.append((str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def size(condition: Condition) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in condition.values())
