"""What a step measured, in readable numbers: distances to teachers by noise level; ratios and rewards."""

import math

import torch
from torch import Tensor

from opd import flow, ranks
from opd.config import DistillationConfig, GRPOConfig
from opd.data import Prompt
from opd.model import Model
from opd.ranks import say


class Distances:
    """Sums and counts of |v - v_k|^2, mean over dimensions, over the samples of a step.

    One row per teacher, of the samples routed to it (each counts with its weight), and a last row of all
    samples for the anchor; one column per state.
    """

    def __init__(self, cfg: DistillationConfig, model: Model, teachers: list[str], anchor_T: list[float]):
        """`anchor_T`: the anchor's weight at each state."""
        self.cfg, self.model, self.teachers, self.anchor_T = cfg, model, teachers, anchor_T
        self.sums_RT = torch.zeros(len(teachers) + 1, cfg.steps, device=model.device)
        self.counts_RT = torch.zeros_like(self.sums_RT)
        self.seen_T = torch.zeros(cfg.steps, device=model.device)
        """Samples trained on at each state, whoever taught them."""
        self.parts: list[tuple[list[Prompt], Tensor]] = []
        """The micro-batches: whose samples, and their squares (B, T, K)."""
        self.beside: dict = {}
        """What else the step measured."""

    def add(
        self,
        squares_BTK: Tensor,
        prompts_B: list[Prompt],
        routed_BK: Tensor,
        real: list[int],
        queried: list[int],
    ) -> None:
        """Distances of one micro-batch; `routed_BK` says whose samples they are, `real` which are not
        padding."""
        self.parts.append((prompts_B, squares_BTK))
        real_B = torch.tensor(real, dtype=torch.float32)
        own_BK = (routed_BK * real_B[:, None]).to(squares_BTK.device)
        # Chosen, not multiplied: the NaN of another's sample times 0 would be NaN.
        own_BTK = torch.where(own_BK[:, None] != 0, squares_BTK * own_BK[:, None], 0)
        self.sums_RT[:-1] += own_BTK.sum(0).T
        self.counts_RT[:-1, queried] += own_BK.sum(0)[:, None]
        self.seen_T[queried] += sum(real)
        held = [state for state in queried if self.anchor_T[state] > 0]
        if held:
            self.sums_RT[-1, held] += squares_BTK[:, held, self.teachers.index(self.cfg.anchor)].sum(0)
            self.counts_RT[-1, held] += sum(real)

    def collect(self) -> None:
        """Sum over ranks (a collective) and send the table to the host, without waiting for it: it must not
        be read before something else has been waited for."""
        rows = len(self.sums_RT)
        table = ranks.total(torch.cat([self.sums_RT, self.counts_RT, self.seen_T[None]])).double()
        table = table.to("cpu", non_blocking=True)
        self.sums_RT, self.counts_RT, self.seen_T = table[:rows], table[rows:-1], table[-1]

    def name_non_finite(self, step: int) -> None:
        """Say where the first distance is that is not a number; the step itself is skipped by its
        gradient."""
        bad = (~self.sums_RT.isfinite()).T.nonzero().tolist()
        if bad:
            state, row = bad[0]
            name = [*self.teachers, "anchor"][row]
            # The table is the same on all ranks, so all of them are here.
            prompts = [prompt for part in ranks.gather(self.bad_prompts()) for prompt in part]
            where = f"step {step}: non-finite velocity difference to {name} at state {state}"
            say("; ".join([where, *prompts[:1]]))

    def bad_prompts(self) -> list[str]:
        """Task and prompt of this rank's samples that have a distance which is not a number."""
        words = []
        for prompts_B, squares_BTK in self.parts:
            bad_B = ~squares_BTK.isfinite().flatten(1).all(1)
            words += [f"task {prompts_B[b].task!r}, prompt {prompts_B[b].text!r}" for b in bad_B.nonzero()]
        return words

    def metrics(self) -> dict:
        """The loss (eq. 16), and per teacher and anchor its weighted loss and its KL per sigma.

        All in nats per dimension. The KL is that of the rollout's transitions (eq. 12), whatever --weight is.
        """
        row = {"loss": 0.0}
        weight_T = torch.tensor(self._weights(self.cfg.weight), dtype=torch.float64)
        for k, name in enumerate(self.teachers):
            if self.counts_RT[k].sum() > 0:
                row[name] = self._distance(k, weight_T)
                row["loss"] += self._share(self.sums_RT[k], weight_T)
        if self.counts_RT[-1].sum() > 0:
            row["anchor"] = self._distance(-1, weight_T)
            anchor_T = torch.tensor(self.anchor_T, dtype=torch.float64)
            row["loss"] += self._share(self.sums_RT[-1], weight_T * anchor_T)
        return row | self.beside

    def _share(self, sums_T: Tensor, weight_T: Tensor) -> float:
        """What a row adds to the mean loss over samples and states."""
        trained_T = self.seen_T > 0  # elsewhere the weight may be infinite
        return float((sums_T * weight_T)[trained_T].sum() / self.seen_T.sum())

    def _distance(self, row: int, weight_T: Tensor) -> dict:
        """{"loss", "kl"} of one row: the mean over its states of what they weigh, and the KL per sigma."""
        seen_T = self.counts_RT[row] > 0
        mean_T = self.sums_RT[row] / self.counts_RT[row].clamp(min=1e-9)
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


class TaskGradients:
    """The gradients of tasks that are trained one after the other: differences of what has accumulated."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.before: Tensor | float = 0.0
        self.found: dict[str, Tensor] = {}

    def note(self, task: str) -> None:
        """All that has been added since the last call is `task`'s (a collective)."""
        now = ranks.mean_gradient(self.parameters)
        self.found[task] = now - self.before
        self.before = now

    def cosines(self) -> dict[str, float]:
        """Eq. 4: the cosine between every two tasks' gradients, {"a/b": cos}."""
        names = list(self.found)
        cosines = {}
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                cosine = torch.nn.functional.cosine_similarity(self.found[a], self.found[b], dim=0)
                cosines[f"{a}/{b}"] = float(cosine)
        return cosines


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

    def metrics(self, cfg: GRPOConfig) -> dict:
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
