"""A preset steps aside for the prompts and teachers that the command line names.

`train.py sd35 --teachers mine=LORA --prompts mine=FILE` keeps what does not speak of the preset's own tasks
and teachers. What goes is said in a line each; a field that the command line gives too stays as it is given.
"""

from collections.abc import Iterator
from dataclasses import replace

from opd import routing
from opd.config import DistillationConfig, RewardedConfig, Rollout, RunConfig

Change = tuple[str, object, str]
"""A field, its value, and why."""


def step_aside(cfg: RunConfig, given: set[str]) -> tuple[RunConfig, list[str]]:
    """The settings, and a line for each that had to change. `given`: the fields on the command line."""
    if not isinstance(cfg, Rollout) or not given & {"prompts", "teachers", "heldout", "train_rewards"}:
        return cfg, []
    before, reasons = cfg, {}
    for part in (tasks, teachers, start, scorers, scores):
        for name, value, reason in part(cfg, given):
            if name not in given and getattr(cfg, name) != value:
                cfg, reasons[name] = replace(cfg, **{name: value}), reason
    lines = []
    for name, reason in reasons.items():
        old, new = shown(getattr(before, name)), shown(getattr(cfg, name))
        lines.append(f"--{name.replace('_', '-')} {old} -> {new}: {reason}")
    return cfg, lines


def tasks(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    for name in ("mix", "heldout", "rewards", "train_rewards", "routes"):
        if "prompts" in given and hasattr(cfg, name):
            yield name, among(cfg.prompts, getattr(cfg, name)), "--prompts has other tasks"


def teachers(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    if "teachers" not in given:
        return
    known = [*cfg.teachers, "base"]
    past, factors = among(known, cfg.extrapolate), set(cfg.extrapolate.values())
    if len(factors) == 1:  # the same for every teacher of the preset: part of its recipe
        own = [name for name in cfg.teachers if cfg.adapter_of(name) != "base" and name != cfg.anchor]
        past = dict.fromkeys(own, factors.pop())
    yield "extrapolate", past, "--teachers has others"
    for name in ("teacher_guidances", "teacher_devices"):
        yield name, among(known, getattr(cfg, name)), "--teachers has others"
    led = {task: route for task, route in cfg.routes.items() if taught_by(route) <= {*cfg.teachers}}
    yield "routes", led, "--teachers has others"
    if cfg.anchored() and cfg.anchor not in known:
        yield "anchor", "base", f"--teachers has no {cfg.anchor!r}"


def start(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    """One teacher teaches every task, and cannot teach its own merge."""
    if not isinstance(cfg, DistillationConfig) or len(cfg.teachers) != 1:
        return
    (only,) = cfg.teachers
    lost = [task for task in cfg.prompts if not taught_by(cfg.route(task)) <= {only, "base"}]
    yield "routes", cfg.routes | dict.fromkeys(lost, only), "the one teacher teaches every task"
    alone = all(taught_by(cfg.route(task)) == {only} for task in cfg.prompts if task not in lost)
    nothing_to_learn = alone and cfg.guidance_of(only) == cfg.guidance and not cfg.extrapolate
    if cfg.cold_start == "merge" and not cfg.merge_from and nothing_to_learn and cfg.iterations > 0:
        yield "cold_start", "base", "a merge of one teacher has nothing to learn from it"


def scorers(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    if isinstance(cfg, RewardedConfig) and (cfg.evaluate or cfg.watch_every > 0):
        lacking = {task: cfg.train_rewards[task] for task in cfg.train_rewards if task not in cfg.rewards}
        yield "rewards", cfg.rewards | lacking, "what trains a task also scores it"


def scores(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    unscored = [task for task in cfg.prompts | cfg.heldout if task not in cfg.rewards]
    if unscored and given & {"prompts", "heldout"}:
        yield "evaluate", False, f"no scorer for {', '.join(unscored)} (--rewards TASK=SCORER)"
    if "prompts" in given and (unscored or not cfg.heldout):
        yield "watch_every", 0, "no held-out prompts with a scorer (--heldout TASK=FILE)"


def taught_by(route: str) -> set[str]:
    return set(routing.shares(route, "--routes"))


def among(known, table: dict) -> dict:
    return {name: value for name, value in table.items() if name in known}


def shown(value) -> str:
    if isinstance(value, dict):
        pairs = " ".join(f"{name}={item}" for name, item in value.items()) or "nothing"
        return pairs if len(pairs) < 60 else " ".join(f"{name}=..." for name in value)
    return str(value)
