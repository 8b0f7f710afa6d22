"""Flow matching (eq. 1) on images with captions: pretrains the miniature's base, fine-tunes specialists and cold starts."""

import torch

import kernels
from opd import adapters, flow, ranks
from opd.adapters import BASE, STUDENT
from opd.config import Config
from opd.data import micro_batches, seed_of
from opd.images import Images
from opd.model import Model
from opd.optim import Trained


def gradients(cfg: Config, m: Model, images: Images, step: int) -> torch.Tensor:
    """Accumulate the gradient of the flow-matching loss (eq. 1) on this rank's part of the step's images.

    sigma is logit-normal, shifted like the scheduler's grid. Returns (2,): sum of losses and count over all ranks.
    """
    chosen = images.of_step(cfg.prompts_per_step, cfg.seed, step)
    total = torch.zeros(2, device=m.device)
    for batch in micro_batches(dict.fromkeys(range(len(chosen)), "data"), cfg.micro_batch, ranks.world(), ranks.rank()):
        index = torch.tensor(batch.samples, device=m.device)
        real_B = torch.tensor(batch.real, dtype=torch.float32, device=m.device)
        draws_B2 = kernels.normal((len(index), 2), seed_of(cfg.seed, step, "sigma"), index, device=m.device)
        sigma_B = flow.logit_normal_sigma(draws_B2[:, 0], mean=images.log_shift)
        dropped_B = torch.special.ndtr(draws_B2[:, 1]) < cfg.caption_dropout
        captions = ["" if drop else images.captions[chosen[n]] for n, drop in zip(batch.samples, dropped_B.tolist())]
        data = images.latents[[chosen[n] for n in batch.samples]].to(m.device, torch.float32)
        eps = kernels.normal(tuple(data.shape), seed_of(cfg.seed, step, "eps"), index, device=m.device)
        with adapters.use(m.transformer, BASE if cfg.full else STUDENT):
            v = m.family.velocity(m.transformer, flow.noised(data, eps, sigma_B), sigma_B, m.conditioning(captions))
            loss_B = flow.flow_matching_loss(v, data, eps) * real_B
            (loss_B.sum() * ranks.world() / len(chosen)).backward()
        total += torch.stack([loss_B.detach().sum(), real_B.sum()])
    return ranks.total(total)


def optimizer_step(cfg: Config, m: Model, images: Images, trained: Trained, step: int, first: bool) -> tuple[dict, float]:
    """One optimizer step of flow matching: (metrics, gradient norm)."""
    total = gradients(cfg, m, images, step)
    return {"loss": float(total[0] / total[1])}, trained.update(step)
