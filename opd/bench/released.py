"""Our emulation of the STRUCTURE of the released Flow-OPD loop, from our own modules: not the released code.

What is emulated: trajectories are rolled out first, to their end, without gradients, and all their states are
kept; then the student's forward pass runs a second time over the stored states. Every teacher, and the anchor
unless it is the base, is a whole float32 transformer of its own, that computes under autocast in the run's
dtype. A micro-batch holds samples of one task.
What is left out: the VAE and the rewards of the rollout, data loading, the released loss. The loss is ours
(eq. 16) on the same samples with the same noise, so that both structures must find the same gradient.
"""

from dataclasses import replace

import torch
from torch import Tensor

from opd import adapters, kernels, trajectory
from opd.adapters import BASE
from opd.bench.model import World, attach_student, merged_copy
from opd.conditioning import TextBatch
from opd.data import MicroBatch, micro_batches, seed_of
from opd.diagnostics import Distances
from opd.model import Model
from opd.optim import Trained
from opd.teachers import Teacher, adapter_teacher
from opd.trajectory import State
from train import Distillation, Plan


class Released:
    """A stage like `train.Distillation`: step(number) -> (metrics, gradient norm)."""

    def __init__(self, world: World):
        self.cfg, self.model = world.cfg, world.model
        self.copies: dict[str, Model] = {}
        for name, lora in world.teachers.items():
            whole = merged_copy(world.model.transformer, lora).to(world.model.device)
            self.copies[name] = replace(world.model, transformer=whole)
        if world.cfg.anchor_weight > 0 and world.cfg.anchor in world.pools:
            # The anchor is a copy of its own also where it is one of the teachers.
            lora = world.teachers[world.cfg.anchor]
            whole = merged_copy(world.model.transformer, lora).to(world.model.device)
            self.copies["anchor"] = replace(world.model, transformer=whole)
        attach_student(world)
        self.trained = Trained(world.cfg, world.model)
        self.ours = Distillation(world.cfg, world.model, world.pools, {}, self.trained)

    def step(self, step: int) -> tuple[dict, float]:
        plan = self.ours.plan(step)
        squares = Distances(self.cfg, self.model, list(self.ours.teachers), plan.anchor_T)
        stored = []
        for batch in self.batches(plan):
            stored.append((batch, self.sample(plan, batch)))
        for batch, states in stored:
            squares_BTK = self.learn(plan, batch, states)
            prompts_B = [plan.prompts_N[n] for n in batch.samples]
            squares.add(squares_BTK, prompts_B, plan.routed_NK[batch.samples], batch.real, plan.queried)
        squares.collect()
        norm = self.trained.update(step)
        return squares.metrics(), norm

    def batches(self, plan: Plan) -> list[MicroBatch]:
        """One task after the other."""
        batches = []
        for task in dict.fromkeys(plan.route_N):
            mine = {n: name for n, name in enumerate(plan.route_N) if name == task}
            batches += micro_batches(mine, self.cfg.micro_batch, 1, 0)
        return batches

    def sample(self, plan: Plan, batch: MicroBatch) -> list[State]:
        """Every state of the trajectories, the student's forward passes without gradients."""
        cfg, model = self.cfg, self.model
        text = self.texts(plan, batch).by(model.conditioning)
        index = torch.tensor(batch.samples, device=model.device)
        seeds = [seed_of(cfg.seed, plan.step, "noise", i) for i in range(cfg.steps)]
        path = model.path(cfg.steps, cfg.rollout, cfg.noise_level, seeds)
        start = seed_of(cfg.seed, plan.step, "start")
        x = kernels.normal((len(index), *model.shape), start, index, device=model.device)

        def student(state: State) -> Tensor:
            return model.velocity(state.x, state.sigma_B, text, cfg.guidance)

        with adapters.use(model.transformer, model.trained):
            return trajectory.rollout(x, path, index, student)

    def learn(self, plan: Plan, batch: MicroBatch, states: list[State]) -> Tensor:
        """The training pass over stored states. Returns |v_b - v_k,b|^2 (B, T, K) like
        `Distillation.learn`."""
        cfg, model = self.cfg, self.model
        names = list(self.ours.teachers)
        task = plan.route_N[batch.samples[0]]
        texts = self.texts(plan, batch)
        text = texts.by(model.conditioning)
        scale = 1 / (len(plan.prompts_N) * len(plan.queried))
        squares_BTK = torch.zeros(len(text), cfg.steps, len(names), device=model.device)
        for i in plan.queried:
            state = states[i]
            with adapters.use(model.transformer, model.trained):
                v = model.velocity(state.x, state.sigma_B, text, cfg.guidance)
                columns = [names.index(task)]
                targets = [self.teacher(task)(state.x, state.sigma_B, texts)]
                weights = [1.0]
                if cfg.anchor_weight > 0:
                    columns.append(names.index(cfg.anchor))
                    targets.append(self.anchor()(state.x, state.sigma_B, texts))
                    weights.append(cfg.anchor_weight)
                alpha_BK = torch.tensor([weights] * len(text), device=model.device)
                w_B = torch.full_like(state.sigma_B, plan.weight_T[i])
                loss_B, squares_BK = kernels.velocity_mse(v, targets, alpha_BK, w_B)
                (loss_B.sum() * scale).backward()
            for k, column in enumerate(columns):
                squares_BTK[:, i, column] = squares_BK[:, k]
        return squares_BTK

    def texts(self, plan: Plan, batch: MicroBatch) -> TextBatch:
        return TextBatch([plan.prompts_N[n].text for n in batch.samples])

    def anchor(self) -> Teacher:
        if self.cfg.anchor == BASE:
            return adapter_teacher(self.model, BASE, self.cfg.teacher_guidance)
        if "anchor" in self.copies:
            return self.teacher("anchor")
        return self.teacher(self.cfg.anchor)

    def teacher(self, name: str) -> Teacher:
        """The copy `name`, in the run's dtype by autocast, without gradients."""
        whole = self.copies[name]
        dtype = self.model.dtype

        @torch.no_grad()
        def velocity(x_BCHW: Tensor, sigma_B: Tensor, texts: TextBatch) -> Tensor:
            text = texts.by(whole.conditioning)
            mixed = dtype != torch.float32
            with torch.autocast(self.model.device.type, dtype=dtype, enabled=mixed):
                return whole.velocity(x_BCHW, sigma_B, text, self.cfg.teacher_guidance)

        return velocity
