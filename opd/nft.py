"""Stage 1 without likelihoods: DiffusionNFT (arXiv 2509.16117), from rewards on images.

One iteration samples G images for each prompt by any solver, scores them, and keeps the clean latents x0
alone. They are noised afresh, x = (1 - sigma) x0 + sigma eps, so that u = eps - x0 is the velocity that leads
back to the image. Images better than their group's mean pull to theirs, worse ones push away:

    r = 1/2 + A / 10,  A = (r - mean) / std clipped to +-5      share_of_positive; opd/rewards/groups.py
    loss = (5 / b) [r L(v+) + (1 - r) L(v-)]                                                        nft_loss
           + beta |v - v_base|^2,  v_base: the adapter off
    L(v') = sigma^2 |v' - u|^2 / w,  w = sigma mean |v' - u|, a constant
    v+ = v_old + b (v - v_old),  v- = v_old - b (v - v_old)

The old policy, which makes the images, is an adapter that follows the trained one. On the policy (v = v_old)
the gradient is -2 A sigma (u - v_old) / mean |u - v_old| whatever b is.

Shapes: P prompts, G samples each, N = P G samples, L noise levels each; B samples of a micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd import flow, kernels, lora, ranks, signals
from opd.config import NFTConfig
from opd.data import MicroBatch, Pools, Prompt, seed_of
from opd.diagnostics import MATCHING, matching_metrics
from opd.grpo import squared_difference
from opd.lora import BASE, OLD
from opd.model import Model
from opd.optim import Trained
from opd.ranks import say
from opd.rewards import Rewards
from opd.rewards.groups import ADVANTAGE_CLIP, RewardedStage, kept_advantages

SMALLEST_WEIGHT = 1e-5
"""Of w, as in the released code."""


@dataclass
class Sampled:
    """A micro-batch of images, as clean latents (B, C, H, W) float32."""

    batch: MicroBatch
    x0: Tensor


@dataclass(frozen=True)
class Noised:
    """What a loss is made of: the images of a micro-batch at one noise level each."""

    u: Tensor
    """eps - x0 (B, C, H, W), the velocity that leads back to the image."""
    v_old: Tensor
    """Of the old policy, a constant."""
    sigma_B: Tensor
    advantage_B: Tensor


class NFT(RewardedStage):
    """Stage nft: each step samples groups of images, scores them, matches the velocity to them, and lets the
    old policy follow."""

    cfg: NFTConfig

    def __init__(self, cfg: NFTConfig, model: Model, pools: Pools, rewards: Rewards, trained: Trained):
        super().__init__(cfg, model, pools, rewards, trained)
        # Not where the network is told its guidance, as FLUX.1 is.
        if cfg.guidance != 1.0 and model.family.guide is not None:
            say(f"--guidance {cfg.guidance:g}: stage nft is known to learn little with guidance; 1 has none")

    @torch.no_grad()
    def sample(self, batch: MicroBatch, prompts: list[Prompt], step: int) -> tuple[Sampled, Tensor]:
        """Sample a micro-batch's images."""
        cfg, model = self.cfg, self.model
        text = self.text(prompts, batch)
        path = model.path(cfg.steps, cfg.rollout, cfg.noise_level, (cfg.seed, step, "noise"))
        with lora.use(model.transformer, OLD):
            for state in model.walk(path, seed_of(cfg.seed, step, "start"), batch.samples):
                signals.boundary()
                state.step(model.velocity(state.x, state.sigma_B, text, cfg.guidance))
        return Sampled(batch, state.x_next), state.x_next

    # ---- the update ----

    def accumulate(
        self, part: list[Sampled], prompts: list[Prompt], advantage_N: Tensor, kept: int, step: int
    ) -> Tensor:
        """Gradient of one update, left in .grad. Returns the sums of MATCHING over `kept` samples and their
        levels, of all ranks."""
        sigma_NL = self.drawn_levels(step)
        sums = torch.zeros(len(MATCHING), device=self.model.device)
        scale = ranks.world() / (kept * sigma_NL.shape[1])
        for sampled in part:
            sums += self.learn(sampled, prompts, advantage_N, sigma_NL, step, scale)
        return ranks.total(sums)

    def finish(self, found: list[Tensor], norm: float, step: int) -> dict:
        """The metrics, from what the updates found. The old policy follows after all of them: each compares
        with the policy that made the images."""
        cfg, sums = self.cfg, sum(found, torch.zeros(len(MATCHING)))
        if found:  # else the step is skipped, and nothing moves
            self.trained.move_old(old_share(cfg, (step + 1) * cfg.updates))
        count = sum(parameter.numel() for parameter in self.trained.parameters.values())
        # Of the gradient that AdamW sees, which is clipped.
        return matching_metrics(sums, cfg.beta) | {"grad_rms": min(norm, cfg.clip) / count**0.5}

    def drawn_levels(self, step: int) -> Tensor:
        """The noise levels that each sample is trained at (N, L) float32, in the order in which they come: a
        function of (seed, step), the same on every rank."""
        cfg = self.cfg
        grid = torch.tensor(self.model.sigmas(cfg.steps)[: cfg.states()])
        generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "levels"))
        order_NL = torch.rand(cfg.samples_per_step(), len(grid), generator=generator).argsort(1)
        return grid[order_NL[:, : cfg.states_per_sample()]]

    def learn(
        self,
        sampled: Sampled,
        prompts: list[Prompt],
        advantage_N: Tensor,
        sigma_NL: Tensor,
        step: int,
        scale: float,
    ) -> Tensor:
        """Gradient of one micro-batch. Returns sums over samples and levels, see MATCHING.

        `advantage_N` is NaN for samples of dropped groups, which count for nothing. `scale` makes the sum
        over samples and levels the update's mean.
        """
        cfg, model, batch = self.cfg, self.model, sampled.batch
        text = self.text(prompts, batch)
        index = torch.tensor(batch.samples).to(model.device, non_blocking=True)
        kept_B, advantage_B = kept_advantages(advantage_N, batch, model.device)
        sigma_LB = sigma_NL[batch.samples].T.contiguous().to(model.device, non_blocking=True)
        sums = torch.zeros(len(MATCHING), device=model.device)
        asked = []
        if not cfg.on_policy():  # else the old policy is the policy
            asked.append(OLD)
        if cfg.beta > 0:
            asked.append(BASE)
        for j, sigma_B in enumerate(sigma_LB):
            signals.boundary()
            seed = seed_of(cfg.seed, step, "level", j)
            eps = kernels.normal(tuple(sampled.x0.shape), seed, index, device=model.device)
            x, v_of = flow.noised(sampled.x0, eps, sigma_B), {}
            for frozen in asked:
                with torch.no_grad(), lora.use(model.transformer, frozen):
                    v_of[frozen] = model.velocity(x, sigma_B, text, cfg.guidance)
            # The adapter stays switched on around backward: recomputed activations must see that of their
            # forward pass.
            with lora.use(model.transformer, model.trained):
                v = model.velocity(x, sigma_B, text, cfg.guidance)
                v_old = v_of[OLD] if OLD in v_of else v.detach()
                noised = Noised(eps - sampled.x0, v_old, sigma_B, advantage_B)
                policy_B = nft_loss(v, noised, cfg.strength)
                from_base_B = size_B = torch.zeros_like(policy_B)
                if cfg.beta > 0:
                    from_base_B = squared_difference(v, v_of[BASE], 1.0)
                    size_B = log_size(v.detach()) - log_size(v_of[BASE])
                (((policy_B + cfg.beta * from_base_B) * kept_B).sum() * scale).backward()
            rows = (policy_B.detach(), from_base_B.detach(), size_B, torch.ones_like(kept_B))
            sums += (torch.stack(rows) * kept_B).sum(1)
        return sums


# ---- equations ---------------------------------------------------------------------------------------------


def share_of_positive(advantage_B: Tensor) -> Tensor:
    """r = 1/2 + A / 10 in [0, 1] (B,): how much an image counts as one to go to, the rest as one to leave."""
    return (0.5 + advantage_B / (2 * ADVANTAGE_CLIP)).clamp(0, 1)


def nft_loss(v: Tensor, noised: Noised, b: float) -> Tensor:
    """(5 / b) [r L(v+) + (1 - r) L(v-)] (B,), differentiable in v.

    It is a distillation loss with two teachers, v_old +- (u - v_old) / b, since
    v+ - u = b (v - v_old - (u - v_old) / b) and v- - u = -b (v - v_old + (u - v_old) / b).
    """
    r_B, v_old = share_of_positive(noised.advantage_B), noised.v_old
    step = b * (v.detach() - v_old)
    teachers = [v_old + (noised.u - v_old) / b, v_old - (noised.u - v_old) / b]
    alpha_B2 = torch.stack(
        [r_B / error_size(v_old + step, noised), (1 - r_B) / error_size(v_old - step, noised)], dim=1
    )
    loss_B, _ = kernels.velocity_mse(v, teachers, alpha_B2, ADVANTAGE_CLIP * b * noised.sigma_B**2)
    return loss_B


def error_size(v: Tensor, noised: Noised) -> Tensor:
    """w = sigma mean |v - u| (B,), at least 1e-5: the mean distance of the predicted image from x0."""
    error_B = noised.sigma_B * (v - noised.u).abs().flatten(1).mean(1)
    return error_B.clamp(min=SMALLEST_WEIGHT)


def log_size(v: Tensor) -> Tensor:
    """log |v|, the root of the mean square (B,)."""
    return v.square().flatten(1).mean(1).log() / 2


def old_share(cfg: NFTConfig, updates: int) -> float:
    """How much of itself the old policy keeps after so many updates: min(slope (n - n0), most), at least
    0."""
    begin, slope, most = cfg.old_decay
    return max(0.0, min(slope * (updates - begin), most))
