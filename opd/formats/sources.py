"""Source pictures of prompts: where a line names them, and what a pipeline can take."""

import os
from pathlib import Path
from types import ModuleType

from opd.data import Asked, Edit
from opd.errors import require
from opd.files import path_of, reading
from opd.formats.pictures import size_of_image


def source_pictures(row: dict, folder: Path, where: str) -> tuple[str, ...]:
    """The paths under "image", seen from `folder`; they become "source", where rewards find them. A "mask" of
    theirs is seen from there too. ValueError or FileNotFoundError naming `where`."""
    given = row.pop("image", None) or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "image" is {given!r:.60}; expected a path or a list of paths')
    if given and None in row:  # of a .csv, what no column is for
        raise ValueError(f"{where}: more fields than columns; several pictures of a prompt need a .jsonl")
    with reading(f'{where}: "image"'):
        paths = [str((folder / path_of(name)).resolve()) for name in names]
    for path in paths:
        if not os.path.isfile(path):  # False too where the name is longer than any file's
            what = f"no source picture {path[:300]!r}"
            raise FileNotFoundError(f"{where}: {what}; paths are seen from {folder}")
    if paths and "source" in row:
        taken = '"source" is where rewards find the pictures of "image"'
        raise ValueError(f"{where}: {taken}; give this field another name")
    if paths:
        row["source"] = paths
    if paths and isinstance(row.get("mask"), str):
        row["mask"] = str((folder / path_of(row["mask"])).resolve())
    return tuple(paths)


def sizes(asked: Asked) -> str:
    """Width x height of a prompt's source pictures' files, such as 1024x768+512x512; "" without any."""
    pictures = asked.pictures if isinstance(asked, Edit) else ()
    return "+".join("{}x{}".format(*size_of_image(picture)) for picture in pictures)


def fitted_sizes(family: ModuleType, folder: Path, asked: Asked) -> str:
    """The same as the transformer sees them. ValueError for a prompt whose source pictures, or want of any,
    the pipeline cannot take."""
    editing, kind = family.EDITING, family.PIPELINE
    text, pictures = asked if isinstance(asked, Edit) else (asked, ())
    what = f"prompt {text[:60]!r}"
    if editing is None:
        way_out = "drop its field image, or take a pipeline that edits"
        require(not pictures, f"{what} has a source picture, and {kind} reads text alone; {way_out}")
        return ""
    wanted = f"{editing.fewest} to {editing.most} source pictures (field image, or --image)"
    fits = editing.fewest <= len(pictures) <= editing.most
    require(fits, f"{what} has {len(pictures)} source pictures; {kind} takes {wanted}")
    fitted = []
    for picture in pictures:
        with reading(f"source picture {picture!r}"):
            fitted.append("{}x{}".format(*editing.size(folder, *size_of_image(picture))))
    return "+".join(fitted)
