"""Scores of finished trajectories in distillation: they route samples (--routing reward) or train beside the
teachers (--reward-weight). A policy gradient without teachers is stage grpo.

Shapes: N samples of a step over all ranks, J tasks with a reward each, P prompts of G samples, N = P G.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd import ranks, routing
from opd.config import DistillationConfig
from opd.data import MicroBatch, Prompt
from opd.diagnostics import reward_metrics
from opd.grpo import advantages
from opd.ranks import say
from opd.rewards import Reward
from opd.rewards.scoring import Scoring

ADVANTAGE_CLIP = 5.0  # as in stage grpo


@dataclass
class Hearing:
    """Some samples before one reward: their scores are under way."""

    column: int
    samples: list[int]
    scoring: Scoring


class Judges:
    """The rewards of all tasks, a column each."""

    def __init__(self, cfg: DistillationConfig, rewards: dict[str, Reward], device: torch.device):
        self.cfg, self.device = cfg, device
        self.reward_of = {task: rewards[cfg.train_rewards[task]] for task in cfg.prompts}

    def start(self, batch: MicroBatch, prompts_N: list[Prompt], images_BCHW: Tensor) -> list[Hearing]:
        """Begin to score a micro-batch's finished images; padding is not scored."""
        hearings = []
        for column, (task, reward) in enumerate(self.reward_of.items()):
            rows = [
                b for b, n in enumerate(batch.samples) if batch.real[b] and self.hears(task, prompts_N[n])
            ]
            if not rows:
                continue
            samples = [batch.samples[b] for b in rows]
            texts = [prompts_N[n].text for n in samples]
            metadata = [prompts_N[n].metadata for n in samples]
            scoring = reward.start(images_BCHW[rows], texts, metadata, self.cfg.reward_timeout)
            hearings.append(Hearing(column, samples, scoring))
        return hearings

    def hears(self, task: str, prompt: Prompt) -> bool:
        """Whether a task's reward can judge a prompt: its own; with --routing reward any whose metadata has
        what the reward needs."""
        if prompt.task == task:
            return True
        needs = self.reward_of[task].metadata_keys
        return self.cfg.routing == "reward" and all(key in prompt.metadata for key in needs)

    def verdict(self, hearings: list[Hearing], count: int, step: int) -> Tensor:
        """Wait for the scores: (N, J) float64 on the CPU of all ranks' samples (a collective), NaN where a
        reward was not asked or failed."""
        sums_NJ = torch.zeros(count, len(self.reward_of), dtype=torch.float64, device=self.device)
        known_NJ = torch.zeros_like(sums_NJ)
        failures = []
        for hearing in hearings:
            scores_B, failed, _ = hearing.scoring.result()
            finite_B = scores_B.isfinite()
            sums_NJ[hearing.samples, hearing.column] = scores_B.nan_to_num(0.0).double().to(self.device)
            known_NJ[hearing.samples, hearing.column] = finite_B.double().to(self.device)
            failures += sorted(set(failed.values()))
        for failures_of_rank in ranks.gather(failures):
            for failure in failures_of_rank:
                say(f"step {step}: no reward for {failure}")
        ranks.total(sums_NJ)
        ranks.total(known_NJ)
        return torch.where(known_NJ > 0, sums_NJ, torch.nan).cpu()

    def routes(self, scores_NJ: Tensor, route_N: list[str]) -> list[str]:
        """The route of the task whose reward claims each sample; unclaimed samples keep theirs."""
        tasks = list(self.reward_of)
        routes = []
        for claim, route in zip(routing.claimed(scores_NJ), route_N, strict=True):
            if claim is None:
                routes.append(route)
            else:
                routes.append(self.cfg.route(tasks[claim]))
        return routes

    def own_scores(self, scores_NJ: Tensor, prompts_N: list[Prompt]) -> Tensor:
        """Every sample's score by its own task's reward, as groups (P, G)."""
        tasks = list(self.reward_of)
        columns = [tasks.index(prompt.task) for prompt in prompts_N]
        own_N = scores_NJ[torch.arange(len(columns)), columns]
        return own_N.view(-1, self.cfg.group)

    def advantages(self, scores_PG: Tensor, prompts_N: list[Prompt]) -> Tensor:
        """Group-relative advantages (N,) float32, 0 in groups where a score is missing."""
        tasks_P = [prompt.task for prompt in prompts_N[:: self.cfg.group]]
        advantage_PG = advantages(scores_PG, tasks_P, "global", ADVANTAGE_CLIP)
        return advantage_PG.nan_to_num(0.0).float().flatten()

    def metrics(self, scores_PG: Tensor, prompts_N: list[Prompt]) -> dict:
        tasks_P = [prompt.task for prompt in prompts_N[:: self.cfg.group]]
        return reward_metrics(scores_PG, tasks_P)
