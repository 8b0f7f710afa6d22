"""The trained parameters, their optimizer and their moving average: what a checkpoint holds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from opd import lora, ranks
from opd.config import NFTConfig, RunConfig
from opd.formats.export import deployment_of, save_lora, save_transformer
from opd.formats.lora_files import KEY
from opd.lora import BASE, EMA, OLD
from opd.model import Model


def learning_rate(cfg: RunConfig, step: int) -> float:
    """Linear warm-up, then constant or a cosine down to zero."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    if cfg.decay == "constant":
        return cfg.lr
    progress = (step - cfg.warmup) / max(1, cfg.iterations - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def due(done: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now; `every` 0 means
    never."""
    if every == 0:
        return False
    return done % every == 0 or done == last


class Trained:
    """The parameters that a run trains: the student's LoRA, or (--full) all weights of the transformer."""

    def __init__(self, cfg: RunConfig, model: Model):
        self.cfg, self.model = cfg, model
        if model.trained == BASE:
            self.parameters = dict(model.transformer.named_parameters())
        else:
            self.parameters = lora.parameters_of(model.transformer, model.trained)
        parameters = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, eps=cfg.adam_eps
        )
        self.average = {}
        if cfg.ema > 0:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Where the average teaches, it is an adapter on the model, and moves there.
        taught = lora.parameters_of(model.transformer, EMA)
        if taught:
            self.average = dict(zip(self.parameters, taught.values(), strict=True))
        # Stage nft's old policy, by the names of what it follows.
        self.old = {}
        if isinstance(cfg, NFTConfig):
            olds = lora.parameters_of(model.transformer, OLD)
            self.old = dict(zip(self.parameters, olds.values(), strict=True))
        self.updates = 0
        """Calls of `update` in this process."""
        self.before: tuple[int, dict[str, Tensor]] = (-1, {})
        """A step of several updates, and the state before the first of them."""

    def update(self, step: int, turn: int = 0, turns: int = 1) -> float:
        """Clip and step; returns the gradient norm. A non-finite norm (the same on every rank) skips the
        step.

        `turn` of `turns`: where a rollout is followed by several updates. The average moves every `ema_every`
        of them.
        """
        self.updates += 1
        if turns > 1 and self.before[0] != step:
            self.before = step, {name: tensor.clone() for name, tensor in self.state().items()}
        ranks.reshard(self.model.transformer)
        ranks.average_gradients(list(self.parameters.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.cfg.clip)
        norm = float(ranks.full(norm))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.cfg, step)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._move_average(step * turns + turn)
        return norm

    def undo(self, step: int) -> None:
        """Take back what a step has done that was not finished."""
        if self.before[0] == step:
            for name, tensor in self.state().items():
                tensor.copy_(self.before[1][name])

    def _move_average(self, count: int) -> None:
        """EMA with decay min(ema, (1 + n) / (10 + n)), n updates in."""
        if (count + 1) % self.cfg.ema_every != 0:
            return
        decay = min(self.cfg.ema, (1 + count) / (10 + count))
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - decay)

    def move_old(self, share: float) -> None:
        """Stage nft's old policy keeps `share` of itself and takes the rest from what is trained."""
        for name, old in self.old.items():
            old.data.lerp_(self.parameters[name].detach(), 1 - share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the moving average (if there is one)."""
        ranks.reshard(self.model.transformer)
        kept = {name: self.parameters[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                self.parameters[name].copy_(average)
            try:
                yield
            finally:
                ranks.reshard(self.model.transformer)
                for name, value in kept.items():
                    self.parameters[name].copy_(value)

    # ---- saving and resuming ----

    def weights(self) -> dict[str, Tensor]:
        """What the run would ship now, on rank 0: the average if there is one, whole (collectives)."""
        with self.averaged():
            return ranks.gathered({name: p.detach() for name, p in self.parameters.items()})

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write `weights()` as a PEFT directory, or as the `transformer/` directory of a pipeline, and how it
        is to be sampled."""
        deployment = deployment_of(self.cfg, self.model)
        deployment.write(folder)
        if self.model.trained == BASE:
            save_transformer(folder, self.model.transformer, weights, self.model.dtype)
        else:
            metadata = {KEY: deployment.text()}
            save_lora(folder, weights, self.model.trained, self.cfg.rank, self.cfg.alpha, metadata)

    def state(self) -> dict[str, Tensor]:
        """Everything to resume from, by name, to be read or filled: of what is sharded this rank's part.
        Moments that no step has made yet are zero, as AdamW makes them."""
        tensors = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.tensor(0.0)
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[key] = torch.zeros_like(parameter.detach())
            tensors[f"model/{name}"] = parameter.detach()
            for key, value in moments.items():
                tensors[f"optimizer/{key}/{name}"] = value
        for name, average in self.average.items():
            tensors[f"average/{name}"] = average
        for name, old in self.old.items():
            tensors[f"old/{name}"] = old.detach()
        return tensors
