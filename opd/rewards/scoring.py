"""Scores of one batch, computed in a guarded thread: no failure of a reward stops the caller or goes
unnoticed."""

import copy
import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opd.flags import require

_TURN = threading.Lock()  # calls run one at a time: batches wait for each other outside their time-outs
_LATE_RETRIES = 2  # after so many in one batch no further prompt of it is tried again


class Scoring:
    """The scores of one batch, computed in a daemon thread while the caller goes on.

    Where the call for the whole batch fails, all of its prompts are scored again, one at a time; where it
    gives some images a score that is not finite, their prompts are. What still fails is NaN and has a
    reason. Threads cannot be stopped: a reward that hangs keeps its thread, but neither the caller nor the
    end of the process waits for it."""

    def __init__(
        self,
        function,
        images_BCHW: Tensor,
        prompts: list[str],
        metadata: list[dict],
        timeout: float,
        retries: int = 1,
    ):
        """`function`: a reward or anything that is called like one. `timeout`: seconds for one call.
        `retries`: further calls for a prompt that failed. `images_BCHW` must stay as they are. ValueError
        for unequal counts."""
        counts = f"{len(images_BCHW)} images, {len(prompts)} prompts, {len(metadata)} metadata"
        equal = len(images_BCHW) == len(prompts) == len(metadata)
        require(equal, f"{counts}: give as many of each")
        self.function = function
        self.images_BCHW = images_BCHW
        self.prompts = prompts
        self.metadata = metadata
        self.timeout = timeout
        self.retries = retries
        self.device = _current_gpu()
        self.scores_B = torch.full((len(prompts),), math.nan)
        self.reasons = dict.fromkeys(range(len(prompts)), "")  # position -> why it has no score
        self.seconds = 0.0
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def result(self) -> tuple[Tensor, dict[int, str], float]:
        """Wait for the scores (B,) float32 on the CPU, NaN where failed; for each failed position the
        reason; and the seconds from the start to the last score. May be asked again."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.scores_B, self.reasons, self.seconds

    def _run(self) -> None:
        start = time.monotonic()
        try:
            self._score_batch()
        except Exception as error:  # ours, not the reward's; `result` raises it
            self.error = error
        self.seconds = time.monotonic() - start

    def _score_batch(self) -> None:
        """All images at once, then again those prompts of which an image still lacks its score."""
        everything = list(range(len(self.prompts)))
        self._score(everything)
        failed = dict.fromkeys(self.prompts[i] for i in self.reasons)
        late = 0
        for text in failed:
            positions = [i for i in everything if self.prompts[i] == text]
            late = self._retry(positions, late)

    def _retry(self, positions: list[int], late: int) -> int:
        """Score the images of one prompt again while some have no score. `late` counts the batch's retries
        that took too long; the new count is returned."""
        if self.retries and late == _LATE_RETRIES:
            self._note(positions, "reward kept timing out")
        for _ in range(self.retries):
            complete = self.reasons.keys().isdisjoint(positions)
            if complete or late == _LATE_RETRIES:
                break
            late += self._score(positions)
        return late

    def _score(self, positions: list[int]) -> bool:
        """Call the reward for these images and note what came of it; True if it took too long."""
        try:
            with _TURN:
                answer = self._ask(positions)
        except queue.Empty:
            self._note(positions, f"took longer than {self.timeout:g} s")
            return True
        self._note(positions, answer)
        return False

    def _ask(self, positions: list[int]) -> list[float] | str:
        """Scores or failure, from a call in a thread of its own. It gets copies, because a call that is
        given up runs on beside the next one; its late answer goes into a queue that nobody reads any
        more."""
        answers = queue.SimpleQueue()
        images_BCHW = self.images_BCHW[positions]
        prompts = [self.prompts[i] for i in positions]
        metadata = [copy.deepcopy(self.metadata[i]) for i in positions]
        arguments = (answers, self.device, self.function, images_BCHW, prompts, metadata)
        threading.Thread(target=_call, args=arguments, daemon=True).start()
        return answers.get(timeout=self.timeout)

    def _note(self, positions: list[int], answer: list[float] | str) -> None:
        """Fill in the scores that are finite, and say why the others are missing."""
        if isinstance(answer, str):
            for position in positions:
                self._fail(position, answer)
            return
        for position, score in zip(positions, answer, strict=True):
            if math.isfinite(score):
                self._keep(position, score)
            else:
                self._fail(position, f"returned {score}")

    def _keep(self, position: int, score: float) -> None:
        """The first finite score of an image stays."""
        if position in self.reasons:
            self.scores_B[position] = score
            del self.reasons[position]

    def _fail(self, position: int, failure: str) -> None:
        if position in self.reasons:
            self.reasons[position] = f"prompt {self.prompts[position]!r}: {failure}"


def _current_gpu() -> int | None:
    """The caller's GPU, for the threads: a new thread would be on GPU 0."""
    if torch.cuda.is_initialized():
        return torch.cuda.current_device()
    return None


def _call(
    answers: queue.SimpleQueue,
    device: int | None,
    function,
    images_BCHW: Tensor,
    prompts: list[str],
    metadata: list[dict],
) -> None:
    """Put the scores as numbers, or in words what went wrong."""
    try:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.no_grad(), no_exit():
            scores = function(images_BCHW, prompts, metadata)
        fault = fault_of(scores, len(prompts))
        answers.put(fault or scores.float().tolist())
    except BaseException as error:  # SystemExit too: it would end the thread without a word
        answers.put(f"raised {type(error).__name__}: {error}")


_guest = threading.local()
_leave = os._exit


@contextmanager
def no_exit() -> Iterator[None]:
    """Inside, os._exit of this thread raises SystemExit: a reward must not end the run without a word. A
    process that the reward forks may end itself."""
    _guest.process = os.getpid()
    try:
        yield
    finally:
        _guest.process = None


def _exit(status: int) -> None:
    if getattr(_guest, "process", None) == os.getpid():
        raise SystemExit(f"os._exit({status})")
    _leave(status)


os._exit = _exit


def fault_of(scores, count: int) -> str:
    """What is wrong with what a reward returned for `count` images, "" if nothing. Scores that are not
    finite are no concern here."""
    if not isinstance(scores, Tensor):
        fix = "return torch.tensor(scores, dtype=torch.float32)"
        return f"returned a {type(scores).__name__}, not a tensor; {fix}"
    if not scores.is_floating_point():
        return f"returned dtype {scores.dtype}, which is not floating; return scores.float()"
    if tuple(scores.shape) != (count,):
        return f"returned shape {tuple(scores.shape)} for {count} images"
    return ""
