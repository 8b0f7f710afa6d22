"""What scorers share: pictures of tensors, and extras that may be missing."""

import importlib.util
from importlib.metadata import version

from PIL import Image
from torch import Tensor

from opd.formats.pictures import to_pil


def pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """The images as 8-bit RGB. ValueError naming the first that holds a NaN: as bytes it would look like a
    picture."""
    for position, image_CHW in enumerate(images_BCHW):
        if image_CHW.isnan().any():
            raise ValueError(f"image {position} of the batch holds a NaN")
    return [to_pil(image_CHW.float().cpu(), 0) for image_CHW in images_BCHW]


def need(extra: str, *modules: str) -> None:
    """ValueError naming the extra of this package that brings `modules`, if one is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            fix = f"pip install 'flow-opd[{extra}]'"
            raise ValueError(f"it needs the package {module}; install it with: {fix}")


def versions(*packages: str) -> str:
    """Of the packages that compute a score, which moves with them."""
    return ", ".join(f"{package} {version(package)}" for package in packages)
