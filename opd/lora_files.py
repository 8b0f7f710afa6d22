"""Adapter files: find one, read any of the field's formats, check that it fits the base."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from opd.files import locate, read_json

WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # in the folder of an adapter
PREFIXES = ("base_model.model.", "transformer.")


@dataclass(frozen=True)
class Lora:
    """One adapter, read from disk, fresh or merged (then sha256 is ""): per module name A (r, in), B (out, r)
    float32, and its scale alpha / r."""

    source: str
    sha256: str
    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    scale: dict[str, float]

    def update(self, module: str) -> torch.Tensor:
        """The weight update scale * B A (out, in), float32."""
        return self.scale[module] * self.B[module].float() @ self.A[module].float()

    def norm(self) -> float:
        """Frobenius norm of the whole update, from the small r x r Gram matrices."""
        square = sum(
            self.scale[m] ** 2 * ((self.B[m].T @ self.B[m]) * (self.A[m] @ self.A[m].T)).sum() for m in self.A
        )
        return float(square) ** 0.5


# ---- reading -----------------------------------------------------------------------------------------------


def find_adapter(source: str) -> Path:
    """A local directory or file, a Hub id `owner/name`, or `owner/name:subfolder` -> the weights file.

    FileNotFoundError naming the path and what was looked for.
    """
    repo, _, subfolder = source.partition(":")
    if Path(source).expanduser().exists() or not subfolder:
        path = locate("adapter", source, ["*.json", "*.safetensors"])
    else:
        path = locate("adapter", repo, [f"{subfolder}/*.json", f"{subfolder}/*.safetensors"]) / subfolder
    if path.is_file():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"adapter {source!r}: {path} holds neither adapter_model.safetensors nor "
        "pytorch_lora_weights.safetensors"
    )


def read_lora(source: str) -> Lora:
    """Read an adapter in PEFT (`base_model.model.`), diffusers (`transformer.`) or bare naming, r and alpha
    from the file.

    ValueError for a broken file, tensors that are not LoRA weights, half a pair, or an update that is zero
    everywhere.
    """
    path = find_adapter(source)
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"adapter {source!r}: {path} is not a readable safetensors file ({error})"
        ) from error
    A, B, alpha = {}, {}, {}
    for key, tensor in tensors.items():
        module, _, kind = (
            _bare(key).partition(".lora_") if ".lora_" in key else (_bare(key).removesuffix(".alpha"), "", "")
        )
        if kind in ("A.weight", "A.default.weight"):
            A[module] = tensor.float()
        elif kind in ("B.weight", "B.default.weight"):
            B[module] = tensor.float()
        elif key.endswith(".alpha"):
            alpha[module] = float(tensor)
        else:
            raise ValueError(
                f"adapter {source!r}: {key!r} is no LoRA weight (expected *.lora_A.weight, "
                "*.lora_B.weight, *.alpha); fully fine-tuned models cannot be attached as adapters"
            )
    if not A or A.keys() != B.keys():
        lonely = sorted(A.keys() ^ B.keys())
        raise ValueError(
            f"adapter {source!r}: {len(A)} lora_A and {len(B)} lora_B weights; without partner: {lonely[:3]}"
        )
    for module, a_RI in A.items():
        in_a, in_b = a_RI.shape[0], B[module].shape[1]
        if in_a != in_b:
            raise ValueError(f"adapter {source!r}: {module} has rank {in_a} in lora_A, {in_b} in lora_B")
    if all(b.abs().max() == 0 for b in B.values()) or all(a.abs().max() == 0 for a in A.values()):
        raise ValueError(
            f"adapter {source!r}: its update is zero everywhere, so it equals the base; "
            f"was it saved before training? To use the base itself write 'base'"
        )
    rank = {m: a.shape[0] for m, a in A.items()}
    scale = {m: _alpha(m, rank[m], path, metadata, alpha) / rank[m] for m in A}
    return Lora(source, hashlib.sha256(path.read_bytes()).hexdigest(), A, B, scale)


def _bare(key: str) -> str:
    """Strip the wrappers' prefixes: one name for one module, whoever saved it."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _alpha(module: str, rank: int, path: Path, metadata: dict, alpha: dict[str, float]) -> float:
    """alpha of `module`: `.alpha` key, adapter_config.json, diffusers' metadata; without any of them alpha =
    r."""
    if module in alpha:
        return alpha[module]
    config = {}
    if path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file():
        config = read_json(path.parent / "adapter_config.json")
    elif "lora_adapter_metadata" in metadata:
        config = {
            k.removeprefix("transformer."): v
            for k, v in json.loads(metadata["lora_adapter_metadata"]).items()
        }
    if "lora_alpha" not in config:
        return rank
    patterns = config.get("alpha_pattern") or {}
    matching = (
        value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)
    )  # as PEFT does
    value = next(matching, config["lora_alpha"])
    return value * rank**0.5 if config.get("use_rslora") else value


def check_fits(lora: Lora, skeleton: torch.nn.Module, targets: tuple[str, ...]) -> None:
    """ValueError unless every adapted module exists in the base with fitting shapes and no block's target is
    missing."""
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    unknown = sorted(set(lora.A) - set(linears))
    if unknown:
        raise ValueError(
            f"adapter {lora.source!r} has layers that the base lacks: {unknown[:3]} "
            f"({len(unknown)} of {len(lora.A)}); it was made for another base"
        )
    for module, a in lora.A.items():
        out_features, in_features = linears[module].out_features, linears[module].in_features
        if a.shape[1] != in_features or lora.B[module].shape[0] != out_features:
            raise ValueError(
                f"adapter {lora.source!r}: {module} updates ({lora.B[module].shape[0]}, {a.shape[1]}), "
                f"the base has ({out_features}, {in_features}); it was made for another base"
            )
    used = [t for t in targets if any(is_target(m, (t,)) for m in lora.A)]
    missing = sorted(n for n in linears if is_target(n, used) and n not in lora.A)
    if missing:
        raise ValueError(
            f"adapter {lora.source!r} adapts {used} but lacks {len(missing)} of these layers: "
            f"{missing[:3]}; the file is incomplete"
        )


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Whether the module's name ends in one of `targets`, in which * stands for anything."""
    return any(fnmatchcase("." + module, "*." + target) for target in targets)
