"""What a step measured, in readable numbers: distances to teachers by noise level; ratios and rewards."""

import math

import torch
from torch import Tensor

from opd import flow, ranks
from opd.config import Distil, Grow
from opd.model import Model
from opd.ranks import say


class Squares:
    """Sums and counts of |v - v_k|^2, mean over dimensions, over the samples of a step.

    One row per teacher, of the samples routed to it, and a last row of all samples for the anchor; one column
    per state.
    """

    def __init__(self, cfg: Distil, model: Model, teachers: list[str]):
        self.cfg, self.model, self.teachers = cfg, model, teachers
        self.sums_RT = torch.zeros(len(teachers) + 1, cfg.steps, device=model.device)
        self.counts_RT = torch.zeros_like(self.sums_RT)

    def add(self, squares_BTK: Tensor, routed_BK: Tensor, real: list[int], queried: list[int]) -> None:
        """Squares of one micro-batch; `routed_BK` says whose samples they are, `real` which are not
        padding."""
        real_B = torch.tensor(real, dtype=torch.float32)
        own_BK = (routed_BK * real_B[:, None]).to(squares_BTK.device)
        # Chosen, not multiplied: the NaN of another's sample times 0 would be NaN.
        own_BTK = torch.where(own_BK[:, None] != 0, squares_BTK * own_BK[:, None], 0)
        self.sums_RT[:-1] += own_BTK.sum(0).T
        self.counts_RT[:-1, queried] += own_BK.sum(0)[:, None]
        if self.cfg.anchor_weight > 0:
            self.sums_RT[-1] += squares_BTK[:, :, self.teachers.index(self.cfg.anchor)].sum(0)
        self.counts_RT[-1, queried] += sum(real)

    def collect(self) -> None:
        """Sum over ranks (a collective) and fetch the table to the host, once per step."""
        table = ranks.total(torch.stack([self.sums_RT, self.counts_RT])).double().cpu()
        self.sums_RT, self.counts_RT = table[0], table[1]

    def name_non_finite(self, step: int) -> None:
        """Say where the first distance is that is not a number; the step itself is skipped by its
        gradient."""
        bad = (~self.sums_RT.isfinite()).T.nonzero().tolist()
        if bad:
            state, row = bad[0]
            name = [*self.teachers, "anchor"][row]
            say(f"step {step}: non-finite velocity difference to {name} at state {state}")

    def metrics(self) -> dict:
        """The loss (eq. 16), and per teacher and anchor its weighted loss and its KL per sigma.

        All in nats per dimension. The KL is that of the rollout's transitions (eq. 12), whatever --weight is.
        """
        row = {"loss": 0.0}
        samples = self.counts_RT[-1].sum()
        for k, name in enumerate(self.teachers):
            own = self.counts_RT[k].sum()
            if own > 0:
                row[name] = self._distance(k)
                row["loss"] += float(own / samples) * row[name]["loss"]
        if self.cfg.anchor_weight > 0:
            row["anchor"] = self._distance(-1)
            row["loss"] += self.cfg.anchor_weight * row["anchor"]["loss"]
        return row

    def _distance(self, row: int) -> dict:
        """{"loss", "kl"} of one row: the mean over its states of what they weigh, and the KL per sigma."""
        seen_T = self.counts_RT[row] > 0
        mean_T = self.sums_RT[row] / self.counts_RT[row].clamp(min=1)
        weight_T = torch.tensor(self._weights(self.cfg.weight), dtype=torch.float64)
        loss_T = mean_T * weight_T
        return {"loss": float(loss_T[seen_T].mean())} | self._kl(mean_T, seen_T)

    def _kl(self, mean_T: Tensor, seen_T: Tensor) -> dict:
        """{"kl": {sigma: nats per dimension}} of the states that were seen and have one; {} without noise."""
        if self.cfg.noise_level == 0:
            return {}
        sigmas, weights = self.model.sigmas(self.cfg.steps), self._weights("kl")
        kl = {}
        for i, weight in enumerate(weights):
            if seen_T[i] and math.isfinite(weight):
                kl[f"{sigmas[i]:.3f}"] = float(mean_T[i] * weight)
        return {"kl": kl}

    def _weights(self, name: str) -> list[float]:
        sigmas = self.model.sigmas(self.cfg.steps)
        return flow.state_weights(name, sigmas, self.cfg.rollout, self.cfg.noise_level)


STATISTICS = ("policy", "kl", "drift", "square", "clipped", "count")
"""What GRPO sums over samples and states: both losses, ratio - 1, its square, whether it was clipped, 1."""


class Outcome:
    """What the updates of an iteration measured."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(STATISTICS), device=device)
        self.largest = 0.0
        self.cosine: dict[str, float] = {}
        self.norm = 0.0
        """Gradient norm of the last update, or of the first that is not finite."""

    def add(self, sums: Tensor, largest: Tensor, cosine: dict[str, float]) -> None:
        self.sums += sums
        self.largest = max(self.largest, float(largest))
        self.cosine |= cosine

    def add_norm(self, norm: float) -> None:
        if math.isfinite(self.norm):
            self.norm = norm

    def metrics(self, cfg: Grow) -> dict:
        """Losses in nats per dimension; of the ratio its std (`spread`) and the share that is further than
        the clip range from 1 (`clipped`)."""
        mean = dict(zip(STATISTICS, (self.sums / self.sums[-1].clamp(min=1)).tolist(), strict=True))
        spread = math.sqrt(max(mean["square"] - mean["drift"] ** 2, 0.0))
        row = {"loss": mean["policy"] + cfg.beta * mean["kl"], "kl": mean["kl"]}
        row["ratio"] = {"spread": spread, "largest": self.largest, "clipped": mean["clipped"]}
        if self.cosine:
            row["cosine"] = self.cosine
        return row


def reward_metrics(rewards_PG: Tensor, tasks_P: list[str]) -> dict:
    """Rewards per task; how many groups have equal rewards, which teach nothing, and how many were
    dropped."""
    dropped_P = rewards_PG.isnan().any(1)
    flat_P = (rewards_PG == rewards_PG[:, :1]).all(1)
    reward, std = {}, {}
    for task in dict.fromkeys(tasks_P):
        of_task_P = torch.tensor([t == task for t in tasks_P], device=rewards_PG.device)
        mine = rewards_PG[of_task_P & ~dropped_P]
        if len(mine):
            reward[task] = float(mine.mean())
            std[task] = float(mine.std(correction=0))
    groups = {"zero_spread": int(flat_P.sum()), "dropped": int(dropped_P.sum()), "all": len(tasks_P)}
    return {"reward": reward, "reward_std": std, "groups": groups}
