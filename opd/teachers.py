"""Who teaches a sample, and what its teachers say.

A teacher is a callable `(x_BCHW, sigma_B, prompts) -> v_BCHW`: the velocity that it would take. It is given
the prompts themselves, since it may read them with encoders of its own. Distillation knows nothing else of a
teacher; which kinds there are says opd/formats/teacher_files.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import flow, lora, ranks, routing, signals
from opd.config import DistillationConfig
from opd.data import Asked, MicroBatch, Pools, Prompt, micro_batches
from opd.errors import require
from opd.lora import BASE
from opd.model import Model
from opd.rewards import Rewards
from opd.rewards.scoring import gather_scores
from opd.trajectory import State

Teacher = Callable[[Tensor, Tensor, list[Asked]], Tensor]


# ---- routes: whose sample is it? ---------------------------------------------------------------------------


def route_of(cfg: DistillationConfig, prompt: Prompt) -> str:
    """Who teaches `prompt`: its own field "route" if it has one, else what its task is routed to."""
    if "route" in prompt.metadata:
        return prompt.metadata["route"]
    return cfg.route(prompt.task)


def main_teacher(cfg: DistillationConfig, prompt: Prompt) -> str | None:
    """The teacher that counts most for a prompt; None for a prompt of no task."""
    if prompt.task not in cfg.prompts and "route" not in prompt.metadata:
        return None
    shares = routing.shares(route_of(cfg, prompt), "route")
    return max(shares, key=lambda name: shares[name])


def teacher_names(cfg: DistillationConfig, pools: Pools) -> list[str]:
    """The columns of alpha: the teachers that some task or prompt is routed to, then the anchor if it is none
    of them. ValueError naming the prompt whose own route cannot be followed."""
    names = []
    for task in cfg.prompts:
        names += routing.shares(cfg.route(task), f"--routes {task}")
    for pool in pools.values():
        for prompt in pool:
            if "route" in prompt.metadata:
                names += own_shares(cfg, prompt)
    if cfg.anchored():
        names.append(cfg.anchor)
    return list(dict.fromkeys(names))


def own_shares(cfg: DistillationConfig, prompt: Prompt) -> dict[str, float]:
    """The shares of a prompt's own route. ValueError naming the prompt."""
    where = f'the field "route" of prompt {prompt.text!r}'
    route = prompt.metadata["route"]
    require(isinstance(route, str), f"{where} is {route!r}; write a teacher or a sum of teachers")
    shares = routing.shares(route, where)
    known = cfg.may_teach()
    for name in shares:
        require(name in known, f"{where} names {name!r}, which is not among the teachers {known}")
    return shares


class RewardRouter:
    """--routing reward: the task whose reward finds most in a sample's picture sends its teacher.

    The pictures are those of the trajectories that the step will train on, sampled before by an ordinary pass
    of the same seeds. It costs one more rollout.
    """

    def __init__(self, cfg: DistillationConfig, model: Model, rewards: Rewards):
        self.cfg, self.model = cfg, model
        self.reward_of = {task: rewards[cfg.train_rewards[task]] for task in cfg.prompts}

    @torch.no_grad()
    def routes(
        self, prompts_N: list[Prompt], route_N: list[str], walk: Callable, step: int
    ) -> tuple[list[str], Tensor]:
        """(each sample's route, its score by its own task's reward, as groups (P, G), NaN where that failed).
        A sample that no reward could score keeps its route. `walk`: that of Distillation."""
        cfg, model = self.cfg, self.model
        pending = {task: [] for task in self.reward_of}
        samples = dict.fromkeys(range(len(prompts_N)), "any")
        shapes = model.shapes([prompt.asked for prompt in prompts_N])
        for batch in micro_batches(samples, cfg.micro_batch, ranks.world(), ranks.rank(), shapes):
            text = model.text([prompts_N[n].asked for n in batch.samples])
            with lora.use(model.transformer, model.trained):
                for state in walk(step, batch.samples):
                    signals.boundary()
                    state.step(model.velocity(state.x, state.sigma_B, text, cfg.guidance))
            if batch.real:
                self.start(batch, prompts_N, model.decode(state.x_next), pending)
        columns = []
        for scorings in pending.values():
            scores_N, failures, _ = gather_scores(scorings, len(prompts_N), model.device)
            columns.append(scores_N)
            for failure in failures:
                ranks.say(f"step {step + 1}: no reward for {failure}")
        scores_NJ = torch.stack(columns, dim=1)
        tasks, routes = list(self.reward_of), []
        for claim, route in zip(routing.claimed(scores_NJ), route_N, strict=True):
            if claim is not None:
                route = cfg.route(tasks[claim])
            routes.append(route)
        own_N = scores_NJ[torch.arange(len(prompts_N)), [tasks.index(prompt.task) for prompt in prompts_N]]
        return routes, own_N.view(-1, cfg.group)

    def start(self, batch: MicroBatch, prompts_N: list[Prompt], images_BCHW: Tensor, pending: dict) -> None:
        """Begin to score a micro-batch by every reward that can judge it: its own task's, and those whose
        metadata the prompt has."""
        for task, reward in self.reward_of.items():
            rows = []
            for b, n in enumerate(batch.samples):
                if prompts_N[n].task == task or reward.fault_of(prompts_N[n]) == "":
                    rows.append(b)
            if rows:
                mine = [prompts_N[batch.samples[b]] for b in rows]
                scoring = reward.start(
                    images_BCHW[rows],
                    [prompt.text for prompt in mine],
                    [prompt.metadata for prompt in mine],
                    self.cfg.reward_timeout,
                )
                pending[task].append(([batch.samples[b] for b in rows], scoring))


# ---- teachers: which velocity would they take? -------------------------------------------------------------


def load_teachers(cfg: DistillationConfig, model: Model, pools: Pools) -> dict[str, Teacher]:
    """Name -> teacher for every column of alpha. Whatever teaches must be on the model by now."""
    teachers = {}
    for name in teacher_names(cfg, pools):
        teachers[name] = load_teacher(cfg, model, name)
        if name in cfg.extrapolate:
            # At the teacher's guidance: what lies between the two is what was learned, and no guidance.
            base = adapter_teacher(model, BASE, cfg.guidance_of(name))
            teachers[name] = extrapolated(teachers[name], base, cfg.extrapolate[name])
    return teachers


def load_teacher(cfg: DistillationConfig, model: Model, name: str) -> Teacher:
    """Teacher `name` by itself: a model of its own, or an adapter on the student's base (BASE: none)."""
    if name in model.teachers:
        return adapter_teacher(model.teachers[name], BASE, cfg.guidance_of(name))
    return adapter_teacher(model, cfg.adapter_of(name), cfg.guidance_of(name))


def adapter_teacher(model: Model, adapter: str, guidance: float) -> Teacher:
    """A model under an adapter, or under none (BASE), and its own guidance; never a gradient. Question and
    answer are on the student's device."""

    @torch.no_grad()
    def velocity(x_BCHW: Tensor, sigma_B: Tensor, prompts: list[Asked]) -> Tensor:
        x, sigma = x_BCHW.to(model.device), sigma_B.to(model.device)
        with lora.use(model.transformer, adapter):
            return model.velocity(x, sigma, model.text(prompts), guidance).to(x_BCHW.device)

    return velocity


def extrapolated(teacher: Teacher, reference: Teacher, factor: float) -> Teacher:
    """A teacher that answers v + (l - 1) (v - v_ref); its samples cost one more forward, the reference's."""

    def velocity(x_BCHW: Tensor, sigma_B: Tensor, prompts: list[Asked]) -> Tensor:
        v = teacher(x_BCHW, sigma_B, prompts)
        return flow.extrapolated(v, reference(x_BCHW, sigma_B, prompts), factor)

    return velocity


# ---- asking them about a micro-batch -----------------------------------------------------------------------


@dataclass(frozen=True)
class Queries:
    """Whom a micro-batch asks about which samples, and how much each answer counts."""

    alpha_BK: Tensor
    """On the device. Padding has alpha 0: it counts for nothing, and no teacher spends time on it."""
    rows_K: list[list[int] | None]
    """Each teacher's samples here; None where no rank has any in this turn."""
    index_K: list[Tensor | None]
    """The same on the device, made once and not at every state."""


def teacher_queries(alpha_NK: Tensor, batch: MicroBatch, device: torch.device) -> Queries:
    """A teacher is asked about the samples whose alpha is not 0."""
    alpha_BK = alpha_NK[batch.samples] * batch.real
    rows_K, index_K = [], []
    for column in range(alpha_NK.shape[1]):
        if (alpha_NK[batch.turn, column] == 0).all():
            rows_K.append(None)
            index_K.append(None)
            continue
        rows = alpha_BK[:, column].nonzero().flatten().tolist()
        rows_K.append(rows)
        index_K.append(torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True))
    return Queries(alpha_BK.to(device, non_blocking=True), rows_K, index_K)


def ask(teachers: list[Teacher], queries: Queries, state: State, prompts: list[Asked]) -> list[Tensor | None]:
    """What each teacher would do at `state`: K velocities (B, ...), 0 at samples that it is not asked about,
    None for a teacher that no rank has samples of."""
    targets = []
    for teacher, rows, index in zip(teachers, queries.rows_K, queries.index_K, strict=True):
        if rows is None:
            targets.append(None)
        elif len(rows) == len(state.x):
            targets.append(teacher(state.x, state.sigma_B, prompts))
        else:
            target = torch.zeros_like(state.x)
            if rows:
                asked = [prompts[b] for b in rows]
                target[index] = teacher(state.x[index], state.sigma_B[index], asked)
            else:
                # Its samples are all on other ranks. Where weights are sharded, every rank must run the same
                # forward passes in the same order: this one is for nothing.
                teacher(state.x[:1], state.sigma_B[:1], prompts[:1])
            targets.append(target)
    return targets


def mean_velocity(targets: list[Tensor | None], alpha_BK: Tensor) -> Tensor:
    """What the teachers would do together (B, ...): the mean of their velocities, weighted by alpha."""
    asked = [k for k, target in enumerate(targets) if target is not None]
    v = sum(flow.per_sample(alpha_BK[:, k], targets[k]) * targets[k] for k in asked)
    return v / flow.per_sample(alpha_BK.sum(1), v)
