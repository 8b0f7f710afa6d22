"""Named runs, a table: `train.py PRESET --field value` starts from one of them and overrides single settings.

Sources that start with opd/ lie in this package (`opd.files.resolve`).
"""

from dataclasses import replace

from opd.config import DistillationConfig, GRPOConfig, RunConfig, SFTConfig

MINI = "opd/mini/weights/base"
MINI_TEACHERS = {
    "compose": "opd/mini/weights/compose",
    "text": "opd/mini/weights/text",
    "quality": "opd/mini/weights/quality",
}
MINI_PROMPTS = {
    "compose": "opd/mini/prompts/compose.train.jsonl",
    "text": "opd/mini/prompts/text.train.txt",
    "quality": "opd/mini/prompts/quality.train.txt",
}
MINI_HELDOUT = {
    "compose": "opd/mini/prompts/compose.test.jsonl",
    "text": "opd/mini/prompts/text.test.txt",
    "quality": "opd/mini/prompts/quality.test.txt",
}
MINI_REWARDS = {
    "compose": "opd.mini.rewards:compose",
    "text": "opd.mini.rewards:text",
    "quality": "opd.mini.rewards:quality",
}
# GRPO is rewarded for parts of a composition; scores count whole ones.
MINI_SCORERS = MINI_REWARDS | {"compose": "opd.mini.rewards:compose_strict"}

# One early state is trained at a time, since early states decide the composition; groups share their start,
# so that this state is computed once for all of a group, and rewards differ by the noise of its one step. Six
# steps are enough to roll out.
GROW = GRPOConfig(
    model=MINI,
    heldout=MINI_HELDOUT,
    rewards=MINI_SCORERS,
    prompts_per_step=12,
    group=8,
    micro_batch=48,
    beta=0.002,
    steps=6,
    window=1,
    window_range=(0, 3),
    shared_start=True,
    ema=0.9,
    save_every=50,
    sample_every=30,
    watch_every=60,
    watch_prompts=128,
)


def grow(task: str, lr: float, iterations: int) -> GRPOConfig:
    """The miniature's teacher of one task."""
    return replace(
        GROW,
        out=f"runs/mini-{task}",
        prompts={task: MINI_PROMPTS[task]},
        train_rewards={task: MINI_REWARDS[task]},
        lr=lr,
        iterations=iterations,
    )


FINETUNE = SFTConfig(
    model=MINI,
    prompts_per_step=64,
    micro_batch=64,
    warmup=20,
    save_every=200,
    sample_every=200,
)
PRETRAIN = replace(FINETUNE, full=True, lr=1e-3, weight_decay=0.01)


def finetune(task: str, iterations: int) -> SFTConfig:
    """The miniature's base, fine-tuned on pictures of one task."""
    data, out = f"runs/mini-data/{task}", f"runs/mini-sft-{task}"
    return replace(FINETUNE, data=data, out=out, iterations=iterations, ema=0.99)


SD35 = "stabilityai/stable-diffusion-3.5-medium"
SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
SD35_TEACHERS = {
    "geneval": "jieliu/SD3.5M-FlowGRPO-GenEval",
    "ocr": "jieliu/SD3.5M-FlowGRPO-Text",
    "pickscore": "jieliu/SD3.5M-FlowGRPO-PickScore",
    "deqa": "CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix",
}
# As Flow-GRPO ships them: the folder `dataset` of its repository.
SD35_PROMPTS = {
    "geneval": "dataset/geneval/train_metadata.jsonl",
    "ocr": "dataset/ocr/train.txt",
    "pickscore": "dataset/pickscore/train.txt",
}

# Distillation in the miniature as the paper has it; 3:1:1 is its mix. The default, "mini", weighs states
# alike: kl weighs the high-noise states, which decide the composition, hundreds of times less than the last
# ones, and a hundred steps are too few to wait for them (opd/mini/study/RESULTS.md, "Open questions").
MINI_OPD = DistillationConfig(
    out="runs/mini-flow-opd",
    model=MINI,
    teachers=MINI_TEACHERS,
    prompts=MINI_PROMPTS,
    heldout=MINI_HELDOUT,
    rewards=MINI_SCORERS,
    anchor="quality",
    rank=32,
    alpha=64.0,
    lr=3e-3,
    mix={"compose": 3},
    prompts_per_step=30,
    micro_batch=30,
    iterations=80,
    save_every=40,
    eval_prompts=64,
)
# The paper's: SDE with a = 0.7 and T = 10, every state, KL weights, 3:1:1, a start merged from the tasks'
# teachers, lambda 0.02 of the quality teacher that saw the prompts of all tasks, 512 px, guidance 4.5, LoRA
# 32/64, 40 evaluation steps.
# Not the paper's: all tasks in every step, loss by the mean over dimensions, one forward pass (README, "Where
# we differ"); 160 samples a step, for few GPUs.
SD35_OPD = DistillationConfig(
    out="runs/sd35-flow-opd",
    model=SD35,
    resolution="512",
    rank=32,
    alpha=64.0,
    teachers=SD35_TEACHERS,
    prompts=SD35_PROMPTS,
    mix={"geneval": 3, "ocr": 1, "pickscore": 1},
    anchor="deqa",
    guidance=4.5,
    teacher_guidance=4.5,
    prompts_per_step=40,
    group=4,
    micro_batch=8,
    iterations=1000,
    lr=1e-4,
    warmup=10,
    decay="constant",
    evaluate=False,
    eval_steps=40,
    save_every=25,
    sample_every=25,
)


def base_without_teachers(family: str, model: str, guidance: float, eval_steps: int) -> DistillationConfig:
    """Another family's base, sampled as its pipeline's defaults say. Nobody has published teachers for these:
    give --teachers and --prompts, and an --anchor with its --anchor-weight if there is one."""
    return DistillationConfig(
        out=f"runs/{family}",
        model=model,
        resolution="1024",
        rank=32,
        alpha=64.0,
        cold_start="base",
        anchor_weight=0.0,
        guidance=guidance,
        teacher_guidance=guidance,
        prompts_per_step=40,
        group=4,
        micro_batch=1,
        iterations=1000,
        lr=1e-4,
        warmup=10,
        decay="constant",
        checkpointing=True,
        evaluate=False,
        eval_steps=eval_steps,
        save_every=25,
        sample_every=25,
    )


def diffusion_opd(base: DistillationConfig, out: str) -> DistillationConfig:
    """DiffusionOPD (arXiv 2605.15055): deterministic walks, half the squared distance of their steps, from
    the base, without an anchor."""
    return replace(base, out=out, rollout="ode", weight="ode_kl", cold_start="base", anchor_weight=0.0)


def dance_opd(base: DistillationConfig, out: str) -> DistillationConfig:
    """DanceOPD (arXiv 2606.27377): one state per trajectory, mostly towards the data, all weighed alike."""
    walk = replace(base, out=out, rollout="ode", weight="uniform", queries=1, query_beta=(5.0, 2.0))
    return replace(walk, cold_start="base", anchor_weight=0.0)


def gfd_opd(base: DistillationConfig, out: str, teacher_guidance: float) -> DistillationConfig:
    """GFD-OPD (arXiv 2609.39692): the student without guidance learns the guided velocity of targets that lie
    past the teachers, at two states of ten. Which two is our choice: the first, which decide composition."""
    past = dict.fromkeys(base.teachers, 1.25)
    folded = replace(base, out=out, guidance=1.0, teacher_guidance=teacher_guidance, extrapolate=past)
    return replace(folded, query_range=(0, 2), cold_start="base", anchor_weight=0.0)


SD35_REWARDS = {"geneval": "geneval_dense", "ocr": "ocr", "pickscore": "pickscore"}
SD35_QUALITY = "0.0308*pickscore+0.04*deqa@http://localhost:8000"

# Flow-GRPO's numbers. A rollout of 1,152 pictures is read by the OCR reward in some minutes on one core.
SD35_GROW = GRPOConfig(
    model=SD35,
    resolution="512",
    rank=32,
    alpha=64.0,
    prompts_per_step=48,
    group=24,
    micro_batch=8,
    steps=10,
    eval_steps=40,
    skip_last=True,
    guidance=4.5,
    updates=2,
    clip_range=1e-4,
    lr=3e-4,
    warmup=0,
    decay="constant",
    ema=0.9,
    ema_every=8,
    iterations=2000,
    checkpointing=True,
    evaluate=False,
    save_every=25,
    sample_every=25,
    reward_timeout=900.0,
)


def grow_sd35(task: str, beta: float) -> GRPOConfig:
    """SD3.5's teacher of one task."""
    return replace(
        SD35_GROW,
        out=f"runs/sd35-grpo-{task}",
        prompts={task: SD35_PROMPTS[task]},
        train_rewards={task: SD35_REWARDS[task]},
        beta=beta,
    )


# Guidance folded into the student, states weighed alike, five of them per trajectory, no anchor.
MINI_FOLD = replace(
    MINI_OPD,
    out="runs/mini-fold",
    teacher_guidance=2.5,
    anchor_weight=0.0,
    weight="uniform",
    queries=5,
    query_beta=(1.0, 1.5),
    skip_last=True,
    iterations=50,
    save_every=25,
)

MINI_MIX = replace(
    GROW,
    out="runs/mini-grpo-mix",
    prompts=MINI_PROMPTS,
    train_rewards=MINI_REWARDS,
    mix={"compose": 3},
    prompts_per_step=15,
    lr=2e-3,
    iterations=550,
)
LOOKED_AT = dict.fromkeys(("shapes", "signs"), MINI_REWARDS["quality"])

PRESETS: dict[str, RunConfig] = {
    # The recipe that does best here: that, with an anchor that leaves the composition alone.
    "mini": replace(
        MINI_FOLD, out="runs/mini", anchor_weight=0.02, anchor_levels={"0.6": 3.0}, iterations=100
    ),
    "mini-fold": MINI_FOLD,
    "mini-flow-opd": MINI_OPD,
    "mini-diffusion-opd": diffusion_opd(MINI_OPD, "runs/mini-diffusion-opd"),
    "mini-dance-opd": dance_opd(MINI_OPD, "runs/mini-dance-opd"),
    "mini-gfd-opd": gfd_opd(MINI_OPD, "runs/mini-gfd-opd", teacher_guidance=2.5),
    "mini-base": replace(
        PRETRAIN,
        out="runs/mini-base",
        model="runs/mini-pipeline",
        data="runs/mini-data/base",
        iterations=8700,
        warmup=200,
        ema=0.999,
        save_every=500,
        sample_every=500,
    ),
    # 64 px signs and the real OCR reward (opd/mini/signs.py).
    "mini-ocr-base": replace(
        PRETRAIN,
        out="runs/mini-ocr-base",
        model="runs/mini-signs/pipeline",
        data="runs/mini-signs/data",
        iterations=2000,
        prompts_per_step=32,
        micro_batch=32,
        lr=1.5e-3,
        warmup=100,
        ema=0.99,
    ),
    "mini-ocr": replace(
        grow("text", lr=4e-3, iterations=100),
        out="runs/mini-ocr",
        model="runs/mini-signs/base",
        prompts={"text": "runs/mini-signs/train.txt"},
        heldout={"text": "runs/mini-signs/test.txt"},
        train_rewards={"text": "ocr"},
        rewards={"text": "ocr"},
        window_range=(0, 2),
    ),
    "mini-compose": grow("compose", lr=1.3e-3, iterations=320),
    "mini-text": grow("text", lr=2e-3, iterations=80),
    # The anchor's teacher sees the prompts of all tasks, so that it has something to say about each.
    "mini-quality": replace(
        grow("quality", lr=2e-3, iterations=80),
        prompts=MINI_PROMPTS,
        train_rewards=dict.fromkeys(MINI_PROMPTS, MINI_REWARDS["quality"]),
    ),
    "mini-grpo-mix": MINI_MIX,
    # The default run's student goes on by GRPO, at a fifth of the mix's learning rate, which else undoes what
    # is there. It sees shapes and signs a second time, for their quality.
    "mini-student-grpo": replace(
        MINI_MIX,
        out="runs/mini-student-grpo",
        cold_start="runs/mini/student",
        rank=32,
        alpha=64.0,
        lr=4e-4,
        iterations=93,
        prompts=MINI_PROMPTS | {"shapes": MINI_PROMPTS["compose"], "signs": MINI_PROMPTS["text"]},
        train_rewards=MINI_REWARDS | LOOKED_AT,
        rewards=MINI_SCORERS | LOOKED_AT,
        mix={"compose": 9, "text": 3},
    ),
    # An SFT start for "mini": python sample.py --save latents --out runs/mini-samples makes its data.
    "mini-sft-start": replace(
        FINETUNE, data="runs/mini-samples", out="runs/mini-sft-start", rank=32, alpha=64.0, iterations=200
    ),
    "mini-sft-compose": finetune("compose", iterations=1200),
    "mini-sft-text": finetune("text", iterations=500),
    "mini-sft-quality": finetune("quality", iterations=500),
    "sd35": replace(SD35_OPD, out="runs/sd35"),
    # One GPU of 24 GB: the four adapters share the base, samples go through in pairs, and activations are
    # computed again where an 80 GB card keeps them (a fifth of a step).
    "sd35-24gb": replace(SD35_OPD, out="runs/sd35-24gb", micro_batch=2, checkpointing=True),
    "sd35-flow-opd": SD35_OPD,
    "sd35-diffusion-opd": diffusion_opd(SD35_OPD, "runs/sd35-diffusion-opd"),
    "sd35-dance-opd": dance_opd(SD35_OPD, "runs/sd35-dance-opd"),
    # The paper deploys the folded student at guidance 2.
    "sd35-gfd-opd": replace(
        gfd_opd(SD35_OPD, "runs/sd35-gfd-opd", teacher_guidance=4.5), deploy_guidance=2.0
    ),
    # What does best in the miniature, for GFD-OPD's number of trained states: guidance folded, states weighed
    # alike, two of them per trajectory, more of them early.
    "sd35-fold": replace(
        SD35_OPD,
        out="runs/sd35-fold",
        guidance=1.0,
        weight="uniform",
        queries=2,
        query_beta=(1.0, 1.5),
        skip_last=True,
    ),
    # A larger transformer with encoders of its own teaches on the same latents, each guided as its card says.
    # It is 16 GB in bfloat16: --teacher-devices large=offload where that does not fit beside the student.
    "sd35-large-to-medium": replace(
        SD35_OPD,
        out="runs/sd35-large-to-medium",
        teachers={"large": SD35_LARGE},
        routes=dict.fromkeys(SD35_PROMPTS, "large"),
        teacher_guidance=3.5,
        cold_start="base",
        anchor="",
        anchor_weight=0.0,
        micro_batch=2,
        checkpointing=True,
    ),
    "flux": base_without_teachers("flux", "black-forest-labs/FLUX.1-dev", 3.5, 28),
    "flux2": base_without_teachers("flux2", "black-forest-labs/FLUX.2-klein-base-4B", 4.0, 50),
    "qwen_image": base_without_teachers("qwen_image", "Qwen/Qwen-Image", 4.0, 50),
    # 5 of the pipeline's guidance_scale is 6 here (opd/families/z_image.py).
    "z_image": base_without_teachers("z_image", "Tongyi-MAI/Z-Image", 6.0, 50),
    "sd35-grpo-geneval": grow_sd35("geneval", beta=0.04),
    "sd35-grpo-ocr": grow_sd35("ocr", beta=0.04),
    "sd35-grpo-pickscore": grow_sd35("pickscore", beta=0.01),
    # The anchor's teacher: it sees the prompts of all tasks, so that it has something to say about each. The
    # blend is the one of the released code's mix, .8 PickScore / 26 + .2 DeQA / 5.
    "sd35-grpo-quality": replace(
        SD35_GROW,
        out="runs/sd35-grpo-quality",
        prompts=SD35_PROMPTS,
        train_rewards=dict.fromkeys(SD35_PROMPTS, SD35_QUALITY),
        beta=0.01,
    ),
    # The baseline: one model, a task per step, each task with its own reward. (The released code takes .8 of
    # each and adds .2 DeQA / 5.)
    "sd35-grpo-mix": replace(
        SD35_GROW,
        out="runs/sd35-grpo-mix",
        prompts=SD35_PROMPTS,
        train_rewards=SD35_REWARDS,
        mix={"geneval": 3, "ocr": 1, "pickscore": 1},
        alternate=True,
        beta=0.04,
        lr=1e-4,
    ),
}

DEFAULT = PRESETS["mini"]
