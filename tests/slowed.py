"""train.py whose steps take long once the file SLOW exists: every velocity of the model waits for as many
seconds as are written there, and the file SLOW.begun says that one does. Behind the number may stand a method
and the steps done: then those wait alone that it asks for by then."""

import os
import sys
import time
from pathlib import Path

import train
from opd.model import Model

velocity = Model.velocity


def slowly(*arguments):
    slow = Path(os.environ["SLOW"])
    if slow.exists():
        seconds, *place = slow.read_text().split()
        if callers().issuperset(place):
            slow.with_suffix(".begun").touch()
            time.sleep(float(seconds))
    return velocity(*arguments)


def callers() -> set[str]:
    """The names of the functions that are at work, and their steps done."""
    frame, found = sys._getframe(), set()
    while frame is not None:
        found |= {frame.f_code.co_name, str(frame.f_locals.get("done", ""))}
        frame = frame.f_back
    return found


def main():
    Model.velocity = slowly
    train.main()
