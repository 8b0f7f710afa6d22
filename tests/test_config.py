"""The settings of every stage: bad ones are refused by flag and value; the presets pass."""

import ast
import inspect
import json
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import diffusers
import pytest

from opd import config, config_base
from opd.config import STAGES, DistillationConfig, GRPOConfig, Logistics, RunConfig, Scores, SFTConfig
from opd.families import load_family
from opd.files import resolve
from opd.flags import dashed
from opd.presets import PRESETS
from opd.rewards import find_reward
from opd.settings import field_names, parse, stage_of, to_json

NAN, INF = float("nan"), float("inf")
COLOURS = {"red": "red.txt", "green": "green.txt", "blue": "blue.txt"}
SCORERS = {"red": "m:f", "green": "m:f", "blue": "m:f"}
SCORED = {"prompts": COLOURS, "heldout": COLOURS, "rewards": SCORERS}
DISTIL = DistillationConfig(out="run", model="model", teachers=COLOURS, anchor="blue", **SCORED)
GROW = GRPOConfig(out="run", model="model", train_rewards=SCORERS, **SCORED)
FINETUNE = SFTConfig(out="run", model="model", data="images")
EVERY = (DISTIL, GROW, FINETUNE)
MERGED = replace(GROW, cold_start="merge", merge_from=COLOURS)
ON_POLICY = (DISTIL, GROW)


def refused(bases, names, values, message):
    """A row for each of these settings: (base, changes, message with the flag and the value)."""
    rows = []
    for base in bases:
        for name in names:
            for value in values:
                rows.append((base, {name: value}, f"--{dashed(name)} is {value}; {message}"))
    return rows


def wrong_sizes(texts, message):
    rows = []
    for base in EVERY:
        for text in texts:
            rows.append((base, {"resolution": ("8", text)}, f"--resolution {text!r}: {message}"))
    return rows


COUNTS = ["prompts_per_step", "micro_batch", "iterations", "rank", "shard_size", "log_every", "save_every"]
COUNTS += ["max_bad_steps", "eval_steps", "ema_every"]
TAKEN = "student start anchor loss lr step grad_norm seconds watch train type keys training".split()
OUTER_EDGES = (-0.1, 1.0, 1.5, NAN)

# (settings, changes, what the message must contain: the flag, the value, the way out)
REFUSED = [
    *refused(EVERY, COUNTS, [0, -3], "it must be at least 1"),
    *refused(
        ON_POLICY, ["group", "steps", "eval_prompts", "watch_prompts"], [0, -3], "it must be at least 1"
    ),
    *refused([GROW], ["updates", "epochs"], [0], "it must be at least 1"),
    *refused(EVERY, ["lr", "alpha", "clip"], [0.0, -1.5], "it must be positive"),
    *refused(ON_POLICY, ["reward_timeout"], [0.0, -1.5], "it must be positive"),
    *refused([GROW], ["clip_range", "advantage_clip"], [0.0, -1.5], "it must be positive"),
    *refused([GROW], ["advantage_clip"], [NAN], "it must be positive"),
    *refused(
        EVERY,
        ["lr", "alpha", "clip", "weight_decay", "guidance", "deploy_guidance"],
        [NAN, INF, -INF],
        "it must be finite",
    ),
    *refused(ON_POLICY, ["noise_level", "reward_timeout"], [NAN, INF], "it must be finite"),
    *refused([DISTIL], ["anchor_weight", "teacher_guidance"], [NAN, INF, -INF], "it must be finite"),
    *refused([GROW], ["beta", "clip_range"], [NAN, INF], "it must be finite"),
    *refused(EVERY, ["weight_decay", "warmup", "sample_every"], [-1], "it must not be negative"),
    *wrong_sizes(["-1", "768*512", "x8", "512x", ""], "write pixels per side, or HEIGHTxWIDTH"),
    *wrong_sizes(["0", "8x10001"], "a side has 1 to 10000 pixels"),
    *[(base, {"resolution": ("16", "8", "16x16")}, "--resolution 16 is given twice") for base in EVERY],
    *refused(ON_POLICY, ["noise_level", "watch_every"], [-1], "it must not be negative"),
    *refused([DISTIL], ["anchor_weight", "queries"], [-1], "it must not be negative"),
    *[
        (DISTIL, {"walker": "teacher"} | judging, "own steps; leave out --walker teacher")
        for judging in ({"estimator": "pg"}, {"routing": "reward"}, {"reward_weight": 1.0})
    ],
    *refused([GROW], ["beta", "window", "cosine_every"], [-1], "it must not be negative"),
    *refused(EVERY, ["ema"], OUTER_EDGES, "it must lie in [0, 1)"),
    *refused([FINETUNE], ["caption_dropout"], OUTER_EDGES, "it must lie in [0, 1)"),
    *[
        (cfg, {"shard_size": 3}, "--shard-size 3 does not divide the 4 ranks; choose one of [1, 2, 4]")
        for cfg in EVERY
    ],
    *[(cfg, {"out": ""}, "--out is empty: name the run folder") for cfg in EVERY],
    *[(cfg, {"model": ""}, "--model is empty: name a pipeline directory or a Hub id") for cfg in EVERY],
    *[(cfg, {"cold_start": ""}, "--cold-start is empty") for cfg in EVERY],
    # starts by merging
    *[(cfg, {"cold_start": "merge"}, "add --merge-from NAME=ADAPTER ...") for cfg in (GROW, FINETUNE)],
    *[
        (
            cfg,
            {"cold_start": "base", name: value},
            f"--{dashed(name)} {value} is for --cold-start merge alone",
        )
        for cfg in EVERY
        for name, value in [
            ("merge", "cat"),
            ("merge_from", COLOURS),
            ("merge_weights", {"red": 1.0}),
            ("merge_density", 0.2),
        ]
    ],
    *[
        (
            MERGED,
            {"merge_density": 0.2, "merge": mode},
            "--merge-density 0.2 is for --merge ties and dare alone",
        )
        for mode in ("svd", "cat", "naive")
    ],
    *[
        (
            MERGED,
            {"merge_density": value, "merge": "ties"},
            f"--merge-density is {value}; it must lie in (0, 1]",
        )
        for value in (0.0, -0.1, 1.5, NAN)
    ],
    *[
        (
            MERGED,
            {"merge_weights": dict.fromkeys(COLOURS, value)},
            f"--merge-weights red={value}: a weight must",
        )
        for value in (0.0, NAN, INF)
    ],
    (MERGED, {"merge_weights": {"red": 1.0, "dog": 1.0}}, "--merge-weights names 'dog', which is not merged"),
    (MERGED, {"merge_weights": {"red": 1.0}}, "--merge-weights lacks 'green'; give every merged adapter its"),
    (DISTIL, {"merge_weights": {"red": 1.0}}, "--merge-weights lacks 'green'"),
    # stages that sample from prompts
    *[(cfg, {"prompts": {}}, "--prompts is empty: give at least one TASK=FILE pair") for cfg in ON_POLICY],
    *[
        (cfg, {"mix": {"dog": 1}}, "--mix names task 'dog', which has no --prompts; known: ['red',")
        for cfg in ON_POLICY
    ],
    *[(cfg, {"mix": {"red": 0}}, "--mix red=0: shares are whole numbers of at least 1") for cfg in ON_POLICY],
    *[
        (cfg, {"steps": 1, "skip_last": True}, "--steps 1 with --skip-last leaves no state")
        for cfg in ON_POLICY
    ],
    *[
        (cfg, {"rewards": {"red": "m:f", "blue": "m:f"}}, "task 'green' has no scorer; add")
        for cfg in ON_POLICY
    ],
    *[
        (cfg, {"heldout": {"dog": "x.txt"}}, "add --rewards dog=module:function or --no-evaluate")
        for cfg in ON_POLICY
    ],
    *[(cfg, {"heldout": {}, "rewards": {}}, "task 'red' has no scorer") for cfg in ON_POLICY],
    *[
        (cfg, {"watch_every": 5, "heldout": {}}, "--watch-every 5 scores held-out prompts")
        for cfg in ON_POLICY
    ],
    *[
        (cfg, {"evaluate": False, "watch_every": 5, "rewards": {}}, "task 'red' has no scorer")
        for cfg in ON_POLICY
    ],
    # stage opd
    *[
        (DISTIL, {"query_beta": beta}, f"--query-beta {beta}: both numbers must be positive and finite")
        for beta in [(0.0, 2.0), (2.0, -1.0), (NAN, 2.0), (2.0, NAN), (INF, 2.0), (2.0, INF)]
    ],
    (DISTIL, {"queries": 11}, "--queries 11 exceeds the 10 states"),
    (DISTIL, {"queries": 10, "skip_last": True}, "--queries 10 exceeds the 9 states"),
    (DISTIL, {"rollout": "cps", "noise_level": 1.5}, "--rollout cps needs --noise-level in (0, 1], got 1.5"),
    (
        DISTIL,
        {"noise_level": 0.0},
        "--weight kl divides by the SDE's noise; with --noise-level 0 use --weight ode_kl",
    ),
    (DISTIL, {"noise_level": 0.0, "weight": "kl_released"}, "--weight kl_released divides"),
    (DISTIL, {"noise_level": 0.0, "weight": "uniform"}, "--rollout sde with --noise-level 0 adds no noise"),
    (
        DISTIL,
        {"noise_level": 0.0, "weight": "ode_kl", "rollout": "cps"},
        "--rollout cps with --noise-level 0",
    ),
    (DISTIL, {"teachers": {}}, "--teachers is empty: give at least one NAME=ADAPTER pair"),
    (
        DISTIL,
        {"teachers": {"base": "x"}},
        "--teachers: the name 'base' is for the source 'base'; choose another",
    ),
    (DISTIL, {"teachers": COLOURS | {"ema": "x"}}, "--teachers: the name 'ema' is for the source 'ema'"),
    (DISTIL, {"teachers": COLOURS | {"red": "ema"}}, "--teachers red=ema: --ema 0 keeps no moving average"),
    (DISTIL, {"teacher_guidances": {"dog": 2.0}}, "--teacher-guidances names 'dog', which is no teacher"),
    (DISTIL, {"teacher_guidances": {"red": NAN}}, "--teacher-guidances red=nan: it must be finite"),
    (
        DISTIL,
        {"teacher_devices": {"base": "cuda:1"}},
        "--teacher-devices base=cuda:1: no teacher with weights",
    ),
    (
        DISTIL,
        {"teacher_devices": {"red": "cuda:1"}},
        "--teacher-devices red=cuda:1 would be the place of all 4",
    ),
    (
        DISTIL,
        {"teacher_devices": {"red": "offload"}, "shard_size": 2},
        "--teacher-devices red=offload and --shard-size 2 both spread a teacher out; use one of them",
    ),
    *[
        (DISTIL, {"teachers": {name: "x"}}, f"the name '{name}' is empty or has a dot")
        for name in ("", "sd3.5")
    ],
    *[
        (
            DISTIL,
            {"teachers": COLOURS | {name: "x"}},
            f"--teachers: the name '{name}' is taken; choose another",
        )
        for name in TAKEN
    ],
    (
        DISTIL,
        {"prompts": {"dog": "x.txt"}, "evaluate": False},
        "task 'dog' is routed to 'dog', which is not among the teachers ['red', 'green', 'blue', 'base']; "
        "add it to --teachers or map it with --routes dog=NAME",
    ),
    (DISTIL, {"routes": {"red": "nobody"}}, "task 'red' is routed to 'nobody'"),
    (
        DISTIL,
        {"routes": {"dog": "red"}},
        "--routes names task 'dog', which has no --prompts; known: ['red', 'green',",
    ),
    (DISTIL, {"anchor": "nobody"}, "--anchor 'nobody' is not among the teachers"),
    (DISTIL, {"anchor": ""}, "--anchor '' is not among the teachers ['red', 'green', 'blue', 'base']"),
    # stage grpo
    *[(cfg, {"seed": 2**63}, f"--seed is {2**63}; it must fit into 64 bits") for cfg in EVERY],
    (DISTIL, {"mix": {"red": 10**9}}, "--mix red=1000000000: a share must be at most 10000"),
    (DISTIL, {"iterations": 10**12}, "--iterations is 1000000000000; it must be at most 1000000"),
    (DISTIL, {"steps": 10**9}, "--steps is 1000000000; it must be at most 10000"),
    (DISTIL, {"rank": 10**9}, "--rank is 1000000000; it must be at most 10000"),
    (DISTIL, {"eval_prompts": 10**9}, "--eval-prompts is 1000000000; it must be at most 1000000"),
    (GROW, {"group": 10**9}, "--group is 1000000000; it must be at most 10000"),
    (DISTIL, {"reward_timeout": 1e300}, "--reward-timeout is 1e+300; it must be at most"),
    (GROW, {"group": 1}, "--group 1: an advantage compares the images of one prompt"),
    (GROW, {"noise_level": 0.0}, "needs the likelihood of a noisy step: --rollout sde --noise-level 0.0"),
    (
        GROW,
        {"full": True, "beta": 0.0, "evaluate": True},
        "--full with --evaluate: the table compares adapters",
    ),
    (GROW, {"rollout": "ode"}, "needs the likelihood of a noisy step: --rollout ode"),
    (
        GROW,
        {"rollout": "cps", "noise_level": 1.5, "skip_last": True},
        "--rollout cps needs --noise-level in (0, 1]",
    ),
    (
        GROW,
        {"rollout": "cps", "window": 0, "skip_last": False},
        "--rollout cps: the last CPS step has no noise",
    ),
    (
        GROW,
        {"rollout": "cps", "steps": 6, "window": 1, "window_range": (0, 6), "skip_last": False},
        "add --skip-last or end --window-range before it",
    ),
    (
        DISTIL,
        {"rollout": "cps"},
        "--rollout cps with --weight kl: the last cps step has no noise, so its weight",
    ),
    (
        GROW,
        {"full": True, "beta": 0.0, "cold_start": "some/adapter"},
        "--cold-start 'some/adapter' cannot apply",
    ),
    (
        GROW,
        {"full": True, "beta": 0.5},
        "--beta 0.5 with --full: the reference is the base with the adapter off",
    ),
    (GROW, {"updates": 5, "prompts_per_step": 12}, "--updates 5 does not divide --prompts-per-step 12"),
    (
        GROW,
        {"train_rewards": {"red": "m:f"}},
        "task 'green' has no reward to train on; add --train-rewards green=",
    ),
    *[
        (
            GROW,
            {"steps": 6, "skip_last": skip, "window": window, "window_range": span},
            f"--window {window} does not fit into --window-range {span[0]} {span[1]} of the {6 - skip}",
        )
        for skip, window, span in [
            (False, 1, (0, 7)),
            (True, 1, (0, 6)),
            (False, 3, (2, 4)),
            (False, 1, (-1, 3)),
        ]
    ],
    # stage sft
    (FINETUNE, {"data": ""}, "--data is empty: name a directory with metadata.jsonl and images or latents"),
    (
        FINETUNE,
        {"full": True, "cold_start": "some/adapter"},
        "--full trains the base; --cold-start 'some/adapter' can",
    ),
]


@pytest.mark.parametrize("base, changes, message", REFUSED)
def test_bad_settings_are_refused_by_flag_and_value(base, changes, message):
    with pytest.raises(ValueError) as caught:
        replace(base, **changes).check(world=4)
    assert message in str(caught.value)
    for flag in re.findall(r"--[a-z][a-z0-9-]*", str(caught.value)):
        name = flag[2:].replace("-", "_").removeprefix("no_")
        assert name in field_names(type(base)), f"the message names {flag}, which this stage does not have"


ACCEPTED = [
    *[
        (cfg, {"shard_size": 4, "warmup": 0, "weight_decay": 0.0, "sample_every": 0, "guidance": -0.5})
        for cfg in EVERY
    ],
    *[(cfg, {"evaluate": False, "rewards": {}}) for cfg in ON_POLICY],
    *[(cfg, {"heldout": {}}) for cfg in ON_POLICY],
    *[(cfg, {"watch_every": 5, "evaluate": False, "mix": {"red": 3}}) for cfg in ON_POLICY],
    *[(cfg, {"steps": 2, "skip_last": True}) for cfg in ON_POLICY],
    (DISTIL, {"anchor": "nobody", "anchor_weight": 0.0}),
    (DISTIL, {"anchor": "base"}),
    (DISTIL, {"teachers": {"base": "base"}, "anchor": "base", "routes": dict.fromkeys(COLOURS, "base")}),
    (DISTIL, {"routes": {"red": "base"}}),
    (DISTIL, {"teachers": COLOURS | {"red": "base", "ema": "ema"}, "ema": 0.9}),
    (DISTIL, {"teacher_guidances": {"base": 1.0, "red": 4.5}, "teacher_devices": {"red": "offload"}}),
    (DISTIL, {"noise_level": 0.0, "weight": "ode_kl", "rollout": "ode"}),
    (DISTIL, {"noise_level": 1.0, "rollout": "cps", "skip_last": True}),
    (DISTIL, {"noise_level": 1.0, "rollout": "cps", "weight": "uniform"}),
    (DISTIL, {"queries": 10}),
    (DISTIL, {"queries": 9, "skip_last": True}),
    (DISTIL, {"cold_start": "some/adapter", "group": 1}),
    (GROW, {"group": 2, "beta": 0.0, "updates": 12, "prompts_per_step": 12}),
    (GROW, {"full": True, "beta": 0.0, "evaluate": False}),
    (GROW, {"cold_start": "some/adapter"}),
    (MERGED, {"merge": "ties", "merge_density": 1.0, "merge_weights": {"red": 1, "green": -0.5, "blue": 2}}),
    (DISTIL, {"merge_from": {"other": "x"}, "merge_weights": {"other": 0.5}, "merge": "cat"}),
    (GROW, {"window": 3, "window_range": (7, 10)}),
    (GROW, {"rollout": "cps", "window": 3, "window_range": (6, 9)}),
    (GROW, {"rollout": "cps", "skip_last": True}),
    (GROW, {"window": 0, "window_range": (0, 99)}),
    (GROW, {"advantage_clip": INF}),
    (FINETUNE, {"full": True}),
    (FINETUNE, {"cold_start": "some/adapter", "caption_dropout": 0.0, "ema": 0.0}),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_settings_at_the_edge_are_accepted(base, changes):
    replace(base, **changes).check(world=4)


@pytest.mark.parametrize("cfg", EVERY, ids=stage_of)
def test_settings_cannot_change_while_a_run_goes_on(cfg):
    with pytest.raises(FrozenInstanceError):
        cfg.lr = 1.0


@pytest.mark.parametrize("kind", STAGES.values())
def test_the_defaults_name_no_model_and_no_data(kind):
    with pytest.raises(ValueError, match="--out is empty"):
        kind().check(world=1)
    with pytest.raises(ValueError, match="--model is empty"):
        kind(out="run").check(world=1)
    assert not re.search(r"\bmini", json.dumps(to_json(kind())))


def test_routes_and_shares():
    cfg = replace(DISTIL, routes={"red": "blue"}, mix={"green": 3})
    assert [cfg.route(task) for task in COLOURS] == ["blue", "green", "blue"]
    assert cfg.share() == {"red": 1, "green": 3, "blue": 1} and list(cfg.share()) == list(COLOURS)
    assert replace(GROW, mix={"red": 2}).share() == {"red": 2, "green": 1, "blue": 1}


def test_a_start_merges_the_teachers_of_the_tasks_and_not_one_that_only_anchors():
    """The paper's merge: the experts of the tasks, and not the quality teacher that anchors them."""
    cfg = replace(DISTIL, cold_start="merge", teachers=COLOURS | {"quality": "q"}, anchor="quality")
    assert cfg.merged() == COLOURS and cfg.merge_weight("red") == 1 / 3
    shared = replace(cfg, routes={"red": "0.5*red+0.5*quality"})
    assert shared.merged() == COLOURS | {"quality": "q"}
    assert replace(cfg, merge_from={"x": "y"}).merged() == {"x": "y"}
    assert replace(cfg, anchor="blue").merged().keys() == {"red", "green", "blue", "quality"}
    assert PRESETS["sd35"].merged().keys() == {"geneval", "ocr", "pickscore"}
    assert PRESETS["mini"].merged().keys() == {"compose", "text", "quality"}


# ---- presets -------------------------------------------------------------------------------------


OWN = {"teachers": {"mine": "my/lora"}, "prompts": {"mine": "mine.txt"}}
# What a preset leaves to the user.
ASKED_FOR = {
    "flux": OWN,
    "flux2": OWN,
    "qwen_image": OWN,
    "z_image": OWN,
}


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "z_image"])
def test_a_familys_preset_samples_as_its_pipeline_does(name):
    """By default, and in the pipeline's own scale of guidance."""
    family = load_family(name)
    defaults = inspect.signature(getattr(diffusers, family.PIPELINE).__call__).parameters
    scale = defaults["true_cfg_scale" if name == "qwen_image" else "guidance_scale"].default
    if name == "z_image":
        scale += 1
    preset = PRESETS[name]
    assert (preset.family, preset.guidance, preset.teacher_guidance) == (name, scale, scale)
    assert preset.eval_steps == defaults["num_inference_steps"].default


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_and_can_be_parsed(name):
    replace(PRESETS[name], **ASKED_FOR.get(name, {})).check(world=1)
    assert parse([name], PRESETS) == PRESETS[name]
    assert parse([name, "--seed", "7"], PRESETS) == replace(PRESETS[name], seed=7)


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


def test_the_folding_preset_trains_two_states_of_ten_to_the_guided_velocity():
    fold = PRESETS["sd35-fold"]
    assert (fold.guidance, fold.teacher_guidance, fold.states_per_sample(), fold.steps) == (1.0, 4.5, 2, 10)
    assert (fold.teachers, fold.anchor) == (PRESETS["sd35"].teachers, "deqa")


def test_presets_name_the_package_relative_to_its_folder():
    """So that a run resumes in a checkout that has moved."""
    packaged = 0
    for cfg in PRESETS.values():
        text = json.dumps(to_json(cfg))
        assert str(Path(config.__file__).parents[1]) not in text
        for source in re.findall(r'"(opd/[^"]*)"', text):
            assert resolve(source).exists(), source
            packaged += 1
    assert packaged > 20


# ---- the classes ---------------------------------------------------------------------------------


def test_every_field_says_what_it_is():
    """A docstring under each field, in every class: it is the flag's help."""
    nodes = []
    for module in (config, config_base):
        nodes += ast.parse(Path(module.__file__).read_text()).body
    documented, silent = set(), []
    for kind in [node for node in nodes if isinstance(node, ast.ClassDef)]:
        for node, after in zip(kind.body, [*kind.body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign):
                continue
            documented.add(node.target.id)
            text = (
                after.value.value
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                else ""
            )
            if len(text) <= 5:
                silent.append(f"{kind.name}.{node.target.id}")
    assert silent == []
    assert documented == set().union(*(field_names(kind) for kind in STAGES.values()))


def test_what_may_change_on_resume_and_what_may_not_do_not_overlap():
    assert not field_names(Logistics) & field_names(Scores)
    assert field_names(Logistics) < field_names(RunConfig) and not field_names(RunConfig) & field_names(
        Scores
    )
    for kind in (DistillationConfig, GRPOConfig):
        assert field_names(Scores) < field_names(kind)
