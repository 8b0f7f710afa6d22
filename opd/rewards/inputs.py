"""What scorers share on their way in: pictures of tensors, PNG files as text, extras that may be missing."""

import base64
import importlib.util
import io

from PIL import Image
from torch import Tensor

from opd.flags import require
from opd.formats.pictures import to_pil


def pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """The images as 8-bit RGB. ValueError naming the first that holds a NaN: as bytes it would look like a
    picture."""
    for position, image_CHW in enumerate(images_BCHW):
        require(not image_CHW.isnan().any(), f"image {position} of the batch holds a NaN")
    return [to_pil(image_CHW.float().cpu(), 0) for image_CHW in images_BCHW]


def png_base64(picture: Image.Image) -> str:
    """The picture as a PNG file in base64, as JSON carries it."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def need(extra: str, *modules: str) -> None:
    """ValueError naming the extra of this package that brings `modules`, if one is missing."""
    for module in modules:
        found = importlib.util.find_spec(module) is not None
        require(found, f"it needs the package {module}; install it with: pip install 'flow-opd[{extra}]'")
