"""The runs of the miniature's study, as data: `python -m opd.mini.study` makes those that have no result."""

from dataclasses import dataclass

TASKS = ("compose", "text", "quality")
KINDS = {"compose": "jsonl", "text": "txt", "quality": "txt"}


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    title: str
    """What a table calls it."""
    flags: str = ""
    """On top of `train.py PRESET`. {of NAME} is the student of another recipe with this run's seed."""
    needs: tuple[str, ...] = ()
    """Of PREPARED, or recipes (of the same seed), in the order in which they are made."""
    tasks: tuple[str, ...] = TASKS
    """What is scored."""
    preset: str = "mini-fold"


@dataclass(frozen=True)
class Reference:
    """Models that are scored as they are."""

    titles: dict[str, str]
    """Row of `opd.evaluation` -> what a table calls it."""
    flags: str
    """Of `opd.evaluation`."""
    needs: tuple[str, ...] = ()
    """Of PREPARED, in the order in which they are made."""
    tasks: tuple[str, ...] = TASKS
    """What is scored."""


SAMPLES = "runs/mini-samples/latents.safetensors"
SFT_START = "runs/mini-sft-start/student"
TEXT_DATA = "runs/mini-data/text/metadata.jsonl"
FULL, FULL_TEACHER = "runs/mini-full-text/student", "runs/mini-full-teacher"
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
}
STARTS = (SAMPLES, SFT_START)
# Teachers on the mix's terms, one set per seed: its beta, and no more images in all. The quality teacher sees
# the prompts of every task, as the paper's anchor does.
EQUAL = {"compose": "equal-compose", "text": "equal-text", "quality": "all-quality"}
TEACHERS = tuple(EQUAL.values())
FROM_FULL = (TEXT_DATA, FULL)

# One teacher of one task, from the base, with the share of the way from base to teacher in the log.
ONE_TEACHER = (
    "--prompts text=opd/mini/prompts/text.train.txt --mix text=1 --cold-start base --teacher-guidance 1"
    " --prompts-per-step 20 --micro-batch 20"
)
TEXT_ONLY = f"{ONE_TEACHER} --iterations 25 --diagnose-every 25 --diagnose-prompts 32"
# Teachers of other kinds.
OTHERS = {
    "full": Recipe(
        "student of the full teacher", f"{TEXT_ONLY} --teachers text={FULL}", FROM_FULL, ("text",)
    ),
}
PROMPTS = " ".join(f"{task}=opd/mini/prompts/{task}.train.{kind}" for task, kind in KINDS.items())
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
# The same from the merged teachers, as long as "mix-all" in all, the teachers included.
MERGE_MIX = f"--iterations 166 --cold-start merge --merge-from{LEARNED} {GO_ON}"
LEARN_FROM_MIX = "--teachers" + "".join(f" {task}={{of mix-all}}" for task in TASKS) + " --anchor-weight 0"
# One student from teachers on equal terms against one model by GRPO on all rewards. 384 iterations of the mix
# see as many images as the teachers; the others take the seconds of distillation.
RIVALS = {
    "equal-compose": Recipe("compose teacher", "--iterations 320", preset="mini-compose"),
    "equal-text": Recipe("text teacher", TERMS, preset="mini-text"),
    "all-quality": Recipe("quality teacher, prompts of all tasks", QUALITY_OF_ALL, preset="mini-quality"),
    "stacked": Recipe(
        "rewards stacked: compose, then text, then quality",
        f"{QUALITY_OF_ALL} --cold-start {{of stacked-text}}",
        ("stacked-text",),
        preset="mini-quality",
    ),
    "mix": Recipe("GRPO-mix", "--iterations 550", preset="mini-grpo-mix"),
    "mix-all": Recipe(
        "GRPO-mix, quality of all prompts", f"--iterations 550 {MIX_ALL}", preset="mini-grpo-mix"
    ),
    "mix-folded": Recipe("the latter, folded into itself", LEARN_FROM_MIX, ("mix-all",)),
    "student": Recipe("**distilled, late anchor**", f"{LEARN} {LATE} {WATCHED}", TEACHERS),
    # Of the 166 iterations that "mix-all" has beyond its teachers' images, 50 steps take the seconds of 73.
    "rewarded": Recipe(
        "**distilled for 50 steps, then that GRPO-mix**",
        f"--iterations 93 --cold-start {{of anchor-late}} {GO_ON}",
        ("anchor-late",),
        preset="mini-grpo-mix",
    ),
}
# Other ways to one model, and what the KL term does for a teacher.
CONTROLS = {
    "free-student": Recipe("distilled, no anchor", f"{LEARN} --anchor-weight 0 --iterations 100", TEACHERS),
    "plain-student": Recipe(
        "distilled, late anchor, nothing folded", f"{LEARN} {LATE} --teacher-guidance 1", TEACHERS
    ),
    "stacked-text": Recipe(
        "compose, then text",
        f"{TERMS} --cold-start {{of equal-compose}}",
        ("equal-compose",),
        preset="mini-text",
    ),
    # One step that moves nothing: the start of the students.
    "merged": Recipe("teachers merged, no training", f"{LEARN} --iterations 1 --lr 1e-9", TEACHERS),
    "merge-mix": Recipe(
        "teachers merged, then GRPO-mix, quality of all prompts",
        MERGE_MIX,
        TEACHERS,
        preset="mini-grpo-mix",
    ),
    "merge-mix-faster": Recipe(
        "the same at twice that learning rate",
        f"{MERGE_MIX} --lr 8e-4",
        TEACHERS,
        preset="mini-grpo-mix",
    ),
    "merge-mix-fast": Recipe(
        "the same at the mix's own learning rate",
        f"{MERGE_MIX} --lr 2e-3",
        TEACHERS,
        preset="mini-grpo-mix",
    ),
    "sft-mix": Recipe(
        "SFT on samples of seed 0's teachers, then that GRPO-mix",
        f"--iterations 166 --cold-start {SFT_START} {GO_ON}",
        STARTS,
        preset="mini-grpo-mix",
    ),
    "rewarded-fast": Recipe(
        "distilled for 50 steps, then that GRPO-mix at its own learning rate",
        f"--iterations 93 --cold-start {{of anchor-late}} --rank 32 --alpha 64 {MIX_ALL}",
        ("anchor-late",),
        preset="mini-grpo-mix",
    ),
    # The preset "mini-student-grpo".
    "student-mix": Recipe(
        "distilled for 100 steps, then that GRPO-mix",
        f"--iterations 93 --cold-start {{of student}} {GO_ON}",
        ("student",),
        preset="mini-grpo-mix",
    ),
    "short-mix": Recipe("GRPO-mix, 450 iterations", "--iterations 450", preset="mini-grpo-mix"),
    "free-compose": Recipe("compose teacher, no KL", "--iterations 320 --beta 0", preset="mini-compose"),
    "free-text": Recipe("text teacher, no KL", f"{TERMS} --beta 0", preset="mini-text"),
    "free-quality": Recipe("quality teacher, no KL", f"{QUALITY_OF_ALL} --beta 0", preset="mini-quality"),
}
# The anchor (MAR): a weight for all noise levels, one for the low ones, one that holds a target.
ANCHORS = {
    "anchor-0": Recipe("no anchor", f"{LEARN} --anchor-weight 0", TEACHERS),
    "anchor-0.02": Recipe("anchor .02", f"{LEARN} --anchor-weight 0.02", TEACHERS),
    "anchor-0.1": Recipe("anchor .1", f"{LEARN} --anchor-weight 0.1", TEACHERS),
    "anchor-0.5": Recipe("anchor .5", f"{LEARN} --anchor-weight 0.5", TEACHERS),
    "anchor-2": Recipe("anchor 2", f"{LEARN} --anchor-weight 2", TEACHERS),
    "anchor-held": Recipe(
        "anchor's loss held at .8", f"{LEARN} --anchor-weight 0.1 --anchor-target 0.8", TEACHERS
    ),
    "anchor-late-4": Recipe(
        "anchor .02 above noise level .6, 4 below",
        f"{LEARN} --anchor-weight 0.02 --anchor-levels 0.6=4",
        TEACHERS,
    ),
    "anchor-late-3x80": Recipe(
        "anchor .02, 3 below .6; 80 steps of three states",
        f"{LEARN} --anchor-weight 0.02 --anchor-levels 0.6=3 --queries 3 --iterations 80",
        TEACHERS,
    ),
    "anchor-earlier": Recipe(
        "anchor .02 above noise level .7, 2 below",
        f"{LEARN} --anchor-weight 0.02 --anchor-levels 0.7=2",
        TEACHERS,
    ),
    "anchor-late": Recipe(
        "anchor .02 above noise level .6, 2 below",
        f"{LEARN} --anchor-weight 0.02 --anchor-levels 0.6=2 --watch-every 10 --watch-prompts 128",
        TEACHERS,
    ),
}
# The field's open questions, each one setting beside "asked": folded, five of nine states trained on.
PAST = "--extrapolate compose=1.3 text=1.3 quality=1.3"
ASKED = f"{LEARN} --anchor-weight 0 --iterations 25"
QUESTIONS = {
    "asked": Recipe("**as asked: none of the below**", ASKED, TEACHERS),
    "from-base": Recipe("from the base", f"{ASKED} --cold-start base", TEACHERS),
    "from-sft": Recipe(
        "from SFT on samples of seed 0's teachers", f"{ASKED} --cold-start {SFT_START}", (*STARTS, *TEACHERS)
    ),
    "unfolded": Recipe("teachers at guidance 1", f"{ASKED} --teacher-guidance 1", TEACHERS),
    "past": Recipe("targets past the teachers, l = 1.3", f"{ASKED} {PAST}", TEACHERS),
    "unfolded-past": Recipe(
        "both: guidance 1, targets past them", f"{ASKED} --teacher-guidance 1 {PAST}", TEACHERS
    ),
    "early": Recipe("states 1 to 3 (noise)", f"{ASKED} --queries 3 --query-range 0 3", TEACHERS),
    "middle": Recipe("states 4 to 6", f"{ASKED} --queries 3 --query-range 3 6", TEACHERS),
    "late": Recipe("states 7 to 9 (data)", f"{ASKED} --queries 3 --query-range 6 9", TEACHERS),
    "anywhere": Recipe("three states, drawn from all", f"{ASKED} --queries 3 --query-beta 1 1", TEACHERS),
    "every-state": Recipe("all nine states", f"{ASKED} --queries 0", TEACHERS),
    "kl": Recipe("weight kl", f"{ASKED} --weight kl", TEACHERS),
    "ode": Recipe("deterministic walks", f"{ASKED} --rollout ode", TEACHERS),
    "off-policy": Recipe("walks of the teachers", f"{ASKED} --walker teacher", TEACHERS),
    "soft": Recipe(
        "soft routing: .8 of the task's teacher, .1 of each other",
        f"{ASKED} --routes compose=0.8*compose+0.1*text+0.1*quality"
        " text=0.1*compose+0.8*text+0.1*quality quality=0.1*compose+0.1*text+0.8*quality",
        TEACHERS,
    ),
    "by-reward": Recipe(
        "routed by reward", f"{ASKED} --routing reward --train-rewards {OWN_REWARDS}", TEACHERS
    ),
    "alternate": Recipe("one task per step", f"{ASKED} --alternate", TEACHERS),
    "pg": Recipe("estimator pg", f"{ASKED} --estimator pg", TEACHERS),
    "pg_state": Recipe("estimator pg_state", f"{ASKED} --estimator pg_state", TEACHERS),
    "pg_live": Recipe("estimator pg_live", f"{ASKED} --estimator pg_live", TEACHERS),
}
# The papers' settings, with as many forward passes of the student (225 to 220 states of 30 samples).
QUESTIONS |= {
    "flow-opd": Recipe("Flow-OPD's settings", f"{LEARN} --iterations 22", TEACHERS, preset="mini-flow-opd"),
    "diffusion-opd": Recipe(
        "DiffusionOPD's", f"{LEARN} --iterations 22", TEACHERS, preset="mini-diffusion-opd"
    ),
    "dance-opd": Recipe("DanceOPD's", f"{LEARN} --iterations 22", TEACHERS, preset="mini-dance-opd"),
    "gfd-opd": Recipe("GFD-OPD's", f"{LEARN} --iterations 110", TEACHERS, preset="mini-gfd-opd"),
}
RECIPES = OTHERS | RIVALS | CONTROLS | ANCHORS | QUESTIONS
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
    "sft-start": Reference(
        {"start": "SFT start, 0 steps"}, f"--adapters start={SFT_START} --guidance 1", STARTS
    ),
    "full-teacher": Reference(
        {"base": "full teacher: every weight of the base fine-tuned"},
        f"--model {FULL_TEACHER} --adapters --guidance 1",
        (*FROM_FULL, FULL_TEACHER),
        ("text",),
    ),
}
# Table -> its rows.
TABLES = {
    "references": ("guided", "sft-start"),
    "other teachers": ("full-teacher", "full"),
    "questions": tuple(QUESTIONS),
    "rivals": ("base", *RIVALS),
    "pace": (*TEACHERS, "mix-all"),
    "level": ("student", "rewarded", "mix", "mix-all"),
    "controls": ("mix", *CONTROLS),
    "anchors": tuple(ANCHORS),
}
