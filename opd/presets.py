"""Named runs, a table: `train.py PRESET --field value` starts from one of them, in the folder runs/PRESET.

The miniature's, which come first, are in opd/mini/presets.py.
"""

from dataclasses import replace

from opd.config import DistillationConfig, GRPOConfig, NFTConfig, RunConfig
from opd.mini.presets import MADE_BY, MINI_PRESETS

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
# What a start without them says.
FETCH = "copying the folder dataset of https://github.com/yifan123/flow_grpo here"
MADE_BY |= dict.fromkeys(SD35_PROMPTS.values(), FETCH)
SD35_REWARDS = {"geneval": "geneval_dense", "ocr": "ocr", "pickscore": "pickscore"}
# The blend of the released code's mix, .8 PickScore / 26 + .2 DeQA / 5; the paper has .6 and .4.
SD35_QUALITY = "0.0308*pickscore+0.04*deqa@http://localhost:8000"

# ---- blocks that presets share -----------------------------------------------------------------------------

STUDENT = {"rank": 32, "alpha": 64.0}
REAL = {**STUDENT, "decay": "constant", "evaluate": False}
REAL_OPD = {**REAL, "iterations": 1000, "lr": 1e-4, "warmup": 10}
EVERY_25 = {"save_every": 25, "sample_every": 25}
# 160 samples a step, not the number of the paper, for few GPUs.
LARGE_STEPS = {"prompts_per_step": 40, "group": 4, **EVERY_25}
FROM_BASE = {"cold_start": "base", "anchor_weight": 0.0}
# Many small updates instead: two states a trajectory, of all noise levels and weighed alike. In the miniature
# they come near the teachers' level in less than half the time and end a little lower ("How soon" of
# opd/mini/study/RESULTS.md); at full size they are not measured. Ten prompts are one micro-batch that fills a
# GPU.
SMALL_STEPS = {"weight": "uniform", "queries": 2, "query_beta": (1.0, 1.5), "skip_last": True}
SMALL_STEPS |= {"prompts_per_step": 10, "group": 1, "save_every": 100, "sample_every": 100}
SD35 = {"model": "stabilityai/stable-diffusion-3.5-medium", "resolution": "512", "eval_steps": 40}
SD35_MIX = {"geneval": 3, "ocr": 1, "pickscore": 1}
SD35_OPD = {**SD35, **REAL_OPD, "prompts": SD35_PROMPTS, "mix": SD35_MIX}
SD35_TAUGHT = {"teachers": SD35_TEACHERS, "anchor": "deqa"}
# The paper's: SDE with a = 0.7 and T = 10, every state, KL weights, 3:1:1, a start merged from the tasks'
# teachers, lambda 0.02 of the quality teacher that saw the prompts of all tasks, 512 px, guidance 4.5, LoRA
# 32/64, 40 evaluation steps.
# Not the paper's: all tasks in every step, the last state trained on (43 to 48 % of the loss), loss by the
# mean over dimensions, one forward pass (README, "Where we differ").
FLOW_OPD = {**SD35_OPD, **SD35_TAUGHT, "guidance": 4.5, "teacher_guidance": 4.5}
PAPER = {**FLOW_OPD, **LARGE_STEPS}

AT_1024 = {"resolution": "1024", "micro_batch": 1, "checkpointing": True}


def of_family(model: str, guidance: float, eval_steps: int) -> DistillationConfig:
    """Another family's base, sampled as its pipeline's defaults say. Nobody has published teachers for these:
    give --teachers and --prompts, and an --anchor if there is one."""
    sampled = {"guidance": guidance, "teacher_guidance": guidance, "eval_steps": eval_steps}
    return DistillationConfig(model=model, **REAL_OPD, **SMALL_STEPS, **FROM_BASE, **AT_1024, **sampled)


# A teacher's task: its prompts and its reward.
OF_TASK = {
    task: {"prompts": {task: SD35_PROMPTS[task]}, "train_rewards": {task: SD35_REWARDS[task]}}
    for task in SD35_PROMPTS
}
# Flow-GRPO's numbers, beta too, though our KL is 1 / D of its code's: 4.4 times as much over these states. A
# rollout of 1,152 pictures is read by the OCR reward in some minutes on one core.
BATCHES = {"prompts_per_step": 48, "group": 24, "updates": 2, "micro_batch": 8, "checkpointing": True}
WALK = {"steps": 10, "skip_last": True, "guidance": 4.5, "reward_timeout": 900.0}
OPTIMIZER = {"iterations": 2000, "warmup": 0, "clip_range": 1e-4, "ema": 0.9, "ema_every": 8}
SD35_GRPO = {**SD35, **REAL, **EVERY_25, **BATCHES, **WALK, **OPTIMIZER}

# DiffusionNFT's numbers: deterministic walks without guidance, nine of their ten noise levels for each
# picture, an old policy that follows ever more slowly. Their solver is of second order, ours Euler's. A
# teacher grown so samples without guidance: distil it at --teacher-guidances NAME=1. Known not to suit:
# guidance above 1 (rewards stay flat), and Z-Image's base (they fall); FLUX.2-klein learns.
NFT = {"prompts_per_step": 48, "group": 24, "micro_batch": 8, "checkpointing": True, "reward_timeout": 900.0}
NFT |= {"steps": 10, "levels": 9, "lr": 3e-4, "iterations": 2000, "warmup": 0, "ema": 0.9}
SD35_NFT = {**SD35, **REAL, **EVERY_25, **NFT}

# ---- the runs ----------------------------------------------------------------------------------------------

REAL_PRESETS: dict[str, RunConfig] = {
    "sd35": DistillationConfig(**PAPER, micro_batch=8),  # the paper's, as sd35-flow-opd
    # One GPU of 24 GB, in steps that it makes in time: a fiftieth of those of sd35. The four adapters share
    # the base, samples go through in pairs, and activations are computed again, which an 80 GB card keeps.
    "sd35-24gb": DistillationConfig(**FLOW_OPD, **SMALL_STEPS, micro_batch=2, checkpointing=True),
    "sd35-flow-opd": DistillationConfig(**PAPER, micro_batch=8),
    # DiffusionOPD (arXiv 2605.15055): deterministic walks, half the squared distance of their steps, from the
    # base, without an anchor.
    "sd35-diffusion-opd": DistillationConfig(
        **PAPER, **FROM_BASE, rollout="ode", weight="ode_kl", micro_batch=8
    ),
    # DanceOPD (arXiv 2606.27377): one state per trajectory, mostly towards the data, all weighed alike. Here
    # a step's trajectories share it, there every sample draws its own.
    "sd35-dance-opd": DistillationConfig(
        **PAPER,
        **FROM_BASE,
        rollout="ode",
        weight="uniform",
        queries=1,
        query_beta=(5.0, 2.0),
        micro_batch=8,
    ),
    # GFD-OPD (arXiv 2609.39692): the student without guidance learns the guided velocity of targets that lie
    # past the teachers, at two states of ten. Which two is our choice: the first, which decide composition.
    # The paper deploys the folded student at guidance 2.
    "sd35-gfd-opd": DistillationConfig(
        **SD35_OPD,
        **SD35_TAUGHT,
        **LARGE_STEPS,
        **FROM_BASE,
        guidance=1.0,
        teacher_guidance=4.5,
        deploy_guidance=2.0,
        extrapolate={"geneval": 1.25, "ocr": 1.25, "pickscore": 1.25, "deqa": 1.25},
        query_range=(0, 2),
        micro_batch=8,
    ),
    # Of what is soonest in the miniature: guidance folded into the student, and small steps.
    "sd35-fold": DistillationConfig(
        **SD35_OPD, **SMALL_STEPS, **SD35_TAUGHT, guidance=1.0, teacher_guidance=4.5, micro_batch=10
    ),
    # Any model learns its own guided velocity: a picture then costs half the passes, at guidance 1.
    "guidance-distil": DistillationConfig(
        **SD35,
        **REAL_OPD,
        **SMALL_STEPS,
        **FROM_BASE,
        prompts={"all": SD35_PROMPTS["pickscore"]},
        teachers={"base": "base"},
        routes={"all": "base"},
        guidance=1.0,
        teacher_guidance=4.5,
        micro_batch=10,
    ),
    # A larger transformer with encoders of its own teaches on the same latents, each guided as its card says.
    # It is 16 GB in bfloat16: --teacher-devices large=offload where that does not fit beside the student.
    "sd35-large-to-medium": DistillationConfig(
        **SD35_OPD,
        **LARGE_STEPS,
        **FROM_BASE,
        teachers={"large": "stabilityai/stable-diffusion-3.5-large"},
        routes={"geneval": "large", "ocr": "large", "pickscore": "large"},
        guidance=4.5,
        teacher_guidance=3.5,
        micro_batch=2,
        checkpointing=True,
    ),
    "flux": of_family("black-forest-labs/FLUX.1-dev", guidance=3.5, eval_steps=28),
    "flux_kontext": of_family("black-forest-labs/FLUX.1-Kontext-dev", guidance=3.5, eval_steps=28),
    # Paints, and edits the source pictures of prompts that have some, in one run.
    "flux2": of_family("black-forest-labs/FLUX.2-klein-base-4B", guidance=4.0, eval_steps=50),
    "qwen_image": of_family("Qwen/Qwen-Image", guidance=4.0, eval_steps=50),
    "qwen_image_edit": of_family("Qwen/Qwen-Image-Edit-2509", guidance=4.0, eval_steps=50),
    # 5 of the pipeline's guidance_scale is 6 here (opd/families/z_image.py).
    "z_image": of_family("Tongyi-MAI/Z-Image", guidance=6.0, eval_steps=50),
    "sd35-grpo-geneval": GRPOConfig(**SD35_GRPO, **OF_TASK["geneval"], beta=0.04, lr=3e-4),
    "sd35-grpo-ocr": GRPOConfig(**SD35_GRPO, **OF_TASK["ocr"], beta=0.04, lr=3e-4),
    "sd35-grpo-pickscore": GRPOConfig(**SD35_GRPO, **OF_TASK["pickscore"], beta=0.01, lr=3e-4),
    "sd35-nft-geneval": NFTConfig(**SD35_NFT, **OF_TASK["geneval"]),
    # An old policy that stays behind for longer, and a b of .1.
    "sd35-nft-ocr": NFTConfig(
        **SD35_NFT, **OF_TASK["ocr"], strength=0.1, old_decay=(75.0, 0.0075, 0.999), updates=2
    ),
    "sd35-nft-pickscore": NFTConfig(**SD35_NFT, **OF_TASK["pickscore"]),
    # The anchor's teacher: it sees the prompts of all tasks, so that it has something to say about each.
    "sd35-grpo-quality": GRPOConfig(
        **SD35_GRPO,
        prompts=SD35_PROMPTS,
        train_rewards={"geneval": SD35_QUALITY, "ocr": SD35_QUALITY, "pickscore": SD35_QUALITY},
        beta=0.01,
        lr=3e-4,
    ),
    # The baseline: one model, a task per step, each task with its own reward. (The released code takes .8 of
    # each and adds .2 DeQA / 5.)
    "sd35-grpo-mix": GRPOConfig(
        **SD35_GRPO,
        prompts=SD35_PROMPTS,
        train_rewards=SD35_REWARDS,
        mix=SD35_MIX,
        alternate=True,
        beta=0.04,
        lr=1e-4,
    ),
}

PRESETS = {name: replace(cfg, out=f"runs/{name}") for name, cfg in (MINI_PRESETS | REAL_PRESETS).items()}
DEFAULT = PRESETS["mini"]
