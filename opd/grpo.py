"""Stage 1, Flow-GRPO (arXiv 2505.05470): a policy gradient on the transitions of noisy rollouts, from rewards
on images.

One iteration samples G images for each prompt, scores them, and updates on the stored transitions:

    A = (r - mean of the group) / (std + 1e-4), clipped            advantages, in opd/rewards/groups.py
    loss = -min(A ratio, A clip(ratio, 1 - c, 1 + c)),  ratio = p / p_old           clipped_loss
           + beta KL(policy || base)                                      KL of the two transitions, eq. 12

Log-probabilities and KL are means over dimensions (nats per dimension), as in Flow-GRPO. States stay float32
from the rollout to the update: the state that is trained on is, to the bit, the one that was scored.

Shapes: P prompts, G samples each, N = P G samples; B samples of a micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd import kernels, lora, ranks, signals, trajectory
from opd.config import GRPOConfig
from opd.data import MicroBatch, Prompt, seed_of
from opd.diagnostics import STATISTICS, policy_metrics
from opd.families import Condition
from opd.lora import BASE
from opd.rewards.groups import RewardedStage, kept_advantages
from opd.trajectory import State


@dataclass
class Sampled:
    """A micro-batch that was rolled out, and its trained transitions."""

    batch: MicroBatch
    states: list[State]
    old_v: list[Tensor]
    """Velocities of the old policy at these states; kept for --guard alone."""


@dataclass
class SharedPrefix:
    """Which samples of a micro-batch stand at one point: `first` has one of each group, `back` finds a
    sample's own."""

    first: list[int]
    first_index: Tensor
    """The same on the device, made once and not at every state."""
    back_index: Tensor


class GRPO(RewardedStage):
    """Stage grpo: each step samples groups of images, scores them, and updates the policy that made them."""

    cfg: GRPOConfig

    # ---- the rollout ----

    @torch.no_grad()
    def sample(self, batch: MicroBatch, prompts: list[Prompt], step: int) -> tuple[Sampled, Tensor]:
        """Roll the policy out, and keep the trained transitions."""
        cfg, model, states = self.cfg, self.model, trained_states(self.cfg, step)
        text = self.text(prompts, batch)
        shared = self.shared_prefix(batch)
        starts = None
        if cfg.shared_start:
            starts = [n // cfg.group for n in batch.samples]
        sampled = Sampled(batch, [], [])
        with lora.use(model.transformer, model.trained):
            seed = seed_of(cfg.seed, step, "start")
            for state in model.walk(self.path(step, states), seed, batch.samples, starts):
                signals.boundary()
                v = self.velocity(state, text, states, shared)
                state.step(v)
                if state.i in states:
                    sampled.states.append(state)
                if state.i in states and cfg.guard:
                    sampled.old_v.append(v)
        return sampled, state.x_next

    def path(self, step: int, states: list[int]) -> trajectory.Path:
        """Noise at every state, or with --window at the trained ones alone and ODE steps elsewhere."""
        cfg, key = self.cfg, (self.cfg.seed, step, "noise")
        noisy = self.model.path(cfg.steps, cfg.rollout, cfg.noise_level, key)
        if cfg.window == 0:
            return noisy
        transitions = list(self.model.path(cfg.steps, "ode", cfg.noise_level, key).transitions)
        for i in states:
            transitions[i] = noisy.transitions[i]
        return trajectory.Path(noisy.sigmas, transitions, noisy.seeds)

    def shared_prefix(self, batch: MicroBatch) -> SharedPrefix:
        groups = [n // self.cfg.group for n in batch.samples]
        order = list(dict.fromkeys(groups))
        first = [groups.index(group) for group in order]
        back = [order.index(group) for group in groups]
        device = self.model.device
        first_index, back_index = (torch.tensor(rows).to(device, non_blocking=True) for rows in (first, back))
        return SharedPrefix(first, first_index, back_index)

    def velocity(
        self, state: State, text: list[Condition], states: list[int], shared: SharedPrefix
    ) -> Tensor:
        """Guided velocity of the adapter in use at `state`.

        Groups that share their start stand together until the first trained state, where their noise begins:
        up to there one sample of a group answers for all, in the rollout, in the update and in its KL.
        """
        x, sigma_B, guidance = state.x, state.sigma_B, self.cfg.guidance
        if not self.cfg.shared_start or state.i > states[0]:
            return self.model.velocity(x, sigma_B, text, guidance)
        first = shared.first_index
        text_of_first = [text[b] for b in shared.first]
        v = self.model.velocity(x[first], sigma_B[first], text_of_first, guidance)
        return v[shared.back_index]

    # ---- the update ----

    def accumulate(
        self, part: list[Sampled], prompts: list[Prompt], advantage_N: Tensor, kept: int, step: int
    ) -> Tensor:
        """Gradient of one update, left in .grad. Returns the sums of STATISTICS over `kept` samples and their
        states, and last the largest |ratio - 1|, of all ranks."""
        sums = torch.zeros(len(STATISTICS), device=self.model.device)
        largest = torch.zeros((), device=self.model.device)
        for sampled in part:
            scale = ranks.world() / (kept * len(sampled.states))
            more, drift = self.learn(sampled, prompts, advantage_N, scale)
            sums += more
            largest = torch.maximum(largest, drift)
        sums, largest = ranks.total(sums), ranks.largest(largest)
        if self.trained.updates == 0:
            self_test(float(largest), self.cfg.clip_range)
        return torch.cat([sums, largest[None]])

    def finish(self, found: list[Tensor], norm: float, step: int) -> dict:
        """The metrics, from what the updates found."""
        rows_US = torch.stack(found or [torch.zeros(len(STATISTICS) + 1)])
        return policy_metrics(rows_US[:, :-1].sum(0), rows_US[:, -1].max(), self.cfg.beta)

    def learn(
        self, sampled: Sampled, prompts: list[Prompt], advantage_N: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Gradient of one micro-batch. Returns sums over samples and states (see STATISTICS) and max |ratio -
        1|.

        `advantage_N` is NaN for samples of dropped groups, which count for nothing. `scale` makes the sum
        over samples and states the update's mean.
        """
        cfg, model, batch = self.cfg, self.model, sampled.batch
        text = self.text(prompts, batch)
        shared = self.shared_prefix(batch)
        numbers = [state.i for state in sampled.states]
        kept_B, advantage_B = kept_advantages(advantage_N, batch, model.device)
        sums = torch.zeros(len(STATISTICS), device=model.device)
        largest = torch.zeros((), device=model.device)
        for j, state in enumerate(sampled.states):
            signals.boundary()
            kl_weight = float(state.transition.kl_weight())
            reference_v = None
            if cfg.beta > 0:
                with torch.no_grad(), lora.use(model.transformer, BASE):
                    reference_v = self.velocity(state, text, numbers, shared)
            # The adapter stays switched on around backward: recomputed activations must see that of their
            # forward pass.
            with lora.use(model.transformer, model.trained):
                v = self.velocity(state, text, numbers, shared)
                log_ratio_B = kernels.log_prob(state.x_next, state.x, v, state.transition) - state.log_prob_B
                if cfg.guard:
                    kl_old_B = squared_difference(v, sampled.old_v[j], kl_weight)
                    log_ratio_B = guarded(log_ratio_B, kl_old_B, state.transition.std)
                policy_B = clipped_loss(log_ratio_B, advantage_B, cfg.clip_range)
                kl_B = torch.zeros_like(policy_B)
                if cfg.beta > 0:
                    kl_B = squared_difference(v, reference_v, kl_weight)
                loss_B = policy_B + cfg.beta * kl_B
                ((loss_B * kept_B).sum() * scale).backward()
            drift_B = (log_ratio_B.detach().exp() - 1) * batch.real
            largest = torch.maximum(largest, drift_B.abs().max())
            clipped_B = (drift_B.abs() > cfg.clip_range).float()
            ones_B = torch.ones_like(kept_B)
            rows = (policy_B.detach(), kl_B.detach(), drift_B, drift_B**2, clipped_B, ones_B)
            sums += (torch.stack(rows) * kept_B).sum(1)
        return sums, largest


def squared_difference(v: Tensor, other: Tensor, weight: float | Tensor) -> Tensor:
    """weight mean |v - other|^2 (B,): a distillation loss with one teacher. One weight, or one a sample."""
    ones_B1 = v.new_ones(len(v), 1)
    loss_B, _ = kernels.velocity_mse(v, [other], ones_B1, ones_B1[:, 0] * weight)
    return loss_B


# ---- equations ---------------------------------------------------------------------------------------------


def clipped_loss(log_ratio_B: Tensor, advantage_B: Tensor, clip_range: float) -> Tensor:
    """-min(A ratio, A clip(ratio, 1 - c, 1 + c)) (B,)."""
    ratio_B = log_ratio_B.exp()
    clipped_B = ratio_B.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(advantage_B * ratio_B, advantage_B * clipped_B)


def guarded(log_ratio_B: Tensor, kl_old_B: Tensor, step_std: Tensor) -> Tensor:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): std (log ratio + KL of old and new transition).

    The log-ratio of a sampled step has mean -KL and a spread that goes with 1 / std; without its mean and
    times std it is centred and of one size at every noise level, so that one (smaller) clip range fits all
    states. Guard's published code also divides the loss of a state by its step size; we do not.
    """
    return step_std * (log_ratio_B + kl_old_B)


def trained_states(cfg: GRPOConfig, step: int) -> list[int]:
    """Consecutive indices of the states that are trained on: all, all but the last, or a window drawn for
    this step."""
    if cfg.window == 0:
        return list(range(cfg.steps - cfg.skip_last))
    low, high = cfg.window_range
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "window"))
    start = low + int(torch.randint(high - low - cfg.window + 1, (), generator=generator))
    return list(range(start, start + cfg.window))


def self_test(largest: float, clip_range: float) -> None:
    """Before the first update the policy is the one that sampled: every ratio is 1. RuntimeError with the
    likely causes."""
    tolerance = clip_range / 2
    if not largest <= tolerance:
        raise RuntimeError(
            f"before the first update a ratio is {largest:.3g} off 1 (tolerance {tolerance:.3g}, half of "
            "--clip-range): training does not see the policy that sampled. Likely causes: states or "
            "velocities cast to another dtype between rollout and update, active dropout (a model in "
            "train() mode), or another guidance"
        )
