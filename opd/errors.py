"""Errors: what the user can mend is one line that names it; the rest keeps its traceback."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from opd import ranks


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@contextmanager
def in_one_line(*mendable: type[Exception]) -> Iterator[None]:
    """`error: ...` and exit status 1, instead of a traceback, for the errors that the user can mend here, and
    for a rank that is lost."""
    try:
        yield
    except mendable as error:
        leave(f"error: {error}")
    except RuntimeError as error:
        if not ranks.is_lost(error):
            raise
        reason = str(error).splitlines()[0]
        lost = "another rank ended, or did not answer for ten minutes"
        leave(f"error: {lost}; the same command goes on after the last checkpoint ({reason})")


def leave(line: str) -> NoReturn:
    """End with a line and exit status 1. torchrun, whose own traceback follows, is told the line by its error
    file, and prints it last."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        told = {"message": line, "timestamp": int(time.time())}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(told))
    sys.exit(line)
