"""Rewards: what a name means, what is refused before training, that no failure goes unnoticed."""

import importlib
import math
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from opd import rewards
from opd.data import Prompt, load_prompts
from opd.mini import rewards as mini
from opd.rewards import jpeg

HERE = "tests.test_rewards"


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def lettered(images, prompts, metadata):
    return torch.tensor([float(len(p)) for p in prompts])


def needs_target(images, prompts, metadata):
    return torch.tensor([float(m["target"]) for m in metadata])


def needs_both(images, prompts, metadata):
    return torch.tensor([float(m["target"] * m["scale"]) for m in metadata])


needs_target.metadata_keys = ("target",)
needs_both.metadata_keys = ("scale", "target")


def one_string_of_keys(images, prompts, metadata):
    return torch.zeros(len(images))


one_string_of_keys.metadata_keys = "target"


def too_short(images, prompts, metadata):
    return torch.zeros(1)


def a_column(images, prompts, metadata):
    return torch.zeros(len(images), 1)


def integers(images, prompts, metadata):
    return torch.arange(len(images))


def a_list(images, prompts, metadata):
    return [0.0] * len(images)


def an_array(images, prompts, metadata):
    return torch.zeros(len(images)).numpy()


def broken(images, prompts, metadata):
    raise KeyError("no such glyph")


def not_a_number(images, prompts, metadata):
    return torch.full((len(images),), math.nan)


class Uncallable:
    pass


class Unmakable:
    def __init__(self):
        raise OSError("no weights here")

    __call__ = broken


class Counted:
    """A reward with a model: its scores are (2 * brightness), and it notes what is done to it."""

    metadata_keys = ("target",)
    made = 0

    def __init__(self):
        type(self).made += 1
        self.loads, self.calls = [], []

    def load(self, device):
        self.loads.append(device)

    def __call__(self, images, prompts, metadata):
        assert self.loads, "called before load"
        self.calls.append((len(images), [m["target"] for m in metadata]))
        return 2 * brightness(images, prompts, metadata)


class Unloadable:
    """Fails to load the first time only."""

    def __init__(self):
        self.attempts = 0

    def load(self, device):
        self.attempts += 1
        if self.attempts == 1:
            raise OSError("no file weights.safetensors")

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata)


class Module(torch.nn.Module):
    def forward(self, images, prompts, metadata):
        return brightness(images, prompts, metadata)


def spy(function):
    """A reward made of any function."""
    return rewards.Reward("spy", [rewards.Term(1.0, "spy", function)])


def fresh(kind):
    """The spec of a class that nobody has named before: a subclass of `kind`, found in this module."""
    name = f"{kind.__name__}{len(globals())}"
    globals()[name] = type(name, (kind,), {"made": 0})
    return f"{HERE}:{name}", globals()[name]


def images_of(count, pixels=8):
    return torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


# ---- rewards without a model --------------------------------------------


def test_jpeg_rewards_order_flat_against_noise():
    images = torch.stack([torch.full((3, 64, 64), 0.3), images_of(1, 64)[0]])
    size = jpeg.incompressibility(images, ["", ""], [{}, {}])
    assert size.shape == (2,) and size.dtype == torch.float32
    assert 0 < 4 * size[0] < size[1] < 3 * 64 * 64 / 1000  # kB; smaller than the raw pixels
    assert torch.equal(jpeg.compressibility(images, ["", ""], [{}, {}]), -size)


def test_a_nan_image_is_not_a_compressible_one():
    images = torch.full((2, 3, 16, 16), 0.5)
    images[1, 0, 3, 3] = math.nan
    reward = rewards.find_reward("jpeg_compressibility")
    scores, failures, _ = reward.start(images, ["a", "b"], [{}, {}], 30.0).result()
    assert scores.isnan().tolist() == [False, True] and "holds a NaN" in failures[1]


# ---- names --------------------------------------------


@pytest.mark.parametrize(
    "spec, function",
    [
        ("jpeg_compressibility", jpeg.compressibility),
        ("jpeg_incompressibility", jpeg.incompressibility),
        (" opd.rewards.jpeg:incompressibility ", jpeg.incompressibility),
        ("opd.mini.rewards:quality", mini.quality),
    ],
)
def test_a_single_name_is_the_function_itself(spec, function):
    reward = rewards.find_reward(spec)
    batch = images_of(3, 32), ["a"] * 3, [{}] * 3
    assert [term.function for term in reward.terms] == [function] and reward.spec == spec
    assert torch.equal(reward(*batch), function(*batch))


def test_a_single_name_passes_on_what_the_function_returns():
    answer = object()
    reward = spy(lambda *batch: answer)
    assert reward(images_of(2), ["", ""], [{}, {}]) is answer


def test_every_short_name_leads_to_something_that_can_be_called():
    for name, path in rewards.SHORT.items():
        module, attribute = path.split(":")
        assert callable(getattr(importlib.import_module(module), attribute)), name


@pytest.mark.parametrize(
    "spec, weights",
    [
        ("0.7*opd.mini.rewards:quality+0.3*tests.test_rewards:brightness", (0.7, 0.3)),
        (" .7 * opd.mini.rewards:quality + 3E-1*tests.test_rewards:brightness ", (0.7, 0.3)),
        ("1e+1*opd.mini.rewards:quality+-2.*tests.test_rewards:brightness", (10, -2)),
        ("-2*opd.mini.rewards:quality + +.5*tests.test_rewards:brightness", (-2, 0.5)),
        ("opd.mini.rewards:quality+tests.test_rewards:brightness", (1, 1)),
        ("opd.mini.rewards:quality+0*tests.test_rewards:brightness", (1, 0)),
    ],
)
def test_a_weighted_sum_is_the_sum_by_hand(spec, weights):
    batch = images_of(4, 32), ["a"] * 4, [{}] * 4
    got, wanted = (
        rewards.find_reward(spec)(*batch),
        weights[0] * mini.quality(*batch) + weights[1] * brightness(*batch),
    )
    assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=1e-6)


def test_sums_take_bare_names_and_a_single_weight():
    batch = images_of(3), ["a"] * 3, [{}] * 3
    size = jpeg.incompressibility(*batch)
    assert torch.allclose(rewards.find_reward("2*jpeg_incompressibility")(*batch), 2 * size)
    assert torch.allclose(rewards.find_reward("jpeg_incompressibility+2*jpeg_compressibility")(*batch), -size)


def test_a_sum_needs_the_metadata_of_all_its_terms():
    reward = rewards.find_reward(f"{HERE}:needs_target + 2*{HERE}:needs_both + {HERE}:brightness")
    assert reward.metadata_keys == ("target", "scale")
    assert reward(
        torch.zeros(2, 3, 4, 4), ["", ""], [{"target": 1, "scale": 5}, {"target": 2, "scale": 0}]
    ).tolist() == [11.0, 2.0]


@pytest.mark.parametrize(
    "name, message", [("a_column", r"shape \(2, 1\) for 2"), ("integers", "int64"), ("a_list", "list")]
)
def test_a_sum_does_not_hide_what_a_term_returns(name, message):
    with pytest.raises(ValueError, match=message) as error:
        rewards.find_reward(f"0.5*{HERE}:{name}+{HERE}:brightness")(images_of(2), ["", ""], [{}, {}])
    assert f"{HERE}:{name}" in str(error.value)


class Variant:
    """A class that is made with a string; it states what it is and refuses prompts without an a."""

    def __init__(self, argument="plain"):
        if argument == "broken":
            raise OSError("no such variant")
        self.argument = argument
        self.about = f"letters {argument}"

    def prompt_fault(self, text, metadata):
        return "" if "a" in text else f"no a in it ({metadata['n']})"

    def __call__(self, images, prompts, metadata):
        return lettered(images, prompts, metadata)


def test_an_argument_makes_an_instance_of_its_own():
    spec = f"2*{HERE}:Variant@/a-b/c_1.pt + {HERE}:Variant+.5*{HERE}:Variant@http://host:80/v1"
    first, second, third = rewards.find_reward(spec).terms
    assert [term.weight for term in (first, second, third)] == [2, 1, 0.5]
    arguments = [term.function.argument for term in (first, second, third)]
    assert arguments == ["/a-b/c_1.pt", "plain", "http://host:80/v1"]
    assert rewards.find_reward(f"{HERE}:Variant@/a-b/c_1.pt").terms[0].function is first.function


def test_a_reward_tells_what_its_terms_state_about_themselves():
    reward = rewards.find_reward(f"{HERE}:Variant@x+{HERE}:brightness")
    (name,) = reward.about
    assert name == f"{HERE}:Variant@x"
    assert reward.about[name] == "letters x" and reward.divisor == 1


def test_a_prompt_that_cannot_be_scored_is_named_with_its_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "an a", "n": 1}\n\n{"prompt": "lost", "n": 2}\n')
    reward = rewards.find_reward(f"{HERE}:brightness+{HERE}:Variant")
    message = rf"'mine': .*prompts.jsonl:3 'lost' cannot be scored by {HERE}:Variant: no a in it \(2\)"
    with pytest.raises(ValueError, match=message):
        reward.check_metadata("mine", load_prompts(str(file), "mine", None))


@pytest.mark.parametrize(
    "spec, message",
    [
        (f"{HERE}:Variant@broken", "Variant@broken cannot be made: no such variant"),
        (f"{HERE}:Variant@", "write it as"),
        (f"{HERE}:Variant@a*b", "write it as"),
        (f"{HERE}:brightness@x", "takes no argument; drop @x"),
        ("", "write it as"),
        ("a:", "write it as"),
        (":b", "write it as"),
        ("a:b:c", "write it as"),
        ("a:b+", "write it as"),
        ("+a:b", "write it as"),
        ("2*", "write it as"),
        ("x*a:b", "write it as"),
        ("1.5.2*a:b", "write it as"),
        ("2**a:b", "write it as"),
        ("a:b-a:c", "write it as"),
        ("a:b a:c", "write it as"),
        ("nothing_here", "module:function"),
        ("no.such.module:f", "cannot be imported"),
        (".relative:f", "cannot be imported"),
        (f"{HERE}:nothing", "cannot be imported"),
        (f"{HERE}:brightness+0.5*no.such:thing", "cannot be imported"),
        ("math:pi", "must accept"),
        ("math:sqrt", "must accept"),
        ("find_reward", "module:function"),
        ("opd.rewards:find_reward", "must accept"),
        ("opd.rewards:jpeg_incompressibility", "cannot be imported"),
        ("opd.rewards:SHORT", "must accept"),
        ("opd.rewards:Reward", "cannot be made: .*'terms'"),
        (f"{HERE}:Uncallable", "must accept"),
        (f"{HERE}:Unmakable", "cannot be made: no weights here"),
        ("inf*jpeg_compressibility", "not finite"),
        ("nan*jpeg_compressibility", "not finite"),
        ("jpeg_compressibility+1e999*jpeg_compressibility", "not finite"),
        (f"{HERE}:one_string_of_keys", "tuple"),
    ],
)
def test_wrong_names_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        rewards.find_reward(spec)
    assert repr(spec) in str(error.value)


def test_a_module_that_fails_on_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "failing_reward.py").write_text("raise OSError('no weights')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'failing_reward:f' cannot be imported: no weights"):
        rewards.find_reward("failing_reward:f")


# ---- before training --------------------------------------------


def pool(*metadata):
    return [Prompt(f"prompt {n}", "task", m) for n, m in enumerate(metadata)]


@pytest.mark.parametrize("prompts", [pool({}), pool({}, {}), pool({}, {}, {})], ids=len)
@pytest.mark.parametrize(
    "spec", ["jpeg_compressibility", f"{HERE}:brightness", f"{HERE}:not_a_number", f"0.5*{HERE}:brightness"]
)
def test_good_rewards_pass(spec, prompts):
    rewards.find_reward(spec).check("task", prompts, (16, 16))


def test_the_probe_is_two_grey_images_of_the_size_asked_for():
    seen = []

    def reward(*batch):
        seen.append((*batch, torch.is_grad_enabled()))
        return torch.zeros(2)

    spy(reward).check("task", pool({"n": 0}, {"n": 1}, {"n": 2}), (24, 24))
    ((images, prompts, metadata, grad),) = seen
    assert images.shape == (2, 3, 24, 24) and images.dtype == torch.float32 and bool((images == 0.5).all())
    assert (prompts, metadata, grad) == (["prompt 0", "prompt 1"], [{"n": 0}, {"n": 1}], False)


@pytest.mark.parametrize("spec", [f"{HERE}:needs_target", f"{HERE}:brightness + 2*{HERE}:needs_target"])
def test_missing_metadata_is_found_in_any_prompt(spec):
    prompts = pool({"target": 1}, {"target": 2}, {"target": 3}, {"other": 1}, {})
    with pytest.raises(
        ValueError, match=r"needs 'target'.*'prompt 3' has none; add the field 'target'.*jsonl"
    ) as error:
        rewards.find_reward(spec).check("mytask", prompts, (8, 8))
    assert "'mytask'" in str(error.value) and repr(spec) in str(error.value)
    rewards.find_reward(spec).check("mytask", prompts[:3], (8, 8))


@pytest.mark.parametrize(
    "name, message",
    [
        ("too_short", r"shape \(1,\) for 2 images.*shape \(2,\)"),
        ("a_column", r"shape \(2, 1\)"),
        ("integers", r"int64.*scores\.float\(\)"),
        ("a_list", r"a list.*torch\.tensor"),
        ("an_array", r"a ndarray.*torch\.tensor"),
        ("broken", "prompt 0.*no such glyph"),
    ],
)
def test_misbehaving_rewards_are_refused(name, message):
    with pytest.raises(ValueError, match=message) as error:
        rewards.find_reward(f"{HERE}:{name}").check("mytask", pool({}, {}), (8, 8))
    assert "'mytask'" in str(error.value) and f"'{HERE}:{name}'" in str(error.value)
    assert name != "broken" or isinstance(error.value.__cause__, KeyError)


def test_a_reward_that_would_end_the_program_is_refused():
    with pytest.raises(ValueError, match="task 'mytask': reward 'spy' raised SystemExit on grey images.*bye"):
        spy(lambda *batch: sys.exit("bye")).check("mytask", pool({}), (8, 8))


# ---- classes --------------------------------------------


def test_a_class_is_made_once_and_loaded_once_on_the_device_it_is_told():
    spec, kind = fresh(Counted)
    reward, again = rewards.find_reward(spec), rewards.find_reward(spec)
    instance = reward.terms[0].function
    assert kind.made == 1 and type(instance) is kind and again.terms[0].function is instance
    assert instance.loads == []  # finding a reward loads nothing
    device = torch.device("meta")
    reward.load(device)
    reward.load(device)
    again.load(torch.device("cpu"))
    assert instance.loads == [device]


def test_one_object_serves_the_check_the_training_and_the_reports():
    spec, kind = fresh(Counted)
    reward = rewards.find_reward(spec)
    reward.load(torch.device("cpu"))
    with pytest.raises(ValueError, match="needs 'target'.*'prompt 1' has none"):
        reward.check("task", pool({"target": 1}, {}), (8, 8))
    reward.check("task", pool({"target": 1}, {"target": 2}, {"target": 3}), (8, 8))
    for target in (4, 5):
        scores, reasons, _ = reward.start(images_of(3), TEXTS[:3], [{"target": target}] * 3, 30.0).result()
        assert torch.equal(scores, 2 * brightness(images_of(3), None, None)) and reasons == {}
    instance = reward.terms[0].function
    assert (kind.made, len(instance.loads)) == (1, 1)
    assert instance.calls == [(2, [1, 2]), (3, [4] * 3), (3, [5] * 3)]


def test_sums_of_classes_share_their_instances():
    spec, kind = fresh(Counted)
    other, another_kind = fresh(Counted)
    reward = rewards.find_reward(f"0.5*{spec} + 3*{other} + -1*{spec} + {HERE}:brightness")
    reward.load(torch.device("cpu"))
    assert kind.made == another_kind.made == 1
    assert [len(term.function.loads) for term in reward.terms[:3]] == [1, 1, 1]
    assert reward.metadata_keys == ("target",)
    scores = reward(images_of(4), [""] * 4, [{"target": 0}] * 4)
    assert torch.allclose(scores, (0.5 * 2 + 3 * 2 - 2 + 1) * brightness(images_of(4), None, None))


def test_models_that_do_not_load_are_named_and_may_be_tried_again():
    spec, _ = fresh(Unloadable)
    reward = rewards.find_reward(f"2*{spec}")
    with pytest.raises(
        ValueError, match=r"load\(cpu\) of .*raised OSError: no file weights.safetensors"
    ) as error:
        reward.load(torch.device("cpu"))
    assert repr(f"2*{spec}") in str(error.value) and isinstance(error.value.__cause__, OSError)
    reward.load(torch.device("cpu"))
    reward.load(torch.device("cpu"))
    assert reward.terms[0].function.attempts == 2


def test_a_module_of_torch_is_a_reward():
    batch = images_of(3), [""] * 3, [{}] * 3
    reward = rewards.find_reward(f"{HERE}:Module")
    reward.load(torch.device("cpu"))  # it has no load, and needs none
    assert torch.equal(reward(*batch), brightness(*batch))


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_image_without_a_score_is_scored_once_again(bad):
    calls = []

    def reward(images, prompts, metadata):
        calls.append([m["n"] for m in metadata])
        scores = brightness(images, prompts, metadata)
        if len(calls) == 1:
            scores[[1, 3]] = bad
        if len(prompts) == 1 and prompts[0] == "ccc":
            scores[0] = bad
        return scores

    scores, failures, _ = scored(reward)
    good = [0, 1, 2, 4]
    assert torch.allclose(scores[good], brightness(images_of(5), None, None)[good]) and scores[3].isnan()
    assert failures == {3: f"prompt 'ccc': returned {bad}"}
    assert calls == [[0, 1, 2, 3, 4], [1], [3]]


@pytest.mark.parametrize(
    "reward, reason",
    [
        (lambda *_: torch.zeros(3), "returned shape (3,) for 2 images"),
        (integers, "returned dtype torch.int64"),
        (a_list, "returned a list"),
        (lambda images, *_: torch.full((2,), 1e300, dtype=torch.float64), "returned inf"),
        (lambda *_: sys.exit("bye"), "raised SystemExit: bye"),
    ],
)
def test_what_a_reward_does_wrongly_is_said(reward, reason):
    scores, failures, _ = scored(reward, texts=["a", "a"])
    assert scores.isnan().all() and sorted(failures) == [0, 1]
    assert all(text.startswith(f"prompt 'a': {reason}") for text in failures.values())


def test_a_slow_batch_of_quick_prompts_is_recovered_and_its_late_answer_changes_nothing():
    release, late = threading.Event(), []

    def reward(images, prompts, metadata):
        if len(prompts) == 5:
            late.append(threading.current_thread())
            assert release.wait(60)
            return torch.full((5,), 9.0)
        return lettered(images, prompts, metadata)

    scores, failures, seconds = scored(reward, timeout=0.5)
    assert scores.tolist() == [1, 2, 1, 3, 2] and failures == {} and seconds >= 0.5
    release.set()
    late[0].join(60)
    assert scores.tolist() == [1, 2, 1, 3, 2] and failures == {}


def test_after_two_late_retries_no_prompt_is_called_any_more():
    calls, release = [], threading.Event()

    def reward(images, prompts, metadata):
        calls.append(prompts)
        release.wait(60)
        return torch.zeros(len(images))

    scores, failures, _ = scored(reward, timeout=0.1)
    release.set()
    assert scores.isnan().all() and calls == [TEXTS, ["a", "a"], ["bb", "bb"]]
    late, kept = "took longer than 0.1 s", "reward kept timing out"
    words = [f"prompt {text!r}: {kept if text == 'ccc' else late}" for text in TEXTS]
    assert failures == dict(enumerate(words))


def test_no_images_are_no_failure_and_unequal_counts_are_refused():
    scores, failures, _ = scored(lettered, texts=[])
    assert scores.shape == (0,) and failures == {}
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        spy(lettered).start(images_of(2), ["a"], [{}], 1.0)


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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1.0] tensor([nan]) {0: \"prompt 'a': took longer than 0.1 s\"}"
