"""JSON over HTTP, asked patiently: what the judges and the workers get their pictures through.

A server may be slow, answer 500 or send garbage. It is asked again after a pause; then the failure is said
with its reason. Nothing is ever taken for a score that is none, and nothing is unpickled."""

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

TIMEOUT = 60.0  # seconds for one request
TRIES = 3
PAUSE = 1.0  # seconds before the second try; doubled before each further one
TOGETHER = 16  # requests under way at once


def ask(url: str, body: dict | None = None, key: str = "") -> dict:
    """GET `url`, or POST `body`; the JSON object that comes back. `key`: a bearer token. ValueError after
    TRIES, or at once for an answer that would be the same again."""
    for number in range(TRIES):
        if number > 0:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            return _ask_once(url, body, key)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {error.read(200)!r}"
            if error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"{url}: {reason}") from error
        except TimeoutError:
            reason = f"no answer within {TIMEOUT:g} s"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise ValueError(f"{url}: {TRIES} tries failed, the last: {reason}")


def _ask_once(url: str, body: dict | None, key: str) -> dict:
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        text = response.read()
    with reading(f"not JSON: {text[:80]!r}"):
        return json.loads(text)


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
