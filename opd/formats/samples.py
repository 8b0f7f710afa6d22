"""What each task's teacher makes of that task's prompts, kept as latents with captions: the data of an SFT
start. `sample.py --save latents` writes it, stage sft reads it (opd/formats/images.py)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from opd.data import Prompt
from opd.evaluation.score import cases_of
from opd.flags import at_least_one, require, time_limit
from opd.formats.images import write_samples
from opd.model import Model, Sampling
from opd.rewards import Reward, find_reward

Case = tuple[int, Prompt]  # noise index and prompt: what a sample is made from


@dataclass(frozen=True)
class Filter:
    """Which samples of a task are good enough."""

    reward: Reward
    least: float


@dataclass
class Kept:
    latents: list[Tensor] = field(default_factory=list)
    """(C, H, W) float16 on the CPU: half the size of float32, and finer than bfloat16."""
    rows: list[dict] = field(default_factory=list)
    """Their captions, task and reward."""


def check(args) -> None:
    """What sample.py is asked for with --save latents; ValueError, naming flag and value."""
    at_least_one(args, "count")
    time_limit(args, "reward_timeout")
    require(len(args.tasks) > 0, "--tasks is empty: give at least one TASK=FILE pair")
    for task in args.tasks:
        fix = f"add --adapters {task}=ADAPTER"
        require(task in ("base", *args.adapters), f"task {task!r} has no adapter of its name; {fix}")
    for task in args.at_least:
        fix = f"add --rewards {task}=module:function"
        require(task in args.rewards, f"--at-least {task}={args.at_least[task]} has no reward; {fix}")
    for task in args.rewards:
        require(
            task in args.tasks, f"--rewards names task {task!r}, which has no --tasks: {list(args.tasks)}"
        )
        fix = f"add --at-least {task}=NUMBER"
        require(
            task in args.at_least, f"--rewards {task}={args.rewards[task]} filters by no threshold; {fix}"
        )
    check_free(Path(args.out))


def check_free(folder: Path) -> None:
    for name in ("metadata.jsonl", "latents.safetensors"):
        taken = f"--out {str(folder)!r} already holds a {name}"
        require(not (folder / name).exists(), f"{taken}; choose another folder, or delete that one")


def find_filters(args, pools: dict[str, list[Prompt]]) -> dict[str, Filter]:
    """Task -> its filter, where it has one; every prompt holds the metadata that the reward needs."""
    filters = {}
    for task, spec in args.rewards.items():
        reward = find_reward(spec)
        reward.check_metadata(task, pools[task])
        filters[task] = Filter(reward, args.at_least[task])
    return filters


def save_latents(
    args, model: Model, pools: dict[str, list[Prompt]], scales: dict[str, float], filters: dict[str, Filter]
) -> None:
    """Sample `args.count` times per task and write what is good enough. `scales`: guidance by adapter.

    ValueError where nothing of a task is.
    """
    latents, rows = [], []
    for task, pool in pools.items():
        kept = Kept()
        cases = cases_of(pool, args.count)
        for start in range(0, len(cases), args.batch):
            piece = cases[start : start + args.batch]
            latents_BCHW = draw(args, model, task, piece, scales[task])
            keep(args, model, task, piece, latents_BCHW, filters, kept)
        print(f"{task}: kept {len(kept.rows)} of {len(cases)} samples")
        if task in filters:
            short = f"none of the {len(cases)} samples of task {task!r} reaches --at-least"
            require(len(kept.rows) > 0, f"{short} {task}={filters[task].least}; lower it")
        latents += kept.latents
        rows += kept.rows
    write_samples(Path(args.out), torch.stack(latents), rows)
    print(f"{args.out}: {len(rows)} latents with captions, for --data of stage sft")


def draw(args, model: Model, task: str, cases: list[Case], guidance: float) -> Tensor:
    """Latents (B, C, H, W) of the adapter that has the task's name."""
    return model.latents(
        task,
        [prompt.text for _, prompt in cases],
        [index for index, _ in cases],
        Sampling(args.steps, args.seed, guidance, args.sampler, args.noise_level),
    )


def keep(
    args,
    model: Model,
    task: str,
    cases: list[Case],
    latents_BCHW: Tensor,
    filters: dict[str, Filter],
    kept: Kept,
) -> None:
    """Add to `kept` what passes the task's filter; a sample without a score does not."""
    rows = [{"prompt": prompt.text, "task": task} for _, prompt in cases]
    good = [True] * len(cases)
    if task in filters:
        scores_B, _, _ = (
            filters[task]
            .reward.start(
                model.decode(latents_BCHW),
                [prompt.text for _, prompt in cases],
                [prompt.metadata for _, prompt in cases],
                args.reward_timeout,
            )
            .result()
        )
        good = (scores_B >= filters[task].least).tolist()
        for row, score in zip(rows, scores_B.tolist(), strict=True):
            row["reward"] = score
    for row, latent, is_good in zip(rows, latents_BCHW.cpu().half(), good, strict=True):
        if is_good:
            kept.rows.append(row)
            kept.latents.append(latent)
