"""A preset steps aside for the prompts, teachers and scorers that the command line names.

`train.py sd35 --teachers mine=LORA --prompts mine=FILE` keeps what does not speak of the preset's own tasks
and teachers. What goes is said in a line each; a field that the command line gives too stays as it is given.
"""

from dataclasses import replace
from typing import Any

from opd import routing
from opd.cli import known_names
from opd.config import DistillationConfig, RewardedConfig, Rollout, RunConfig

PAPERS_ANCHOR = 0.02
"""Flow-OPD's lambda of eq. 16."""


class Aside:
    """Settings that change but for the fields that are `given`, and why each of them has changed."""

    def __init__(self, cfg: RunConfig, given: set[str]):
        self.cfg, self.given = cfg, given
        self.reasons: dict[str, str] = {}

    def change(self, name: str, value: Any, reason: str) -> None:
        if name not in self.given and getattr(self.cfg, name) != value:
            self.cfg = replace(self.cfg, **{name: value})
            self.reasons[name] = reason

    def keep(self, names: tuple[str, ...], known: Any, reason: str) -> None:
        """Of these tables, where the stage has them, what is said of the `known` tasks or teachers."""
        for name in names:
            if hasattr(self.cfg, name):
                table = getattr(self.cfg, name)
                self.change(name, {key: table[key] for key in table if key in known}, reason)


def step_aside(cfg: RunConfig, given: set[str]) -> tuple[RunConfig, list[str]]:
    """The settings, and a line for each that had to change. `given`: the fields on the command line."""
    others = given & {"prompts", "teachers", "heldout", "train_rewards"}
    if not isinstance(cfg, Rollout) or not others | given & {"rewards", "anchor"}:
        return cfg, []
    aside = Aside(cfg, given)
    if "prompts" in given:
        of_tasks = ("mix", "heldout", "rewards", "train_rewards", "routes")
        aside.keep(of_tasks, cfg.prompts, "--prompts has other tasks")
    if "rewards" in given:
        known_names("--rewards", cfg.rewards, "tasks", cfg.prompts | aside.cfg.heldout)
    if "teachers" in given:
        for_other_teachers(aside)
    if isinstance(cfg, DistillationConfig):
        for_unused(aside)
    if isinstance(cfg, DistillationConfig) and len(cfg.teachers) == 1 and others:
        for_one_teacher(aside, *cfg.teachers)
    for_scores(aside)
    lines = []
    for name, reason in aside.reasons.items():
        old, new = shown(getattr(cfg, name)), shown(getattr(aside.cfg, name))
        change = f"{old} -> {new}" if old != new else f"stays {new}"
        lines.append(f"--{name.replace('_', '-')} {change}: {reason}")
    return aside.cfg, lines


def for_other_teachers(aside: Aside) -> None:
    cfg, reason = aside.cfg, "--teachers has others"
    known, factors = cfg.may_teach(), set(cfg.extrapolate.values())
    if len(factors) == 1:  # the same for every teacher of the preset: part of its recipe
        own = [name for name in cfg.teachers if cfg.adapter_of(name) != "base" and name != cfg.anchor]
        aside.change("extrapolate", dict.fromkeys(own, factors.pop()), reason)
    aside.keep(("extrapolate", "teacher_guidances", "teacher_devices"), known, reason)
    led = {task: route for task, route in cfg.routes.items() if taught_by(route) <= {*cfg.teachers}}
    aside.change("routes", led, reason)
    if cfg.anchor not in known and "anchor" not in aside.given:
        lost = f"--teachers lacks the preset's anchor {cfg.anchor!r}; --anchor NAME names another"
        aside.change("anchor_weight", 0.0, lost)
        aside.change("anchor_levels", {}, lost)


def for_unused(aside: Aside) -> None:
    """An anchor of no weight, and rewards that nothing asks, are named to be used."""
    if "anchor" in aside.given and not aside.cfg.anchored():
        aside.change("anchor_weight", PAPERS_ANCHOR, "--anchor names one, and this is the paper's weight")
        past = {name: factor for name, factor in aside.cfg.extrapolate.items() if name != aside.cfg.anchor}
        aside.change("extrapolate", past, "the anchor's target is no other")
    if "train_rewards" in aside.given:
        aside.change("routing", "reward", "--train-rewards are what decides it")


def for_one_teacher(aside: Aside, only: str) -> None:
    """It teaches every task, and cannot teach its own merge."""
    cfg = aside.cfg
    lost = [task for task in cfg.prompts if not taught_by(cfg.route(task)) <= {only, "base"}]
    aside.change("routes", cfg.routes | dict.fromkeys(lost, only), "the one teacher teaches every task")
    alone = all(taught_by(cfg.route(task)) == {only} for task in cfg.prompts if task not in lost)
    nothing_to_learn = alone and cfg.guidance_of(only) == cfg.guidance and not cfg.extrapolate
    if cfg.cold_start == "merge" and not cfg.merge_from and nothing_to_learn and cfg.iterations > 0:
        aside.change("cold_start", "base", "a merge of one teacher has nothing to learn from it")


def for_scores(aside: Aside) -> None:
    cfg, given = aside.cfg, aside.given
    if isinstance(cfg, RewardedConfig) and (cfg.evaluate or cfg.watch_every > 0):
        lacking = {task: spec for task, spec in cfg.train_rewards.items() if task not in cfg.rewards}
        aside.change("rewards", cfg.rewards | lacking, "what trains a task also scores it")
    if "rewards" in given and not cfg.full:
        aside.change("evaluate", True, "--rewards names scorers")
    unscored = [task for task in cfg.prompts | cfg.heldout if task not in aside.cfg.rewards]
    if unscored and (given & {"prompts", "heldout"} or not cfg.evaluate):
        aside.change("evaluate", False, f"no scorer for {', '.join(unscored)} (--rewards TASK=SCORER)")
    if "prompts" in given and (unscored or not cfg.heldout):
        aside.change("watch_every", 0, "no held-out prompts with a scorer (--heldout TASK=FILE)")


def taught_by(route: str) -> set[str]:
    return set(routing.shares(route, "--routes"))


def shown(value: Any) -> str:
    if isinstance(value, dict):
        pairs = " ".join(f"{name}={item}" for name, item in value.items()) or "nothing"
        return pairs if len(pairs) < 60 else " ".join(f"{name}=..." for name in value)
    return str(value)
