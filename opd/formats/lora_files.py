"""Adapter files: find one, read any of the field's formats, check that it fits the base.

A file holds two factors per layer, and in some formats alpha beside them:

    LAYER.lora_A.weight (r, in), LAYER.lora_B.weight (out, r)       PEFT, diffusers; alpha is in the metadata
    LAYER.lora_down.weight, LAYER.lora_up.weight, LAYER.alpha       kohya, ComfyUI

LAYER is the transformer's own name, perhaps behind PREFIXES; behind one of FOREIGN, or like NATIVE, it is
another tool's name, which the model family translates (`convert_lora` of opd/families).
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import regex
import torch
from safetensors import safe_open
from torch import Tensor

from opd.errors import require
from opd.files import digest, read_json, reading
from opd.formats.hub import locate_part, only_weights
from opd.ranks import say

WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # in the folder of an adapter
FILES = ["adapter_config.json", *WEIGHTS]
FILES += [f"lora/{name}" for name in FILES]  # where Flow-GRPO's checkpoints have them
# How an adapter is sampled; a fine-tuned transformer may have it too.
BESIDE = ["deployment.json", "lora/deployment.json"]
KEY = "flow-opd"
"""Under which files of weights and pictures hold what they are."""
COMFY = "diffusion_model."
PREFIXES = re.compile(rf"(?:(?:base_model\.model|transformer|module|_orig_mod|{COMFY[:-1]})\.)*")
FOREIGN = (COMFY, "lora_unet_", "lora_transformer_", "lycoris_")
OWN = ("transformer_blocks.", "single_transformer_blocks.")  # no other tool's, whatever they stand behind
# A file that has such layers has only its tool's names, whatever they stand behind.
NATIVE = re.compile(r"(?:double_blocks|single_blocks|joint_blocks|final_layer)\.|.+\.attention\.(?:qkv|out)$")
FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)(?:\.default)?|lora[_.](down|up))\.weight")
# What in PEFT's config makes more of an adapter than its factors say.
OTHER_SETTINGS = "use_dora lora_bias modules_to_save target_parameters layer_replication use_qalora".split()
OTHER_SETTINGS += "use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config".split()
# PEFT's starts that leave the base as it is; the others take the start of the factors off its weights.
PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")

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
    with reading(f"adapter {source!r}"):
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        A, B, keys = factors(tensors)
        ranks = {layer: len(a_RI) for layer, a_RI in A.items()}
        config = peft_config(path, metadata)
        check_settings(config)
        alpha = alphas(ranks, keys, config, asked)
        if not alpha and KEY in metadata:  # a student's single file: alpha / r is in B
            alpha = ranks
        if not alpha:
            say(
                f"adapter {source!r} states no alpha: read at alpha = rank, the update as it stands in the "
                f"file. If it was trained with another, write {place}:alpha=NUMBER"
            )
            alpha = ranks
        scale = {layer: alpha[layer] / ranks[layer] for layer in A}
        lora = translated(Lora(source, digest(path), A, B, scale), convert)
        largest = max(alpha.values())
        finite = math.isfinite(lora.norm())
        require(finite, f"its update is too large for float32; its largest alpha is {largest:g}")
        return lora


# ---- files -------------------------------------------------------------------------------------------------


def find_adapter(source: str) -> Path:
    """A local directory or file, a Hub id `owner/name`, `owner/name:subfolder` or `owner/name:FILE`, all
    perhaps with `:alpha=NUMBER` behind -> the weights file: by a library's name, or the only one there.

    FileNotFoundError naming the path and what was looked for.
    """
    source = source.partition(":alpha=")[0]
    path = locate_part("adapter", source, FILES + BESIDE)
    if path.is_file():
        return path
    for name in FILES:
        if (path / name).is_file() and name.endswith(WEIGHTS):
            return path / name
    return only_weights("adapter", source, path, f"neither {WEIGHTS[0]} nor {WEIGHTS[1]}")


# ---- factors -----------------------------------------------------------------------------------------------


def factors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(A, B, the `.alpha` tensors) by layer, prefixes stripped; A and B float32, checked. ValueError."""
    A, B, alpha = {}, {}, {}
    for key, tensor in tensors.items():
        layer, part = split_key(key)
        half = {"A": A, "B": B, "alpha": alpha}[part]
        require(layer not in half, f"{layer} is given twice: {key!r} is its second {part}")
        half[layer] = tensor
    lonely, astray = sorted(A.keys() ^ B.keys()), sorted(alpha.keys() - A.keys())
    paired = len(A) > 0 and not lonely
    require(paired, f"{len(A)} A and {len(B)} B factors; without partner: {lonely[:3]}")
    require(not astray, f"alpha without a layer: {astray[:3]}")
    for layer in A:
        check_pair(layer, A[layer], B[layer])
        A[layer], B[layer] = A[layer].float(), B[layer].float()
    for half in (A, B):
        if all(factor.abs().max() == 0 for factor in half.values()):
            raise ValueError(
                "its update is zero everywhere, so it equals the base; was it saved before training? "
                "To use the base itself write 'base'"
            )
    return A, B, alpha


def split_key(key: str) -> tuple[str, str]:
    """`transformer.blocks.0.to_q.lora_A.weight` -> (`blocks.0.to_q`, "A"). ValueError for what is no plain
    LoRA's."""
    before = PREFIXES.match(key)[0]
    name = key.removeprefix(before).replace("._orig_mod.", ".")
    if COMFY in before and not name.startswith(OWN):
        name = COMFY + name
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    found = FACTOR.fullmatch(name)
    if not found:
        kinds = "DoRA, LoKr, a bias, whole weights, or xlabs' names, which diffusers loads and saves anew"
        raise ValueError(f"{key!r} is no factor of a plain LoRA but another kind's: {kinds}")
    return found[1], "A" if found[2] == "A" or found[3] == "down" else "B"


def check_pair(layer: str, a_RI: Tensor, b_OR: Tensor) -> None:
    """ValueError unless A (r, in) and B (out, r) are finite floats of one rank that is low for the layer."""
    shapes = f"{layer} has factors of shapes {tuple(a_RI.shape)} and {tuple(b_OR.shape)}"
    require(a_RI.dim() == b_OR.dim() == 2, f"{shapes}; only linear layers can be adapted")
    rank, other_rank = a_RI.shape[0], b_OR.shape[1]
    low = 0 < rank <= max(a_RI.shape[1], b_OR.shape[0])
    require(low and rank == other_rank, f"{shapes}: rank {rank} in A, {other_rank} in B")
    for factor in (a_RI, b_OR):
        numbers = f"{layer} holds {factor.dtype}; the factors of an adapter are floating-point"
        require(factor.is_floating_point(), numbers)
        require(bool(factor.float().isfinite().all()), f"{layer} has values that are not finite")


# ---- alpha -------------------------------------------------------------------------------------------------


def alphas(ranks: dict[str, int], keys: dict[str, Tensor], config: dict, asked: str) -> dict[str, float]:
    """Layer -> alpha, from the file's `.alpha` tensors, else its config, else what the user asked for; empty
    where nobody says. rank-stabilised LoRA's alpha / sqrt(r) is put as an alpha of sqrt(r) times the value.

    ValueError for numbers that are no alpha, and where the user contradicts the file.
    """
    stated = {layer: number(f"the alpha of {layer}", tensor) for layer, tensor in keys.items()}
    if "lora_alpha" in config:
        general = number("lora_alpha", config["lora_alpha"])
        patterns = config.get("alpha_pattern") or {}
        for layer in ranks.keys() - stated.keys():
            stated[layer] = pattern_alpha(layer, patterns, general)
            if config.get("use_rslora"):
                stated[layer] *= ranks[layer] ** 0.5
    require(not (stated and asked), f"the file states its alpha, so leave out :alpha={asked}")
    if asked:
        stated = dict.fromkeys(ranks, number("alpha", asked))
    if stated and stated.keys() != ranks.keys():
        raise ValueError(f"some layers state an alpha, but not {sorted(ranks.keys() - stated.keys())[:3]}")
    return stated


def pattern_alpha(layer: str, patterns: dict, general: float) -> float:
    """PEFT's rule: the first key of alpha_pattern counts that, as a regular expression, is the layer's name
    or its end behind a dot. ValueError for one that is none, or would take long or
    much memory."""
    for key, value in patterns.items():
        endless = re.search(r"\{[^}]*\d{3}|(\{.*){3}", key)
        require(not endless, f"alpha_pattern {key[:80]!r} counts too many repetitions; write out the layers")
        with reading(f"alpha_pattern {key[:80]!r}"):
            found = regex.match(rf"(.*\.)?({key})$", layer, timeout=1)
        if found:
            return number(f"alpha_pattern {key!r}", value)
    return general


def number(what: str, value: Tensor | float | str) -> float:
    """A positive float, finite in float32, or ValueError."""
    with reading(what):
        result = float(str(value) if isinstance(value, bool) else value)
    positive = 0 < result < torch.finfo(torch.float32).max
    require(positive, f"{what} is {result}; it must be positive and finite")
    return result


def peft_config(path: Path, metadata: dict[str, str]) -> dict:
    """The LoRA's settings from the adapter_config.json beside it, or from diffusers' metadata inside it;
    empty where neither is."""
    beside = path.parent / "adapter_config.json"
    if re.fullmatch(r"adapter_model(\.\w+)?\.safetensors", path.name) and beside.is_file():
        return read_json(beside)
    if "lora_adapter_metadata" not in metadata:
        return {}
    with reading("its lora_adapter_metadata"):
        packed = json.loads(metadata["lora_adapter_metadata"])
    return {key.removeprefix("transformer."): value for key, value in packed.items()}


def check_settings(config: dict) -> None:
    """ValueError for an adapter that the factors alone do not describe: of another kind, with more than
    factors, or made for a base that PEFT had changed first."""
    kind, bias = config.get("peft_type"), config.get("bias")
    plain = "only plain LoRAs can be attached"
    require(kind in (None, "LORA"), f"its config says peft_type {kind!r}; {plain}")
    require(bias in (None, "none"), f"its config says bias={bias!r}: the base's biases were trained too")
    for setting in OTHER_SETTINGS:
        require(not config.get(setting), f"its config says {setting}: {plain}")
    if str(config.get("init_lora_weights")).lower() not in PLAIN_STARTS:
        raise ValueError(
            f"its config says init_lora_weights={config['init_lora_weights']!r}, for which PEFT changes the "
            "base's weights, so it is another update of the base itself. Save it as a plain LoRA, with "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=FOLDER_OF_THE_START)"
        )


# ---- names -------------------------------------------------------------------------------------------------


def translated(lora: Lora, convert: Convert | None) -> Lora:
    """The same update with the foreign names among its layers translated by the family.

    ValueError where a layer is unknown to the family, or lost by a library that drops what it does not know:
    the norm of the whole update must stay.
    """
    native = any(NATIVE.match(layer) for layer in lora.A)
    names = {layer: COMFY * (native and not layer.startswith(FOREIGN)) + layer for layer in lora.A}
    foreign = [layer for layer in lora.A if names[layer].startswith(FOREIGN)]
    if not foreign:
        return lora
    unknown = f"layer names like {foreign[0]!r} are not known for this model family"
    require(convert is not None, unknown)
    folded = {}
    for layer in foreign:
        # The converters tell the tools apart by their spelling: kohya's for flat names.
        a_name, b_name = ("lora_A", "lora_B") if "." in names[layer] else ("lora_down", "lora_up")
        folded[f"{names[layer]}.{a_name}.weight"] = lora.A[layer]
        folded[f"{names[layer]}.{b_name}.weight"] = lora.scale[layer] * lora.B[layer]
    with reading(unknown):  # a library's errors, on a file that it was not written for
        A, B, _ = factors(convert(folded))
    require(not any(layer.startswith(FOREIGN) for layer in A), unknown)
    scale = dict.fromkeys(A, 1.0)
    for layer in lora.A.keys() - set(foreign):
        require(layer not in A, f"{layer} is given twice, once by another tool's name")
        A[layer], B[layer], scale[layer] = lora.A[layer], lora.B[layer], lora.scale[layer]
    whole = Lora(lora.source, lora.sha256, A, B, scale)
    if not math.isclose(whole.norm(), lora.norm(), rel_tol=1e-3):
        kept = f"of an update of norm {lora.norm():.4g} only {whole.norm():.4g} was recognised"
        raise ValueError(f"{unknown}: {kept}")
    return whole


def check_fits(lora: Lora, skeleton: torch.nn.Module) -> None:
    """ValueError unless every adapted module exists in the base with fitting shapes. One that adapts some
    blocks alone is said to: a file cut short is known by its header, or by a factor without its partner."""
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    another = "it was made for another base, or for a text encoder too"
    unknown = sorted(lora.A.keys() - linears.keys())
    if unknown:
        found = f"{len(unknown)} of its {len(lora.A)} layers are not in the base: {unknown[:3]}"
        raise ValueError(f"adapter {lora.source!r}: {found}; {another}")
    for module, a_RI in lora.A.items():
        update, base = (len(lora.B[module]), a_RI.shape[1]), tuple(linears[module].weight.shape)
        if update != base:
            found = f"{module} updates {update}, the base has {base}"
            raise ValueError(f"adapter {lora.source!r}: {found}; {another}")
    kinds = {re.sub(r"\d+", "*", module) for module in lora.A}
    layers = [module for module in linears if re.sub(r"\d+", "*", module) in kinds]
    others = [module for module in layers if module not in lora.A]
    if others:
        share = f"{len(lora.A)} of the base's {len(layers)} layers of its kinds"
        say(f"adapter {lora.source!r} adapts {share}; the others, like {others[0]}, stay the base's")


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Whether the module's name ends in one of `targets`, in which * stands for anything."""
    return any(fnmatchcase("." + module, "*." + target) for target in targets)
