"""Signals: a run that is told to stop saves between two steps, after the same one on every rank, and ends
well."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd import ranks

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 2.0
"""Seconds in which a further signal is the same one: a scheduler signals the launcher and the ranks, and the
launcher passes its own on."""
GO_ON = "the same command goes on"


class Ear:
    """What this process has heard. Python calls `note` in the main thread, between two of its steps."""

    number: int = 0
    """The first signal; 0 = none yet."""
    since: float = 0.0
    saves: bool = False
    """Whether somebody will ask, and save before the end."""

    def forget(self) -> None:
        self.number, self.since, self.saves = 0, 0.0, False

    def note(self, number: int, frame) -> None:
        # What is saved is renamed into place when it is whole, so leaving at any moment does no harm. An
        # exception might be swallowed by whatever runs here.
        now = time.monotonic()
        if self.number == 0 and self.saves:
            self.number, self.since = number, now
        elif self.number == 0:
            line = f"\nstopped by {signal.Signals(number).name}; {GO_ON} after the last checkpoint\n"
            if ranks.rank() == 0:
                os.write(1, line.encode())
            os._exit(0)
        elif now - self.since > ECHO:
            os._exit(128 + number)


_ear = Ear()  # signals belong to the process, and so does this


@contextmanager
def heard() -> Iterator[None]:
    """Inside, a signal of HEARD ends the process with one line and status 0, or waits for `asked` where that
    is called; a later one ends it at once."""
    _ear.forget()
    before = {number: signal.signal(number, _ear.note) for number in HEARD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, a signal waits until `asked` is called."""
    _ear.saves = True
    try:
        yield
    finally:
        _ear.saves = False


def asked(device: torch.device) -> str:
    """The name of a signal that any rank has received, the same on all of them, or "" (a collective)."""
    number = int(ranks.largest(torch.tensor(_ear.number, device=device)))
    if number == 0:
        return ""
    return signal.Signals(number).name
