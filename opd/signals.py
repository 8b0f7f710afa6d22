"""Signals: a run that is told to stop leaves the step or picture it is in, saves the last finished step, and
ends well.

A step is a function of (seed, step): what it had begun is made again, to the same bits, by the run that goes
on. All ranks leave at the same boundary, since saving needs them all.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from opd import ranks

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 2.0
"""Seconds in which a further signal is the same one: a scheduler signals the launcher and the ranks, and the
launcher passes its own on."""
POLL = 0.05
"""Seconds between two looks of `wait_until`."""


class Stopped(Exception):
    """Its text is the signal's name."""


class Handler:
    """Python calls `handle` in the main thread, between two of its instructions."""

    number: int = 0
    """The first signal; 0 = none yet."""
    since: float = 0.0
    deferred: bool = False
    """Whether a boundary will look at the number, and the run save before the end."""
    votes: tuple | None = None
    """The ranks' numbers at the last boundary, on their way."""

    def handle(self, number: int, frame) -> None:
        # What is saved is renamed into place when it is whole, so leaving at any moment does no harm. An
        # exception might be swallowed by whatever runs here.
        now, name = time.monotonic(), signal.Signals(number).name
        if self.number == 0 and self.deferred:
            self.number, self.since = number, now
            drop_closed_pipes()
            tell(f"{name}: saving the last finished step; again to leave now")
        elif self.number == 0:
            tell(f"stopped by {name}; the same command goes on after the last checkpoint")
            os._exit(0)
        elif now - self.since > ECHO:
            os._exit(128 + number)


def drop_closed_pipes() -> None:
    """Ctrl-C ends `| tee log` too, which may be first; what is printed then would end the run before it has
    saved."""
    time.sleep(0.1)
    for output in (1, 2):
        reader = select.poll()
        reader.register(output, 0)
        if reader.poll(0):  # an error: nobody reads it
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def tell(line: str) -> None:
    """print is not for signal handlers."""
    if ranks.rank() == 0:
        os.write(1, f"\n{line}\n".encode())


_handler = Handler()  # signals belong to the process, and so does this


@contextmanager
def handled() -> Iterator[None]:
    """Inside, a signal of HANDLED ends the process with one line and status 0, or waits for a boundary where
    the run is `deferred`; a later one ends it at once."""
    _handler.number, _handler.since, _handler.deferred, _handler.votes = 0, 0.0, False, None
    before = {number: signal.signal(number, _handler.handle) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            # A run that has stopped takes half a second to leave, and a further signal is no failure.
            signal.signal(number, signal.SIG_IGN if _handler.number > 0 else handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits for the next `boundary`."""
    _handler.deferred = True
    try:
        yield
    finally:
        _handler.deferred = False


def boundary() -> None:
    """A place where a run can be left, such as between two states: raises Stopped where any rank has
    received a signal. All ranks come by the same boundaries, and leave at the same one.

    Nobody waits: what the ranks say at one boundary is read at the next.
    """
    if not _handler.deferred:
        return
    number = _handler.number
    if ranks.world() > 1:
        number = 0
        if _handler.votes is not None:
            numbers, sent = _handler.votes
            sent.wait()
            number = int(numbers)
        numbers = torch.tensor(_handler.number)
        _handler.votes = numbers, ranks.largest_later(numbers)
    if number > 0:
        raise Stopped(signal.Signals(number).name)


def wait_until(done: Callable[[], bool]) -> None:
    """Where signals wait for boundaries: until `done()` on every rank, with a boundary all the while (a
    collective)."""
    while _handler.deferred and anywhere(not done()):
        boundary()
        time.sleep(POLL)


def anywhere(here: bool) -> bool:
    """Whether it is so on any rank (a collective)."""
    said = torch.tensor(here, dtype=torch.uint8)
    if ranks.world() > 1:
        ranks.largest_later(said).wait()
    return bool(said)
