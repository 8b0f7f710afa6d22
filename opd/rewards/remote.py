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
The released DeQA server gets JPEGs and ours PNGs, which moves its scores a little.

Below, what the judges ask by too: JSON over HTTP, asked patiently. A server may be slow, answer 500 or send
garbage; it is asked again after a pause, then the failure is said with its reason. Nothing is ever taken for
a score that is none, and nothing is unpickled."""

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from opd.files import reading
from opd.rewards.inputs import pictures

BATCH = 16  # images per request
TIMEOUT = 60.0  # seconds for one request
TRIES = 3
PAUSE = 1.0  # seconds before the second try; doubled before each further one
TOGETHER = 16  # requests under way at once


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


# ---- JSON over HTTP --------------------------------------------


def ask(url: str, body: dict | None = None, key: str = "") -> dict:
    """GET `url`, or POST `body`; the JSON object that comes back. `key`: a bearer token. ValueError after
    TRIES, or at once for an answer that would be the same again."""
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.data = json.dumps(body).encode()
    for number in range(TRIES):
        if number > 0:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                text = response.read()
            with reading(f"not JSON: {text[:80]!r}"):
                return json.loads(text)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {error.read(200)!r}"
            if error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"{url}: {reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise ValueError(f"{url}: {TRIES} tries failed, the last: {reason}")


def text_at(url: str, answer: dict, *path: str | int) -> str:
    """What the server's answer holds at a path of keys and positions. ValueError if there is nothing."""
    value = answer
    with reading(f"{url} answered {str(answer)[:80]}"):
        for step in path:
            value = value[step]
    return str(value)


def checked_url(endpoint: str, example: str) -> str:
    """`endpoint` without its last slash. ValueError if it is no http address."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"it needs the address of a server, got {endpoint!r}; write {example}")
    return endpoint.rstrip("/")


def png_base64(picture: Image.Image) -> str:
    """The picture as a PNG file in base64, as JSON carries it."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def gather(score: Callable, items: list, prompts: list[str]) -> Tensor:
    """`score(item, prompt)` of each pair side by side, (B,); NaN where it raised ValueError.

    The reason must not be lost: what failed is asked for again prompt by prompt (opd/rewards/scoring.py), and
    where a batch holds one prompt only and has a failure, the failure is raised."""

    def attempt(item, prompt: str) -> float | ValueError:
        try:
            return score(item, prompt)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(TOGETHER) as threads:
        answers = list(threads.map(attempt, items, prompts))
    failures = [answer for answer in answers if isinstance(answer, ValueError)]
    if failures and len(set(prompts)) == 1:
        count = f"{len(failures)} of {len(prompts)} images: "
        raise ValueError(count + str(failures[0])) from failures[0]
    return torch.tensor([math.nan if isinstance(answer, ValueError) else answer for answer in answers])
