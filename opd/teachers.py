"""Teachers: callables that say which velocity they would take, `(x_BCHW, sigma_B, texts) -> v_BCHW`.

A teacher is given the prompts themselves: it may read them with encoders of its own. Distillation knows
nothing else of a teacher; which kinds there are says opd/teacher_files.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import adapters, flow, routing
from opd.adapters import BASE
from opd.conditioning import TextBatch
from opd.config import DistillationConfig
from opd.data import MicroBatch, Prompt
from opd.flags import require
from opd.model import Model
from opd.trajectory import State

Teacher = Callable[[Tensor, Tensor, TextBatch], Tensor]


def route_of(cfg: DistillationConfig, prompt: Prompt) -> str:
    """Who teaches `prompt`: its own field "route" if it has one, else what its task is routed to."""
    if "route" in prompt.metadata:
        return prompt.metadata["route"]
    return cfg.route(prompt.task)


def teacher_names(cfg: DistillationConfig, pools: dict[str, list[Prompt]]) -> list[str]:
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
    known = [*cfg.teachers, BASE]
    for name in shares:
        require(name in known, f"{where} names {name!r}, which is not among the teachers {known}")
    return shares


def load_teachers(
    cfg: DistillationConfig, model: Model, pools: dict[str, list[Prompt]], guidance: float | None = None
) -> dict[str, Teacher]:
    """Name -> teacher for every column of alpha, each under its own guidance or under `guidance`. Whatever
    teaches must be on the model by now."""
    teachers = {}
    for name in teacher_names(cfg, pools):
        teachers[name] = load_teacher(cfg, model, name, guidance)
        if name in cfg.extrapolate:
            reference = load_teacher(cfg, model, cfg.reference, guidance)
            teachers[name] = extrapolated(teachers[name], reference, cfg.extrapolate[name])
    return teachers


def load_teacher(cfg: DistillationConfig, model: Model, name: str, guidance: float | None = None) -> Teacher:
    """Teacher `name` by itself."""
    own_model, adapter, own_guidance = policy_of(cfg, model, name)
    if guidance is None:
        guidance = own_guidance
    return adapter_teacher(own_model, adapter, guidance)


def extrapolated(teacher: Teacher, reference: Teacher, factor: float) -> Teacher:
    """A teacher that answers v + (l - 1) (v - v_ref); its samples cost one more forward, the reference's."""

    def velocity(x_BCHW: Tensor, sigma_B: Tensor, texts: TextBatch) -> Tensor:
        v = teacher(x_BCHW, sigma_B, texts)
        return flow.extrapolated(v, reference(x_BCHW, sigma_B, texts), factor)

    return velocity


def policy_of(cfg: DistillationConfig, model: Model, name: str) -> tuple[Model, str, float]:
    """What teacher `name` answers with: a model, an adapter on it (BASE: none), and its guidance."""
    guidance = cfg.guidance_of(name)
    if name in model.teachers:
        return model.teachers[name], BASE, guidance
    return model, cfg.adapter_of(name), guidance


def adapter_teacher(model: Model, adapter: str, guidance: float) -> Teacher:
    """A model under an adapter, or under none (BASE), and its own guidance; never a gradient. Question and
    answer are on the student's device."""

    @torch.no_grad()
    def velocity(x_BCHW: Tensor, sigma_B: Tensor, texts: TextBatch) -> Tensor:
        text = texts.by(model.conditioning)
        x, sigma = x_BCHW.to(model.device), sigma_B.to(model.device)
        with adapters.use(model.transformer, adapter):
            return model.velocity(x, sigma, text, guidance).to(x_BCHW.device)

    return velocity


@dataclass(frozen=True)
class Question:
    """Which samples of a micro-batch a teacher is asked about."""

    teacher: Teacher
    rows: list[int]
    """Its own samples here."""
    index: Tensor
    """Those that it is shown, on the device: its own, or the first for nothing."""
    texts: TextBatch
    """Their prompts."""


class Panel:
    """The teachers of one micro-batch: whom to ask about which samples, and with which weight the answers
    count."""

    def __init__(
        self,
        teachers: dict[str, Teacher],
        alpha_NK: Tensor,
        batch: MicroBatch,
        texts: TextBatch,
        device: torch.device,
    ):
        # Padding gets alpha 0: it counts for nothing, and no teacher spends time on it.
        alpha_BK = alpha_NK[batch.samples] * torch.tensor(batch.real)[:, None]
        self.alpha_BK = alpha_BK.to(device)
        self.questions: list[Question | None] = []
        """Per column; None where no rank has samples of the teacher."""
        for column, teacher in enumerate(teachers.values()):
            if (alpha_NK[batch.turn, column] != 0).any():
                rows = alpha_BK[:, column].nonzero().flatten().tolist()
                asked = rows or [0]
                index = torch.tensor(asked, device=device)
                self.questions.append(Question(teacher, rows, index, texts.rows(asked)))
            else:
                self.questions.append(None)

    def targets(self, state: State) -> list[Tensor | None]:
        """What each teacher would do at `state`: K velocities (B, ...), 0 at samples that it is not asked
        about, None for a teacher that no rank has samples of.

        A teacher whose samples are all on other ranks is asked about the first sample for nothing: where
        weights are sharded, every rank must run the same forward passes in the same order.
        """
        targets = []
        for question in self.questions:
            if question is None:
                targets.append(None)
                continue
            if len(question.rows) == len(state.x):
                targets.append(question.teacher(state.x, state.sigma_B, question.texts))
                continue
            x, sigma_B = state.x[question.index], state.sigma_B[question.index]
            answer = question.teacher(x, sigma_B, question.texts)
            target = torch.zeros_like(state.x)
            if question.rows:
                target[question.index] = answer
            targets.append(target)
        return targets

    def velocity(self, state: State) -> Tensor:
        """What the teachers would do together: the sum of their velocities (B, ...) by weight."""
        v = torch.zeros_like(state.x)
        for alpha_B, target in zip(self.alpha_BK.unbind(1), self.targets(state), strict=True):
            if target is not None:
                v += alpha_B.view(-1, *[1] * (v.dim() - 1)) * target
        return v
