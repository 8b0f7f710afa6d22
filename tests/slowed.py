"""train.py whose steps take long once the file SLOW exists: every velocity of the model waits for as many
seconds as are written there, and the file SLOW.begun says that one does."""

import os
import time
from pathlib import Path

import train
from opd.model import Model

velocity = Model.velocity


def slowly(*arguments):
    slow = Path(os.environ["SLOW"])
    if slow.exists():
        slow.with_suffix(".begun").touch()
        time.sleep(float(slow.read_text()))
    return velocity(*arguments)


def main():
    Model.velocity = slowly
    train.main()
