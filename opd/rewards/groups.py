"""Groups of pictures of one prompt, their scores and advantages: what the stages share that learn from
rewards.

Shapes: P prompts, G samples each, N = P G samples; B samples of a micro-batch.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from opd import ranks
from opd.config import RewardedConfig
from opd.data import MicroBatch, Pools, Prompt, micro_batches, prompts_of_step
from opd.diagnostics import reward_metrics
from opd.families import Condition
from opd.model import Model
from opd.optim import Trained
from opd.ranks import say
from opd.rewards import Rewards
from opd.rewards.scoring import Scoring, gather_scores

ADVANTAGE_CLIP = 5.0
"""Largest advantage, as in Flow-GRPO and DiffusionNFT."""


class RewardedStage:
    """A stage that learns from rewards: each step samples groups of pictures, scores them, and updates.

    GRPO and NFT say how, in the three methods that follow `step`.
    """

    def __init__(self, cfg: RewardedConfig, model: Model, pools: Pools, rewards: Rewards, trained: Trained):
        self.cfg, self.model, self.pools, self.trained = cfg, model, pools, trained
        self.reward_of = {task: rewards[spec] for task, spec in cfg.training_rewards().items()}

    def step(self, step: int) -> tuple[dict, float]:
        """Sample, score, update. Returns the metrics and the gradient norm of the last update (or the first
        that is not finite).

        The prompts are cut into `updates` parts, one optimizer step each. Scores of a micro-batch are
        computed in a thread while the next one is rolled out.
        """
        cfg = self.cfg
        started = time.perf_counter()
        prompts = prompts_of_step(
            self.pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
        )
        parts, pending = [], []
        for part in range(cfg.updates):
            parts.append([])
            for task, batch in self.batches(prompts, part):
                sampled, latents = self.sample(batch, prompts, step)
                parts[-1].append(sampled)
                if batch.real:
                    pending.append((batch.samples, self.score(task, latents, self.asked(prompts, batch))))
        rolled = time.perf_counter()

        advantage_N, metrics, busy = self.wait(pending, prompts, step)
        scored = time.perf_counter()

        found, norm = self.update(parts, prompts, advantage_N, step)
        metrics = self.finish(found, norm, step) | metrics
        metrics["seconds"] = {
            "rollout": rolled - started,
            "reward": scored - rolled,
            "train": time.perf_counter() - scored,
            "scoring": busy,
        }
        return metrics, norm

    def sample(self, batch: MicroBatch, prompts: list[Prompt], step: int) -> tuple[Any, Tensor]:
        """(what `accumulate` needs of a micro-batch, its pictures as latents (B, C, H, W))."""
        raise NotImplementedError

    def accumulate(
        self, part: list, prompts: list[Prompt], advantage_N: Tensor, kept: int, step: int
    ) -> Tensor:
        """Leave the gradient of one update in .grad. Returns sums over the `kept` samples of all ranks; those
        whose advantage is NaN count for nothing."""
        raise NotImplementedError

    def finish(self, found: list[Tensor], norm: float, step: int) -> dict:
        """What comes after all updates of a step; the metrics, from what `accumulate` found in each."""
        raise NotImplementedError

    def batches(self, prompts: list[Prompt], part: int) -> list[tuple[str, MicroBatch]]:
        """(task, micro-batch of this rank) for one of the `updates` parts of a step's samples: task after
        task, since each has its reward, in as many micro-batches on every rank."""
        cfg = self.cfg
        samples = cfg.samples_per_step() // cfg.updates
        by_task: dict[str, dict[int, str]] = {}
        for n in range(part * samples, (part + 1) * samples):
            task = prompts[n // cfg.group].task
            by_task.setdefault(task, {})[n] = task
        batches = []
        shapes = self.model.shapes([prompt.asked for prompt in prompts], cfg.group)
        for task, mine in by_task.items():
            for batch in micro_batches(mine, cfg.micro_batch, ranks.world(), ranks.rank(), shapes):
                batches.append((task, batch))
        return batches

    def asked(self, prompts: list[Prompt], batch: MicroBatch) -> list[Prompt]:
        """Each sample's prompt."""
        return [prompts[n // self.cfg.group] for n in batch.samples]

    def text(self, prompts: list[Prompt], batch: MicroBatch) -> list[Condition]:
        """Each sample's condition."""
        return self.model.text([prompt.asked for prompt in self.asked(prompts, batch)])

    def score(self, task: str, latents: Tensor, mine: list[Prompt]) -> Scoring:
        """Decode a micro-batch and begin to score it, in a thread beside the next rollout."""
        images, texts = self.model.decode(latents), [prompt.text for prompt in mine]
        metadata = [prompt.metadata for prompt in mine]
        return self.reward_of[task].start(images, texts, metadata, self.cfg.reward_timeout)

    def wait(
        self, pending: list[tuple[list[int], Scoring]], prompts: list[Prompt], step: int
    ) -> tuple[Tensor, dict, float]:
        """Wait for the scores of all ranks' samples, and say which failed (collectives). Returns advantages
        (N,) float32, NaN in groups that hold a NaN reward, alike on every rank; metrics of the rewards; the
        seconds that this rank's scorers took."""
        cfg = self.cfg
        tasks_P = [prompt.task for prompt in prompts]
        scores_N, failures, busy = gather_scores(pending, cfg.samples_per_step(), self.model.device)
        rewards_PG = scores_N.view(len(prompts), cfg.group)
        metrics = reward_metrics(rewards_PG, tasks_P)
        if failures:
            metrics["failed_rewards"] = failures
        for failure in failures:
            say(f"step {step + 1}: no reward for {failure}; group dropped")
        advantage_PG = advantages(rewards_PG, tasks_P, cfg.advantage_std, ADVANTAGE_CLIP)
        return advantage_PG.float().flatten(), metrics, busy

    def update(
        self, parts: list[list], prompts: list[Prompt], advantage_N: Tensor, step: int
    ) -> tuple[list[Tensor], float]:
        """An optimizer step for each part: what `accumulate` returned for each, on the CPU; the gradient
        norm."""
        found, norm = [], 0.0
        for turn, part in enumerate(parts):
            kept = int((~advantage_N.view(len(parts), -1)[turn].isnan()).sum())
            if kept == 0:  # an optimizer step would follow old momentum and weight decay alone
                continue
            of_part = self.accumulate(part, prompts, advantage_N, kept, step)
            # Sent without waiting: the next line is the update's only wait for the device.
            found.append(of_part.to("cpu", non_blocking=True))
            of_update = self.trained.update(step, turn, len(parts))
            if math.isfinite(norm):
                norm = of_update
        return found, norm


def kept_advantages(advantage_N: Tensor, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A micro-batch's (1 for a sample that counts, 0 for padding and dropped groups; advantages, 0 there),
    (B,) each, on the device."""
    advantage_B = advantage_N[batch.samples]
    rows_2B = torch.stack([batch.real * ~advantage_B.isnan(), advantage_B.nan_to_num(0.0)])
    kept_B, advantage_B = rows_2B.to(device, non_blocking=True)
    return kept_B, advantage_B


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
