"""The runs of the miniature's study, as data: `python -m opd.study` makes those that have no result."""

from dataclasses import dataclass

TASKS = ("compose", "text", "quality")
KINDS = {"compose": "jsonl", "text": "txt", "quality": "txt"}


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    title: str
    """What a table calls it."""
    flags: str = ""
    """On top of `train.py PRESET`."""
    needs: tuple[str, ...] = ()
    """Of PREPARED, in the order in which they are made."""
    tasks: tuple[str, ...] = TASKS
    """What is scored."""
    preset: str = "mini"


@dataclass(frozen=True)
class Reference:
    """Models that are scored as they are."""

    titles: dict[str, str]
    """Row of `opd.evaluate` -> what a table calls it."""
    flags: str
    """Of `opd.evaluate`."""
    needs: tuple[str, ...] = ()
    """Of PREPARED, in the order in which they are made."""
    tasks: tuple[str, ...] = TASKS
    """What is scored."""


SAMPLES = "runs/mini-samples/latents.safetensors"
SFT_START = "runs/mini-sft-start/student"
TEXT_DATA = "runs/mini-data/text/metadata.jsonl"
LARGE = "runs/mini-large/model_index.json"
FULL, LARGE_TEXT = "runs/mini-full-text/student", "runs/mini-large-text/student"
FULL_TEACHER, LARGE_TEACHER = "runs/mini-full-teacher", "runs/mini-large-teacher"
TUNE = (
    "train.py mini-sft-text --full --lr 5e-4 --iterations 120 --prompts-per-step 32 --micro-batch 32"
    " --sample-every 0"
)
BASE = "opd/mini/weights/base"
INSTALL = "-m opd.mini.build base"
# What some runs start or learn from -> the command that makes it, run in the repository's root.
PREPARED = {
    SAMPLES: "sample.py --save latents --count 128 --steps 10 --out runs/mini-samples",
    SFT_START: "train.py mini-sft-start --iterations 80 --sample-every 0",
    TEXT_DATA: f"-m opd.mini.build data runs/mini-data {BASE} text",
    FULL: f"{TUNE} --out runs/mini-full-text",
    FULL_TEACHER: f"{INSTALL} {BASE} {FULL} {FULL_TEACHER}",
    LARGE: f"-m opd.mini.build larger {BASE} runs/mini-large",
    LARGE_TEXT: f"{TUNE} --model runs/mini-large --out runs/mini-large-text",
    LARGE_TEACHER: f"{INSTALL} runs/mini-large {LARGE_TEXT} {LARGE_TEACHER}",
}
STARTS = (SAMPLES, SFT_START)
# Teachers on the mix's terms: its beta, and as many images of their task. The compose teacher that is shipped
# has them already. The quality teacher sees the prompts of every task, as the paper's anchor does.
EQUAL_TEXT, ALL_QUALITY = "runs/study/equal-text-0/student", "runs/study/all-quality-0/student"
PREPARED |= {
    EQUAL_TEXT: "-m opd.study --runs equal-text --seeds 0",
    ALL_QUALITY: "-m opd.study --runs all-quality --seeds 0",
}
EQUAL = (EQUAL_TEXT, ALL_QUALITY)
FROM_FULL = (TEXT_DATA, FULL)
FROM_LARGE = (TEXT_DATA, LARGE, LARGE_TEXT, LARGE_TEACHER)

PAST = "--extrapolate compose=1.3 text=1.3 quality=1.3"
# One teacher of one task, from the base, with the share of the way from base to teacher in the log.
ONE_TEACHER = (
    "--prompts text=opd/mini/prompts/text.train.txt --mix text=1 --cold-start base --teacher-guidance 1"
    " --prompts-per-step 20 --micro-batch 20"
)
TEXT_ONLY = f"{ONE_TEACHER} --iterations 25 --diagnose-every 25 --diagnose-prompts 32"
EVERY_STATE = f"{ONE_TEACHER} --iterations 100 --queries 0 --diagnose-every 50 --diagnose-prompts 32"
RECIPES = {
    "plain": Recipe("plain: at the teachers' own guidance 1", "--teacher-guidance 1"),
    "extrapolated": Recipe("targets past the teachers, l = 1.3", f"--teacher-guidance 1 {PAST}"),
    "folded": Recipe("**folded: teachers at guidance 2.5 (the default)**"),
    "both": Recipe("folded and l = 1.3", PAST),
    "base-10": Recipe("base, 10 steps", "--cold-start base --iterations 10"),
    "sft-10": Recipe("SFT start, 10 steps", f"--cold-start {SFT_START} --iterations 10", STARTS),
    "merge-10": Recipe("merged teachers, 10 steps", "--iterations 10"),
    "base-25": Recipe("base, 25 steps", "--cold-start base --iterations 25"),
    "sft-25": Recipe("SFT start, 25 steps", f"--cold-start {SFT_START} --iterations 25", STARTS),
    "merge-25": Recipe("merged teachers, 25 steps", "--iterations 25"),
    "full": Recipe(
        "student of the full teacher", f"{TEXT_ONLY} --teachers text={FULL}", FROM_FULL, ("text",)
    ),
    "large": Recipe(
        "student of the larger teacher", f"{TEXT_ONLY} --teachers text={LARGE_TEACHER}", FROM_LARGE, ("text",)
    ),
    "large-100": Recipe(
        "the same, 100 steps on all nine states",
        f"{EVERY_STATE} --teachers text={LARGE_TEACHER}",
        FROM_LARGE,
        ("text",),
    ),
}
SHORT = "--iterations 25"
# The field's open questions, each one setting beside "merge-25"; nine states are trained on there.
QUESTIONS = {
    "early": Recipe("states 1 to 3 (noise)", f"{SHORT} --queries 3 --query-range 0 3"),
    "middle": Recipe("states 4 to 6", f"{SHORT} --queries 3 --query-range 3 6"),
    "late": Recipe("states 7 to 9 (data)", f"{SHORT} --queries 3 --query-range 6 9"),
    "anywhere": Recipe("three states, drawn from all", f"{SHORT} --queries 3 --query-beta 1 1"),
    "kl": Recipe("weight kl", f"{SHORT} --weight kl"),
    "ode": Recipe("deterministic walks", f"{SHORT} --rollout ode"),
    "soft": Recipe(
        "soft routing: .8 of the task's teacher, .1 of each other",
        f"{SHORT} --routes compose=0.8*compose+0.1*text+0.1*quality"
        " text=0.1*compose+0.8*text+0.1*quality quality=0.1*compose+0.1*text+0.8*quality",
    ),
    "alternate": Recipe("one task per step", f"{SHORT} --alternate"),
    "pg": Recipe("estimator pg", f"{SHORT} --estimator pg"),
    "pg_live": Recipe("estimator pg_live", f"{SHORT} --estimator pg_live"),
}
RECIPES |= QUESTIONS
PROMPTS = " ".join(f"{task}=opd/mini/prompts/{task}.train.{kind}" for task, kind in KINDS.items())
REWARDED = " ".join(f"{task}=opd.mini.rewards:quality" for task in TASKS)
TERMS = "--beta 0.002 --iterations 80"
ALL_TEACHERS = (
    f"--teachers compose=opd/mini/weights/compose text={EQUAL_TEXT} quality={ALL_QUALITY} --anchor quality"
)
# One student from teachers on equal terms against one model by GRPO on all rewards.
RIVALS = {
    "equal-text": Recipe("text teacher", TERMS, preset="mini-text"),
    "all-quality": Recipe(
        "quality teacher, prompts of all tasks",
        f"{TERMS} --lr 2e-3 --prompts {PROMPTS} --train-rewards {REWARDED}",
        preset="mini-quality",
    ),
    "mix": Recipe("GRPO-mix", preset="mini-grpo-mix"),
    "anchor-0": Recipe("distilled, no anchor", f"{ALL_TEACHERS} --anchor-weight 0", EQUAL),
}
# The anchor (MAR): a weight for all noise levels, one for the low ones, one that holds a target.
ANCHORS = {
    "anchor-0.02": Recipe("anchor .02", f"{ALL_TEACHERS} --anchor-weight 0.02", EQUAL),
    "anchor-0.1": Recipe("anchor .1", f"{ALL_TEACHERS} --anchor-weight 0.1", EQUAL),
    "anchor-0.5": Recipe("anchor .5", f"{ALL_TEACHERS} --anchor-weight 0.5", EQUAL),
    "anchor-2": Recipe("anchor 2", f"{ALL_TEACHERS} --anchor-weight 2", EQUAL),
    "anchor-late": Recipe(
        "anchor .02 above noise level .6, 2 below",
        f"{ALL_TEACHERS} --anchor-weight 0.02 --anchor-levels 0.6=2",
        EQUAL,
    ),
}
RECIPES |= RIVALS | ANCHORS
REFERENCES = {
    "shipped": Reference(
        {
            "base": "base",
            "compose": "compose teacher",
            "text": "text teacher",
            "quality": "quality teacher",
        },
        "--guidance 1",
    ),
    "shipped-guided": Reference(
        {
            "base": "base at guidance 2.5",
            "compose": "compose teacher at guidance 2.5",
            "text": "text teacher at guidance 2.5",
            "quality": "quality teacher at guidance 2.5",
        },
        "--guidance 2.5",
    ),
    "sft-start": Reference(
        {"start": "SFT start, 0 steps"}, f"--adapters start={SFT_START} --guidance 1", STARTS
    ),
    "full-teacher": Reference(
        {"base": "full teacher: every weight of the base fine-tuned"},
        f"--model {FULL_TEACHER} --adapters --guidance 1",
        (*FROM_FULL, FULL_TEACHER),
        ("text",),
    ),
    "large-teacher": Reference(
        {"base": "larger teacher: 6 blocks, text encoders of its own"},
        f"--model {LARGE_TEACHER} --adapters --guidance 1",
        FROM_LARGE,
        ("text",),
    ),
}
# Table -> its rows.
TABLES = {
    "recipes": ("plain", "extrapolated", "folded", "both"),
    "references": ("shipped", "shipped-guided"),
    "starts": ("sft-start", "base-10", "sft-10", "merge-10", "base-25", "sft-25", "merge-25"),
    "other teachers": ("full-teacher", "full", "large-teacher", "large", "large-100"),
    "questions": ("merge-25", *QUESTIONS),
    "rivals": ("shipped", *RIVALS, "anchor-late"),
    "anchors": ("anchor-0", *ANCHORS),
}
# Those that score the quality of every task's pictures.
EVERYWHERE = ("rivals", "anchors")
