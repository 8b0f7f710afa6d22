"""The FLUX.1-Kontext family: FluxKontextPipeline, which edits one source picture, or paints without one.
`CONTRACT` says what each name is for; all but the pictures is FLUX.1's.

A Condition of a prompt with a picture holds `picture0` (C, H, W) beside FLUX.1's text.
"""

from functools import partial
from pathlib import Path

from diffusers.pipelines.flux import pipeline_flux_kontext

from opd.families import Editing
from opd.families import _parts as parts
from opd.families.flux import *  # noqa: F403 (what is not said here)

PIPELINE = "FluxKontextPipeline"


def picture_size(folder: Path, width: int, height: int) -> tuple[int, int]:
    """The one of the sizes that Kontext was trained on that is nearest in shape, in whole patches. The shape
    is that of the whole patches of the source. ValueError where a side has none."""
    unit = parts.PATCH * parts.pixels(folder)
    columns, rows = width // unit, height // unit
    if rows == 0 or columns == 0:
        raise ValueError(f"{width}x{height} is too small; each side needs at least {unit} pixels")
    preferred = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    _, wide, high = min((abs(columns / rows - w / h), w, h) for w, h in preferred)
    return wide // unit * unit, high // unit * unit


fitted = partial(parts.resized, picture_size)
EDITING = Editing(fewest=0, most=1, size=picture_size, fit=fitted, read=None)
