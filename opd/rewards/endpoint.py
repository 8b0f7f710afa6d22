"""JSON over HTTP, asked patiently: what `judge` and `remote` send their pictures through.

A server may be slow, answer 500 or send garbage. It is asked again after a pause; then the failure is said
with its reason. Nothing is ever taken for a score that is none, and nothing is unpickled."""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from opd.flags import require

TIMEOUT = 60.0
"""Seconds for one request."""
TRIES = 3
PAUSE = 1.0
"""Seconds before the second try; doubled before each further one."""
TOGETHER = 16
"""Requests under way at once."""
LONGEST = 16 * 2**20
"""Bytes of an answer; longer ones are garbage."""


class Unanswered(ValueError):
    """A server that did not give a usable answer; the message names it and says why."""


def ask(url: str, body: dict | None = None, key: str = "") -> dict:
    """GET `url`, or POST `body`; the JSON object that comes back. `key`: a bearer token. Unanswered after
    TRIES."""
    pause = PAUSE
    for last_try in [False] * (TRIES - 1) + [True]:
        try:
            return _ask_once(url, body, key)
        except _Refused as error:
            raise Unanswered(f"{url}: {error}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            if last_try:
                raise Unanswered(f"{url}: {TRIES} tries failed, the last: {_said(error)}") from error
        time.sleep(pause)
        pause *= 2


class _Refused(Exception):
    """An answer that would be the same again."""


def _ask_once(url: str, body: dict | None, key: str) -> dict:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None
    if body is not None:
        data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            text = response.read(LONGEST)
    except urllib.error.HTTPError as error:
        said = f"status {error.code}: {error.read(200)!r}"
        if error.code < 500 and error.code not in (408, 429):
            raise _Refused(said) from error
        raise ValueError(said) from error
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {text[:80]!r}") from error
    require(isinstance(answer, dict), f"no JSON object: {text[:80]!r}")
    return answer


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError) or "timed out" in str(error):
        return f"no answer within {TIMEOUT:g} s"
    return str(error) or type(error).__name__


def checked_url(endpoint: str, example: str) -> str:
    """`endpoint` without its last slash. ValueError if it is no http address."""
    named = endpoint.startswith(("http://", "https://"))
    require(named, f"it needs the address of a server, got {endpoint!r}; write {example}")
    return endpoint.rstrip("/")


def gather(requests: list, prompts: list[str]) -> Tensor:
    """The scores (B,) of calls made side by side; NaN where one raised ValueError.

    The reason must not be lost: what failed is asked for again prompt by prompt (opd/rewards/scoring.py), and
    where a batch holds one prompt only and has a failure, the failure is raised."""
    with ThreadPoolExecutor(TOGETHER) as threads:
        answers = list(threads.map(_answer, requests))
    failures = [answer for answer in answers if isinstance(answer, ValueError)]
    if failures and len(set(prompts)) == 1:
        count = f"{len(failures)} of {len(prompts)} images: "
        raise ValueError(count + str(failures[0])) from failures[0]
    return torch.tensor([math.nan if isinstance(answer, ValueError) else answer for answer in answers])


def _answer(request) -> float | ValueError:
    try:
        return request()
    except ValueError as error:
        return error
