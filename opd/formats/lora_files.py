"""Adapter files: find one, read any of the field's formats, check that it fits the base.

A file holds two factors per layer, and in some formats alpha beside them:

    LAYER.lora_A.weight (r, in), LAYER.lora_B.weight (out, r)       PEFT, diffusers; alpha is in the metadata
    LAYER.lora_down.weight, LAYER.lora_up.weight, LAYER.alpha       kohya, ComfyUI

LAYER is the transformer's own name, perhaps behind one of PREFIXES; behind one of FOREIGN it is another
tool's name, which the model family translates (`convert_lora` of opd/families).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from opd.errors import require
from opd.files import digest, locate_part, read_json
from opd.ranks import say

WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # in the folder of an adapter
PREFIXES = ("base_model.model.", "transformer.")
FOREIGN = ("diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODERS = ("text_encoder", "lora_te")
FACTORS = {
    "lora_A.weight": "A",
    "lora_A.default.weight": "A",
    "lora_down.weight": "A",
    "lora.down.weight": "A",
    "lora_B.weight": "B",
    "lora_B.default.weight": "B",
    "lora_up.weight": "B",
    "lora.up.weight": "B",
}
OTHER_METHODS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
}
LARGEST_HEADER = 16 * 2**20  # bytes; a real one has some hundred kilobytes

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Lora:
    """One adapter, read from disk, fresh or merged (then sha256 is ""): per module name A (r, in), B (out, r)
    float32, and its scale alpha / r."""

    source: str
    sha256: str
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: dict[str, float]

    def update(self, module: str) -> Tensor:
        """The weight update scale * B A (out, in), float32."""
        return self.scale[module] * self.B[module].float() @ self.A[module].float()

    def norm(self) -> float:
        """Frobenius norm of the whole update, from the small r x r Gram matrices."""
        square = sum(
            self.scale[m] ** 2 * ((self.B[m].T @ self.B[m]) * (self.A[m] @ self.A[m].T)).sum() for m in self.A
        )
        return float(square) ** 0.5


def read_lora(source: str, convert: Convert | None = None) -> Lora:
    """Read an adapter. `source`: what `find_adapter` takes, and after it, for a file that states no alpha,
    `:alpha=NUMBER`. `convert`: the family's translation of foreign names; without it they are refused.

    FileNotFoundError where there is none; ValueError, naming the layer, for anything but a plain LoRA whose
    factors are finite, paired, and not zero everywhere.
    """
    place, _, asked = source.partition(":alpha=")
    path = find_adapter(source)
    try:
        tensors, metadata = read_tensors(path)
        A, B, keys = factors(tensors)
        alpha = alphas({m: a.shape[0] for m, a in A.items()}, keys, peft_config(path, metadata), asked)
        if not alpha:
            say(
                f"adapter {source!r} states no alpha: read at alpha = rank, the update as it stands in the "
                f"file. If it was trained with another, write {place}:alpha=NUMBER"
            )
        scale = {}
        for module, a_RI in A.items():
            scale[module] = 1.0
            if module in alpha:
                scale[module] = alpha[module] / a_RI.shape[0]
        return translated(Lora(source, digest(path), A, B, scale), convert)
    except ValueError as error:
        raise ValueError(f"adapter {source!r}: {error}") from error


# ---- files -------------------------------------------------------------------------------------------------


def find_adapter(source: str) -> Path:
    """A local directory or file, a Hub id `owner/name`, or `owner/name:subfolder`, all perhaps with
    `:alpha=NUMBER` behind -> the weights file.

    FileNotFoundError naming the path and what was looked for.
    """
    source = source.partition(":alpha=")[0]
    path = locate_part("adapter", source, ["adapter_config.json", *WEIGHTS])
    if path.is_file():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"adapter {source!r}: {path} holds neither adapter_model.safetensors nor "
        "pytorch_lora_weights.safetensors"
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. ValueError for anything else."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    inside = header <= path.stat().st_size
    require(not inside or header <= LARGEST_HEADER, f"{path} has a header of {header} bytes; no adapter's")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error


# ---- factors -----------------------------------------------------------------------------------------------


def factors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(A, B, the `.alpha` tensors) by layer, prefixes stripped; A and B float32, checked. ValueError."""
    found = {"A": {}, "B": {}, "alpha": {}}
    for key, tensor in tensors.items():
        layer, part = split_key(key)
        require(layer not in found[part], f"{layer} is given twice: {key!r} is its second {part}")
        found[part][layer] = tensor
    A, B, alpha = found["A"], found["B"], found["alpha"]
    lonely = sorted(A.keys() ^ B.keys())
    require(not lonely and len(A) > 0, f"{len(A)} A and {len(B)} B factors; without partner: {lonely[:3]}")
    astray = sorted(alpha.keys() - A.keys())
    require(not astray, f"alpha without a layer: {astray[:3]}")
    for layer in A:
        check_pair(layer, A[layer], B[layer])
    A, B = ({layer: factor.float() for layer, factor in half.items()} for half in (A, B))
    for half in (A, B):
        for layer, factor in half.items():
            require(bool(factor.isfinite().all()), f"{layer} has values that are not finite")
        if all(factor.abs().max() == 0 for factor in half.values()):
            raise ValueError(
                "its update is zero everywhere, so it equals the base; was it saved before training? "
                "To use the base itself write 'base'"
            )
    return A, B, alpha


def split_key(key: str) -> tuple[str, str]:
    """`transformer.blocks.0.to_q.lora_A.weight` -> (`blocks.0.to_q`, "A"). ValueError for other methods,
    fully fine-tuned models and text encoders."""
    require(not key.startswith(TEXT_ENCODERS), f"{key!r} adapts a text encoder; those are never trained here")
    name = key
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    for ending, part in FACTORS.items():
        if name.endswith("." + ending):
            return name.removesuffix("." + ending), part
    for mark, method in OTHER_METHODS.items():
        require(mark not in key, f"{key!r} is no LoRA weight but {method}'s; only plain LoRA can be attached")
    raise ValueError(
        f"{key!r} is no LoRA weight (expected *.lora_A.weight, *.lora_B.weight, *.alpha or kohya's "
        "*.lora_down.weight, *.lora_up.weight); fully fine-tuned models cannot be attached as adapters"
    )


def check_pair(layer: str, a_RI: Tensor, b_OR: Tensor) -> None:
    """ValueError unless A (r, in) and B (out, r) are floats of one rank that is low for the layer."""
    for factor in (a_RI, b_OR):
        floats = factor.is_floating_point()
        require(floats, f"{layer} holds {factor.dtype}; the factors of an adapter are floating-point")
    shapes = f"{layer} has factors of shapes {tuple(a_RI.shape)} and {tuple(b_OR.shape)}"
    require(a_RI.dim() == b_OR.dim() == 2, f"{shapes}; only linear layers can be adapted")
    rank, other_rank = a_RI.shape[0], b_OR.shape[1]
    require(rank == other_rank and rank > 0, f"{shapes}: rank {rank} in A, {other_rank} in B")
    largest = max(a_RI.shape[1], b_OR.shape[0])
    require(rank <= largest, f"{shapes}: rank {rank} is more than the whole layer has")


# ---- alpha -------------------------------------------------------------------------------------------------


def alphas(ranks: dict[str, int], keys: dict[str, Tensor], config: dict, asked: str) -> dict[str, float]:
    """Layer -> alpha, from the file's `.alpha` tensors, else its config, else what the user asked for; empty
    where nobody says. rank-stabilised LoRA's alpha / sqrt(r) is put as an alpha of sqrt(r) times the value.

    ValueError for numbers that are no alpha, and where the user contradicts the file.
    """
    stated = {layer: number(f"the alpha of {layer}", tensor) for layer, tensor in keys.items()}
    if "lora_alpha" in config:
        general = number("lora_alpha", config["lora_alpha"])
        patterns = config["alpha_pattern"] if config.get("alpha_pattern") else {}
        for layer in ranks.keys() - stated.keys():
            stated[layer] = pattern_alpha(layer, patterns, general)
            if config.get("use_rslora"):
                stated[layer] *= ranks[layer] ** 0.5
    require(not stated or not asked, f"the file states its alpha, so leave out :alpha={asked}")
    if asked:
        stated = dict.fromkeys(ranks, number("alpha", asked))
    silent = sorted(ranks.keys() - stated.keys())
    require(not stated or not silent, f"some layers state an alpha, but not {silent[:3]}")
    return stated


def pattern_alpha(layer: str, patterns: dict, general: float) -> float:
    """PEFT's rule: the first key of alpha_pattern that is the layer's name or its end counts.

    PEFT takes the keys for regular expressions; whoever writes them writes names, and a hostile expression
    would hang the reader, so anything but a name is refused.
    """
    for key, value in patterns.items():
        name = key.removeprefix("^").replace("\\.", ".")
        plain = name.replace(".", "").replace("_", "").isalnum()
        require(plain, f"alpha_pattern {key!r} is a regular expression; write out the layers' names")
        if f".{layer}".endswith(f".{name}"):
            return number(f"alpha_pattern {key!r}", value)
    return general


def number(what: str, value: Tensor | float | str) -> float:
    """A positive finite float, or ValueError."""
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is {str(value)[:40]!r}, not a number") from error
    require(0 < result < math.inf, f"{what} is {result}; it must be positive and finite")
    return result


def peft_config(path: Path, metadata: dict[str, str]) -> dict:
    """The LoRA's settings from the adapter_config.json beside it, or from diffusers' metadata inside it;
    empty where neither is."""
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside)
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        packed = json.loads(metadata["lora_adapter_metadata"])
        return {key.removeprefix("transformer."): value for key, value in packed.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its lora_adapter_metadata is no JSON object ({error})") from error


# ---- names -------------------------------------------------------------------------------------------------


def translated(lora: Lora, convert: Convert | None) -> Lora:
    """The same update with the foreign names among its layers translated by the family.

    ValueError where a layer is unknown to the family, or lost by a library that drops what it does not know:
    the norm of the whole update must stay.
    """
    foreign = [layer for layer in lora.A if layer.startswith(FOREIGN)]
    if not foreign:
        return lora
    unknown = f"layer names like {foreign[0]!r} are not known for this model family"
    require(convert is not None, unknown)
    folded = {}
    for layer in foreign:
        # The converters tell the tools apart by their spelling: kohya's for flat names.
        a_name, b_name = ("lora_A", "lora_B") if "." in layer else ("lora_down", "lora_up")
        folded[f"{layer}.{a_name}.weight"] = lora.A[layer]
        folded[f"{layer}.{b_name}.weight"] = lora.scale[layer] * lora.B[layer]
    try:
        tensors = convert(folded)
    except Exception as error:  # a library's, on a file that it was not written for
        raise ValueError(f"{unknown} ({type(error).__name__}: {str(error)[:200]})") from error
    A, B, _ = factors(tensors) if tensors else ({}, {}, {})
    scale = dict.fromkeys(A, 1.0)
    for layer in lora.A.keys() - set(foreign):
        require(layer not in A, f"{layer} is given twice, once by another tool's name")
        A[layer], B[layer], scale[layer] = lora.A[layer], lora.B[layer], lora.scale[layer]
    whole = Lora(lora.source, lora.sha256, A, B, scale)
    kept = math.isclose(whole.norm(), lora.norm(), rel_tol=1e-3)
    require(kept, f"{unknown}: of an update of norm {lora.norm():.4g} only {whole.norm():.4g} was recognised")
    return whole


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
