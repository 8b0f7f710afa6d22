"""Teachers: callables that say which velocity they would take, `(x_BCHW, sigma_B, texts) -> v_BCHW`.

A teacher is given the prompts themselves: it may read them with encoders of its own. Distillation knows
nothing else of a teacher. Today's are adapters on the student's own base, which cost their LoRA weights
alone, and the base itself (adapter off). Another kind is another function here, and a line where
`read_teachers` and `load_teachers` tell kinds apart by their source.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import adapters
from opd.adapters import BASE
from opd.conditioning import TextBatch
from opd.config import Distil
from opd.data import MicroBatch
from opd.lora_files import Lora
from opd.model import Model
from opd.trajectory import State

Teacher = Callable[[Tensor, Tensor, TextBatch], Tensor]


def teacher_names(cfg: Distil) -> list[str]:
    """The columns of alpha: the teachers that some task is routed to, then the anchor if it is none of
    them."""
    names = [cfg.route(task) for task in cfg.prompts]
    if cfg.anchor_weight > 0:
        names.append(cfg.anchor)
    return list(dict.fromkeys(names))


def read_teachers(cfg: Distil, model: Model) -> dict[str, Lora]:
    """The adapters of all teachers but the base, read from disk. ValueError / FileNotFoundError for bad
    files."""
    return {name: model.read_lora(source) for name, source in cfg.teachers.items() if source != BASE}


def load_teachers(cfg: Distil, model: Model) -> dict[str, Teacher]:
    """Name -> teacher for every column of alpha. The adapters must be attached to the model by now."""
    return {name: adapter_teacher(model, name, cfg.teacher_guidance) for name in teacher_names(cfg)}


def adapter_teacher(model: Model, adapter: str, guidance: float) -> Teacher:
    """The student's base with another adapter, or without any (BASE), under its own guidance; never a
    gradient."""

    @torch.no_grad()
    def velocity(x_BCHW: Tensor, sigma_B: Tensor, texts: TextBatch) -> Tensor:
        text = texts.by(model.conditioning)
        with adapters.use(model.transformer, adapter):
            return model.velocity(x_BCHW, sigma_B, text, guidance)

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
