"""How far the student is from its teachers, state by state, on two sets of states:

    fixed      trajectories of the start, from fixed prompts and noise: the same states in every step and run,
               so that numbers can be compared between runs
    visited    the same prompts and noise, walked by the student of now

For each teacher, on prompts of the tasks that are routed to it, and each noise level:

    kl         eq. 12, nats per dimension (absent without noise)
    cosine     of the two velocities
    norm       |v| / |v_T|
    gap        closed = 1 - |v - v_T| / |v_base - v_T|: 0 at the base, 1 at the teacher

Every rank computes all of it, so that sharded forward passes match.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from opd import flow, kernels, routing, trajectory
from opd.adapters import BASE, START
from opd.conditioning import TextBatch
from opd.config import DistillationConfig
from opd.data import Prompt, permutation, seed_of
from opd.model import Model
from opd.teachers import Teacher, adapter_teacher, route_of
from opd.trajectory import State

MEASURES = ("square", "cosine", "norm", "gap")


class Probe:
    def __init__(
        self,
        cfg: DistillationConfig,
        model: Model,
        pools: dict[str, list[Prompt]],
        teachers: dict[str, Teacher],
    ):
        self.cfg, self.model, self.teachers = cfg, model, teachers
        self.prompts_of: dict[str, list[Prompt]] = {}
        """Teacher -> prompts; a prompt that several share belongs to the one with the largest weight."""
        for prompt in probe_prompts(cfg, pools):
            weights = routing.shares(route_of(cfg, prompt), "route")
            self.prompts_of.setdefault(max(weights, key=weights.get), []).append(prompt)

    @torch.no_grad()
    def compare(self) -> dict:
        """{"fixed": {teacher: {measure: {sigma: value}}}, "visited": the same}."""
        walkers = {"fixed": START, "visited": self.model.trained}
        found = {}
        with self.model.at(self.model.shapes[0]):  # whatever this step has, rows compare
            for label, walker in walkers.items():
                found[label] = {}
                for name, prompts in self.prompts_of.items():
                    measures_MT = self.measure(name, prompts, walker)
                    found[label][name] = self.readable(measures_MT)
        return found

    def measure(self, name: str, prompts: list[Prompt], walker: str) -> Tensor:
        """MEASURES of the student against teacher `name` at each state: (M, T), means over the prompts."""
        cfg = self.cfg
        teacher, base = self.teachers[name], adapter_teacher(self.model, BASE, cfg.guidance)
        student = adapter_teacher(self.model, self.model.trained, cfg.guidance)
        sums_MT = torch.zeros(len(MEASURES), cfg.steps, device=self.model.device)
        for state, texts in self.states(prompts, walker):
            v, v_teacher, v_base = (who(state.x, state.sigma_B, texts) for who in (student, teacher, base))
            sums_MT[:, state.i] += torch.stack(compared(v, v_teacher, v_base)).sum(1)
        return sums_MT / len(prompts)

    def states(self, prompts: list[Prompt], walker: str) -> Iterator[tuple[State, TextBatch]]:
        """Every state of trajectories walked by adapter `walker`; noise depends on a prompt's place alone."""
        cfg, model = self.cfg, self.model
        seeds = [seed_of(cfg.seed, "probe", i) for i in range(cfg.steps)]
        path = model.path(cfg.steps, cfg.rollout, cfg.noise_level, seeds)
        policy = adapter_teacher(model, walker, cfg.guidance)
        for first in range(0, len(prompts), cfg.micro_batch):
            texts = TextBatch([prompt.text for prompt in prompts[first : first + cfg.micro_batch]])
            index = torch.arange(first, first + len(texts), device=model.device)
            start = seed_of(cfg.seed, "probe", "start")
            x = kernels.normal((len(texts), *model.shape), start, index, device=model.device)
            for state in trajectory.walk(x, path, index):
                yield state, texts
                state.step(policy(state.x, state.sigma_B, texts))

    def readable(self, measures_MT: Tensor) -> dict:
        """{measure: {sigma: value}}, the square distance as a KL."""
        cfg = self.cfg
        sigmas = self.model.sigmas(cfg.steps)
        rows = dict(zip(MEASURES, measures_MT.tolist(), strict=True))
        found = {}
        for measure in ("cosine", "norm", "gap"):
            found[measure] = {
                f"{sigma:.3f}": value for sigma, value in zip(sigmas[:-1], rows[measure], strict=True)
            }
        if cfg.noise_level > 0:
            weights = flow.state_weights("kl", sigmas, cfg.rollout, cfg.noise_level)
            kl = [weight * square for weight, square in zip(weights, rows["square"], strict=True)]
            found["kl"] = {
                f"{sigma:.3f}": value
                for sigma, value in zip(sigmas[:-1], kl, strict=True)
                if math.isfinite(value)
            }
        return found


def compared(v: Tensor, v_teacher: Tensor, v_base: Tensor) -> list[Tensor]:
    """MEASURES of a batch, (B,) each. A teacher that is the base leaves no gap: 1 where it is met."""
    v, v_teacher, v_base = v.flatten(1), v_teacher.flatten(1), v_base.flatten(1)
    distance_B = (v - v_teacher).norm(dim=1)
    gap_B = (v_base - v_teacher).norm(dim=1)
    closed_B = 1 - distance_B / gap_B.clamp(min=1e-12)
    cosine_B = torch.nn.functional.cosine_similarity(v, v_teacher)
    norm_B = v.norm(dim=1) / v_teacher.norm(dim=1)
    return [flow.mean_square(v - v_teacher), cosine_B, norm_B, closed_B]


def probe_prompts(cfg: DistillationConfig, pools: dict[str, list[Prompt]]) -> list[Prompt]:
    """The first --diagnose-prompts of every task in a fixed shuffled order: files are sorted by kind."""
    if cfg.diagnose_every == 0:
        return []
    chosen = []
    for pool in pools.values():
        order = permutation(len(pool), 0, "probe", 0)
        chosen += [pool[place] for place in order[: cfg.diagnose_prompts]]
    return chosen
