"""Rewards: what one is, how it is named, and how it fails.

What a reward is. A function, or a class whose instance is called in the same way,

    (images (B, 3, H, W) float32 in [0, 1] on the CPU, prompts list[str], metadata list[dict]) -> scores (B,)

that returns a floating tensor, higher is better. Either may carry

    metadata_keys = ("key", ...)    what the metadata of every prompt must hold
    prompt_fault(text, metadata)    why a prompt cannot be scored, "" if it can
    load(device)                    loads its models, on this rank's device
    about = "..."                   model, licence, size, definition and engine, said beside the scores
    divisor = 26.0                  raw score / divisor is the papers' reward, about in [0, 1]

A class has one instance per process and argument, and `load` runs once before the first call. Scores may be
on any device; moving the images to the models is the reward's job. A call that timed out may still run beside
the next one. Raw scores are those of the papers' tables.

How it is named. `path/to/file.py:function`, `module:function` or `module:Class` (a class in a file too); a
short name from the table SHORT; either followed by `@ARGUMENT`, the one string that a class is made with
(weights, an endpoint, a variant), as in `pickscore@/weights/pickscore`; or a weighted sum of these such as
`0.7*module:a+0.3*module:b@c`.

How it fails. Before training, a ValueError names the reward and the fix: a name that cannot be imported
(`find_reward`), models that do not load (`Reward.load`), prompts that cannot be scored and a wrong return
value (`Reward.check`). Later, under `Reward.start`, a call that raises, hangs or returns something else than
B finite scores is repeated prompt by prompt; what still fails is NaN and has a reason."""

import copy
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from opd.data import Prompt
from opd.files import path_of, reading
from opd.rewards.scoring import Scoring, fault_of

SHORT = {
    "jpeg_compressibility": "opd.rewards.pixels:compressibility",
    "jpeg_incompressibility": "opd.rewards.pixels:incompressibility",
    "ocr": "opd.rewards.ocr:Ocr",
    "geneval": "opd.rewards.geneval:Official",
    "geneval_strict": "opd.rewards.geneval:Strict",
    "geneval_dense": "opd.rewards.geneval:Dense",
    "preservation": "opd.rewards.pixels:preservation",
    "pickscore": "opd.rewards.preference:PickScore",
    "clipscore": "opd.rewards.preference:ClipScore",
    "clip_direction": "opd.rewards.preference:ClipDirection",
    "aesthetic": "opd.rewards.preference:Aesthetic",
    "hpsv2": "opd.rewards.preference:HPSv2",
    "blip_vqa": "opd.rewards.blip:BlipVqa",
    "unified_reward": "opd.rewards.judge:UnifiedReward",
    "qwenvl": "opd.rewards.judge:QwenVL",
    "qwenvl_released": "opd.rewards.judge:QwenVLReleased",
    "qwenvl_edit": "opd.rewards.judge:QwenVLEdit",
    "deqa": "opd.rewards.remote:Deqa",
    "hpsv3": "opd.rewards.remote:HPSv3",
    "imagereward": "opd.rewards.remote:ImageReward",
    "remote": "opd.rewards.remote:Remote",
}

# An exponent of two digits at most: no weight is infinite.
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d\d?)?"
_NAME = rf"(?:[\w./~-]+:\w+|(?:{'|'.join(SHORT)})\b)(?:@[^\s+*]+)?"
_TERM = rf"\s*(?:({_NUMBER})\s*\*)?\s*({_NAME})\s*"
# A comma before a scorer; one in an argument, as in hpsv2@WEIGHTS,CLIP, stands before something else.
_COMMA = rf",(?=\s*(?:{_NUMBER}\s*\*)?\s*{_NAME}\s*(?:[+,]|$))"
_LOADED = {}  # id -> function or instance whose load() has run in this process


def specs_of(text: str) -> list[str]:
    """The scorers of a task, TASK=SPEC,SPEC. The first is the task's own, in means and curves."""
    return [spec.strip() for spec in re.split(_COMMA, text)]


def find_reward(spec: str) -> "Reward":
    """The reward called `spec`, its modules imported and its classes made."""
    if not re.fullmatch(rf"{_TERM}(?:\+{_TERM})*", spec):
        raise ValueError(
            f"scorer {spec!r}: write it as file.py:function, module:function, as one of the short names "
            f"{', '.join(SHORT)}, either with @ARGUMENT, or as a weighted sum of them such as "
            "0.7*module:a+0.3*module:b (an argument holds no space, + or *)"
        )
    terms = []
    for weight, name in re.findall(_TERM, spec):
        terms.append(Term(float(weight or 1), name, _find_function(name, spec)))
    return Reward(spec, terms)


@dataclass(frozen=True)
class Term:
    weight: float
    name: str
    function: Callable  # a function, or the instance of a class


class Reward:
    """A reward or a weighted sum of rewards, found once per run: checking, training, watching and reporting
    share it."""

    def __init__(self, spec: str, terms: list[Term]):
        self.spec = spec
        self.terms = terms

    @property
    def about(self) -> dict[str, str]:
        """What the terms state about themselves, by name. Final once `load` has run."""
        lines = {}
        for term in self.terms:
            if hasattr(term.function, "about"):
                lines[term.name] = term.function.about
                if hasattr(term.function, "divisor"):
                    lines[term.name] += f"; reward: score / {term.function.divisor:g}"
        return lines

    def load(self, device: torch.device) -> None:
        """Load the models of every term that has some, unless this process has loaded them before."""
        for term in self.terms:
            function = term.function
            if not hasattr(function, "load") or id(function) in _LOADED:
                continue
            with reading(f"scorer {self.spec!r}: load({device}) of {term.name}"):
                function.load(device)
            _LOADED[id(function)] = function

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """The raw scores (B,). `fault_of` judges what comes back; here it judges the terms of a sum, which
        the sum would hide."""
        if len(self.terms) == 1 and self.terms[0].weight == 1:
            return self.terms[0].function(images_BCHW, prompts, metadata)
        total_B = torch.zeros(len(prompts))
        for term in self.terms:
            # Copies: a term may change what it is given.
            scores_B = term.function(images_BCHW.clone(), list(prompts), copy.deepcopy(metadata))
            if fault := fault_of(scores_B, len(prompts)):
                raise ValueError(f"{term.name} {fault}")
            total_B += term.weight * scores_B.detach().to("cpu", torch.float32)
        return total_B

    def check(self, task: str, prompts: list[Prompt], pixels: tuple[int, int]) -> None:
        """Look for the metadata it needs, then call it once, on grey images of `pixels` (height, width).
        There is no time-out: a first call may prepare much."""
        self.check_metadata(task, prompts)
        reward = f"task {task!r}: reward {self.spec!r}"
        probe = prompts[:2]
        texts = [prompt.text for prompt in probe]
        grey_BCHW = torch.full((len(probe), 3, *pixels), 0.5)
        try:
            with torch.no_grad():
                scores = self(grey_BCHW, texts, [prompt.metadata for prompt in probe])
        except (Exception, SystemExit) as error:
            raised = f"raised {type(error).__name__} on grey images of {texts}"
            raise ValueError(f"{reward} {raised}: {error}") from error
        if fault := fault_of(scores, len(probe)):
            wanted = f"wanted: a floating tensor of shape ({len(probe)},), a score per image"
            raise ValueError(f"{reward} {fault} ({wanted})")

    def check_metadata(self, task: str, prompts: list[Prompt]) -> None:
        """ValueError naming the first prompt, with its file and line, that cannot be scored."""
        for prompt in prompts:
            if fault := self.fault_of(prompt):
                raise ValueError(f"task {task!r}: {prompt.source} {prompt.text!r} {fault}")

    def fault_of(self, prompt: Prompt) -> str:
        """Why a prompt cannot be scored, "" if it can."""
        for term in self.terms:
            for key in getattr(term.function, "metadata_keys", ()):
                if key not in prompt.metadata:
                    needed = f"{term.name} needs {key!r} with every prompt"
                    return f"lacks a field of its line in the .jsonl: {needed}"
            prompt_fault = getattr(term.function, "prompt_fault", lambda text, metadata: "")
            if fault := prompt_fault(prompt.text, prompt.metadata):
                return f"cannot be scored by {term.name}: {fault}"
        return ""

    def start(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict], timeout: float) -> Scoring:
        """Score a batch beside the caller; `timeout` in seconds per call."""
        return Scoring(self, images_BCHW, prompts, metadata, timeout)


Rewards = dict[str, Reward]
"""Spec -> reward."""


def _find_function(name: str, spec: str) -> Callable:
    """The function called `name`, or the instance of the class; `spec` is what the user wrote."""
    path, *argument = name.split("@", 1)
    module, _, attribute = SHORT.get(path, path).rpartition(":")
    # Whatever the user's module or class raises.
    with reading(f"scorer {spec!r}: importing or making {name}"):
        function = getattr(_import(module), attribute)
        if inspect.isclass(function):
            function = _instance(function, *argument)
        elif argument:
            raise ValueError(f"it is no class and takes no argument; drop @{argument[0]}")
    try:
        inspect.signature(function).bind(None, None, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scorer {spec!r}: {name} must accept (images, prompts, metadata)") from error
    return function


@functools.cache
def _import(module: str) -> ModuleType:
    """A module by its name, or by the path of its file."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = path_of(module).resolve()
    found = importlib.util.spec_from_file_location(f"reward file {path}", path)
    loaded = importlib.util.module_from_spec(found)
    sys.modules[found.name] = loaded  # where dataclasses and pickle look for it
    sys.path.insert(0, str(path.parent))  # it may import its neighbours, as a script may
    try:
        found.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(path.parent))
    return loaded


@functools.cache
def _instance(kind: type, *arguments: str) -> Callable:
    """The one instance of a class and argument: two rewards that name it share its models."""
    return kind(*arguments)
