"""Signals: a run that is told to stop saves between two steps, after the same one on every rank, and ends
well."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd import ranks

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 2.0
"""Seconds in which a further signal is the same one: a scheduler signals the launcher and the ranks, and the
launcher passes its own on."""


class SignalHandler:
    """Python calls `handle` in the main thread, between two of its instructions."""

    number: int = 0
    """The first signal; 0 = none yet."""
    since: float = 0.0
    deferred: bool = False
    """Whether the loop will look at the number, and save before the end."""

    def handle(self, number: int, frame) -> None:
        # What is saved is renamed into place when it is whole, so leaving at any moment does no harm. An
        # exception might be swallowed by whatever runs here.
        now = time.monotonic()
        if self.number == 0 and self.deferred:
            self.number, self.since = number, now
        elif self.number == 0:
            name = signal.Signals(number).name
            line = f"\nstopped by {name}; the same command goes on after the last checkpoint\n"
            if ranks.rank() == 0:
                os.write(1, line.encode())
            os._exit(0)
        elif now - self.since > ECHO:
            os._exit(128 + number)


_handler = SignalHandler()  # signals belong to the process, and so does this


@contextmanager
def handled() -> Iterator[None]:
    """Inside, a signal of HANDLED ends the process with one line and status 0, or waits for `received` where
    that is called; a later one ends it at once."""
    _handler.number, _handler.since, _handler.deferred = 0, 0.0, False
    before = {number: signal.signal(number, _handler.handle) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits until `received` is called."""
    _handler.deferred = True
    try:
        yield
    finally:
        _handler.deferred = False


def received(device: torch.device) -> str:
    """The name of a signal that any rank has received, the same on all of them, or "" (a collective)."""
    number = int(ranks.largest(torch.tensor(_handler.number, device=device)))
    if number == 0:
        return ""
    return signal.Signals(number).name
