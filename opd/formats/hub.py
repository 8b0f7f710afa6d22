"""What the user names: a path or a Hub repository, and what a pipeline's folder must hold to be one."""

import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

from opd.files import read_json, resolve

# What a pipeline needs of its Hub repository, which may hold all weights again: as one file for other tools,
# in half precision, in other formats. Its README.md states the licence, which a student's card repeats.
PARTS = ("scheduler", "transformer", "vae", "text_encoder", "tokenizer")
FURTHER = ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")
PIPELINE_FILES = ["model_index.json", "README.md", *(f"{part}/*" for part in PARTS + FURTHER)]
IGNORED = ["*.fp16*", "*.bin", "*.msgpack", "*.h5", "*.onnx*", "*.gguf"]


def locate(
    what: str, source: str, patterns: list[str] | None = None, ignored: list[str] | None = None
) -> Path:
    """A local path, or the local copy of the files of Hub repository `owner/name` that match `patterns` and
    none of `ignored`. FileNotFoundError naming `source` otherwise."""
    path = resolve(source)
    if path.exists():
        return path
    if not is_hub_id(source):
        raise FileNotFoundError(f"{what} {source!r}: no such file or directory (and not a Hub id owner/name)")
    from huggingface_hub import snapshot_download  # heavy, and the settings import this module

    try:
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:
        raise FileNotFoundError(
            f"{what} {source!r}: neither a local path nor a Hub repository that can be reached "
            f"({type(error).__name__}); check the spelling, the network, or log in if it is gated"
        ) from error


def locate_part(what: str, source: str, patterns: list[str]) -> Path:
    """Like `locate`, for a source that may name a part of a Hub repository: `owner/name:subfolder`, or
    `owner/name:FILE.safetensors`."""
    repo, _, part = source.partition(":")
    if resolve(source).exists() or not part:
        return locate(what, source, patterns)
    file = part.endswith(".safetensors")
    path = locate(what, repo, [part] if file else [f"{part}/{pattern}" for pattern in patterns]) / part
    if not (path.is_file() if file else path.is_dir()):
        wanted = f"no file {part!r}" if file else f"no folder {part!r} with {' or '.join(patterns)} in it"
        raise FileNotFoundError(f"{what} {source!r}: {repo} holds {wanted}; check the part after the colon")
    return path


def only_weights(what: str, source: str, folder: Path, neither: str) -> Path:
    """The only .safetensors file of a source that holds `neither` of the usual ones; from the Hub it is
    fetched once it is known to be the only one. FileNotFoundError where there is none or a choice."""
    repo, _, part = source.partition(":alpha=")[0].partition(":")
    files = sorted(str(file.relative_to(folder)) for file in folder.glob("*.safetensors"))
    if not resolve(source.partition(":alpha=")[0]).exists():
        from huggingface_hub import list_repo_files  # heavy, and the settings import this module

        with suppress(Exception):  # off the network what was fetched before counts
            below = f"{part}/" if part else ""
            names = [name for name in list_repo_files(repo) if name.endswith(".safetensors")]
            files = [name.removeprefix(below) for name in names if name.startswith(below)]
    if len(files) != 1:
        choice = f" but {len(files)} .safetensors files, {files[:3]}: name one of them" if files else ""
        raise FileNotFoundError(f"{what} {source!r}: {folder} holds {neither}{choice}")
    if (folder / files[0]).is_file():
        return folder / files[0]
    return locate_part(what, f"{repo}:{part}/{files[0]}" if part else f"{repo}:{files[0]}", [])


def is_hub_id(source: str) -> bool:
    """Whether `source` can be owner/name or owner/name:subfolder, and no path."""
    repo = source.partition(":")[0]
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) is not None


def find_pipeline(source: str) -> Path:
    """The directory of a diffusers pipeline. FileNotFoundError for a missing path, ValueError for one that
    holds something else."""
    folder = locate("model", source, PIPELINE_FILES, IGNORED)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model {source!r} is not a pipeline directory: it has no model_index.json")
    return folder


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def check_encoders(folder: Path, t5: bool) -> None:
    """FileNotFoundError for a text encoder or tokenizer that a pipeline names and that is missing, and for a
    tokenizer without its vocabulary: transformers would make an empty one without a word, and every prompt
    would be the same. Without `t5` the further ones may be absent."""
    for name, kind in read_json(folder / "model_index.json").items():
        named = isinstance(kind, list) and kind[:1] not in ([], [None])
        if not named or not name.startswith(("text_encoder", "tokenizer")):
            continue
        part, needed = folder / name, t5 or name in PARTS
        if needed and not part.is_dir():
            raise FileNotFoundError(f"{folder} lacks its folder {name}; download the pipeline again")
        empty = not any((part / file).is_file() for file in VOCABULARIES)
        if part.is_dir() and name.startswith("tokenizer") and empty:
            listed = ", ".join(VOCABULARIES)
            raise FileNotFoundError(f"{part} holds none of {listed}; download the pipeline again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model's folder that diffusers loads: the shards that its index names, or its one
    file, if it is there."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return list(folder.glob("diffusion_pytorch_model.safetensors"))


def check_weights(files: list[Path], skeleton: torch.nn.Module) -> None:
    """ValueError unless the files hold all of the skeleton's weights, in its shapes, and no others: diffusers
    would draw missing ones at random and pass over others. Names may begin with `transformer.`."""
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as content:
            for key in content.keys():
                shapes[key.removeprefix("transformer.")] = content.get_slice(key).get_shape()
    wanted = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    problems = {
        "missing": wanted.keys() - shapes.keys(),
        "unknown": shapes.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]},
    }
    for problem, names in problems.items():
        if names:
            scales = problem == "unknown" and any("scale" in name.rpartition(".")[2] for name in names)
            why = " scales of 8-bit weights, which are not applied (use the model in bfloat16)"
            raise ValueError(f"{len(names)} weights are {problem}{why * scales}: {sorted(names)[:3]}")
