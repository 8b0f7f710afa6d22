"""Encoded prompts on disk, in few files: packs.

A pack is a safetensors file with the conditions of some hundred prompts, tensors named KEY.NAME, KEY the
prompt's sha256. Packs are written whole or not at all and never change, so runs may share a folder: each
reads what it finds and adds its own. Every tensor has a checksum; what is damaged counts as lacking.
"""

import hashlib
import json
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opd.families import Condition
from opd.files import write_safetensors
from opd.flags import require
from opd.ranks import say

GB = 10**9
PACK = 256 * 2**20  # bytes: what a kill loses, and what one fsync is for
HEADER = 256  # bytes that a tensor's name, place and checksum take at most


@dataclass(frozen=True)
class Pack:
    """An open file: it stays readable if another run deletes it meanwhile."""

    file: safe_open
    names: dict[str, list[str]]
    """Key -> the names of its tensors."""
    sums: dict[str, int]
    """Checksum (CRC-32) by tensor."""


class TextCache:
    """The conditions of one set of encoders, `folder`, in a cache `root` that is kept below `limit` bytes."""

    def __init__(self, root: Path, folder: Path, limit: float):
        self.root, self.folder, self.limit = root, folder, limit
        self.packs: dict[Path, Pack] = {}
        self.place: dict[str, Path] = {}
        """Key -> the pack that holds it."""
        self.checked: set[str] = set()
        """Tensors whose checksum was found right: once is enough."""

    def __contains__(self, prompt: str) -> bool:
        return key_of(prompt) in self.place

    def refresh(self) -> None:
        """Notice the packs that were written since, by this or another process; delete damaged ones."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self.packs:
                continue
            try:
                pack = open_pack(path)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                say(f"text cache: {path.name} is damaged ({error}); its prompts are encoded again")
                path.unlink(missing_ok=True)
                continue
            self.packs[path] = pack
            self.place |= dict.fromkeys(pack.names, path)

    def read(self, prompt: str) -> Condition | None:
        """The condition, on the CPU; None where it is lacking or damaged."""
        key = key_of(prompt)
        if key not in self.place:
            return None
        pack = self.packs[self.place[key]]
        condition = {}
        for name in pack.names[key]:
            full = f"{key}.{name}"
            tensor = pack.file.get_tensor(full)
            if full not in self.checked and checksum(tensor) != pack.sums[full]:
                say(f"text cache: the entry of {prompt!r} is damaged; it is encoded again")
                self.place[key].unlink(missing_ok=True)  # the next run shall not meet it
                del self.place[key]
                return None
            self.checked.add(full)
            condition[name] = tensor
        return condition

    def write(self, conditions: dict[str, Condition], keep: set[str]) -> None:
        """Add a pack, deleting old ones for it, but none that holds a prompt of `keep`.

        ValueError where the limit or the disk is too small, or the folder cannot be written to.
        """
        tensors = {}
        for prompt, condition in conditions.items():
            for name, tensor in condition.items():
                tensors[f"{key_of(prompt)}.{name}"] = tensor.cpu().contiguous()
        size = sum(tensor.nbytes + HEADER for tensor in tensors.values())
        self.make_room(size, keep)
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        path = self.folder / f"{key_of(' '.join(sorted(tensors)))[:16]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            short = f"{size / GB:.3g} GB are needed, {free / GB:.3g} GB are free"
            require(free > size, f"--cache {self.root}: {short}; choose another or free some space")
            write_safetensors(path, tensors, {"crc32": json.dumps(sums, sort_keys=True)})
        except OSError as error:
            way_out = "choose another"
            raise ValueError(f"--cache {self.root} cannot be written to ({error}); {way_out}") from error
        self.packs.pop(path, None)  # one of the same prompts was there: read the new one
        self.refresh()

    def make_room(self, size: int, keep: set[str]) -> None:
        """Delete packs, of whatever encoders, until `size` bytes more are within the limit: those that were
        used longest ago first, none that holds a prompt of `keep`. ValueError where that is too little."""
        kept = {self.place[key_of(prompt)] for prompt in keep if prompt in self}
        sizes, ages = {}, {}
        for path in self.root.rglob("*.safetensors"):
            with suppress(FileNotFoundError):  # another run made room
                stat = path.stat()
                sizes[path], ages[path] = stat.st_size, stat.st_mtime_ns
        needed = size + sum(sizes[path] for path in sizes.keys() & kept)
        require(
            needed <= self.limit,
            f"--cache-gb {self.limit / GB:g}: the prompts that are needed at once take {needed / GB:.3g} GB; "
            "raise it, or show and score fewer prompts",
        )
        total = size + sum(sizes.values())
        for path in sorted(sizes.keys() - kept, key=ages.get):
            if total <= self.limit:
                break
            self.delete(path)
            total -= sizes[path]

    def delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if path in self.packs:
            for key in self.packs.pop(path).names:
                if self.place.get(key) == path:
                    del self.place[key]

    def touch(self, prompts: list[str]) -> None:
        """Mark the packs of `prompts` as used now, so that they are deleted last."""
        for path in {self.place[key_of(prompt)] for prompt in prompts if prompt in self}:
            if path.exists():
                os.utime(path)


def open_pack(path: Path) -> Pack:
    file = safe_open(path, "pt")
    sums = json.loads(file.metadata()["crc32"])
    require(sums.keys() == set(file.keys()), "the checksums are not those of its tensors")
    names = {}
    for tensor in file.keys():
        key, _, name = tensor.partition(".")
        names.setdefault(key, []).append(name)
    return Pack(file, names, sums)


def key_of(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())
