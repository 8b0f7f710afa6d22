"""Scores of one batch, computed beside the caller: no failure of a reward stops the run or goes unnoticed."""

import copy
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import ranks, signals

MOST_LATE = 2  # after so many late retries of a batch, its further prompts are not tried again


@dataclass(eq=False)
class Scoring:
    """The scores of one batch, computed in a thread while the caller goes on. Scorings run one at a time, in
    the order begun.

    Where the call for the whole batch fails, the images without a finite score are scored once again, prompt
    by prompt. What still fails is NaN and has a reason."""

    function: Callable  # a reward or anything that is called like one
    images_BCHW: Tensor  # must stay as they are
    prompts: list[str]
    metadata: list[dict]
    timeout: float  # seconds for one call

    newest = None  # the event `over` of the scoring begun last

    def __post_init__(self):
        self.scores_B = torch.full((len(self.prompts),), math.nan)
        self.failures = dict.fromkeys(range(len(self.prompts)), "")  # row -> why it has no score
        self.seconds = 0.0
        self.gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.over = threading.Event()
        before, Scoring.newest = Scoring.newest, self.over
        threading.Thread(target=self._run, args=(before,), daemon=True).start()

    def is_over(self) -> bool:
        return self.over.is_set()

    def result(self) -> tuple[Tensor, dict[int, str], float]:
        """Wait for the scores (B,) float32 on the CPU, NaN where failed; for each failed row the reason; and
        the seconds that the calls took."""
        self.over.wait()
        return self.scores_B, self.failures, self.seconds

    def _run(self, before: threading.Event | None) -> None:
        if before is not None:
            before.wait()
        try:
            self._score(list(self.failures))
            self._retry()
        finally:
            self.over.set()

    def _retry(self) -> None:
        # With their source pictures, since edits of many may share their text.
        sources = [repr(row.get("source")) for row in self.metadata]
        asked = list(zip(self.prompts, sources, strict=True))
        late = 0
        for one in dict.fromkeys(asked[row] for row in self.failures):
            rows = [row for row in self.failures if asked[row] == one]
            if late < MOST_LATE:
                late += self._score(rows)
            else:
                self._fail(rows, "reward kept timing out")

    def _score(self, rows: list[int]) -> bool:
        """Call the reward for these rows and note what it gives; True if it was late.

        The call has a daemon thread of its own: neither the next call nor the end of the process waits for
        one that hangs."""
        answers = []
        call = threading.Thread(target=lambda: answers.append(self._answer(rows)), daemon=True)
        start = time.monotonic()
        call.start()
        call.join(self.timeout)
        self.seconds += time.monotonic() - start
        if not answers:
            self._fail(rows, f"took longer than {self.timeout:g} s")
            return True
        [answer] = answers
        if isinstance(answer, str):
            self._fail(rows, answer)
            return False
        for row, score in zip(rows, answer, strict=True):
            if math.isfinite(score):
                self.scores_B[row] = score
                del self.failures[row]
            else:
                self._fail([row], f"returned {score}")
        return False

    def _answer(self, rows: list[int]) -> list[float] | str:
        """The scores of these rows as numbers, or what is wrong with them."""
        try:
            # Copies, because a call that is late runs on beside the next one.
            images_BCHW, prompts = self.images_BCHW[rows], [self.prompts[row] for row in rows]
            metadata = copy.deepcopy([self.metadata[row] for row in rows])
            if self.gpu is not None:
                torch.cuda.set_device(self.gpu)  # a new thread would be on GPU 0
            with torch.no_grad():
                scores = self.function(images_BCHW, prompts, metadata)
            return fault_of(scores, len(rows)) or scores.float().tolist()
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            return f"raised {type(error).__name__}: {error}"

    def _fail(self, rows: list[int], reason: str) -> None:
        for row in rows:
            sources = self.metadata[row].get("source")
            of = f" of {sources}" if isinstance(sources, list) else ""
            self.failures[row] = f"prompt {self.prompts[row]!r}{of}: {reason}"


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


def gather_scores(
    pending: list[tuple[list[int], Scoring]], count: int, device: torch.device
) -> tuple[Tensor, list[str], float]:
    """Wait for the scorings of some samples each (collectives by way of `device`). Returns the scores
    (count,) float64 of all ranks' samples, NaN where none was asked for or it failed; all ranks' failures in
    words; and the seconds that this rank's scorers were busy."""
    scored_2N = torch.zeros(2, count, dtype=torch.float64)
    scores_N, asked_N = scored_2N
    failures, busy = [], 0.0
    signals.wait_until(lambda: all(scoring.is_over() for _, scoring in pending))
    for samples, scoring in pending:
        scores_B, failed, seconds = scoring.result()
        scores_N[samples] = scores_B.double()
        asked_N[samples] = 1.0
        failures += sorted(set(failed.values()))
        busy += seconds
    scores_N, asked_N = ranks.total(scored_2N.to(device, non_blocking=True)).cpu()
    everywhere = [failure for failures_of_rank in ranks.gather(failures) for failure in failures_of_rank]
    return torch.where(asked_N > 0, scores_N, torch.nan), everywhere, busy
