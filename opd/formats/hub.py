"""What the user names: a path or a Hub repository, and what a pipeline's folder must hold to be one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from torch import Tensor

from opd.files import read_json, resolve


def locate(what: str, source: str, patterns: list[str] | None = None) -> Path:
    """A local path, or the local copy of the files of Hub repository `owner/name` that match `patterns`.
    FileNotFoundError naming `source` otherwise."""
    path = resolve(source)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download  # heavy, and the settings import this module

    with fetching(what, source):
        return Path(snapshot_download(source, allow_patterns=patterns))


@contextmanager
def fetching(what: str, source: str) -> Iterator[None]:
    """FileNotFoundError for a source that is no Hub id, and for whatever keeps the Hub's client from it, such
    as a file that is neither in its cache nor to be had."""
    if not is_hub_id(source):
        forms = "no Hub id, which is owner/name, for a part of it owner/name:FOLDER or owner/name:FILE"
        raise FileNotFoundError(f"{what} {source!r}: no such file or directory, and {forms}")
    try:
        yield
    except Exception as error:
        kind, reason = type(error).__name__, " ".join(str(error).split())[:400]
        way_out = "check the spelling, the network, or log in if it is gated"
        nowhere = f"{what} {source!r}: neither a local path nor to be had from the Hub"
        raise FileNotFoundError(f"{nowhere}; {way_out} ({kind}: {reason})") from error


def locate_part(what: str, source: str, patterns: list[str]) -> Path:
    """Like `locate`, for a source that may name a part of a Hub repository: `owner/name:FILE.safetensors`,
    which comes with what of `patterns` is said beside it in JSON, or `owner/name:subfolder`, which need not
    exist where nothing in it matches `patterns`."""
    repo, _, part = source.partition(":")
    if not part or resolve(source).exists() or not is_hub_id(source):
        return locate(what, source, patterns)
    if not part.endswith(".safetensors"):
        return locate(what, repo, [f"{part}/{pattern}" for pattern in patterns]) / part
    folder = PurePosixPath(part).parent
    beside = [str(folder / pattern) for pattern in patterns if pattern.endswith(".json")]
    path = locate(what, repo, [part, *beside]) / part
    if not path.is_file():
        raise FileNotFoundError(f"{what} {source!r}: {repo} has no {part!r}; check what follows the colon")
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
        if (folder / "student").is_dir():
            choice = f"; a run's student is {folder / 'student'}"
        raise FileNotFoundError(f"{what} {source!r}: {folder} holds {neither}{choice}")
    if (folder / files[0]).is_file():
        return folder / files[0]
    return locate_part(what, f"{repo}:{part}/{files[0]}" if part else f"{repo}:{files[0]}", [])


def is_hub_id(source: str) -> bool:
    """Whether `source` can be owner/name or owner/name:subfolder, and no path, such as a file of weights."""
    repo = source.partition(":")[0]
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) is not None and not repo.endswith(".safetensors")


def find_pipeline(source: str) -> Path:
    """The directory of a diffusers pipeline; of a Hub repository what diffusers itself would read, and the
    README.md, whose licence a student's card repeats. FileNotFoundError for a missing path or file,
    ValueError for a source that holds something else."""
    folder = resolve(source)
    if not folder.exists():
        from diffusers import DiffusionPipeline  # heavy, and the settings import this module
        from huggingface_hub import hf_hub_download

        with fetching("model", source):
            try:
                folder = Path(DiffusionPipeline.download(source, use_safetensors=True))
            except OSError as error:  # names the files that are there
                variants = re.findall(r"transformer/diffusion_pytorch_model\.(\w+)\.", str(error))
                if not variants:
                    raise
                folder = Path(DiffusionPipeline.download(source, use_safetensors=True, variant=min(variants)))
            with suppress(Exception):  # a cache that diffusers filled lacks it
                hf_hub_download(source, "README.md")
    if not (folder / "model_index.json").is_file():
        wanted = "name what holds transformer/, vae/ and scheduler/, not a part of it or a single file"
        raise ValueError(f"model {source!r} is not a pipeline directory, with a model_index.json: {wanted}")
    return folder


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def check_encoders(folder: Path, t5: bool) -> None:
    """FileNotFoundError for a text encoder, tokenizer or processor that a pipeline names and that is missing,
    and for one of the last two without its vocabulary: transformers would make an empty one without a word,
    and every prompt would be the same. Without `t5` the further ones may be absent."""
    for name, kind in read_json(folder / "model_index.json").items():
        named = isinstance(kind, list) and kind[:1] not in ([], [None])
        if not named or not name.startswith(("text_encoder", "tokenizer", "processor")):
            continue
        part, needed = folder / name, t5 or name in ("text_encoder", "tokenizer")
        if needed and not part.is_dir():
            raise FileNotFoundError(f"{folder} lacks its folder {name}; download the pipeline again")
        empty = not any((part / file).is_file() for file in VOCABULARIES)
        if part.is_dir() and not name.startswith("text_encoder") and empty:
            listed = ", ".join(VOCABULARIES)
            raise FileNotFoundError(f"{part} holds none of {listed}; download the pipeline again")


def variant_of(folder: Path, name: str = "diffusion_pytorch_model") -> str | None:
    """The variant, such as fp16, that a model's weights are there in; None where they are there plain, or in
    several. diffusers loads a variant when it is told so alone."""
    kinds = rf"{name}(?:\.(\w+))?\.safetensors|{name}\.safetensors\.index(?:\.(\w+))?\.json"
    matches = [re.fullmatch(kinds, file.name) for file in folder.glob(f"{name}.*")]
    found = {match[1] or match[2] for match in matches if match}
    return found.pop() if len(found) == 1 else None


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors of a model's folder that diffusers loads: the shards that its index names, or its one
    file. FileNotFoundError where there are pickles alone, or several variants."""
    variant = variant_of(folder, stem)
    dot = f".{variant}" if variant else ""
    name = f"{stem}{dot}.safetensors"
    index = folder / f"{stem}.safetensors.index{dot}.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not (folder / name).is_file():
        way_out = "load it with diffusers (variant=... where names have one) and save_pretrained it"
        others = sorted(file.name for file in folder.glob("*") if file.suffix != ".json")
        raise FileNotFoundError(f"{folder} has no {name}; {way_out}; it holds {others[:3]}")
    return [folder / name]


def stored(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files on the meta device: names and shapes without reading them."""
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as content:
            for key in content.keys():
                tensors[key] = torch.empty(content.get_slice(key).get_shape(), device="meta")
    return tensors


def check_weights(tensors: dict[str, Tensor], skeleton: torch.nn.Module) -> None:
    """ValueError unless the tensors are all of the skeleton's weights, in its shapes, and no others.
    diffusers would draw missing ones at random and pass over others."""
    wanted = skeleton.state_dict()
    both = wanted.keys() & tensors.keys()
    problems = {
        "missing": wanted.keys() - tensors.keys(),
        "unknown": tensors.keys() - wanted.keys(),
        "of another shape": {name for name in both if wanted[name].shape != tensors[name].shape},
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{len(names)} weights are {problem}: {sorted(names)[:3]}")
