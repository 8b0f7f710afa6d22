"""Judges and workers against servers that are slow, send garbage or answer 404; the example over a socket."""

import base64
import io
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from opd import rewards
from opd.rewards import judge, remote
from tests import forked
from tests.tiny_scorers import loaded

CPU = torch.device("cpu")
ABOUT = {"name": "deqa", "about": "zhiyuanyou/DeQA-Score-Mix3, MIT, 7 B: expected grade; transformers 4.36"}


NUMBERS = itertools.count()


@pytest.fixture
def serve(monkeypatch):
    """Make servers in urlopen's place; others are asked as ever, and clients hardly pause between tries."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    servers, others = {}, urllib.request.urlopen

    def start(reply):
        url = f"http://server-{next(NUMBERS)}"  # a judge of the same address is loaded once
        server = SimpleNamespace(reply=reply, asked=[], headers=[], url=url)
        servers[server.url] = server
        return server

    def urlopen(request, timeout):
        server = servers.get(f"http://{request.host}")
        if server is None:
            return others(request, timeout=timeout)
        body = json.loads(request.data) if request.data else None
        server.asked.append((request.selector, body))
        server.headers.append(dict(request.header_items()))
        return answered(request, timeout, server.reply(request.selector, body))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return start


def answered(request, timeout, answer):
    """An object is sent as JSON, bytes as they are; a number is a status, None is silence."""
    if answer is None:
        assert timeout == remote.TIMEOUT
        raise TimeoutError("timed out")
    if isinstance(answer, int):
        raise urllib.error.HTTPError(request.full_url, answer, "", {}, io.BytesIO(b"broken"))
    return io.BytesIO(answer if isinstance(answer, bytes) else json.dumps(answer).encode())


def said(text):
    return {"choices": [{"message": {"content": text}}]}


def chat(grades):
    """A judge that answers each chat by `grades(body)`."""

    def reply(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "judge-7b"}]}
        assert path == "/v1/chat/completions"
        return grades(body)

    return reply


def pixels(*levels):
    """A flat 8 px picture per level of grey."""
    return torch.stack([torch.full((3, 8, 8), level / 255) for level in levels])


def picture_of(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def prompt_in(body):
    return body["messages"][0]["content"][1]["text"]


# ---- judges --------------------------------------------
ANSWERS = [
    (judge.UnifiedReward, "fine.\nFinal Score: 3.5", 3.5),
    (judge.QwenVL, "well <OverallScore>4</OverallScore>", 4),
    (judge.QwenVLReleased, "<AlignmentScore>1</AlignmentScore><OverallScore>2</OverallScore>", 2),
]


@pytest.mark.parametrize("kind, answer, grade", ANSWERS)
def test_a_judge_gets_picture_text_and_key_and_its_grade_is_read(serve, monkeypatch, kind, answer, grade):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    server = serve(chat(lambda body: said(answer)))
    spec = f"opd.rewards.judge:{kind.__name__}@{server.url}/v1/"
    reward = loaded(spec)
    assert reward(pixels(0, 200), ["a {dog}", "a cat"], [{}, {}]).tolist() == [grade, grade]
    bodies = sorted((body for _, body in server.asked if body), key=prompt_in)
    asked = [kind.text.replace("{prompt}", p) for p in ("a {dog}", "a cat")]
    assert [prompt_in(body) for body in bodies] == sorted(asked)
    for body, level in zip(bodies, (200, 0), strict=True):
        assert body["model"] == "judge-7b" and body["temperature"] == 0
        picture = picture_of(body["messages"][0]["content"][0]["image_url"]["url"])
        assert picture.getpixel((0, 0)) == (level,) * 3
        assert picture.size == ((512, 512) if kind is judge.UnifiedReward else (8, 8))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "runs judge-7b" in reward.about[spec]


def test_each_picture_gets_its_own_grade(serve):
    """Whatever the order in which answers arrive."""

    def grade(body):
        level = picture_of(body["messages"][0]["content"][0]["image_url"]["url"]).getpixel((0, 0))[0]
        time.sleep(0.02 * (5 - level))
        return said(f"<OverallScore>{level}</OverallScore>")

    reward = loaded(f"qwenvl@{serve(chat(grade)).url}/v1")
    assert reward(pixels(1, 2, 3, 4, 5), ["a"] * 5, [{}] * 5).tolist() == [1, 2, 3, 4, 5]


def test_an_edit_is_shown_after_its_sources_and_its_lesser_grade_counts(serve, tmp_path):
    paths = [str(tmp_path / f"{level}.png") for level in (10, 20)]
    for path, level in zip(paths, (10, 20), strict=True):
        Image.new("RGB", (32, 16), (level,) * 3).save(path)
    answers = {1: (8, 3), 2: (0, 10), 3: (11, 5)}
    seen = []

    def grade(body):
        *shown, question = body["messages"][0]["content"]
        pictures = [picture_of(part["image_url"]["url"]) for part in shown]
        seen.append([(picture.getpixel((0, 0))[0], picture.size) for picture in pictures])
        assert "The instruction was: [redder]" in question["text"]
        success, kept = answers[pictures[-1].getpixel((0, 0))[0]]
        said_of = "<SuccessScore>{}</SuccessScore>, <PreservationScore> {}</PreservationScore>"
        return said(said_of.format(success, kept))

    spec = f"qwenvl_edit@{serve(chat(grade)).url}/v1"
    reward, metadata = loaded(spec), [{"source": paths}, {"source": paths[1:]}]
    assert reward(pixels(1, 2), ["redder"] * 2, metadata).tolist() == [3, 0]
    first, fitted = (10, (8, 4)), (20, (8, 4))
    assert sorted(seen) == [[first, fitted, (1, (8, 8))], [fitted, (2, (8, 8))]]
    assert "least of two grades: grade 0-10" in reward.about[spec]
    with pytest.raises(ValueError, match="the grade 11 is not in 0-10"):
        reward(pixels(3), ["redder"], metadata[:1])


# Who is asked, its answer about a dog, what is said of it, and how often it was asked for the dog alone.
BAD = [
    ("qwenvl", lambda body: None, "3 tries failed, the last: timed out", 6),
    ("qwenvl", lambda body: 404, "status 404: b'broken'", 2),
    ("qwenvl", lambda body: b"<html>", "3 tries failed, the last: not JSON: b'<html>'", 6),
    ("qwenvl", lambda body: said("I like it"), "no grade in 'I like it'", 2),
    ("qwenvl", lambda body: said("<OverallScore>9</OverallScore>"), "the grade 9 is not in 1-5", 2),
    ("deqa", lambda body: {"outputs": [3.0]}, 'wanted {"scores": [...]} with 1 numbers', 1),
    ("deqa", lambda body: b'{"scores": [NaN]}', "returned nan", 1),
    ("deqa", lambda body: {"scores": [0.0]}, "returned nan", 1),
]


@pytest.mark.parametrize("name, answer, reason, times", BAD, ids=[reason for _, _, reason, _ in BAD])
def test_who_misbehaves_gives_a_reason_and_never_a_zero(serve, name, answer, reason, times):
    """Asked once for the batch, a judge picture by picture, and once more for the prompt alone."""
    dogs = []

    def grade(body):
        if "a cat" in prompt_in(body):
            return said("<OverallScore>4</OverallScore>")
        dogs.append(body)
        return answer(body)

    def scores(body):
        if body["prompts"] == ["a dog"]:
            dogs.append(body)
            return answer(body)
        return {"scores": [None if prompt == "a dog" else 4.0 for prompt in body["prompts"]]}

    place = f"{serve(chat(grade)).url}/v1" if name == "qwenvl" else serve(worker(scores)).url
    reward = loaded(f"{name}@{place}")
    scores_B, reasons, _ = reward.start(pixels(0, 1), ["a dog", "a cat"], [{}] * 2, 30.0).result()
    assert scores_B[0].isnan() and scores_B[1] == 4
    assert list(reasons) == [0] and reason in reasons[0] and len(dogs) == times
    assert ("1 of 1 images" in reasons[0]) == (name == "qwenvl")


def test_missing_judges_are_named_before_training(serve):
    with pytest.raises(ValueError, match="address of a server, got ''; write qwenvl@http://localhost:8001"):
        rewards.find_reward("qwenvl")
    with pytest.raises(ValueError, match="needs the address of a server, got 'localhost:8001'"):
        rewards.find_reward("deqa@localhost:8001")
    port = forked.free_port()
    with pytest.raises(ValueError, match=f"127.0.0.1:{port}/v1/models: 3 tries failed.*refused"):
        loaded(f"qwenvl@http://127.0.0.1:{port}/v1")
    with pytest.raises(ValueError, match="/models answered .*IndexError"):
        loaded(f"qwenvl@{serve(lambda path, body: {'data': []}).url}/v1")


# ---- workers --------------------------------------------
def worker(scores, about=ABOUT):
    """A worker that answers each request for scores by `scores(body)`."""

    def reply(path, body):
        if path == "/about":
            return about
        assert path == "/score"
        return scores(body)

    return reply


def ones(body):
    return {"scores": [1.0] * len(body["images"])}


def test_a_worker_gets_png_prompts_and_metadata_in_batches(serve):
    def level(body):
        images = [picture_of(image) for image in body["images"]]
        return {"scores": [1 + image.getpixel((0, 0))[0] / 10 for image in images]}

    server = serve(worker(level))
    reward = loaded(f"deqa@{server.url}")
    scores_B = reward(pixels(*range(20)), [f"p{n}" for n in range(20)], [{"n": n} for n in range(20)])
    assert torch.allclose(scores_B, 1 + torch.arange(20) / 10)
    bodies = [body for _, body in server.asked if body]
    assert [len(body["images"]) for body in bodies] == [16, 4]
    assert bodies[1]["prompts"] == ["p16", "p17", "p18", "p19"] and bodies[1]["metadata"][0] == {"n": 16}
    about = f"{ABOUT['about']}, at {server.url}; reward: score / 5"
    assert reward.about == {f"deqa@{server.url}": about}


def test_another_worker_or_half_a_worker_is_refused(serve):
    with pytest.raises(ValueError, match="is a worker for 'deqa', wanted 'hpsv3'"):
        loaded(f"hpsv3@{serve(worker(ones)).url}")
    with pytest.raises(ValueError, match="/about answered .*KeyError: 'about'"):
        loaded(f"remote@{serve(worker(ones, {'name': 'x', 'model': 'y'})).url}")
    assert loaded(f"remote@{serve(worker(ones)).url}")(pixels(0), ["a"], [{}]).tolist() == [1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_example_worker_scores():
    port = forked.free_port()
    command = [sys.executable, "opd/rewards/worker.py", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        forked.wait_for(lambda: listens(port))
        reward = loaded(f"remote@http://127.0.0.1:{port}")
        scores_B = reward(pixels(0, 51, 255), ["a"] * 3, [{}] * 3)
    finally:
        process.terminate()
        process.wait()
    assert torch.allclose(scores_B, torch.tensor([0, 0.2, 1.0]))
