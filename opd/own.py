"""A preset steps aside for the prompts and teachers that the command line names.

`train.py sd35 --teachers mine=LORA --prompts mine=FILE` keeps what does not speak of the preset's own tasks
and teachers. What goes is said in a line each; a field that the command line gives too stays as it is given.
"""

from collections.abc import Iterator
from dataclasses import replace

from opd.config import DistillationConfig, GRPOConfig, Rollout, RunConfig

Change = tuple[str, object, str]
"""A field, its value, and why."""


def step_aside(cfg: RunConfig, given: set[str]) -> tuple[RunConfig, list[str]]:
    """The settings, and a line for each that had to change. `given`: the fields on the command line."""
    if not isinstance(cfg, Rollout):
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
    for name in ("extrapolate", "teacher_guidances", "teacher_devices"):
        yield name, among(known, getattr(cfg, name)), "--teachers has others"
    if cfg.anchored() and cfg.anchor not in known:
        yield "anchor", "base", f"--teachers has no {cfg.anchor!r}"


def start(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    """One teacher teaches every task, and cannot teach its own merge."""
    if not isinstance(cfg, DistillationConfig) or len(cfg.teachers) != 1:
        return
    (only,) = cfg.teachers
    lost = [task for task in cfg.prompts if cfg.route(task) not in [only, "base"]]
    yield "routes", cfg.routes | dict.fromkeys(lost, only), "the one teacher teaches every task"
    nothing_to_learn = cfg.guidance_of(only) == cfg.guidance and not cfg.extrapolate and cfg.iterations > 0
    if cfg.cold_start == "merge" and not cfg.merge_from and nothing_to_learn:
        yield "cold_start", "base", "a merge of one teacher has nothing to learn from it"


def scorers(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    if isinstance(cfg, GRPOConfig):
        lacking = {task: cfg.train_rewards[task] for task in cfg.train_rewards if task not in cfg.rewards}
        yield "rewards", cfg.rewards | lacking, "what trains a task also scores it"


def scores(cfg: Rollout, given: set[str]) -> Iterator[Change]:
    unscored = [task for task in cfg.prompts | cfg.heldout if task not in cfg.rewards]
    if unscored and given & {"prompts", "heldout"}:
        yield "evaluate", False, f"no scorer for {', '.join(unscored)} (--rewards TASK=SCORER)"
    if "prompts" in given and (unscored or not cfg.heldout):
        yield "watch_every", 0, "no held-out prompts with a scorer (--heldout TASK=FILE)"


def among(known, table: dict) -> dict:
    return {name: value for name, value in table.items() if name in known}


def shown(value) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items()) or "nothing"
    return str(value)
