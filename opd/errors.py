"""Errors: what the user can mend is one line that names it; the rest keeps its traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not ranks.is_lost(error):
            raise
        reason = str(error).splitlines()[0]
        lost = "another rank ended, or did not answer for half an hour"
        sys.exit(f"error: {lost}; the same command goes on after the last checkpoint ({reason})")
