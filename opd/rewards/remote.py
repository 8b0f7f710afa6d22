"""Scorers whose packages cannot live beside ours, each in a worker: a process of its own environment that
speaks JSON. opd/rewards/worker.py is one, short, to start from.

| name | model | licence | raw score |
|---|---|---|---|
| deqa | zhiyuanyou/DeQA-Score-Mix3 (mPLUG-Owl2, 7 B) | MIT (code) | 1-5, expected grade; reward: / 5 |
| hpsv3 | MizzenAI/HPSv3 (Qwen2-VL, 7 B) | see its card | unbounded, about 8-11 |
| imagereward | THUDM/ImageReward (BLIP, 0.4 B) | Apache-2.0 | standardised, about -2 to 2 |
| remote | whatever the worker says | | |

Argument: the worker's address, as in `deqa@http://localhost:8000`. The protocol:

    GET  /about    {"name": "deqa", "about": "model, licence, size: definition; engine"}
    POST /score    {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]} -> {"scores": [...]}

with one finite number per image, or null where it has none. /about must name the scorer that was asked for.
The released DeQA server gets JPEGs and ours PNGs, which moves its scores a little."""

import math

import torch
from torch import Tensor

from opd.rewards.endpoint import ask, checked_url, png_base64, text_at
from opd.rewards.inputs import pictures

BATCH = 16  # images per request


class Remote:
    """A worker of any name. `low`, `high`: what lies outside is no score."""

    name = ""
    low = -math.inf
    high = math.inf

    def __init__(self, endpoint: str = ""):
        self.endpoint = checked_url(endpoint, f"{self.name or 'remote'}@http://localhost:8000")
        self.about = f"{self.endpoint}, not asked yet"

    def load(self, device: torch.device) -> None:
        """Ask the worker what it is. ValueError if it does not answer or is another one."""
        url = f"{self.endpoint}/about"
        said = ask(url)
        name, about = (text_at(url, said, key) for key in ("name", "about"))
        if self.name not in ("", name):
            raise ValueError(f"{self.endpoint} is a worker for {name!r}, wanted {self.name!r}")
        self.about = f"{about}, at {self.endpoint}"

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Scores (B,); NaN where the worker gave none, or no number of its range."""
        images = [png_base64(picture) for picture in pictures(images_BCHW)]
        scores = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            body = {"images": images[part], "prompts": prompts[part], "metadata": metadata[part]}
            answer, count = ask(f"{self.endpoint}/score", body), len(images[part])
            if not isinstance(answer.get("scores"), list) or len(answer["scores"]) != count:
                wanted = f'wanted {{"scores": [...]}} with {count} numbers'
                raise ValueError(f"{self.endpoint}: {wanted}, got {str(answer)[:80]}")
            scores += answer["scores"]
        numbers = [score if type(score) in (int, float) else math.nan for score in scores]
        scores_B = torch.tensor(numbers, dtype=torch.float32)
        return scores_B.where((self.low <= scores_B) & (scores_B <= self.high), math.nan)


class Deqa(Remote):
    name = "deqa"
    low = 1.0
    high = 5.0
    divisor = 5.0


class HPSv3(Remote):
    name = "hpsv3"


class ImageReward(Remote):
    name = "imagereward"
