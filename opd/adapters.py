"""LoRA adapters on one frozen base: read any of the field's formats, check, attach, switch, merge, save.

The student, every teacher and the anchor are adapters on the same transformer. Base weights are never copied:
K teachers cost K times their LoRA weights. `BASE` (adapter off) is the base itself and may teach or anchor
too.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from opd.files import locate, read_json, replace, write_json, write_safetensors
from opd.lora import LoraLinear

BASE = "base"  # the name that means: adapter off
STUDENT, START = "student", "start"  # the adapter being trained, and a frozen copy of where it started
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
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
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
            f"was it saved before training? To use the base itself write {BASE!r}"
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


# ---- on the model ------------------------------------------------------------------------------------------


def attach(transformer: torch.nn.Module, name: str, lora: Lora, dtype: torch.dtype) -> None:
    """Add `lora` to the transformer as the frozen adapter `name` in `dtype`. ValueError for a name PyTorch
    cannot store."""
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r}: choose one that is not empty and has no dot")
    for module, a_RI in lora.A.items():
        layer = transformer.get_submodule(module)
        if isinstance(layer, torch.nn.Linear):
            layer = LoraLinear(layer)
            transformer.set_submodule(module, layer)
        # Copies: the student and the frozen memory of its start come from the same tensors.
        b_OR = lora.B[module].to(dtype, copy=True)
        layer.add(name, a_RI.to(dtype, copy=True), b_OR, lora.scale[module])
    transformer.lora_layers = [layer for layer in transformer.modules() if isinstance(layer, LoraLinear)]
    transformer.requires_grad_(False)


def fresh_lora(
    skeleton: torch.nn.Module, targets: tuple[str, ...], rank: int, alpha: float, seed: int
) -> Lora:
    """A new adapter: A ~ N(0, 1/r^2) (PEFT's "gaussian"), B = 0, so that it starts as the base."""
    generator = torch.Generator().manual_seed(seed)
    A, B = {}, {}
    for name, module in skeleton.named_modules():
        if isinstance(module, torch.nn.Linear) and is_target(name, targets):
            A[name] = torch.randn(rank, module.in_features, generator=generator) / rank
            B[name] = torch.zeros(module.out_features, rank)
    return Lora("fresh", "", A, B, {m: alpha / rank for m in A})


def merge(loras: list[Lora], rank: int, alpha: float, count: int | None = None) -> Lora:
    """The teachers' mean update, mean_k scale_k B_k A_k, truncated to `rank` by SVD: the cold start by
    merging.

    Averaging A and B apart (A-bar B-bar) would not be the mean update. The product is never formed: QR of
    both factors, then the SVD of a (sum r, sum r) core. `count`: how many teachers there are, if some of them
    are the base, whose update is zero. ValueError where there is nothing to merge.
    """
    count = count or len(loras)
    if not loras:
        raise ValueError("--cold-start merge: no teacher has an adapter to merge; use --cold-start base")
    A, B = {}, {}
    spare = torch.Generator().manual_seed(0)
    for module in sorted(set().union(*(lora.A for lora in loras))):
        having = [lora for lora in loras if module in lora.A]
        a = torch.cat([lora.A[module] for lora in having])
        b = torch.cat([lora.scale[module] / count * lora.B[module] for lora in having], dim=1)
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        root, keep = s[:rank].sqrt(), min(rank, len(s))
        # Spare rank starts as in a fresh adapter: with A and B both 0 it would never get a gradient.
        A[module] = torch.randn(rank, a.shape[1], generator=spare) / rank
        B[module] = torch.zeros(b.shape[0], rank)
        A[module][:keep] = (root[:, None] * vh[:rank]) @ q_a.T
        B[module][:, :keep] = q_b @ (u[:, :rank] * root) * (rank / alpha)
    return Lora(
        "merge of " + ", ".join(lora.source for lora in loras), "", A, B, {m: alpha / rank for m in A}
    )


@contextmanager
def use(transformer: torch.nn.Module, name: str):
    """Run the transformer with adapter `name` (or BASE: none). No weight moves and no requires_grad flag
    changes. Where activations are recomputed, keep backward inside the `with`."""
    layers = lora_layers(transformer)
    assert name == BASE or any(name in layer.scale for layer in layers), f"no adapter {name!r} is attached"
    before = [layer.slot for layer in layers]
    for layer in layers:
        layer.slot = None
        if name in layer.scale:
            layer.slot = name
    try:
        yield
    finally:
        for layer, slot in zip(layers, before, strict=True):
            layer.slot = slot


def lora_layers(transformer: torch.nn.Module) -> list[LoraLinear]:
    """The layers with adapters, kept beside the transformer: walking its thousands of modules at every switch
    would take longer than the switch."""
    if not hasattr(transformer, "lora_layers"):
        return []
    return transformer.lora_layers


def parameters_of(transformer: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of adapter `name` by their full names, in a fixed order."""
    return {
        n: p for n, p in transformer.named_parameters() if f".lora_A.{name}." in n or f".lora_B.{name}." in n
    }


# ---- saving ------------------------------------------------------------------------------------------------


def save_lora(
    folder: Path,
    weights: dict[str, torch.Tensor],
    name: str,
    rank: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write adapter `name` from full (unsharded) weights keyed as in `parameters_of`, each file whole or not
    at all.

    `adapter_model.safetensors` + `adapter_config.json` is a PEFT directory;
    `pytorch_lora_weights.safetensors` is for `pipe.load_lora_weights`, with alpha / r folded into B, because
    readers of that format assume alpha = r.
    """
    bare = {
        n.replace(f".{name}.weight", ".weight"): w.detach().cpu().to(dtype).contiguous()
        for n, w in weights.items()
    }
    modules = sorted({n.partition(".lora_")[0] for n in bare})
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": modules,
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": "gaussian",
            "inference_mode": True,
        },
    )
    folded = {"transformer." + n: w * (alpha / rank) if ".lora_B." in n else w for n, w in bare.items()}
    write_safetensors(folder / "pytorch_lora_weights.safetensors", folded)
    write_safetensors(
        folder / "adapter_model.safetensors", {"base_model.model." + n: w for n, w in bare.items()}
    )


def save_transformer(
    folder: Path, transformer: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write all weights of the transformer as the `transformer/` directory of a pipeline, in `dtype`."""
    tensors = {n: w.cpu().to(dtype).contiguous() for n, w in weights.items()}
    tensors |= {
        n: b.cpu().contiguous() for n, b in transformer.named_buffers() if n in transformer.state_dict()
    }
    replace(folder / "config.json", lambda p: p.write_text(transformer.to_json_string()))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
