"""Prompts become text conditioning once: encoded in batches, kept on disk per prompt and encoder, encoders freed."""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

from opd import ranks
from opd.files import write_safetensors

MEMORY = 4 * 2**30  # bytes of conditioning kept in memory; the rest is read again from disk


def fingerprint(folder: Path, dtype: torch.dtype, t5: bool) -> str:
    """Names the encoders that made an embedding: every file of text encoders and tokenizers by path, size and time."""
    parts = [str(folder.resolve()), str(dtype), t5]
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(("text_encoder", "tokenizer"))):
        for file in sorted(sub.rglob("*")):
            stat = file.stat()
            parts.append((str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Conditioning:
    """`conditioning(prompts)` -> (embeds_BLD, pooled_BP) on `device`, for prompts encoded by `prepare` before."""

    def __init__(self, family, folder: Path, cache: str, dtype: torch.dtype, device: torch.device, t5: bool = True):
        self.family, self.folder, self.dtype, self.device, self.t5 = family, folder, dtype, device, t5
        self.cache = Path(cache).expanduser() / fingerprint(folder, dtype, t5)
        self.memory: OrderedDict[str, tuple] = OrderedDict()
        self.used = 0

    def path(self, prompt: str) -> Path:
        key = hashlib.sha256(prompt.encode()).hexdigest()
        return self.cache / key[:2] / f"{key}.safetensors"

    def prepare(self, prompts: list[str], batch: int = 32) -> int:
        """Encode what the cache lacks (rank 0; the others wait), then free the encoders. Returns how many it encoded."""
        missing = [p for p in dict.fromkeys(prompts) if not self.path(p).is_file()]
        if missing and ranks.rank() == 0:
            pipe = self.family.load_text_encoders(self.folder, self.dtype, self.device, self.t5)
            for i in range(0, len(missing), batch):
                embeds_BLD, pooled_BP = self.family.encode_prompts(pipe, missing[i:i + batch], self.device)
                for prompt, embeds_LD, pooled_P in zip(missing[i:i + batch], embeds_BLD.cpu(), pooled_BP.cpu()):
                    write_safetensors(self.path(prompt), {"embeds": embeds_LD.contiguous().to(self.dtype),
                                                          "pooled": pooled_P.contiguous().to(self.dtype)})
            del pipe
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        ranks.barrier()
        return len(missing)

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self._one(p) for p in prompts]
        return (torch.stack([e for e, _ in pairs]).to(self.device, non_blocking=True),
                torch.stack([p for _, p in pairs]).to(self.device, non_blocking=True))

    def _one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        if prompt not in self.memory:
            tensors = load_file(self.path(prompt))
            self.memory[prompt] = (tensors["embeds"], tensors["pooled"])
            self.used += sum(t.nbytes for t in tensors.values())
            while self.used > MEMORY and len(self.memory) > 1:
                self.used -= sum(t.nbytes for t in self.memory.popitem(last=False)[1])
        return self.memory[prompt]
