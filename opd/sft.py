"""Flow matching (eq. 1) on images with captions: pretrains bases, fine-tunes specialists and cold starts."""

import torch
from torch import Tensor

from opd import flow, kernels, lora, ranks, signals
from opd.config import SFTConfig
from opd.data import MicroBatch, micro_batches, seed_of
from opd.families import unconditional
from opd.formats.latents import Images
from opd.model import Model
from opd.optim import Trained


class SFT:
    """Stage sft: each step fits the velocity of noised images."""

    def __init__(self, cfg: SFTConfig, model: Model, images: Images, trained: Trained):
        self.cfg, self.model, self.images, self.trained = cfg, model, images, trained

    def step(self, step: int) -> tuple[dict, float]:
        """One optimizer step: (metrics, gradient norm)."""
        # Sent without waiting: the update is the step's only wait for the device.
        total = self.accumulate(step).to("cpu", non_blocking=True)
        norm = self.trained.update(step)
        return {"loss": float(total) / self.cfg.prompts_per_step}, norm

    def accumulate(self, step: int) -> Tensor:
        """The gradient of the flow-matching loss on this rank's part of the step's images, left in .grad.

        Returns the sum of the losses of all ranks.
        """
        cfg = self.cfg
        chosen = self.images.of_step(cfg.prompts_per_step, cfg.seed, step)
        total = torch.zeros((), device=self.model.device)
        kinds = dict.fromkeys(range(len(chosen)), "image")
        shapes = self.model.shapes([self.images.captions[n] for n in chosen])
        for batch in micro_batches(kinds, cfg.micro_batch, ranks.world(), ranks.rank(), shapes):
            signals.boundary()
            with lora.use(self.model.transformer, self.model.trained):
                loss_B = self.loss(chosen, batch, step) * batch.real
                (loss_B.sum() * ranks.world() / len(chosen)).backward()
            total += loss_B.detach().sum()
        return ranks.total(total)

    def loss(self, chosen: list[int], batch: MicroBatch, step: int) -> Tensor:
        """Eq. 1 for a micro-batch (B,): sigma is logit-normal, shifted like the scheduler's grid."""
        cfg, model, images = self.cfg, self.model, self.images
        index = torch.tensor(batch.samples)
        numbers = [chosen[n] for n in batch.samples]
        # On the CPU, which must know whose captions are dropped.
        draws_B2 = kernels.normal((len(index), 2), seed_of(cfg.seed, step, "sigma"), index)
        sigma_B = flow.logit_normal_sigma(draws_B2[:, 0], mean=images.log_shift)
        sigma_B = sigma_B.to(model.device, non_blocking=True)
        dropped_B = torch.special.ndtr(draws_B2[:, 1]) < cfg.caption_dropout
        data = images.latents[numbers].to(model.device, torch.float32, non_blocking=True)
        index = index.to(model.device, non_blocking=True)
        eps = kernels.normal(tuple(data.shape), seed_of(cfg.seed, step, "eps"), index, device=model.device)
        text = model.text([images.captions[n] for n in numbers])
        for b in dropped_B.nonzero().flatten().tolist():
            text[b] = unconditional(text[b], model.negative)
        # A network that is told its guidance learns at the one that it is sampled at; others have none here.
        guidance = cfg.guidance if model.family.guide is None else 1.0
        v = model.velocity(flow.noised(data, eps, sigma_B), sigma_B, text, guidance)
        return flow.flow_matching_loss(v, data, eps)
