"""The miniature's named runs; opd/presets.py puts them beside those of real models, and says where they go.

Sources that start with opd/ lie in this package (`opd.files.resolve`).
"""

from opd.config import DistillationConfig, GRPOConfig, NFTConfig, RunConfig, SFTConfig

ENDINGS = {"compose": "jsonl", "text": "txt", "quality": "txt"}
MINI_PROMPTS = {task: f"opd/mini/prompts/{task}.train.{ending}" for task, ending in ENDINGS.items()}
MINI_HELDOUT = {task: f"opd/mini/prompts/{task}.test.{ending}" for task, ending in ENDINGS.items()}
QUALITY = "opd.mini.rewards:quality"
MINI_REWARDS = {"compose": "opd.mini.rewards:compose", "text": "opd.mini.rewards:text", "quality": QUALITY}
# GRPO is rewarded for parts of a composition; scores count whole ones.
MINI_SCORERS = MINI_REWARDS | {"compose": "opd.mini.rewards:compose_strict"}

# What presets read and no checkout holds -> the command that makes it.
MADE_BY = {
    "runs/mini-pipeline": "python -m opd.mini.build pipeline runs/mini-pipeline",
    "runs/mini-signs/pipeline": "python -m opd.mini.signs runs/mini-signs",
    "runs/mini-signs/base": "python -m opd.mini.build base runs/mini-signs/pipeline "
    "runs/mini-ocr-base/student runs/mini-signs/base, after python train.py mini-ocr-base",
    "runs/mini-data/base": "python -m opd.mini.build data runs/mini-data/base runs/mini-pipeline",
    "runs/mini/student": "python train.py mini",
    "runs/mini-samples": "python sample.py --save latents --out runs/mini-samples",
}

EDITS = "runs/mini-edits"
EDITS_PIPELINE = "runs/mini-edits-pipeline"
EDITED = ("recolour", "write")
MAKE_EDITS = f"python -m opd.mini.edits {EDITS}"
MADE_BY |= {f"{EDITS}/{task}.{part}.jsonl": MAKE_EDITS for task in EDITED for part in ("train", "test")}
EDITS_DATA = "runs/mini-edits-data"
MAKE = "python -m opd.mini.edit_pipeline"
MADE_BY[EDITS_PIPELINE] = f"{MAKE} pipeline {EDITS_PIPELINE}"
MADE_BY[EDITS_DATA] = f"{MAKE} data {EDITS_DATA} {EDITS_PIPELINE}"

# ---- blocks that presets share -----------------------------------------------------------------------------

MINI = {"model": "opd/mini/weights/base"}
STUDENT = {"rank": 32, "alpha": 64.0}
TEACHERS = {task: f"opd/mini/weights/{task}" for task in ENDINGS}

# Distillation. 3:1:1 is the paper's mix.
MINI_OPD = {
    **MINI,
    **STUDENT,
    "teachers": TEACHERS,
    "anchor": "quality",
    "prompts": MINI_PROMPTS,
    "heldout": MINI_HELDOUT,
    "rewards": MINI_SCORERS,
    "mix": {"compose": 3},
    "micro_batch": 30,
    "eval_prompts": 64,
}
# The recipes of the papers, as opd/presets.py describes them.
LARGE_STEPS = {"prompts_per_step": 30, "lr": 3e-3}
PAPER = {**MINI_OPD, **LARGE_STEPS, "iterations": 80, "save_every": 40}
NO_ANCHOR = {"anchor_weight": 0.0}
FROM_BASE = {"cold_start": "base", **NO_ANCHOR}
# States weighed alike, some of them per trajectory. kl weighs the states of much noise, which decide the
# composition, hundreds of times less than the last ones, and a hundred steps are too few to wait for them
# (opd/mini/study/RESULTS.md, "Open questions").
EARLY = {"weight": "uniform", "query_beta": (1.0, 1.5), "skip_last": True}
FOLD = {**MINI_OPD, **EARLY, "teacher_guidance": 2.5}  # guidance folded into the student
# Many small updates come near the teachers' level sooner ("How soon" there). An anchor of the low noise
# levels alone costs no pass at the others.
SMALL_STEPS = {"prompts_per_step": 10, "queries": 2, "iterations": 120, "save_every": 40, "sample_every": 40}
# A moving average removes the noise of small steps, so the rate can be higher. Signs take longest to learn,
# so they have two fifths of the prompts.
SOON = {**SMALL_STEPS, "lr": 3e-3, "ema": 0.9, "mix": {"compose": 2, "text": 2}}
LATE = {"anchor_weight": 0.0, "anchor_levels": {"0.6": 3.0}}

# What each teacher grows from. The anchor's, quality, sees the prompts of all tasks, so that it has something
# to say about each.
GROWN = {
    task: {"prompts": {task: MINI_PROMPTS[task]}, "train_rewards": {task: MINI_REWARDS[task]}}
    for task in ("compose", "text")
}
GROWN["quality"] = {"prompts": MINI_PROMPTS, "train_rewards": dict.fromkeys(ENDINGS, QUALITY)}

# GRPO. One early state is trained at a time, since early states decide the composition; groups share their
# start, so that this state is computed once for all of a group, and rewards differ by the noise of its one
# step. Six steps are enough to roll out.
WALK = {"group": 8, "micro_batch": 48, "steps": 6, "window": 1, "shared_start": True}
WATCHED = {"save_every": 50, "sample_every": 30, "watch_every": 60, "watch_prompts": 128}
GRPO = {**WALK, **WATCHED, "beta": 0.002, "ema": 0.9}
MINI_GRPO = {**MINI, **GRPO, "heldout": MINI_HELDOUT, "window_range": (0, 3)}
TEACHER = {**MINI_GRPO, "rewards": MINI_SCORERS, "prompts_per_step": 12}
MIX = {**MINI_GRPO, "prompts_per_step": 15}

# The same without likelihoods, on-policy, at four of the six noise levels (opd/nft.py). On the earlier
# base twice the learning rate, or half the pictures an iteration, collapsed.
NFT = {"group": 8, "micro_batch": 48, "steps": 6, "levels": 4, "old_decay": (0.0, 0.0, 0.0), "ema": 0.9}
NFT_TEACHER = {**MINI, **NFT, **WATCHED, "heldout": MINI_HELDOUT, "rewards": MINI_SCORERS}
NFT_TEACHER |= {"prompts_per_step": 12}

# The editing miniature (opd/mini/edits.py): two tasks change a picture, one paints. The teachers that edit
# are rewarded for the edit and for what they leave as it was.
EDIT_GROWN = {  # task -> reward, iterations
    "recolour": ("0.6*opd.mini.edits:recolour+0.4*preservation", 160),
    "write": ("0.6*opd.mini.edits:write+0.4*preservation", 120),
    "paint": ("opd.mini.edits:paint", 60),
}
EDIT_SCORERS = {
    "recolour": "opd.mini.edits:recolour,preservation",
    "write": "opd.mini.edits:write,preservation",
    "paint": "opd.mini.edits:paint",
}
EDIT_PROMPTS = {task: f"{EDITS}/{task}.train.jsonl" for task in EDITED} | {"paint": MINI_PROMPTS["quality"]}
EDIT_HELDOUT = {task: f"{EDITS}/{task}.test.jsonl" for task in EDITED} | {"paint": MINI_HELDOUT["quality"]}
EDIT = {"model": "opd/mini/weights/edits/base", "heldout": EDIT_HELDOUT, "rewards": EDIT_SCORERS}
EDIT_OPD = {
    **EDIT,
    "teachers": {task: f"opd/mini/weights/edits/{task}" for task in EDIT_PROMPTS},
    **NO_ANCHOR,
    "prompts": EDIT_PROMPTS,
    "micro_batch": 30,
    "eval_prompts": 64,
}
EDIT_GRPO = {**EDIT, **GRPO, "window_range": (0, 3), "prompts_per_step": 12, "lr": 2e-3}

# Flow matching: a base from nothing, and the base on further pictures.
PRETRAIN = {"full": True, "weight_decay": 0.01}
RARELY = {"save_every": 500, "sample_every": 500}
WHOLE = {"prompts_per_step": 64, "micro_batch": 64}

# ---- the runs ----------------------------------------------------------------------------------------------

MINI_PRESETS: dict[str, RunConfig] = {
    # What is near its teachers soonest here: guidance folded in, small steps and their average, an anchor
    # that leaves the composition alone. What is not named are the defaults of opd/config/: an SDE walk of ten
    # steps, a start merged from the teachers, guidance 1 for the student, and more; --dry-run prints all.
    "mini": DistillationConfig(**FOLD | SOON | LATE),
    # The study's: large steps, no anchor.
    "mini-fold": DistillationConfig(
        **FOLD, **LARGE_STEPS, **NO_ANCHOR, queries=5, iterations=50, save_every=25
    ),
    "mini-flow-opd": DistillationConfig(**PAPER),
    "mini-diffusion-opd": DistillationConfig(**PAPER, **FROM_BASE, rollout="ode", weight="ode_kl"),
    "mini-dance-opd": DistillationConfig(
        **PAPER, **FROM_BASE, rollout="ode", weight="uniform", queries=1, query_beta=(5.0, 2.0)
    ),
    "mini-gfd-opd": DistillationConfig(
        **PAPER,
        **FROM_BASE,
        teacher_guidance=2.5,
        extrapolate={"compose": 1.25, "text": 1.25, "quality": 1.25},
        query_range=(0, 2),
    ),
    "mini-base": SFTConfig(
        **PRETRAIN,
        **RARELY,
        **WHOLE,
        model="runs/mini-pipeline",
        data="runs/mini-data/base",
        iterations=13_500,
        lr=1e-3,
        warmup=200,
        ema=0.999,
    ),
    # 64 px signs and the real OCR reward (opd/mini/signs.py).
    "mini-ocr-base": SFTConfig(
        **PRETRAIN,
        model="runs/mini-signs/pipeline",
        data="runs/mini-signs/data",
        iterations=2000,
        prompts_per_step=32,
        micro_batch=32,
        lr=1.5e-3,
        warmup=100,
        ema=0.99,
        save_every=200,
        sample_every=200,
    ),
    "mini-ocr": GRPOConfig(
        **GRPO,
        model="runs/mini-signs/base",
        prompts={"text": "runs/mini-signs/train.txt"},
        heldout={"text": "runs/mini-signs/test.txt"},
        train_rewards={"text": "ocr"},
        rewards={"text": "ocr"},
        prompts_per_step=12,
        window_range=(0, 2),
        lr=4e-3,
        iterations=100,
    ),
    "mini-compose": GRPOConfig(**TEACHER, **GROWN["compose"], lr=1.3e-3, iterations=320),
    "mini-text": GRPOConfig(**TEACHER, **GROWN["text"], lr=2e-3, iterations=80),
    "mini-quality": GRPOConfig(**TEACHER, **GROWN["quality"], lr=2e-3, iterations=80),
    "mini-nft-compose": NFTConfig(**NFT_TEACHER, **GROWN["compose"], lr=3e-3, iterations=24),
    "mini-nft-text": NFTConfig(**NFT_TEACHER, **GROWN["text"], lr=3e-3, iterations=12),
    "mini-nft-quality": NFTConfig(**NFT_TEACHER, **GROWN["quality"], lr=3e-3, iterations=12),
    "mini-grpo-mix": GRPOConfig(
        **MIX,
        prompts=MINI_PROMPTS,
        train_rewards=MINI_REWARDS,
        rewards=MINI_SCORERS,
        mix={"compose": 3},
        lr=2e-3,
        iterations=550,
    ),
    # The default run's student goes on by GRPO, at a fifth of the mix's learning rate, which else undoes what
    # is there. It sees shapes and signs a second time, for their quality.
    "mini-student-grpo": GRPOConfig(
        **MIX,
        **STUDENT,
        cold_start="runs/mini/student",
        prompts=MINI_PROMPTS | {"shapes": MINI_PROMPTS["compose"], "signs": MINI_PROMPTS["text"]},
        train_rewards=MINI_REWARDS | {"shapes": QUALITY, "signs": QUALITY},
        rewards=MINI_SCORERS | {"shapes": QUALITY, "signs": QUALITY},
        mix={"compose": 9, "text": 3},
        lr=4e-4,
        iterations=93,
    ),
    # An SFT start for "mini".
    "mini-sft-start": SFTConfig(
        **MINI,
        **WHOLE,
        **STUDENT,
        data="runs/mini-samples",
        iterations=200,
        warmup=20,
        save_every=200,
        sample_every=200,
    ),
    # Two teachers that edit and one that paints, into one student. Guidance is not folded in: at 2.5 it
    # covers the pictures with a pattern of the patches' size.
    "mini-edit": DistillationConfig(**STUDENT, **EARLY, **SMALL_STEPS, **EDIT_OPD, lr=2e-3),
    "mini-edit-base": SFTConfig(
        **PRETRAIN,
        **RARELY,
        model=EDITS_PIPELINE,
        prompts_per_step=32,
        micro_batch=32,
        data=EDITS_DATA,
        iterations=7500,
        lr=1e-3,
        warmup=200,
        ema=0.998,
    ),
}
MINI_PRESETS |= {
    f"mini-edit-{task}": GRPOConfig(
        **EDIT_GRPO,
        prompts={task: EDIT_PROMPTS[task]},
        train_rewards={task: reward},
        iterations=iterations,
    )
    for task, (reward, iterations) in EDIT_GROWN.items()
}
