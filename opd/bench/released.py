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

from opd import adapters, kernels
from opd.adapters import BASE
from opd.bench.model import World, attach_student, merged_copy
from opd.data import MicroBatch, micro_batches
from opd.diagnostics import summed
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
        plan, stored = self.ours.plan(step), []
        for task in dict.fromkeys(plan.route_N):  # one task after the other
            mine = {n: name for n, name in enumerate(plan.route_N) if name == task}
            for batch in micro_batches(mine, self.cfg.micro_batch, 1, 0):
                stored.append((batch, self.sample(plan, batch)))
        sums_RT = torch.zeros(len(self.ours.names) + 1, self.cfg.steps, device=self.model.device)
        for batch, states in stored:
            distances_BTK = self.learn(plan, batch, states)
            sums_RT += summed(distances_BTK, plan.routed_NK[batch.samples], self.ours.anchor)
        norm = self.trained.update(step)
        return self.ours.metrics(plan, sums_RT.double().cpu()), norm

    @torch.no_grad()
    def sample(self, plan: Plan, batch: MicroBatch) -> list[State]:
        """Every state of the trajectories."""
        text = self.model.text([plan.prompts_N[n].text for n in batch.samples])
        states = []
        with adapters.use(self.model.transformer, self.model.trained):
            for state in self.ours.walk(plan.step, batch.samples, self.cfg.steps):
                state.step(self.model.velocity(state.x, state.sigma_B, text, self.cfg.guidance))
                states.append(state)
        return states

    def learn(self, plan: Plan, batch: MicroBatch, states: list[State]) -> Tensor:
        """The training pass over stored states. Returns |v_b - v_k,b|^2 (B, T, K)."""
        cfg, model, names = self.cfg, self.model, self.ours.names
        prompts = [plan.prompts_N[n].text for n in batch.samples]
        text = model.text(prompts)
        task = plan.route_N[batch.samples[0]]
        columns, teachers, weights = [names.index(task)], [self.teacher(task)], [1.0]
        if cfg.anchor_weight > 0:
            columns.append(names.index(cfg.anchor))
            teachers.append(self.anchor())
            weights.append(cfg.anchor_weight)
        alpha_BK = torch.tensor([weights] * len(text), device=model.device)
        scale = 1 / (len(plan.prompts_N) * len(plan.queried))
        distances_BTK = torch.zeros(len(text), cfg.steps, len(names), device=model.device)
        for i in plan.queried:
            state = states[i]
            with adapters.use(model.transformer, model.trained):
                v = model.velocity(state.x, state.sigma_B, text, cfg.guidance)
                targets = [teacher(state.x, state.sigma_B, prompts) for teacher in teachers]
                w_B = torch.full_like(state.sigma_B, plan.weight_T[i])
                loss_B, distances_BK = kernels.velocity_mse(v, targets, alpha_BK, w_B)
                (loss_B.sum() * scale).backward()
            for k, column in enumerate(columns):
                distances_BTK[:, i, column] = distances_BK[:, k]
        return distances_BTK

    def anchor(self) -> Teacher:
        if self.cfg.anchor == BASE:
            return adapter_teacher(self.model, BASE, self.cfg.teacher_guidance)
        if "anchor" in self.copies:
            return self.teacher("anchor")
        return self.teacher(self.cfg.anchor)

    def teacher(self, name: str) -> Teacher:
        """The copy `name`, in the run's dtype by autocast, without gradients."""
        whole, dtype = self.copies[name], self.model.dtype

        @torch.no_grad()
        def velocity(x_BCHW: Tensor, sigma_B: Tensor, prompts: list[str]) -> Tensor:
            mixed = dtype != torch.float32
            with torch.autocast(self.model.device.type, dtype=dtype, enabled=mixed):
                return whole.velocity(x_BCHW, sigma_B, whole.text(prompts), self.cfg.teacher_guidance)

        return velocity
