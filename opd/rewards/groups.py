"""Groups of pictures of one prompt, their scores and advantages: what the stages share that learn from
rewards.

Shapes: P prompts, G samples each, N = P G samples; B samples of a micro-batch.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import ranks
from opd.config import RewardedConfig
from opd.data import MicroBatch, Prompt, micro_batches, prompts_of_step
from opd.diagnostics import reward_metrics
from opd.model import Model
from opd.ranks import say
from opd.rewards import Rewards
from opd.rewards.scoring import Scoring, gather_scores

ADVANTAGE_CLIP = 5.0
"""Largest advantage, as in Flow-GRPO and DiffusionNFT."""


def iteration(stage, step: int) -> tuple[dict, float]:
    """A step of stage grpo or nft: sample, score, update. Returns the metrics and the gradient norm of the
    last update (or the first that is not finite).

    The rollout's prompts are cut into `updates` parts, one optimizer step each. Scores of a micro-batch are
    computed in a thread while the next one is rolled out. `stage.sample` makes a micro-batch's pictures and
    starts to score them; `stage.accumulate` leaves the gradient of a part; `stage.finish` does what comes
    after all updates, and makes the metrics.
    """
    cfg = stage.cfg
    started = time.perf_counter()
    prompts = prompts_of_step(
        stage.pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
    )
    parts = []
    for part in range(cfg.updates):
        batches = batches_of_part(cfg, prompts, part, stage.model)
        parts.append([stage.sample(batch, task, prompts, step) for task, batch in batches])
    rolled = time.perf_counter()

    scores = stage.scorers.wait(prompts, step)
    scored = time.perf_counter()

    found, norm = update(stage, parts, prompts, scores.advantage_PG.flatten(), step)
    metrics = stage.finish(found, norm, step) | scores.metrics
    metrics["seconds"] = {
        "rollout": rolled - started,
        "reward": scored - rolled,
        "train": time.perf_counter() - scored,
        "scoring": scores.busy,
    }
    return metrics, norm


def update(
    stage, parts: list[list], prompts: list[Prompt], advantage_N: Tensor, step: int
) -> tuple[list[Tensor], float]:
    """An optimizer step for each part: what `stage.accumulate` returned for each, on the CPU; the gradient
    norm."""
    found, norm = [], 0.0
    for turn, part in enumerate(parts):
        kept = int((~advantage_N.view(len(parts), -1)[turn].isnan()).sum())
        if kept == 0:  # an optimizer step would follow old momentum and weight decay alone
            continue
        of_part = stage.accumulate(part, prompts, advantage_N, kept, step)
        # Sent without waiting: the next line is the update's only wait for the device.
        found.append(of_part.to("cpu", non_blocking=True))
        of_update = stage.trained.update(step, turn, len(parts))
        if math.isfinite(norm):
            norm = of_update
    return found, norm


def batches_of_part(
    cfg: RewardedConfig, prompts: list[Prompt], part: int, model: Model
) -> list[tuple[str, MicroBatch]]:
    """(task, micro-batch of this rank) for one of the `updates` parts of a step's samples: task after task,
    since each has its reward, in as many micro-batches on every rank."""
    samples = cfg.samples_per_step() // cfg.updates
    by_task: dict[str, dict[int, str]] = {}
    for n in range(part * samples, (part + 1) * samples):
        task = prompts[n // cfg.group].task
        by_task.setdefault(task, {})[n] = task
    batches = []
    shapes = model.shapes([prompt.asked for prompt in prompts], cfg.group)
    for task, mine in by_task.items():
        for batch in micro_batches(mine, cfg.micro_batch, ranks.world(), ranks.rank(), shapes):
            batches.append((task, batch))
    return batches


@dataclass
class Scores:
    """What a step's pictures are worth, alike on every rank."""

    advantage_PG: Tensor
    """float32; NaN in groups that hold a NaN reward, which count for nothing."""
    metrics: dict
    """Of the rewards, for the log."""
    busy: float
    """Seconds that this rank's scorers took."""


class Scorers:
    """The rewards of a run's tasks."""

    def __init__(self, cfg: RewardedConfig, model: Model, rewards: Rewards):
        self.cfg, self.model = cfg, model
        self.of_task = {task: rewards[spec] for task, spec in cfg.training_rewards().items()}
        self.pending: list[tuple[list[int], Scoring]] = []
        """Samples of a micro-batch, and their scoring, which holds the images."""

    def start(self, task: str, samples: list[int], latents: Tensor, mine: list[Prompt]) -> None:
        """Decode a micro-batch and begin to score it, in a thread beside the next rollout."""
        images, texts = self.model.decode(latents), [prompt.text for prompt in mine]
        metadata = [prompt.metadata for prompt in mine]
        scoring = self.of_task[task].start(images, texts, metadata, self.cfg.reward_timeout)
        self.pending.append((samples, scoring))

    def wait(self, prompts: list[Prompt], step: int) -> Scores:
        """The scores of all ranks' samples, whose failures are said (collectives)."""
        pending, self.pending = self.pending, []
        tasks_P = [prompt.task for prompt in prompts]
        scores_N, failures, busy = gather_scores(pending, self.cfg.samples_per_step(), self.model.device)
        rewards_PG = scores_N.view(len(prompts), self.cfg.group)
        metrics = reward_metrics(rewards_PG, tasks_P)
        if failures:
            metrics["failed_rewards"] = failures
        for failure in failures:
            say(f"step {step + 1}: no reward for {failure}; group dropped")
        advantage_PG = advantages(rewards_PG, tasks_P, self.cfg.advantage_std, ADVANTAGE_CLIP)
        return Scores(advantage_PG.float(), metrics, busy)


# ---- equations ---------------------------------------------------------------------------------------------


def advantages(rewards_PG: Tensor, tasks_P: list[str], scope: str, limit: float) -> Tensor:
    """(r - mean of the group) / (std + 1e-4), clipped to +-limit: (P, G), NaN in groups that hold a NaN
    reward.

    The population std is taken over the group, or (scope "global", Flow-GRPO's default) over all groups of
    the same task, because rewards of two tasks share no unit.
    """
    std_P1 = rewards_PG.std(1, correction=0, keepdim=True)
    if scope == "global":
        std_P1 = std_of_task(rewards_PG, tasks_P)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (centred_PG / (std_P1 + 1e-4)).clamp(-limit, limit)


def std_of_task(rewards_PG: Tensor, tasks_P: list[str]) -> Tensor:
    """Population std (P, 1) over all whole groups of the prompt's task; NaN where it has none."""
    whole_P = ~rewards_PG.isnan().any(1)
    std_P1 = torch.full((len(rewards_PG), 1), torch.nan, dtype=rewards_PG.dtype)
    for task in set(tasks_P):
        mine_P = torch.tensor([t == task for t in tasks_P])
        if (mine_P & whole_P).any():
            std_P1[mine_P] = rewards_PG[mine_P & whole_P].std(correction=0)
    return std_P1
