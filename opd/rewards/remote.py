"""Scorers whose packages cannot live beside ours, each in a worker: a process of its own environment that
speaks JSON. opd/rewards/worker.py is one, short, to start from.

| name | model | licence | raw score |
|---|---|---|---|
| deqa | zhiyuanyou/DeQA-Score-Mix3 (mPLUG-Owl2, 7 B) | MIT (code) | 1-5, expected grade; reward: / 5 |
| hpsv3 | MizzenAI/HPSv3 (Qwen2-VL, 7 B) | see its card | unbounded, about 8-11 |
| imagereward | THUDM/ImageReward (BLIP, 0.4 B) | Apache-2.0 | standardised, about -2 to 2 |
| remote | whatever the worker says | | |

Argument: the worker's address, as in `deqa@http://localhost:8000`. The protocol:

    GET  /about    {"name", "model", "licence", "size", "definition", "engine"}
    POST /score    {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]} -> {"scores": [...]}

with one finite number per image, or null where it has none. /about must name the scorer that was asked for.
The released DeQA server gets JPEGs and ours PNGs, which moves its scores a little."""

import functools
import math

import torch
from torch import Tensor

from opd.flags import require
from opd.rewards.about import About
from opd.rewards.endpoint import ask, checked_url, gather
from opd.rewards.inputs import pictures, png_base64

BATCH = 16
"""Images per request."""


class Remote:
    """A worker of any name. `low`, `high`: what lies outside is no score."""

    name = ""
    low = -math.inf
    high = math.inf
    divisor = 1.0

    def __init__(self, endpoint: str = ""):
        self.endpoint = checked_url(endpoint, f"{self.name or 'remote'}@http://localhost:8000")
        unknown = "not asked yet"
        self.about = About(unknown, unknown, unknown, unknown, self.endpoint, self.divisor)

    def load(self, device: torch.device) -> None:
        """Ask the worker what it is. ValueError if it does not answer or is another one."""
        said = ask(f"{self.endpoint}/about")
        wanted = ("name", "model", "licence", "size", "definition", "engine")
        missing = [key for key in wanted if key not in said]
        require(not missing, f"{self.endpoint}/about lacks {missing}")
        right = self.name in ("", said["name"])
        require(right, f"{self.endpoint} is a worker for {said['name']!r}, wanted {self.name!r}")
        model, licence, size, definition, engine = (str(said[key]) for key in wanted[1:])
        self.about = About(model, licence, size, definition, f"{engine}, at {self.endpoint}", self.divisor)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Scores (B,); NaN where the worker gave none."""
        images = [png_base64(picture) for picture in pictures(images_BCHW)]
        scores = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            body = {"images": images[part], "prompts": prompts[part], "metadata": metadata[part]}
            scores += self._scores(body)
        return gather([functools.partial(self._checked, score) for score in scores], prompts)

    def _scores(self, body: dict) -> list:
        """What the worker answers for one request: a list with something for each image."""
        answer = ask(f"{self.endpoint}/score", body)
        got = answer.get("scores")
        count = len(body["images"])
        right = isinstance(got, list) and len(got) == count
        require(
            right, f'{self.endpoint}: wanted {{"scores": [...]}} with {count} numbers, got {str(answer)[:80]}'
        )
        return got

    def _checked(self, score) -> float:
        """ValueError for what is no number of the scorer's range."""
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        require(number, f"{self.endpoint}: {score!r} is no score")
        inside = self.low <= score <= self.high
        require(inside, f"{self.endpoint}: the score {score:g} is not in {self.low:g} to {self.high:g}")
        return float(score)


class Deqa(Remote):
    name = "deqa"
    low = 1.0
    high = 5.0
    divisor = 5.0


class HPSv3(Remote):
    name = "hpsv3"


class ImageReward(Remote):
    name = "imagereward"
