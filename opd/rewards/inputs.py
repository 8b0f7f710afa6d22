"""What scorers share: pictures of tensors and of prompts, and extras that may be missing."""

import functools
import importlib.util
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from torch import Tensor

from opd.formats.pictures import read_image, to_pil


def pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """The images as 8-bit RGB. ValueError naming the first that holds a NaN: as bytes it would look like a
    picture."""
    for position, image_CHW in enumerate(images_BCHW):
        if image_CHW.isnan().any():
            raise ValueError(f"image {position} of the batch holds a NaN")
    return [to_pil(image_CHW.float().cpu(), 0) for image_CHW in images_BCHW]


def source_fault(text: str, metadata: dict) -> str:
    """The `prompt_fault` of a reward that compares a picture with its sources."""
    if isinstance(metadata.get("source"), list):  # a line without "image" may call anything its source
        return ""
    return "the prompt has no source picture (field image)"


def sources_of(metadata: dict) -> list[Image.Image]:
    """A prompt's source pictures in their order, RGB, not to be changed. ValueError where it has none."""
    if fault := source_fault("", metadata):
        raise ValueError(fault)
    return [picture_at(path) for path in metadata["source"]]


@functools.lru_cache(maxsize=8)
def picture_at(path: str) -> Image.Image:
    """The RGB picture, kept for the next samples of its group. ValueError naming a file that is none."""
    return read_image(Path(path))


def need(extra: str, *modules: str) -> None:
    """ValueError naming the extra of this package that brings `modules`, if one is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            fix = f"pip install 'flow-opd[{extra}]'"
            raise ValueError(f"it needs the package {module}; install it with: {fix}")


def versions(*packages: str) -> str:
    """Of the packages that compute a score, which moves with them."""
    return ", ".join(f"{package} {version(package)}" for package in packages)
