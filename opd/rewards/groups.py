"""Groups of pictures of one prompt, their scores and advantages: what the stages share that learn from
rewards.

Shapes: P prompts, G samples each, N = P G samples; B samples of a micro-batch; K terms of a sum of rewards.
"""

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
from opd.rewards import Reward
from opd.rewards.scoring import Scoring, gather_scores

ADVANTAGE_CLIP = 5.0
"""Largest advantage, as in Flow-GRPO and DiffusionNFT."""


def iteration(stage, step: int) -> tuple[dict, float]:
    """A step of stage grpo or nft: sample, score, update. Returns the metrics and the gradient norm of the
    last update (or the first that is not finite).

    The rollout's prompts are cut into `updates` parts, one optimizer step each. Scores of a micro-batch are
    computed in a thread while the next one is rolled out. `stage.sample` makes a micro-batch's pictures and
    starts to score them; `stage.update` learns from all of them.
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

    metrics, norm = stage.update(parts, prompts, scores.advantage_PG, step)
    metrics |= scores.metrics
    metrics["seconds"] = {
        "rollout": rolled - started,
        "reward": scored - rolled,
        "train": time.perf_counter() - scored,
        "scoring": scores.busy,
    }
    return metrics, norm


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
    """The rewards of a run's tasks: each as a whole, or (--advantage-std each) the terms of its sum."""

    def __init__(self, cfg: RewardedConfig, model: Model, rewards: dict[str, Reward]):
        self.cfg, self.model = cfg, model
        self.of_task = {}
        for task, spec in cfg.training_rewards().items():
            whole = rewards[spec]
            self.of_task[task] = whole.apart() if cfg.advantage_std == "each" else [(1.0, whole)]
        self.pending: list[tuple[list[int], list[Scoring]]] = []
        """Samples of a micro-batch, and a scoring for each term. They hold the images."""

    def start(self, task: str, samples: list[int], latents: Tensor, mine: list[Prompt]) -> None:
        """Decode a micro-batch and begin to score it, in a thread beside the next rollout."""
        images, texts = self.model.decode(latents), [prompt.text for prompt in mine]
        metadata, timeout = [prompt.metadata for prompt in mine], self.cfg.reward_timeout
        terms = [reward.start(images, texts, metadata, timeout) for _, reward in self.of_task[task]]
        self.pending.append((samples, terms))

    def wait(self, prompts: list[Prompt], step: int) -> Scores:
        """The scores of all ranks' samples, whose failures are said (collectives)."""
        pending, self.pending = self.pending, []
        tasks_P, shape = [prompt.task for prompt in prompts], (len(prompts), self.cfg.group)
        columns, failures, busy = [], [], 0.0
        for k in range(max(len(terms) for terms in self.of_task.values())):
            of_term = [(samples, terms[k]) for samples, terms in pending if k < len(terms)]
            scores_N, failed, seconds = gather_scores(of_term, self.cfg.samples_per_step(), self.model.device)
            columns.append(scores_N.view(shape))
            failures += failed
            busy += seconds
        terms_KPG, weight_KP1 = torch.stack(columns), torch.zeros(len(columns), len(prompts), 1)
        for p, task in enumerate(tasks_P):
            weights = [weight for weight, _ in self.of_task[task]]
            weight_KP1[: len(weights), p, 0] = torch.tensor(weights)
            terms_KPG[len(weights) :, p] = 0.0  # which other tasks have, and nobody has scored for this one
        rewards_PG = (weight_KP1 * terms_KPG).sum(0)
        metrics = reward_metrics(rewards_PG, tasks_P)
        if failures:
            metrics["failed_rewards"] = failures
        for failure in failures:
            say(f"step {step + 1}: no reward for {failure}; group dropped")
        if self.cfg.advantage_std == "each":
            advantage_PG = advantages_of_each(terms_KPG, weight_KP1, tasks_P, ADVANTAGE_CLIP)
        else:
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
        std_P1 = of_task(rewards_PG, tasks_P)[1]
    return (centred(rewards_PG) / (std_P1 + 1e-4)).clamp(-limit, limit)


def advantages_of_each(terms_KPG: Tensor, weight_KP1: Tensor, tasks_P: list[str], limit: float) -> Tensor:
    """GDPO: the terms of a sum of rewards are normalised in their groups one by one, so that none is lost
    beside one of a larger spread; then their weighted sum over all groups of the task: (P, G), clipped.

    A_k = (r_k - mean of the group) / (std of the group + 1e-4)
    A = sum_k w_k A_k,  then (A - mean) / (std + 1e-4)
    """
    std_KP1 = terms_KPG.std(2, correction=0, keepdim=True)
    each_KPG = centred(terms_KPG) / (std_KP1 + 1e-4)
    sum_PG = (weight_KP1 * each_KPG).sum(0)
    mean_P1, std_P1 = of_task(sum_PG, tasks_P)
    return ((sum_PG - mean_P1) / (std_P1 + 1e-4)).clamp(-limit, limit)


def centred(rewards: Tensor) -> Tensor:
    """Minus the mean of the group, the last dimension."""
    return rewards - rewards.mean(-1, keepdim=True)


def of_task(values_PG: Tensor, tasks_P: list[str]) -> tuple[Tensor, Tensor]:
    """Mean and population std (P, 1) over all whole groups of the prompt's task; NaN where it has none."""
    whole_P = ~values_PG.isnan().any(1)
    mean_P1, std_P1 = torch.full((2, len(values_PG), 1), torch.nan, dtype=values_PG.dtype)
    for task in set(tasks_P):
        mine_P = torch.tensor([t == task for t in tasks_P])
        if (mine_P & whole_P).any():
            of_task_MG = values_PG[mine_P & whole_P]
            mean_P1[mine_P], std_P1[mine_P] = of_task_MG.mean(), of_task_MG.std(correction=0)
    return mean_P1, std_P1
