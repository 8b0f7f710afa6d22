"""The runs of the miniature's study, as data: `python -m opd.mini.study` makes those that have no result."""

import re
from dataclasses import dataclass
from functools import partial

from opd.mini.presets import MINI_PROMPTS
from opd.mini.world import TASKS


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    title: str  # what a table calls it
    flags: str
    """On top of `train.py PRESET`. {of NAME} is the student of another recipe with this run's seed."""
    preset: str = "mini-fold"

    def needs(self) -> list[str]:
        """The recipes that it starts or learns from."""
        return list(dict.fromkeys(re.findall(r"{of ([\w.-]+)}", self.flags)))


Mix = partial(Recipe, preset="mini-grpo-mix")  # one model by GRPO on all rewards


@dataclass(frozen=True)
class Reference:
    """Models that are scored as they are."""

    titles: dict[str, str]  # row of `opd.evaluation` -> what a table calls it
    flags: str  # of `opd.evaluation`


SFT_START = "runs/mini-sft-start/student"
# What some runs start from -> the command that makes it, in this order, run in the repository's root.
PREPARED = {
    "runs/mini-samples/latents.safetensors": (
        "sample.py --save latents --count 128 --steps 10 --out runs/mini-samples"
    ),
    SFT_START: "train.py mini-sft-start --iterations 80 --sample-every 0",
}
# Teachers on the mix's terms, one set per seed: its beta, and no more images in all. The quality teacher sees
# the prompts of every task, as the paper's anchor does.
EQUAL = {"compose": "equal-compose", "text": "equal-text", "quality": "all-quality"}
TEACHERS = tuple(EQUAL.values())
PROMPTS = " ".join(f"{task}={file}" for task, file in MINI_PROMPTS.items())
OWN_REWARDS = " ".join(f"{task}=opd.mini.rewards:{task}" for task in TASKS)
STRICT_REWARDS = OWN_REWARDS.replace(":compose", ":compose_strict")
REWARDED = " ".join(f"{task}=opd.mini.rewards:quality" for task in TASKS)
# The prompts of shapes and signs again, as tasks of their own, rewarded by the quality of their pictures.
LOOKS = "shapes=opd/mini/prompts/compose.train.jsonl signs=opd/mini/prompts/text.train.txt"
LOOKED_AT = "shapes=opd.mini.rewards:quality signs=opd.mini.rewards:quality"
TERMS = "--beta 0.002 --iterations 80"
QUALITY_OF_ALL = f"{TERMS} --lr 2e-3 --prompts {PROMPTS} --train-rewards {REWARDED}"
LEARNED = "".join(f" {task}={{of {name}}}" for task, name in EQUAL.items())
LEARN = f"--teachers{LEARNED} --anchor quality"
WATCHED = "--watch-every 20 --watch-prompts 128"
LATE = "--anchor-weight 0.02 --anchor-levels 0.6=3 --iterations 100"
# The mix that is rewarded for the quality of every task's pictures.
MIX_ALL = (
    f"--prompts {PROMPTS} {LOOKS} --train-rewards {OWN_REWARDS} {LOOKED_AT}"
    f" --rewards {STRICT_REWARDS} {LOOKED_AT} --mix compose=9 text=3"
)
# The same from a student: its rank, and a fifth of the learning rate, which else undoes what is there.
GO_ON = f"--rank 32 --alpha 64 --lr 4e-4 {MIX_ALL}"
# One student from teachers on equal terms against one model by GRPO on all rewards. 384 iterations of the mix
# see as many images as the teachers; the others take the seconds of distillation.
RIVALS = {
    "equal-compose": Recipe("compose teacher", "--iterations 320", preset="mini-compose"),
    "equal-text": Recipe("text teacher", TERMS, preset="mini-text"),
    "all-quality": Recipe("quality teacher, prompts of all tasks", QUALITY_OF_ALL, preset="mini-quality"),
    "mix-all": Mix("GRPO-mix, quality of all prompts", f"--iterations 550 {MIX_ALL}"),
    # In the seconds of "mix-all"; an iteration of stage nft takes more than three of GRPO's. At the teachers'
    # rate it falls apart.
    "nft-mix": Recipe(
        "NFT-mix, quality of all prompts",
        f"--iterations 140 --prompts-per-step 15 --lr 1e-3 {MIX_ALL}",
        preset="mini-nft-compose",
    ),
    "student": Recipe("**distilled, late anchor**", f"{LEARN} {LATE} {WATCHED}"),
    # Of the 166 iterations that "mix-all" has beyond its teachers' images, 50 steps take the seconds of 73.
    # The preset "mini-student-grpo" has these settings and another start.
    "rewarded": Mix(
        "**distilled for 50 steps, then that GRPO-mix**",
        f"--iterations 93 --cold-start {{of anchor-late}} {GO_ON}",
    ),
}
# What "rewarded" starts from.
STARTS = {
    "anchor-late": Recipe(
        "anchor .02 above noise level .6, 2 below",
        f"{LEARN} --anchor-weight 0.02 --anchor-levels 0.6=2 --watch-every 10 --watch-prompts 128",
    ),
}
# The field's open questions, each one setting beside "asked": folded, five of nine states trained on.
PAST = "--extrapolate compose=1.3 text=1.3 quality=1.3"
ASKED = f"{LEARN} --anchor-weight 0 --iterations 25"
QUESTIONS = {
    "asked": Recipe("**ours, with none of these changes**", ASKED),
    "from-base": Recipe("from the base", f"{ASKED} --cold-start base"),
    "from-sft": Recipe("from SFT on samples of seed 0's teachers", f"{ASKED} --cold-start {SFT_START}"),
    "unfolded": Recipe("teachers at guidance 1", f"{ASKED} --teacher-guidance 1"),
    "past": Recipe("targets past the teachers, l = 1.3", f"{ASKED} {PAST}"),
    "unfolded-past": Recipe("both: guidance 1, targets past them", f"{ASKED} --teacher-guidance 1 {PAST}"),
    "early": Recipe("states 1 to 3 (noise)", f"{ASKED} --queries 3 --query-range 0 3"),
    "middle": Recipe("states 4 to 6", f"{ASKED} --queries 3 --query-range 3 6"),
    "late": Recipe("states 7 to 9 (data)", f"{ASKED} --queries 3 --query-range 6 9"),
    "anywhere": Recipe("three states, drawn from all", f"{ASKED} --queries 3 --query-beta 1 1"),
    "every-state": Recipe("all nine states", f"{ASKED} --queries 0"),
    "kl": Recipe("weight kl", f"{ASKED} --weight kl"),
    "ode": Recipe("deterministic walks", f"{ASKED} --rollout ode"),
    "off-policy": Recipe("walks of the teachers", f"{ASKED} --walker teacher"),
    "soft": Recipe(
        "soft routing: .8 of the task's teacher, .1 of each other",
        f"{ASKED} --routes compose=0.8*compose+0.1*text+0.1*quality"
        " text=0.1*compose+0.8*text+0.1*quality quality=0.1*compose+0.1*text+0.8*quality",
    ),
    "by-reward": Recipe("routed by reward", f"{ASKED} --routing reward --train-rewards {OWN_REWARDS}"),
    "alternate": Recipe("one task per step", f"{ASKED} --alternate"),
    "pg": Recipe("estimator pg", f"{ASKED} --estimator pg"),
    "pg_state": Recipe("estimator pg_state", f"{ASKED} --estimator pg_state"),
    "pg_live": Recipe("estimator pg_live", f"{ASKED} --estimator pg_live"),
}
# The papers' settings, with as many forward passes of the student (225 to 220 states of 30 samples).
QUESTIONS |= {
    "flow-opd": Recipe("Flow-OPD's settings", f"{LEARN} --iterations 22", preset="mini-flow-opd"),
    "diffusion-opd": Recipe("DiffusionOPD's", f"{LEARN} --iterations 22", preset="mini-diffusion-opd"),
    "dance-opd": Recipe("DanceOPD's", f"{LEARN} --iterations 22", preset="mini-dance-opd"),
    "gfd-opd": Recipe("GFD-OPD's", f"{LEARN} --iterations 110", preset="mini-gfd-opd"),
}
# How soon a student of the shipped teachers is at their level: the first command, and as it was at 3230e61.
SPEED = {
    "default": Recipe("the first command", "--watch-every 10 --watch-prompts 256", preset="mini"),
    "large-steps": Recipe(
        "30 prompts a step on five states",
        "--prompts-per-step 30 --queries 5 --iterations 100 --mix compose=3 --ema 0 --anchor-weight 0.02"
        " --watch-every 5 --watch-prompts 256",
        preset="mini",
    ),
}
RECIPES = RIVALS | STARTS | QUESTIONS | SPEED
REFERENCES = {
    "base": Reference({"base": "base"}, "--adapters --guidance 1"),
    "guided": Reference(
        {
            "base": "base at guidance 2.5",
            "compose": "compose teacher at guidance 2.5",
            "text": "text teacher at guidance 2.5",
            "quality": "quality teacher at guidance 2.5",
        },
        "--guidance 2.5",
    ),
}
# Table -> its rows.
TABLES = {
    "short": ("base", "mix-all", "student"),
    "recipes": ("asked", "flow-opd", "diffusion-opd", "dance-opd", "gfd-opd"),
    "references": ("guided",),
    "questions": tuple(QUESTIONS),
    "rivals": ("base", *RIVALS, "default"),
    "levels": tuple(SPEED),
}
