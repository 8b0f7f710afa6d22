"""Rewards: how they are named, checked before training, and computed beside the rollout.

A reward is a function `(images (B,3,H,W) float32 in [0,1] on the CPU, prompts list[str], metadata list[dict]) -> scores
(B,)`, a floating tensor, higher is better. A call that timed out may still run beside the
next one. It may carry an attribute
`metadata_keys = ("key", ...)`: what the metadata of every prompt must hold.
"""

import importlib
import inspect
import io
import math
import queue
import re
import threading
import time

import torch
from PIL import Image
from torch import Tensor

from opd.config import require
from opd.data import Prompt

_TERM = r"\s*(?:([-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|nan))\s*\*)?\s*([\w.]+(?::\w+)?)\s*"
_TURN = threading.Lock()  # calls run one at a time: batches wait for each other outside their timeouts
_RETRY_TIMEOUTS = 2  # after so many in one batch no further prompt of it is tried again


# ---- rewards without a model (DDPO) --------------------------------------------------------------------------------

def jpeg_incompressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Size in kB of the JPEG at quality 95, (B,); NaN for an image with a NaN."""
    sizes = []
    for pixels_HWC in (images_BCHW * 255).round().clamp(0, 255).permute(0, 2, 3, 1).cpu():
        file = io.BytesIO()
        Image.fromarray(pixels_HWC.nan_to_num().to(torch.uint8).numpy()).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000 if not pixels_HWC.isnan().any() else math.nan)
    return torch.tensor(sizes)


def jpeg_compressibility(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Minus the size in kB of the JPEG at quality 95, (B,)."""
    return -jpeg_incompressibility(images_BCHW, prompts, metadata)


# ---- names ---------------------------------------------------------------------------------------------------------

def find_reward(spec: str):
    """`module:function`, NAME (a function of this module) or `0.7*module:a + 0.3*module:b` -> the function.
    ValueError naming the spec if it is malformed or missing."""
    require(re.fullmatch(rf"{_TERM}(?:\+{_TERM})*", spec, re.IGNORECASE) is not None,
            f"scorer {spec!r}: write it as module:function, as NAME of a function of opd/rewards.py, or as a weighted sum "
            "of them such as 0.7*module:a+0.3*module:b")
    terms = [(weight, name, _import(name, spec)) for weight, name in re.findall(_TERM, spec, re.IGNORECASE)]
    for weight, name, _ in terms:
        require(math.isfinite(float(weight or 1)), f"scorer {spec!r}: the weight {weight} of {name} is not finite; write a number")
    if len(terms) == 1 and not terms[0][0]:
        return terms[0][2]
    return _weighted([(float(weight or 1), name, function) for weight, name, function in terms])


def _import(name: str, spec: str):
    """The function called `name`; `spec` is what the user wrote."""
    module, _, function_name = name.rpartition(":")
    try:
        function = getattr(importlib.import_module(module or __name__), function_name)
    except Exception as error:  # whatever the user's module raises
        fix = "" if module else "; write a reward outside opd/rewards.py as module:function"
        raise ValueError(f"scorer {spec!r} cannot be imported: {error}{fix}") from error
    try:
        inspect.signature(function).bind(None, None, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scorer {spec!r}: {name} must accept (images, prompts, metadata)") from error
    require(not isinstance(metadata_keys(function), str), f"scorer {spec!r}: metadata_keys of {name} is a string; make it a tuple")
    return function


def _weighted(terms: list):
    """The sum of (weight, name, function) as a reward; each term is held to what a single reward must return."""
    def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        total = torch.zeros(len(prompts))
        for weight, name, function in terms:
            scores = function(images, prompts, metadata)
            wrong = _wrong(scores, len(prompts))
            require(not wrong, f"{name} {wrong}")
            total += weight * scores.detach().to("cpu", torch.float32)
        return total
    reward.metadata_keys = tuple(dict.fromkeys(key for *_, function in terms for key in metadata_keys(function)))
    return reward


def metadata_keys(function) -> tuple[str, ...]:
    return function.metadata_keys if hasattr(function, "metadata_keys") else ()


def _wrong(scores, count: int) -> str:
    """What is wrong with the return value for `count` images, "" if nothing; non-finite scores are no concern here."""
    if not isinstance(scores, Tensor):
        return f"returned a {type(scores).__name__}, not a tensor; return torch.tensor(scores, dtype=torch.float32)"
    if not scores.is_floating_point():
        return f"returned dtype {scores.dtype}, which is not floating; return scores.float()"
    return "" if tuple(scores.shape) == (count,) else f"returned shape {tuple(scores.shape)} for {count} images"


# ---- before training -----------------------------------------------------------------------------------------------

def check_reward(task: str, spec: str, prompts: list[Prompt], pixels: int) -> None:
    """Look for the metadata the reward needs and call it once, on grey images. ValueError naming task, reward and fix."""
    function, who = find_reward(spec), f"task {task!r}: reward {spec!r}"
    for prompt in prompts:
        for key in metadata_keys(function):
            require(key in prompt.metadata, f"{who} needs {key!r} with every prompt, but {prompt.text!r} has none; add the "
                    f"field {key!r} to its line of the .jsonl")
    probe = prompts[:2]
    try:
        with torch.no_grad():
            scores = function(torch.full((len(probe), 3, pixels, pixels), 0.5), [p.text for p in probe], [p.metadata for p in probe])
    except Exception as error:
        raise ValueError(f"{who} raised {type(error).__name__} on grey images of {[p.text for p in probe]}: {error}") from error
    wrong = _wrong(scores, len(probe))
    require(not wrong, f"{who} {wrong} (wanted: a floating tensor of shape ({len(probe)},), a score per image)")


# ---- beside the rollout --------------------------------------------------------------------------------------------

class Scoring:
    """The scores of one batch, computed in a daemon thread while the caller goes on.

    Where the call for the whole batch fails, all of its prompts are scored again, one at a time; where it gives some
    images a score that is not finite, their prompts are. What still fails is NaN and has a reason. Threads cannot be
    stopped: a reward that hangs keeps its thread, but neither the caller nor the end of the process waits for it.
    """

    def __init__(self, function, images: Tensor, prompts: list[str], metadata: list[dict], timeout: float, retries: int = 1):
        """`timeout`: seconds for one call. `retries`: further calls for a prompt that failed. `images` must stay as they are."""
        require(len(images) == len(prompts) == len(metadata),
                f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata: give as many of each")
        self.function, self.images, self.prompts, self.metadata = function, images, prompts, metadata
        self.timeout, self.retries = timeout, retries
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # a new thread would be on GPU 0
        self.scores = torch.full((len(prompts),), math.nan)
        self.reasons = dict.fromkeys(range(len(prompts)), "")  # position -> why it has no score
        self.seconds, self.error = 0.0, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def result(self) -> tuple[Tensor, dict[int, str], float]:
        """Wait for (scores (B,) float32, NaN where failed; position -> reason of the failed; seconds from start to last score)."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.scores, self.reasons, self.seconds

    def _run(self) -> None:
        start, late = time.monotonic(), 0
        try:
            self._score(list(range(len(self.prompts))))
            for text in list(dict.fromkeys(self.prompts[i] for i in self.reasons)):
                late = self._retry([i for i, other in enumerate(self.prompts) if other == text], late)
        except Exception as error:  # ours, not the reward's; `result` raises it
            self.error = error
        self.seconds = time.monotonic() - start

    def _retry(self, positions: list[int], late: int) -> int:
        """Score the images of one prompt again while some have no score. `late`: retries of the batch that timed out so far."""
        if self.retries and late == _RETRY_TIMEOUTS:
            self._note(positions, "reward kept timing out")
        for _ in range(self.retries):
            if late < _RETRY_TIMEOUTS and any(i in self.reasons for i in positions):
                late += self._score(positions)
        return late

    def _score(self, positions: list[int]) -> bool:
        """Call the reward in a thread of its own, with copies, and note what came of it; True if it took too long.
        A late answer goes into a queue that nobody reads any more."""
        answer = queue.SimpleQueue()
        try:
            with _TURN:
                threading.Thread(daemon=True, target=_call, args=(
                    answer, self.device, self.function, self.images[positions], [self.prompts[i] for i in positions],
                    [self.metadata[i] for i in positions])).start()
                outcome = answer.get(timeout=self.timeout)
            self._note(positions, outcome)
        except queue.Empty:
            self._note(positions, f"took longer than {self.timeout:g} s")
            return True
        return False

    def _note(self, positions: list[int], answer: list[float] | str) -> None:
        """Fill in the missing scores that are finite, and say why the others are still missing (`answer`: scores or failure)."""
        for k, i in enumerate(positions):
            failure = answer if isinstance(answer, str) else "" if math.isfinite(answer[k]) else f"returned {answer[k]}"
            if i in self.reasons and failure:
                self.reasons[i] = f"prompt {self.prompts[i]!r}: {failure}"
            elif i in self.reasons:
                self.scores[i] = answer[k]
                del self.reasons[i]


def _call(answer: queue.SimpleQueue, device: int | None, function, images: Tensor, prompts: list[str], metadata: list[dict]) -> None:
    """Put the scores as numbers, or in words what went wrong."""
    try:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.no_grad():
            scores = function(images, prompts, metadata)
        answer.put(_wrong(scores, len(prompts)) or scores.float().tolist())
    except BaseException as error:  # SystemExit too: it would end the thread without a word
        answer.put(f"raised {type(error).__name__}: {error}")
