"""Rewards: what a name means, what is refused before training, that no failure goes unnoticed."""

import math
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from PIL import Image, ImageDraw

from opd import rewards
from opd.data import Prompt
from opd.formats.pictures import to_tensor
from opd.formats.prompts import load_prompts
from opd.mini import rewards as mini
from opd.rewards import pixels
from opd.rewards.scoring import Scoring
from tests.tiny_grpo import brightness

HERE = "tests.test_rewards"
CPU = torch.device("cpu")


def needs_target(images, prompts, metadata):
    return torch.tensor([float(m["target"]) for m in metadata])


needs_target.metadata_keys = ("target",)


class Counted:
    """A reward with a model, made with a string; it notes what is done to it and fails to load at first."""

    about = "twice the brightness"

    def __init__(self, argument="plain"):
        if argument == "broken":
            raise OSError("no such variant")
        self.argument, self.loads, self.calls = argument, [], []

    def load(self, device):
        self.loads.append(device)
        if len(self.loads) == 1:
            raise OSError("no file weights.safetensors")

    def prompt_fault(self, text, metadata):
        return "" if "a" in text else f"no a in it ({metadata['n']})"

    def __call__(self, images, prompts, metadata):
        return 2 * brightness(images, prompts, metadata)


def spy(function):
    return rewards.Reward("spy", [rewards.Term(1.0, "spy", function)])


def images_of(count, pixels=8):
    return torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


# ---- rewards without a model --------------------------------------------
def test_jpeg_rewards_order_flat_against_noise():
    images = torch.stack([torch.full((3, 64, 64), 0.3), images_of(1, 64)[0]])
    size = pixels.incompressibility(images, ["", ""], [{}, {}])
    assert 0 < 4 * size[0] < size[1] < 3 * 64 * 64 / 1000  # kB; smaller than the raw pixels
    assert torch.equal(pixels.compressibility(images, ["", ""], [{}, {}]), -size)


def test_a_nan_image_is_not_a_compressible_one():
    images = torch.full((2, 3, 16, 16), 0.5)
    images[1, 0, 3, 3] = math.nan
    reward = rewards.find_reward("jpeg_compressibility")
    scores, failures, _ = reward.start(images, ["a", "b"], [{}, {}], 30.0).result()
    assert scores.isnan().tolist() == [False, True] and "holds a NaN" in failures[1]


@pytest.fixture
def kept(tmp_path):
    """Score a picture by `preservation` against one in a file, and a mask."""

    def score(picture, source, **mask):
        path = tmp_path / f"source-{len(list(tmp_path.iterdir()))}.png"  # a new one: they are cached
        source.save(path)
        metadata = {"source": [str(path)]} | mask
        return rewards.find_reward("preservation")(to_tensor(picture)[None], [""], [metadata]).item()

    return score


def half_white(size, level=0):
    """White at the right, a grey level at the left."""
    picture = Image.new("RGB", size, (level,) * 3)
    picture.paste("white", (size[0] // 2, 0, *size))
    return picture


def test_preservation_by_closed_forms(kept):
    noise = Image.effect_noise((96, 64), 80).convert("RGB")
    assert kept(noise, noise) == 1
    black, half = Image.new("RGB", (64, 64)), half_white((64, 64))
    assert kept(half, half_white((256, 128))) == 1  # whatever the size
    assert kept(half, half_white((64, 64), 51)) == pytest.approx(1 - 0.2 / 2 / 0.25)  # half is 0.2 off
    assert kept(half, black) == kept(half, half.rotate(90)) == 0
    checks = Image.new("RGB", (64, 64))
    ImageDraw.Draw(checks).point([(x, y) for x in range(64) for y in range(x % 2, 64, 2)], "white")
    assert kept(checks, Image.new("RGB", (64, 64), (127, 128, 127))) > 0.98  # grain is no change


def test_preservation_looks_where_the_mask_is_not_white(kept, tmp_path):
    mask, left = str(tmp_path / "mask.png"), str(tmp_path / "left.png")
    picture = half_white((60, 60))  # whose 60 columns are no multiple of the 32 cells
    half_white((60, 60)).save(mask)
    assert kept(picture, Image.new("RGB", (60, 60)), mask=mask) == 1
    half_white((60, 60)).rotate(180).save(left)
    changed = half_white((60, 60), 51)
    assert kept(changed, half_white((60, 60)), mask=mask) == pytest.approx(1 - 0.2 / 0.25, abs=1e-5)
    assert kept(changed, half_white((60, 60)), mask=left) == 1
    Image.new("L", (8, 8), 255).save(mask_all := tmp_path / "all.png")
    with pytest.raises(ValueError, match="all.png' is white all over"):
        kept(picture, picture, mask=str(mask_all))


@pytest.mark.parametrize("spec", ["preservation", "clip_direction@no/clip", "qwenvl_edit@http://no.such:1"])
def test_a_prompt_without_a_source_picture_is_refused_by_name(spec, tmp_path):
    """Before a model loads. What a line without "image" calls its source is no picture."""
    file = tmp_path / "edits.jsonl"
    captions = '"source_caption": "a cat", "target_caption": "a dog"'
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    starts = ['"prompt": "redder", "image": "a.png"', '"prompt": "x", "source": "web"']
    file.write_text("".join(f"{{{start}, {captions}}}\n" for start in starts))
    prompts = load_prompts(str(file), "mine", None)
    reward = rewards.find_reward(spec)
    reward.check_metadata("mine", prompts[:1])
    with pytest.raises(ValueError, match=rf"edits.jsonl:2 'x' .*{spec}: the prompt has no source picture"):
        reward.check_metadata("mine", prompts)
    if spec == "preservation":
        prompts[0].metadata["mask"] = "no.png"
        with pytest.raises(ValueError, match="edits.jsonl:1 .*no mask 'no.png'"):
            reward.check_metadata("mine", prompts)


# ---- names --------------------------------------------
def test_a_single_name_is_the_function_itself():
    for spec in ("jpeg_incompressibility", " opd.rewards.pixels:incompressibility "):
        (term,) = rewards.find_reward(spec).terms
        assert term.function == pixels.incompressibility
    answer = object()
    assert spy(lambda *batch: answer)(images_of(2), ["", ""], [{}, {}]) is answer


@pytest.mark.parametrize("spec, a, b", [("0.7*{}+0.3*{}", 0.7, 0.3), (" 1e+1 * {} + -2.*{} ", 10, -2)])
def test_a_weighted_sum_is_the_sum_by_hand(spec, a, b):
    batch = images_of(4, 32), ["a"] * 4, [{}] * 4
    found = rewards.find_reward(spec.format("opd.mini.rewards:quality", f"{HERE}:brightness"))
    assert torch.allclose(found(*batch), a * mini.quality(*batch) + b * brightness(*batch), atol=1e-6)


def spoils(images, prompts, metadata):
    images *= 0
    prompts.clear()
    metadata[0].clear()
    return torch.zeros(len(images))


def test_a_term_of_a_sum_gets_what_another_has_not_changed():
    batch = images_of(1), ["a"], [{"target": 5}]
    found = rewards.find_reward(f"{HERE}:spoils+{HERE}:brightness+{HERE}:needs_target")
    assert found(*batch).item() == pytest.approx(brightness(*batch).item() + 5)


def test_a_sum_needs_the_metadata_of_all_its_terms():
    reward = rewards.find_reward(f"{HERE}:brightness + 2*{HERE}:needs_target")
    assert reward(torch.zeros(1, 3, 4, 4), [""], [{"target": 5}]).tolist() == [10.0]
    lacks = rf"'mine': a.jsonl:7 'x' lacks a field .*: {HERE}:needs_target needs 'target' with every prompt"
    with pytest.raises(ValueError, match=lacks):
        reward.check_metadata("mine", [Prompt("x", "mine", {"n": 1}, "a.jsonl:7")])


def test_a_class_is_made_once_for_an_argument_and_loaded_once():
    spec = f"2*{HERE}:Counted@/a-b/c_1.pt + {HERE}:Counted+.5*{HERE}:Counted@http://host:80/v1"
    reward = rewards.find_reward(spec)
    functions = [term.function for term in reward.terms]
    assert [f.argument for f in functions] == ["/a-b/c_1.pt", "plain", "http://host:80/v1"]
    again = rewards.find_reward(f"{HERE}:Counted@/a-b/c_1.pt")
    assert again.terms[0].function is functions[0] and functions[0].loads == []
    with pytest.raises(ValueError, match=r"load\(meta\) of .*OSError: no file weights") as error:
        again.load(torch.device("meta"))
    assert repr(again.spec) in str(error.value)
    again.load(CPU)  # what failed may be tried again
    for function in functions[1:]:
        function.loads.append("at first it fails")
    reward.load(CPU)
    assert [len(f.loads) for f in functions] == [2, 2, 2]
    scores = reward(images_of(4), [""] * 4, [{}] * 4)
    assert torch.allclose(scores, (4 + 2 + 1) * brightness(images_of(4), None, None))


@pytest.mark.parametrize(
    "text, specs",
    [
        ("ocr, my.py:f,0.5*ocr+a:b@x", ["ocr", "my.py:f", "0.5*ocr+a:b@x"]),
        ("hpsv2@/w/HPS.pt,/w/vit-h,ocr", ["hpsv2@/w/HPS.pt,/w/vit-h", "ocr"]),
        ("geneval@w,ocr/clip", ["geneval@w,ocr/clip"]),
    ],
)
def test_a_comma_parts_scorers_and_no_arguments(text, specs):
    assert rewards.specs_of(text) == specs


def test_a_reward_in_a_file_imports_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_a_reward.py").write_text("SCALE = 3.0\n")
    lines = "import neighbour_of_a_reward as near\n\ndef reward(images, prompts, metadata):\n"
    (tmp_path / "own.py").write_text(f"{lines}    return near.SCALE * images.mean((1, 2, 3))\n")
    before = list(sys.path)
    reward = rewards.find_reward(f"{tmp_path}/own.py:reward")
    assert reward(images_of(2), [""] * 2, [{}] * 2).tolist() == (3 * images_of(2).mean((1, 2, 3))).tolist()
    assert sys.path == before


@pytest.mark.parametrize(
    "spec, message",
    [
        (f"{HERE}:Counted@broken", "Counted@broken: .*no such variant"),
        (f"{HERE}:brightness@x", "takes no argument; drop @x"),
        ("", "write it as"),
        ("nothing_here", "module:function"),
        (f"{HERE}:brightness+0.5*no.such:thing", "No module named 'no'"),
        ("math:pi", "must accept"),
        ("1e999*jpeg_compressibility", "write it as"),
    ],
)
def test_wrong_names_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        rewards.find_reward(spec)
    assert repr(spec) in str(error.value)


# ---- before training --------------------------------------------
def test_a_reward_is_tried_on_grey_images_of_the_size_asked_for():
    seen = []

    def reward(*batch):
        seen.append((*batch, torch.is_grad_enabled()))
        return torch.full((len(batch[0]),), math.nan)  # a grey image need not have a score

    spy(reward).check("task", [Prompt(f"prompt {n}", "task", {"n": n}) for n in range(3)], (24, 16))
    ((images, prompts, metadata, grad),) = seen
    assert torch.equal(images, torch.full((2, 3, 24, 16), 0.5)) and not grad
    assert (prompts, metadata) == (["prompt 0", "prompt 1"], [{"n": 0}, {"n": 1}])


def test_a_prompt_that_cannot_be_scored_is_named_with_its_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "an a", "n": 1}\n\n{"prompt": "lost", "n": 2}\n')
    reward = rewards.find_reward(f"{HERE}:brightness+{HERE}:Counted")
    message = rf"'mine': .*prompts.jsonl:3 'lost' cannot be scored by {HERE}:Counted: no a in it \(2\)"
    with pytest.raises(ValueError, match=message):
        reward.check_metadata("mine", load_prompts(str(file), "mine", None))


# ---- beside the rollout --------------------------------------------
TEXTS = ["a", "bb", "a", "ccc", "bb"]


def scored(function, texts=TEXTS, timeout=30.0):
    metadata = [{"n": n} for n in range(len(texts))]
    return spy(function).start(images_of(len(texts)), texts, metadata, timeout).result()


def test_a_batch_is_scored_beside_the_caller_and_the_next_waits_for_it():
    calls, go = [], threading.Event()

    def reward(images, prompts, metadata):
        calls.append(([m["n"] for m in metadata], torch.is_grad_enabled()))
        assert go.wait(60)
        return brightness(images, prompts, metadata).double()

    images = images_of(5)
    first = spy(reward).start(images, TEXTS, [{"n": n} for n in range(5)], 60.0)
    second = spy(reward).start(images[:1], ["a"], [{"n": 9}], 60.0)
    while not calls:
        time.sleep(0.01)
    assert calls == [([0, 1, 2, 3, 4], False)]  # the first runs, the second waits, and we are here
    go.set()
    scores, failures, seconds = second.result()
    assert torch.equal(scores, brightness(images[:1], None, None)) and scores.dtype == torch.float32
    scores, failures, seconds = first.result()
    assert torch.equal(scores, brightness(images, None, None)) and failures == {} and seconds > 0


def test_raising_for_one_prompt_costs_only_that_prompt():
    """And a reward that changes its arguments spoils no retry."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append((prompts, [m.pop("n") for m in metadata]))
        scores = brightness(images, prompts, metadata)
        images.zero_()
        if "bb" in prompts:
            raise ValueError("cannot read bb")
        return scores

    scores, failures, _ = scored(reward)
    wanted = brightness(images_of(5), None, None)
    assert torch.allclose(scores[[0, 2, 3]], wanted[[0, 2, 3]]) and scores[[1, 4]].isnan().all()
    assert failures == dict.fromkeys((1, 4), "prompt 'bb': raised ValueError: cannot read bb")
    retries = [(["a", "a"], [0, 2]), (["bb", "bb"], [1, 4]), (["ccc"], [3])]
    assert calls == [(TEXTS, [0, 1, 2, 3, 4]), *retries]


def test_an_image_without_a_score_is_scored_once_again():
    calls = []

    def reward(images, prompts, metadata):
        calls.append([m["n"] for m in metadata])
        scores = brightness(images, prompts, metadata)
        if len(calls) == 1:
            scores[[1, 3]] = torch.tensor([math.nan, math.inf])
        if len(prompts) == 1 and prompts[0] == "ccc":
            scores[0] = -math.inf
        return scores

    scores, failures, _ = scored(reward)
    good = [0, 1, 2, 4]
    assert torch.allclose(scores[good], brightness(images_of(5), None, None)[good]) and scores[3].isnan()
    assert failures == {3: "prompt 'ccc': returned -inf"}
    assert calls == [[0, 1, 2, 3, 4], [1], [3]]


@pytest.mark.parametrize(
    "reward, reason",
    [
        (lambda *_: torch.zeros(3), "returned shape (3,) for 2 images"),
        (lambda *_: [0.0, 0.0], "returned a list"),
        (lambda images, *_: torch.full((2,), 1e300, dtype=torch.float64), "returned inf"),
        (lambda *_: sys.exit("bye"), "raised SystemExit: bye"),
    ],
)
def test_what_a_reward_does_wrongly_is_said(reward, reason):
    scores, failures, _ = scored(reward, texts=["a", "a"])
    assert scores.isnan().all() and sorted(failures) == [0, 1]
    assert all(text.startswith(f"prompt 'a': {reason}") for text in failures.values())


def test_after_two_late_retries_no_prompt_is_called_any_more():
    """And late answers change nothing."""
    calls, threads, release = [], [], threading.Event()

    def reward(images, prompts, metadata):
        calls.append(prompts)
        threads.append(threading.current_thread())
        assert release.wait(60)
        return torch.zeros(len(images))

    scores, failures, seconds = scored(reward, timeout=0.1)
    release.set()
    for thread in threads:
        thread.join(60)
    assert scores.isnan().all() and calls == [TEXTS, ["a", "a"], ["bb", "bb"]] and seconds >= 0.3
    late, kept = "took longer than 0.1 s", "reward kept timing out"
    words = [f"prompt {text!r}: {kept if text == 'ccc' else late}" for text in TEXTS]
    assert failures == dict(enumerate(words))


def test_a_stuck_reward_keeps_neither_the_next_batch_nor_the_process():
    code = """
        import time, torch
        from opd.rewards import Reward, Term
        stuck = Reward("stuck", [Term(1.0, "stuck", lambda *batch: time.sleep(1000))])
        bright = Reward("bright", [Term(1.0, "bright", lambda images, *_: images.mean((1, 2, 3)))])
        batch = torch.ones(1, 3, 4, 4), ["a"], [{}]
        first, second = stuck.start(*batch, 0.1), bright.start(*batch, 60.0)
        print(second.result()[0].tolist(), *first.result()[:2])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1.0] tensor([nan]) {0: \"prompt 'a': took longer than 0.1 s\"}"


def test_a_failure_names_the_source_picture_and_costs_no_other_edit_its_score():
    """Of edits that share their text."""
    metadata = [{"source": ["/a.png"]}, {"source": ["/b.png"]}]

    def picky(images_BCHW, prompts, rows):
        if metadata[1] in rows:
            raise ValueError("no")
        return torch.ones(len(prompts))

    scores_B, failures, _ = Scoring(picky, torch.zeros(2, 3, 4, 4), ["redder"] * 2, metadata, 10.0).result()
    assert scores_B[0] == 1 and scores_B[1].isnan()
    assert failures == {1: "prompt 'redder' of ['/b.png']: raised ValueError: no"}
