"""The settings of every program: bad ones are refused by flag and value; the presets pass."""

import importlib
import inspect
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import diffusers
import pytest
import tyro

import sample
from opd import config
from opd.cli import Given, Range, bounds_of, check_bounds, dashed, field_names, parse
from opd.config import DistillationConfig, GRPOConfig, NFTConfig, SFTConfig
from opd.evaluation import evaluate
from opd.files import resolve
from opd.formats.settings import from_json, to_json
from opd.presets import PRESETS
from opd.rewards import find_reward

NAN, INF = math.nan, math.inf
COLOURS = {"red": "red.txt", "green": "green.txt", "blue": "blue.txt"}
SCORERS = {"red": "m:f", "green": "m:f", "blue": "m:f"}
SCORED = {"prompts": COLOURS, "heldout": COLOURS, "rewards": SCORERS}
DISTIL = DistillationConfig(out="run", model="model", teachers=COLOURS, anchor="blue", **SCORED)
GRPO = GRPOConfig(out="run", model="model", train_rewards=SCORERS, **SCORED)
NFT = NFTConfig(out="run", model="model", train_rewards=SCORERS, **SCORED)
SFT = SFTConfig(out="run", model="model", data="images")
EVERY, ON_POLICY = (DISTIL, GRPO, NFT, SFT), (DISTIL, GRPO, NFT)
PROGRAMS = (*EVERY, sample.Arguments(), evaluate.Arguments())


# ---- bounds at the fields ----------------------------------------------------------------------------------
def filled(settings, name, number):
    """The field's value with `number` in the place of every number."""
    value = getattr(settings, name)
    if isinstance(value, dict):
        return {"red": number}
    if isinstance(value, tuple):
        return (number,) * max(1, len(value))
    return number


def outside(settings, name, bound):
    """Values of the field that it must not have: just past its ends, and NaN."""
    if isinstance(bound, Given):
        return [type(getattr(settings, name))()]
    if isinstance(bound.low, int):
        numbers = [bound.low - 1, bound.high + 1, -INF, INF]
    else:
        numbers = [math.nextafter(bound.low, -INF), math.nextafter(bound.high, INF), -INF, INF, NAN]
    return [filled(settings, name, number) for number in numbers]


@pytest.mark.parametrize("settings", PROGRAMS, ids=lambda settings: type(settings).__qualname__)
def test_what_is_out_of_bounds_is_refused_and_named(settings):
    bounds = bounds_of(type(settings))
    assert len(bounds) >= 2
    for name, bound in bounds:
        for value in outside(settings, name, bound):
            with pytest.raises(ValueError, match=f"^--{dashed(name)} is "):
                check_bounds(replace(settings, **{name: value}))
        if isinstance(bound, Range):
            for number in (bound.low, bound.high):
                check_bounds(replace(settings, **{name: filled(settings, name, number)}))


@pytest.mark.parametrize("settings", PROGRAMS, ids=lambda settings: type(settings).__qualname__)
def test_every_number_has_bounds(settings):
    """But for three ranges of states, which the number of states bounds."""
    bounded = {name for name, bound in bounds_of(type(settings))}
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        kinds = {hints[field.name], *get_args(hints[field.name])}
        if kinds & {int, float} and field.name not in ("query_range", "window_range"):
            assert field.name in bounded, field.name


# (settings, field, value, message): how bounds are said, one of every kind.
BOUNDS = [
    (SFT, "lr", NAN, "--lr is nan; it must be positive and finite"),
    (SFT, "ema", 1.0, "--ema is 1.0; it must lie in [0, 1)"),
    (SFT, "micro_batch", 0, "--micro-batch is 0; it must be at least 1 and at most 1000000"),
    (SFT, "seed", 2**63, f"--seed is {2**63}; it must fit into 64 bits"),
    (SFT, "model", "", "--model is empty: give a pipeline directory or a Hub id owner/name"),
    (GRPO, "reward_timeout", 1e300, "--reward-timeout is 1e+300; it must be positive, at most"),
    (GRPO, "mix", {"red": 3, "blue": 0}, "--mix is red=3 blue=0; it must be at least 1 and at most 10000"),
    (DISTIL, "query_beta", (1e30, 1.0), "--query-beta is 1e+30 1.0; it must be at least 0.01 and at most"),
]


@pytest.mark.parametrize("settings, name, value, message", BOUNDS)
def test_a_bound_is_said_with_flag_and_value(settings, name, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_bounds(replace(settings, **{name: value}))


# ---- relations ---------------------------------------------------------------------------------------------
# stages | flags on top of the settings above | what the message must contain: flag, value, way out
REFUSED = """
opd grpo sft | --shard-size 3 | --shard-size 3 does not divide the 4 ranks; choose one of [1, 2, 4]
opd grpo sft | --out ~nobody-of-this-name/x | '~nobody-of-this-name/x': there is no such home directory
opd grpo sft | --push nonsense | --push 'nonsense': write a Hub repository as OWNER/NAME
opd grpo sft | --cold-start base --merge naive | --merge naive is for --cold-start merge alone
grpo sft | --cold-start merge | --cold-start merge has nothing to merge; add --merge-from NAME=ADAPTER ...
grpo | --full --beta 0 --cold-start x | --full trains the base; --cold-start 'x' cannot apply
sft | --resolution 512x | --resolution '512x': write pixels
sft | --resolution 8x10001 | --resolution '8x10001': write pixels
opd grpo | --prompts a/b=x | --prompts: the name 'a/b' may hold letters, digits
opd grpo | --mix dog=1 | --mix names 'dog', which is not among the tasks of --prompts: ['red', 'green',
opd grpo | --steps 1 --skip-last | --steps 1 with --skip-last leaves no state to train on; use --steps 2
opd grpo | --rewards red=m:f blue=m:f | task 'green' has no scorer; add --rewards green=module:function or
opd grpo | --heldout dog=x.txt | add --rewards dog=module:function or --no-evaluate
opd grpo | --watch-every 5 --heldout | --watch-every 5 scores held-out prompts; give --heldout TASK=FILE
opd grpo | --rollout cps --noise-level 1.5 | --rollout cps needs --noise-level in (0, 1], got 1.5
opd | --queries 11 | --queries 11 exceeds the 10 states
opd | --query-range 2 11 | --query-range 2 11 does not lie within the 10 states of a trajectory
opd | --noise-level 0 | --weight kl divides by the SDE's noise; with --noise-level 0 use --weight ode_kl
opd | --noise-level 0 --weight uniform | --rollout sde with --noise-level 0 adds no noise; use --rollout ode
opd | --rollout cps | --rollout cps with --weight kl: the last cps step has no noise, so its weight is
opd | --rollout ode --weight ode_kl --estimator pg | --estimator pg takes the likelihood of noisy steps;
opd | --rollout cps --weight uniform --estimator pg_live | step 10 of --rollout cps --noise-level 0.7 has
opd | --walker teacher --estimator pg | judge the student's own steps; leave out --walker teacher
opd | --walker teacher --routing reward --train-rewards red=a green=a blue=a | leave out --walker teacher
opd | --teachers a.b=x | --teachers: the name 'a.b' is empty or has a dot, * or +; choose another
opd | --teachers ema=x | --teachers: the name 'ema' is taken; choose another
opd | --teachers loss=x | --teachers: the name 'loss' is taken; choose another
opd | --teachers from_base=x | --teachers: the name 'from_base' is taken; choose another
opd | --teachers student=x | --teachers: the name 'student' is taken; choose another
opd | --teachers keys=x | --teachers: the name 'keys' is taken; choose another
opd | --teachers red=ema green=x blue=x | --teachers red=ema: --ema 0 keeps no moving average
opd | --teacher-guidances dog=2 | --teacher-guidances names 'dog', which is not among the teachers
opd | --teacher-devices base=offload | --teacher-devices names 'base', which is not among the teachers with
opd | --teacher-devices red=cuda:1 | --teacher-devices red=cuda:1 would be the place of all 4 ranks' teachers
opd | --teacher-devices red=offload --shard-size 2 | and --shard-size 2 both spread a teacher out; use one
opd | --extrapolate dog=2 | --extrapolate names 'dog', which is not among the teachers
opd | --extrapolate base=2 | --extrapolate base=2.0: a target leads away from the base
opd | --extrapolate red=2 --anchor red --anchor-weight 1 | --extrapolate red=2.0 moves the anchor's target too
opd | --prompts dog=x --no-evaluate | add it to --teachers or map it with --routes dog=NAME
opd | --routes red=nobody | task 'red' is routed to 'nobody', which is not among the teachers
opd | --routes red=-1*blue | --routes red: '-1*blue': the weight '-1' must be a positive number
opd | --routes red=0.5*red+0.5*red | --routes red: '0.5*red+0.5*red' names 'red' twice
opd | --train-rewards dog=m:f | --train-rewards names 'dog', which is not among the tasks of --prompts
opd | --routing reward | --routing reward: task 'red' has no reward; add --train-rewards red=module:function
opd | --anchor nobody | --anchor 'nobody' is not among the teachers ['red', 'green', 'blue', 'base']; name one
opd | --anchor-levels 0=1 | --anchor-levels 0=1.0: a noise level lies in (0, 1]
grpo nft | --group 1 | --group 1: an advantage compares the images of one prompt, alone it is always 0; use
grpo | --noise-level 0 | stage grpo takes the likelihood of noisy steps; step 1 of --rollout sde --noise-level
grpo | --full --beta 0 | --full with --evaluate: the table compares adapters; add --no-evaluate
grpo | --full --beta 0.5 | --beta 0.5 with --full: the reference is the base with the adapter off
grpo nft | --updates 5 --prompts-per-step 12 | --updates 5 does not divide --prompts-per-step 12
grpo nft | --train-rewards red=m:f | task 'green' has no reward to train on; add --train-rewards green=
grpo | --rollout cps | has no noise; add --skip-last, or train on earlier states alone
grpo | --rollout ode | --noise-level 0.7 has no noise; use --rollout sde and a noise above 0
grpo | --rollout cps --steps 6 --window 1 --window-range 0 6 | step 6 of --rollout cps --noise-level
grpo | --steps 6 --window 1 --window-range 0 7 | --window 1 does not fit into --window-range 0 7 of the 6
nft | --steps 6 --skip-last --levels 6 | --levels 6 exceeds the 5 noise levels of the rollout's grid (--steps,
nft | --old-decay 0 0.001 1 | --old-decay 0 0.001 1: the old policy would never move; use a last below 1
"""
# The same, to be accepted.
ACCEPTED = """
opd grpo sft | --shard-size 4 --warmup 0 --sample-every 0 --guidance -0.5
opd grpo sft | --cold-start merge --merge-from a=b --merge naive
opd grpo | --watch-every 5 --no-evaluate --mix red=3
opd grpo | --steps 2 --skip-last
opd | --anchor base --routes red=0.5*blue+base
opd | --teachers red=base green=x blue=x ema=ema --ema 0.9
opd | --teacher-guidances base=1 red=4.5 --teacher-devices red=offload --extrapolate red=1
opd | --noise-level 0 --weight ode_kl --rollout ode
opd | --noise-level 1 --rollout cps --skip-last
opd | --queries 10 --query-range 0 10
opd | --cold-start some/adapter --group 1 --walker teacher
grpo | --group 2 --beta 0 --updates 12 --prompts-per-step 12
grpo | --window 3 --window-range 7 10
grpo | --rollout cps --window 3 --window-range 6 9
nft | --rollout cps --levels 1 --beta 0 --group 2
"""


def rows(table):
    """[stage, flags, ...] of each line and each of its stages."""
    lines = [line.split(" | ") for line in table.strip().splitlines()]
    return [[stage, *rest] for stages, *rest in lines for stage in stages.split()]


def settings_of(stage, flags):
    base = next(cfg for cfg in EVERY if cfg.stage == stage)
    return tyro.cli(type(base), default=base, args=flags.split())


@pytest.mark.parametrize("stage, flags, message", rows(REFUSED))
def test_settings_that_do_not_suit_each_other_are_refused(stage, flags, message):
    cfg = settings_of(stage, flags)
    with pytest.raises(ValueError) as caught:
        cfg.check(world=4)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    for flag in re.findall(r"--[a-z][a-z0-9-]*", str(caught.value)):
        name = flag[2:].replace("-", "_").removeprefix("no_")
        assert name in field_names(type(cfg)), f"the message names {flag}, which this stage does not have"


@pytest.mark.parametrize("stage, flags", rows(ACCEPTED))
def test_settings_at_the_edge_are_accepted(stage, flags):
    settings_of(stage, flags).check(world=4)


def test_a_start_merges_the_teachers_of_the_tasks_and_not_one_that_only_anchors():
    """The paper's merge: the experts of the tasks, and not the quality teacher that anchors them."""
    cfg = replace(DISTIL, cold_start="merge", teachers=COLOURS | {"quality": "q"}, anchor="quality")
    assert cfg.merged() == COLOURS
    assert replace(cfg, routes={"red": "0.5*red+0.5*quality"}).merged() == COLOURS | {"quality": "q"}
    assert replace(cfg, merge_from={"x": "y"}).merged() == {"x": "y"}
    assert replace(cfg, anchor="blue").merged().keys() == {"red", "green", "blue", "quality"}
    assert PRESETS["sd35"].merged().keys() == {"geneval", "ocr", "pickscore"}


# ---- presets -----------------------------------------------------------------------------------------------
# What these presets leave to the user.
OWN = {"teachers": {"mine": "my/lora"}, "prompts": {"mine": "mine.txt"}}
FAMILIES = ["flux", "flux_kontext", "flux2", "qwen_image", "qwen_image_edit", "z_image"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_preset_samples_as_its_pipeline_does(name):
    """By default, and in the pipeline's own scale of guidance."""
    family = importlib.import_module(f"opd.families.{name}")
    defaults = inspect.signature(getattr(diffusers, family.PIPELINE).__call__).parameters
    scale = defaults["true_cfg_scale" if name.startswith("qwen") else "guidance_scale"].default
    if name == "z_image":
        scale += 1
    preset = PRESETS[name]
    assert (preset.guidance, preset.teacher_guidance) == (scale, scale)
    assert preset.eval_steps == defaults["num_inference_steps"].default


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_can_be_parsed_and_survives_json(name):
    cfg = PRESETS[name]
    if name in FAMILIES:
        replace(cfg, **OWN).check(world=1)
    else:
        cfg.check(world=1)
    assert cfg.out == f"runs/{name}"
    assert parse([name, "--seed", "7"], PRESETS) == replace(cfg, seed=7)
    saved = json.loads(json.dumps(to_json(cfg)))
    assert list(saved) == ["stage", *(field.name for field in fields(cfg))]
    assert repr(from_json(saved, config.STAGES)) == repr(cfg)  # and so of equal types


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("sd35-grpo-")])
def test_the_sd35_teachers_know_their_rewards(name):
    """Every term is found, though no weights are there."""
    for module in ("rapidocr", "scipy"):
        pytest.importorskip(module, reason="an extra is not installed; pip install -e '.[test]' brings it")
    for task, spec in PRESETS[name].train_rewards.items():
        reward = find_reward(spec)
        assert PRESETS[name].prompts[task] and len(reward.about) == len(reward.terms)
    if name == "sd35-grpo-quality":
        shares = [term.weight * term.function.divisor for term in reward.terms]
        assert shares == pytest.approx([0.8, 0.2], abs=1e-3)  # of PickScore / 26 and of DeQA / 5


def test_presets_name_the_package_relative_to_its_folder():
    """So that a run resumes in a checkout that has moved."""
    text = json.dumps([to_json(cfg) for cfg in PRESETS.values()])
    sources = re.findall(r'"(opd/[^"]*)"', text)
    assert len(sources) > 20 and str(Path(config.__file__).parents[2]) not in text
    assert all(resolve(source).exists() for source in sources)
