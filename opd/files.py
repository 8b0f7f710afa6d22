"""Files: finding what the user names, and writing so that nothing saved is ever lost or half-written."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


def replace(path: Path, write) -> None:
    """Call `write(temporary_path)`, flush to disk, then rename over `path`; a link there is replaced, not
    followed. The file is as readable as the user's others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """ValueError that begins with `what`, such as the name and path of a file, for whatever a library raises
    at the content that it finds there."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        reason = lines[0][:300]
        if not isinstance(error, ValueError | FileNotFoundError):
            reason = f"cannot be read ({type(error).__name__}: {reason})"
        raise ValueError(f"{what}: {reason}") from error


def remove_temporaries(folder: Path) -> None:
    """What `replace` left behind in `folder` and below when its process was killed."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def digest(*files: Path, most: float = math.inf) -> str:
    """sha256 of what the files hold, one after the other; of one file, what sha256sum prints. Of a file of
    more than `most` bytes only its size and its first and last megabyte count."""
    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as content:
            if size > most:
                whole.update(str(size).encode() + content.read(2**20))
                content.seek(-(2**20), os.SEEK_END)
            while piece := content.read(2**24):
                whole.update(piece)
    return whole.hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {str(value)[:40]!r}")
    return value


def write_json(path: Path, value) -> None:
    replace(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """One metadata key at most: safetensors writes several in random order, and equal files should be equal
    bytes."""
    replace(path, lambda p: save_file(tensors, p, metadata=metadata or {"format": "pt"}))


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
            raise ValueError(f"{len(names)} weights are {problem}: {sorted(names)[:3]}")


def resolve(source: str) -> Path:
    """The local path that `source` names; it need not exist.

    A source that starts with opd/ and is not found from the current directory lies in this package: so the
    presets work from anywhere, and a run resumes in a checkout that has moved.
    """
    require_path(source)
    path = Path(source).expanduser()
    packaged = Path(__file__).parents[1] / source
    if not path.exists() and source.startswith("opd/") and packaged.exists():
        return packaged
    return path


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
    """Like `locate`, for a source that may name a folder of a Hub repository: `owner/name:subfolder`."""
    repo, _, subfolder = source.partition(":")
    if resolve(source).exists() or not subfolder:
        return locate(what, source, patterns)
    path = locate(what, repo, [f"{subfolder}/{pattern}" for pattern in patterns]) / subfolder
    if not path.is_dir():
        wanted = f"no folder {subfolder!r} with {' or '.join(patterns)} in it"
        raise FileNotFoundError(f"{what} {source!r}: {repo} holds {wanted}; check the part after the colon")
    return path


def is_hub_id(source: str) -> bool:
    """Whether `source` can be owner/name or owner/name:subfolder, and no path."""
    repo = source.partition(":")[0]
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) is not None


def check_folder(out: str, above: bool = False) -> None:
    """ValueError where --out, or the folder above it, can be no folder: the nearest thing on the way that
    exists must be one."""
    require_path(out)
    path = Path(out).expanduser().absolute()
    if above:
        path = path.parent
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"--out {out!r}: {str(path)!r} is not a directory; name another place")


def require_path(source: str) -> None:
    """ValueError for what no file system can name."""
    if "\0" in source or len(source.encode(errors="replace")) > 4096:
        raise ValueError(f"{source[:60]!r} cannot be a path: it holds a NUL byte, or is too long")


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
