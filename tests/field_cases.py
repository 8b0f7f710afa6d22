"""For every field of every stage: a changed value, where it can matter, and what of a run it changes.

Paths are seen from the folder of a run; tests/test_fields.py makes what lies in place/.
"""

import time
from dataclasses import dataclass, field

import torch

BRIGHT = "tests.field_cases:brightness"
DARK = f"-1*{BRIGHT}"
PROMPTS = {"red": "place/red.txt", "blue": "place/blue.txt"}
COLOURS = {"red": "place/red", "blue": "place/blue"}
ALONE = {"red": "place/red.txt"}


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def slow(images, prompts, metadata):
    time.sleep(0.1)
    return images.mean((1, 2, 3))


def by_place(images, prompts, metadata):
    """Finite whatever the images are."""
    return torch.linspace(0.0, 1.0, len(images))


@dataclass(frozen=True)
class Case:
    """What becomes of a run when one field changes."""

    values: list
    """Changed values, one run each. All of them, and what the field was before, must differ in `changes`."""
    changes: tuple[str, ...] = ("student",)
    """Parts of an Outcome (tests/test_fields.py)."""
    keeps: tuple[str, ...] = ()
    """Parts that stay as they were."""
    under: dict = field(default_factory=dict)
    """Other settings, before and after, with which the field can matter."""
    refused: str = ""
    """The words in which the values are refused instead."""


# ---- the runs that are changed -------------------------------------------------------------------

RUN = {
    "model": "place/pipeline",
    "cache": "place/cache",
    "out": "run",
    "dtype": "float32",
    "rank": 4,
    "alpha": 8.0,
    "cold_start": "base",
    "prompts_per_step": 2,
    "micro_batch": 4,
    "iterations": 2,
    "lr": 1e-2,
    "warmup": 0,
    "decay": "constant",
    "sample_every": 0,
}
ROLLOUT = RUN | {"prompts": PROMPTS, "group": 2, "steps": 2, "evaluate": False}
BASES = {
    "opd": ROLLOUT
    | {
        "teachers": COLOURS,
        "anchor": "blue",
        "anchor_weight": 0.1,
    },
    "grpo": ROLLOUT | {"train_rewards": {"red": BRIGHT, "blue": BRIGHT}, "beta": 0.0},
    "sft": RUN | {"data": "place/images"},
}

# ---- fields of every stage -----------------------------------------------------------------------

WEIGHTS = ("student", "state")
PICTURES = {"sample_every": 1}
THREE = {"iterations": 3}
SAVING = {"save_every": 1}
MERGED = {"cold_start": "merge", "merge_from": COLOURS, "rank": 8}

LOGISTICS = {
    "out": Case(["elsewhere"], changes=("files",), keeps=WEIGHTS),
    "cache": Case(["cache"], changes=("files",), keeps=WEIGHTS),
    "cache_gb": Case([1e-6, 0.0], refused="--cache-gb"),
    "iterations": Case([3], changes=("rows", *WEIGHTS)),
    "micro_batch": Case([1], changes=("passes",), keeps=("losses", "samples")),
    "checkpointing": Case([True], changes=("passes",), keeps=("losses",)),
    # "rows" has the number of compiled graphs.
    "compile": Case([True], changes=("rows",), keeps=("losses", "passes", "samples")),
    "shard_size": Case([2], refused="--shard-size 2 does not divide the 1 ranks"),
    "rank_timeout": Case([0.0, -1.0], refused="it must be positive"),
    # What it refuses: tests/test_faults.py.
    "deterministic": Case([True], changes=("printed",), keeps=(*WEIGHTS, "rows")),
    "max_bad_steps": Case([1], changes=("error",), under=THREE | {"lr": 1e30}),
    "log_every": Case([2, 3], changes=("rows",), keeps=WEIGHTS, under=THREE),
    "keep_last": Case([1, 2], changes=("files",), keeps=(*WEIGHTS, "rows"), under=THREE | SAVING),
    "keep_every": Case([2], changes=("files",), keeps=WEIGHTS, under=THREE | SAVING | {"keep_last": 1}),
    "force_resume": Case([True], refused="--force-resume: run holds no run to resume"),
    "save_every": Case([1, 2], changes=("files",), keeps=(*WEIGHTS, "rows"), under=THREE),
    "sample_every": Case([1, 2], changes=("pictures",), keeps=(*WEIGHTS, "rows"), under=THREE),
    "eval_steps": Case([2], changes=("pictures",), keeps=WEIGHTS, under=PICTURES),
    "deploy_guidance": Case([2.0], changes=("pictures",), keeps=(*WEIGHTS, "rows"), under=PICTURES),
    "tracker": Case(["tensorboard"], changes=("files",), keeps=(*WEIGHTS, "rows")),
    "push": Case(["nonsense"], refused="--push 'nonsense': write a Hub repository as OWNER/NAME"),
    "gpu_memory": Case([1e-6], refused="--gpu-memory 1e-06 GiB is too small"),
    "dry_run": Case([True], changes=("printed", "files", "student", "passes")),
}
EVERY_RUN = LOGISTICS | {
    "family": Case(["sd0"], refused="no model family opd/families/sd0.py; choose from"),
    "model": Case(["place/other_pipeline"]),
    "dtype": Case(["bfloat16"], changes=("student", "rows")),
    "t5": Case([False], under={"model": "place/pipeline_with_t5"}),
    "resolution": Case([("16",), ("8x16",), ("8", "16x8")]),
    "rank": Case([2]),
    "alpha": Case([4.0]),
    "cold_start": Case(["place/red"]),
    "merge": Case(["cat", "ties", "dare", "naive"], under=MERGED),
    "merge_from": Case([{"red": "place/red"}, {"blue": "place/blue"}], under=MERGED),
    "merge_weights": Case([{"red": 0.9, "blue": 0.1}, {"red": 1.0, "blue": 1.0}], under=MERGED),
    "merge_density": Case([0.2, 1.0], under=MERGED | {"merge": "ties"}),
    "prompts_per_step": Case([4]),
    "guidance": Case([2.0], changes=("student", "samples")),
    "lr": Case([1e-3]),
    "warmup": Case([1, 2]),
    "decay": Case(["cosine"]),
    "weight_decay": Case([0.5]),
    "clip": Case([1e-7]),
    "ema": Case([0.05, 0.9], keeps=("losses",), under=THREE),
    "ema_every": Case([2], keeps=("losses",), under={"ema": 0.9}),
    "seed": Case([1]),
}

# ---- fields of the stages that sample ------------------------------------------------------------

HELDOUT = {"heldout": ALONE, "rewards": {"red": BRIGHT, "blue": BRIGHT}, "eval_prompts": 2, "eval_steps": 2}
SCORED = HELDOUT | {"evaluate": True, "iterations": 1}
WATCHED = HELDOUT | {"watch_every": 1, "watch_prompts": 2}
SLOW = {"rewards": {"red": "tests.field_cases:slow"}, "iterations": 1}

SCORES = {
    "evaluate": Case([True], changes=("scores",), keeps=(*WEIGHTS, "rows"), under=HELDOUT),
    "rewards": Case([{"red": DARK, "blue": BRIGHT}], changes=("scores",), keeps=WEIGHTS, under=SCORED),
    "heldout": Case([{}, PROMPTS], changes=("scores",), keeps=WEIGHTS, under=SCORED),
    "eval_prompts": Case([3], changes=("scores",), keeps=WEIGHTS, under=SCORED),
    "eval_steps": Case([3], changes=("scores",), keeps=WEIGHTS, under=SCORED),
    "watch_every": Case([1, 2], changes=("rows",), keeps=WEIGHTS, under=HELDOUT),
    "watch_prompts": Case([3], changes=("rows",), keeps=WEIGHTS, under=WATCHED),
    "reward_timeout": Case([0.02], changes=("rows",), keeps=WEIGHTS, under=WATCHED | SLOW),
}
EVERY_ROLLOUT = (
    EVERY_RUN
    | SCORES
    | {
        "prompts": Case([ALONE]),
        "mix": Case([{"red": 3}]),
        "alternate": Case([True]),
        "group": Case([3]),
        "steps": Case([3], changes=("student", "passes")),
        "rollout": Case(["cps"], under={"skip_last": True}),
        "noise_level": Case([0.3]),
        "skip_last": Case([True]),
        "cosine_every": Case([1, 2], changes=("rows",), keeps=("losses",)),
    }
)

# ---- fields of one stage -------------------------------------------------------------------------

SWAPPED = {"red": "place/blue", "blue": "place/red"}
ONE_QUERY = {"queries": 1, "steps": 3}
EXAGGERATED = {"lr": 1e30, "train_rewards": dict.fromkeys(PROMPTS, "tests.field_cases:by_place")}
JUDGED = {"train_rewards": {"red": BRIGHT, "blue": DARK}}
WINDOW = {"window": 1, "window_range": [0, 1]}
REWARD_IS_SLOW = {"train_rewards": {"red": "tests.field_cases:slow", "blue": BRIGHT}, "iterations": 1}

CASES = {
    "opd": EVERY_ROLLOUT
    | {
        "rollout": Case(["ode", "cps"], under={"skip_last": True, "steps": 3}),
        "teachers": Case([SWAPPED, COLOURS | {"red": "ema"}, COLOURS | {"red": "base"}], under={"ema": 0.9}),
        "routes": Case([{"red": "blue"}]),
        "anchor": Case(["red", "base"]),
        "anchor_weight": Case([0.0], changes=("student", "samples")),
        "anchor_levels": Case([{"0.9": 2.0}, {"0.9": 0.0}]),
        "anchor_target": Case([1e-3, 1.0], changes=("student", "state", "rows")),
        "routing": Case(["reward"], under=JUDGED),
        "reward_weight": Case([1.0], changes=("student", "rows"), under=JUDGED),
        "train_rewards": Case([{"red": DARK, "blue": BRIGHT}], under=JUDGED | {"reward_weight": 1.0}),
        "weight": Case(["kl_released", "ode_kl", "uniform", "x0", "x_next"], keeps=("samples",)),
        "normalise": Case([0.5, 1.0], keeps=("samples",)),
        "estimator": Case(["pg", "pg_state", "pg_live"], keeps=("samples",)),
        "query_range": Case([[0, 1], [0, 2]], changes=("student", "samples"), under={"steps": 3}),
        "branch_weight": Case([0.5], changes=("student", "samples"), under={"guidance": 2.0}),
        "extrapolate": Case([{"red": 1.5}], changes=("student", "samples")),
        "reference": Case(["blue"], under={"extrapolate": {"red": 1.5}}),
        "diagnose_every": Case([1, 2], changes=("rows",), keeps=WEIGHTS, under=THREE),
        "diagnose_prompts": Case([2], changes=("rows",), keeps=WEIGHTS, under={"diagnose_every": 1}),
        "queries": Case([1, 2], changes=("student", "samples"), under={"steps": 3}),
        "query_beta": Case([[1.0, 60.0]], under=ONE_QUERY),
        "single_pass": Case([False], changes=("passes",), keeps=("losses",)),
        "walker": Case(["teacher"], changes=("student", "samples", "passes")),
        "teacher_guidance": Case([2.0], changes=("student", "samples")),
        "teacher_guidances": Case([{"red": 2.0}, {"blue": 2.0}], changes=("student", "samples")),
        "teacher_devices": Case(
            [{"red": "offload"}], refused="'place/red' is an adapter on the student's base"
        ),
    },
    "grpo": EVERY_ROLLOUT
    | {
        "max_bad_steps": Case([1], changes=("error",), under=THREE | EXAGGERATED),
        "reward_timeout": Case([0.02], changes=("rows", "student"), under=REWARD_IS_SLOW),
        "full": Case([True], changes=("files", "student")),
        "train_rewards": Case([{"red": DARK, "blue": BRIGHT}]),
        "beta": Case([0.5], changes=("student", "passes")),
        "clip_range": Case([1e-3], under={"epochs": 2}),
        "guard": Case([True]),
        "advantage_std": Case(["group"], under={"prompts_per_step": 4}),
        "advantage_clip": Case([0.1]),
        "window": Case([1], under={"window_range": [0, 2]}),
        "window_range": Case([[1, 2]], under=WINDOW),
        "shared_start": Case([True], changes=("student", "samples")),
        "updates": Case([2]),
        "epochs": Case([2], changes=("student", "passes")),
    },
    "sft": EVERY_RUN
    | {
        "guidance": Case([2.0], changes=("pictures",), keeps=WEIGHTS, under=PICTURES),
        "full": Case([True], changes=("files", "student")),
        "data": Case(["place/other_images"]),
        "caption_dropout": Case([0.0, 0.9]),
    },
}
