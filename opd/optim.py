"""The trained parameters, their optimizer and their moving average: what a checkpoint holds."""

import math
from contextlib import contextmanager

import torch

from opd import adapters, ranks
from opd.adapters import STUDENT
from opd.config import Config
from opd.model import Model


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then constant or a cosine down to zero."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    progress = (step - cfg.warmup) / max(1, cfg.iterations - cfg.warmup)
    return cfg.lr * (0.5 * (1 + math.cos(math.pi * progress)) if cfg.decay == "cosine" else 1.0)


class Trained:
    """The trained parameters, their optimizer and their moving average: what a checkpoint holds."""

    def __init__(self, cfg: Config, m: Model):
        self.cfg, self.m = cfg, m
        named = dict(m.transformer.named_parameters()) if cfg.full else adapters.parameters_of(m.transformer, STUDENT)
        self.parameters = named
        self.optimizer = torch.optim.AdamW(list(named.values()), lr=cfg.lr, weight_decay=cfg.weight_decay)
        self.average = {n: p.detach().clone() for n, p in named.items()} if cfg.ema else {}

    def update(self, step: int, turn: int = 0, turns: int = 1) -> float:
        """Clip and step; returns the gradient norm. A non-finite norm (the same on every rank) skips the step.

        `turn` of `turns`: where an iteration makes several updates. The average moves every `ema_every` of them.
        """
        ranks.reshard(self.m.transformer)
        norm = float(ranks.full(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.cfg.clip)))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.cfg, step)
            self.optimizer.step()
        self.optimizer.zero_grad()
        count = step * turns + turn
        if (count + 1) % self.cfg.ema_every == 0:
            decay = min(self.cfg.ema, (1 + count) / (10 + count))
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), 1 - decay)
        return norm

    @contextmanager
    def averaged(self):
        """Inside, the model holds the moving average (if there is one)."""
        ranks.reshard(self.m.transformer)
        kept = {n: self.parameters[n].detach().clone() for n in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                self.parameters[name].copy_(average)
            yield
            ranks.reshard(self.m.transformer)
            for name, value in kept.items():
                self.parameters[name].copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything to resume from, as whole tensors (a collective)."""
        tensors = {f"model/{n}": ranks.full(p.detach()) for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = ranks.full(value)
        tensors |= {f"average/{n}": ranks.full(a) for n, a in self.average.items()}
        return {n: t.cpu().contiguous() for n, t in tensors.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            ranks.load_full(parameter, tensors[f"model/{name}"])
            if f"optimizer/step/{name}" not in tensors:  # saved before any step succeeded
                continue
            step = tensors[f"optimizer/step/{name}"]
            moments = {k: torch.zeros_like(parameter.detach()) for k in ("exp_avg", "exp_avg_sq")}
            for key, value in moments.items():
                ranks.load_full(value, tensors[f"optimizer/{key}/{name}"])
            self.optimizer.state[parameter] = {"step": step.clone(), **moments}
        for name, average in self.average.items():
            ranks.load_full(average, tensors[f"average/{name}"])
