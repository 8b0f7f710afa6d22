"""Train: on-policy distillation of flow-matching teachers into one student; before it, the teachers by GRPO
(opd/grpo.py) and flow-matching fine-tuning (opd/sft.py).

    torchrun train.py                                    # the miniature: three teachers, one student
    torchrun train.py mini --seed 1 --out runs/seed1     # PRESET --field value; see opd/presets.py
    torchrun --nproc_per_node 8 train.py sd35 --shard-size 8
    python train.py --dry-run                            # print the resolved configuration
    python train.py sd35-grpo-ocr --help                 # a preset's stage decides which flags there are

The method (arXiv 2605.08063). The student samples its own trajectory x_1 -> x_0 by SDE. At every visited
state the teacher of the prompt's task, and an anchor, say which velocity they would have taken; the weighted
squared difference is the exact KL of the two transitions. The anchor is one more teacher of every sample:

    L_b = w_b sum_k alpha_bk |v_b - v_k,b|^2                                            (eq. 16)

States carry no gradient, so the forward pass that drives the rollout is the one the loss needs: loss,
backward, next state. Where we differ from the paper and its code, and why: README, "Where we differ".

Shapes: N samples of a step over all ranks, B samples of a micro-batch, T states of a trajectory, K teachers.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from opd import adapters, compiled, errors, flow, identity, kernels, ranks, routing, signals, trajectory
from opd.conditioning import TextBatch
from opd.config import DistillationConfig, GRPOConfig, RunConfig
from opd.data import MicroBatch, Prompt, micro_batches, prompts_of_step, seed_of
from opd.diagnostics import Distances, TaskGradients
from opd.estimators import ESTIMATORS, reinforce
from opd.families import Condition
from opd.grpo import GRPO
from opd.judging import Judges
from opd.memory import forecast
from opd.model import Model
from opd.optim import Trained, due, learning_rate
from opd.presets import PRESETS
from opd.probe import Probe
from opd.ranks import say
from opd.report.card import check_login
from opd.report.report import Report, say_phases
from opd.rewards import Reward
from opd.runfolder import RunFolder
from opd.settings import describe, parse, starting_point
from opd.setup import Data, set_up
from opd.sft import SFT
from opd.teachers import Panel, Teacher, load_teachers, route_of
from opd.trajectory import Path, State


def main() -> None:
    """The command. What the user can mend ends in one line, and so does a signal, with status 0."""
    with errors.in_one_line(ValueError, OSError):
        cfg = parse(sys.argv[1:], PRESETS)
        cfg.check(ranks.declared_world())
        if cfg.dry_run:
            print(describe(cfg, starting_point(sys.argv[1:], PRESETS)[0]), flush=True)
            print(forecast(cfg))
            return
    with signals.heard():
        run(cfg)


def run(cfg: RunConfig) -> None:
    """Set up, train, score."""
    with errors.in_one_line(ValueError, OSError):
        check_login(cfg.push)
        device = ranks.start(cfg.rank_timeout, cfg.deterministic)
        folder = RunFolder(cfg, active=ranks.rank() == 0)
        model, data, rewards = set_up(cfg, device)
        if folder.active:
            folder.check_contents(identity.contents(cfg, model))
    with errors.in_one_line(FloatingPointError, OSError):
        trained = Trained(cfg, model)
        report = Report(cfg, model, data, rewards, folder)
        stage = choose_stage(cfg, model, data, rewards, trained)
        with signals.waiting():
            finished = train(cfg, stage, trained, folder, report)
        if finished:
            report.table(trained)
            report.close()
            say(f"run folder: {folder.path}")
    ranks.stop()


def train(cfg: RunConfig, stage: "Stage", trained: Trained, folder: RunFolder, report: Report) -> bool:
    """The loop of every stage: step, watch, log, save, show. The same command again goes on after the last
    checkpoint. Returns whether it came to its end: a signal stops it between two steps."""
    first, model = folder.resume(trained), trained.model
    report.restore(trained, first)
    bad_steps = 0
    samples = cfg.samples_per_step()
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, disable=not folder.active)
    for step in bar:
        signal = signals.asked(model.device)
        if signal:
            bar.close()
            folder.save_to_go_on(trained, step)
            say(f"stopped by {signal} after step {step} of {cfg.iterations}; the same command goes on there")
            return False
        model.ahead(step)
        started = time.perf_counter()
        shape = model.shape_of_step(cfg.seed, step)
        with model.at(shape):
            metrics, norm = stage.step(step)
        seconds = time.perf_counter() - started
        done = step + 1

        fault = fault_of_step(cfg, metrics, norm)
        if fault:
            bad_steps += 1
            say(f"step {step}: {fault}; step skipped")
        else:
            bad_steps = 0
        if bad_steps >= min(cfg.max_bad_steps, cfg.iterations):
            raise FloatingPointError(f"{bad_steps} steps in a row with {fault}; {WAYS_OUT[fault]}")

        metrics |= report.watch(trained, done)
        if math.isfinite(norm) and folder.worth_logging(metrics, done):
            metrics |= {"grad_norm": norm, "lr": learning_rate(cfg, step)}
            metrics |= {"effective_batch": samples, "samples_per_second": samples / seconds}
            metrics |= {"states_per_second": cfg.states_per_sample() * samples / seconds}
            if cfg.compile:
                metrics |= {"graphs": compiled.graphs()}
            if len(model.shapes) > 1:
                metrics |= {"resolution": model.resolutions[model.shapes.index(shape)]}
            folder.log({"step": done} | metrics)
            bar.set_postfix_str(f"loss={metrics['loss']:.4g}")
        if "watch" in metrics:
            folder.save_best(trained, metrics["watch"])
        if due(done, cfg.save_every, cfg.iterations):
            folder.save(trained, done)
        if due(done, cfg.sample_every, cfg.iterations):
            report.sample_grid(trained, done)
        report.show(done)
    say_phases(folder.metrics())
    folder.curves()
    return True


WAYS_OUT = {
    "a non-finite gradient": "lower --lr or use --dtype float32",
    "no reward for any group": "mend the reward, or give it longer with --reward-timeout",
}


def fault_of_step(cfg: RunConfig, metrics: dict, norm: float) -> str:
    """Why a step has changed nothing, one of WAYS_OUT; "" if it has."""
    if not math.isfinite(norm):
        return "a non-finite gradient"
    # A distillation that judges learns from its teachers even where no reward came.
    if isinstance(cfg, GRPOConfig) and metrics["groups"]["dropped"] == metrics["groups"]["all"]:
        return "no reward for any group"
    return ""


# ---- one optimizer step: on-policy distillation ------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an optimizer step trains on, the same on every rank."""

    step: int
    prompts_N: list[Prompt]
    route_N: list[str]
    """Each sample's teacher, or weighted sum of teachers."""
    routed_NK: Tensor
    """The same as weights over the teachers."""
    weight_T: list[float]
    """w at each state: it depends on the noise levels, and they on the size of the pictures."""
    anchor_T: list[float]
    """The anchor's weight at each state."""
    queried: list[int]
    """Indices of the states that are trained on."""
    advantage_N: Tensor | None = None
    """With --reward-weight: what each sample's reward is worth."""


class Distillation:
    """Stage opd: each step walks the student's own trajectories and pulls its velocity to its teachers'."""

    def __init__(
        self,
        cfg: DistillationConfig,
        model: Model,
        pools: dict[str, list[Prompt]],
        rewards: dict[str, Reward],
        trained: Trained,
    ):
        self.cfg, self.model = cfg, model
        self.pools, self.trained = pools, trained
        self.teachers = load_teachers(cfg, model, pools)
        self.branch_teachers = {}
        if cfg.branch_weight > 0:
            self.branch_teachers = load_teachers(cfg, model, pools, guidance=1.0)
        self.estimate = ESTIMATORS[cfg.estimator]
        self.judges = None
        if cfg.judged():
            self.judges = Judges(cfg, rewards, model.device)
        self.probe = Probe(cfg, model, pools, self.teachers)
        if cfg.anchor_target > 0:
            trained.carried["anchor_weight"] = torch.tensor(cfg.anchor_weight, dtype=torch.float64)

    def step(self, step: int) -> tuple[dict, float]:
        """One optimizer step: (metrics, gradient norm)."""
        squares = self.accumulate(self.plan(step))
        squares.collect()
        # The step's only wait for the device; the table, sent before, has then arrived too.
        norm = self.trained.update(step)
        squares.name_non_finite(step)
        metrics = squares.metrics()
        self.adapt_anchor(metrics)
        if due(step + 1, self.cfg.diagnose_every, self.cfg.iterations):
            metrics |= self.probe.compare()
        return metrics, norm

    def plan(self, step: int) -> Plan:
        """A pure function of (seed, step), but for an anchor weight that --anchor-target moves."""
        cfg = self.cfg
        prompts = prompts_of_step(
            self.pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
        )
        prompts_N = [prompt for prompt in prompts for _ in range(cfg.group)]
        route_N = [route_of(cfg, prompt) for prompt in prompts_N]
        routed_NK = routing.rows(route_N, list(self.teachers))
        weight = cfg.anchor_weight
        if "anchor_weight" in self.trained.carried:
            weight = float(self.trained.carried["anchor_weight"])
        sigmas = self.model.sigmas(cfg.steps)
        weight_T = flow.state_weights(cfg.weight, sigmas, cfg.rollout, cfg.noise_level)
        anchor_T = routing.anchor_weights(sigmas[:-1], weight, cfg.anchor_levels)
        return Plan(step, prompts_N, route_N, routed_NK, weight_T, anchor_T, queried_states(cfg, step))

    def accumulate(self, plan: Plan) -> Distances:
        """The gradient of one optimizer step over this rank's micro-batches, left in the student's .grad."""
        cfg, beside = self.cfg, {}
        compare = cfg.cosine_every > 0 and plan.step % cfg.cosine_every == 0
        batches = self.batches(plan, compare)
        # The adapter stays switched on around backward: recomputed activations must see the one that their
        # forward pass saw.
        with adapters.use(self.model.transformer, self.model.trained):
            if cfg.stored():
                walks = [self.rollout(plan, batch) for batch in batches]
            else:
                walks = [self.visit(plan, batch) for batch in batches]
            if self.judges is not None:
                plan, beside = self.judge(plan, batches, walks)
            squares = Distances(cfg, self.model, list(self.teachers), plan.anchor_T)
            squares.beside = beside
            gradients = TaskGradients(list(self.trained.parameters.values()))
            for number, (batch, states) in enumerate(zip(batches, walks, strict=True)):
                squares_BTK = self.learn(plan, batch, states)
                prompts_B = [plan.prompts_N[n] for n in batch.samples]
                routed_BK = plan.routed_NK[batch.samples]
                squares.add(squares_BTK, prompts_B, routed_BK, batch.real, plan.queried)
                if compare and self.task_ends(plan, batches[number:]):
                    gradients.note(plan.prompts_N[batch.samples[0]].task)
        if compare:
            beside["cosine"] = gradients.cosines()
        return squares

    def batches(self, plan: Plan, compare: bool) -> list[MicroBatch]:
        """This rank's micro-batches. Samples of one teacher stay together; where the tasks' gradients are
        compared, a micro-batch has one task, and task comes after task."""
        kinds_of = {"all": dict(enumerate(plan.route_N))}
        if compare:
            kinds_of = {}
            for n, prompt in enumerate(plan.prompts_N):
                kinds_of.setdefault(prompt.task, {})[n] = prompt.task
        batches = []
        for kinds in kinds_of.values():
            batches += micro_batches(kinds, self.cfg.micro_batch, ranks.world(), ranks.rank())
        return batches

    def task_ends(self, plan: Plan, batches: list[MicroBatch]) -> bool:
        """Whether the first of these micro-batches is the last of its task."""
        tasks = [plan.prompts_N[batch.samples[0]].task for batch in batches[:2]]
        return len(tasks) == 1 or tasks[0] != tasks[1]

    # ---- from noise along the student's own trajectory ----

    def visit(self, plan: Plan, batch: MicroBatch) -> Iterator[State]:
        """Walk a micro-batch up to the last queried state. Whoever trains on a queried state takes the step
        from there; at the others the student does, without a gradient."""
        x, path, index, text = self.start(plan, batch)
        for state in trajectory.walk(x, path.until(max(plan.queried) + 1), index):
            if state.i in plan.queried:
                yield state
            else:
                with torch.no_grad():
                    state.step(self.student(state, text))

    def rollout(self, plan: Plan, batch: MicroBatch) -> list[State]:
        """Walk it first and train later, on stored states; to the end where images are judged."""
        x, path, index, text = self.start(plan, batch)
        if self.judges is None:
            path = path.until(max(plan.queried) + 1)
        if self.cfg.walker == "teacher":
            texts = TextBatch([plan.prompts_N[n].text for n in batch.samples])
            panel = Panel(self.teachers, plan.routed_NK, batch, texts, self.model.device)
            return trajectory.rollout(x, path, index, panel.velocity)
        return trajectory.rollout(x, path, index, lambda state: self.student(state, text))

    def start(self, plan: Plan, batch: MicroBatch) -> tuple[Tensor, Path, Tensor, list[Condition]]:
        """(noise (B, ...), the steps to take, the samples' numbers (B,), their text)."""
        cfg, model = self.cfg, self.model
        index = torch.tensor(batch.samples, device=model.device)
        seeds = [seed_of(cfg.seed, plan.step, "noise", i) for i in range(cfg.steps)]
        path = model.path(cfg.steps, cfg.rollout, cfg.noise_level, seeds)
        seed = seed_of(cfg.seed, plan.step, "start")
        x = kernels.normal((len(index), *model.shape), seed, index, device=model.device)
        texts = [plan.prompts_N[n].text for n in batch.samples]
        return x, path, index, model.text(texts)

    def student(self, state: State, text: list[Condition]) -> Tensor:
        return self.model.velocity(state.x, state.sigma_B, text, self.cfg.guidance)

    # ---- the loss ----

    def learn(self, plan: Plan, batch: MicroBatch, states: Iterable[State]) -> Tensor:
        """At every queried state ask the teachers and go backward. Returns |v_b - v_k,b|^2 (B, T, K), mean
        over dimensions, 0 where alpha is 0.

        A queried state costs a sample one student forward and backward and a forward of each of its teachers.
        """
        cfg, model = self.cfg, self.model
        texts = TextBatch([plan.prompts_N[n].text for n in batch.samples])
        text = texts.by(model.conditioning)
        panels = self.panels(self.teachers, plan, batch, texts)
        branch_panels = self.panels(self.branch_teachers, plan, batch, texts)
        # Gradients are averaged over ranks; with this factor the sum over samples and states is the global
        # mean.
        scale = ranks.world() / (len(plan.prompts_N) * len(plan.queried))
        squares_BTK = torch.zeros(len(text), cfg.steps, len(self.teachers), device=model.device)
        for state in states:
            if state.i not in plan.queried:
                continue
            anchor, weight = plan.anchor_T[state.i], plan.weight_T[state.i]
            v, v_branch = model.branches(state.x, state.sigma_B, text, cfg.guidance)
            loss_B, squares_BTK[:, state.i] = self.distance(state, v, panels[anchor], weight)
            if cfg.branch_weight > 0:
                apart_B = self.between_branches(state, v_branch, branch_panels[anchor], weight)
                loss_B = loss_B + cfg.branch_weight * apart_B
            if cfg.normalise > 0:
                loss_B = flow.self_normalised(loss_B, cfg.normalise)
            if plan.advantage_N is not None:
                advantage_B = plan.advantage_N[batch.samples] * torch.tensor(batch.real)
                loss_B = loss_B + cfg.reward_weight * reinforce(state, v, advantage_B.to(model.device))
            (loss_B.sum() * scale).backward()
        return squares_BTK

    def distance(self, state: State, v: Tensor, panel: Panel, weight: float) -> tuple[Tensor, Tensor]:
        """Eq. 16 at one state: (loss (B,), |v_b - v_k,b|^2 (B, K)). Sets the next state, a constant."""
        w_B = torch.full_like(state.sigma_B, weight)
        return self.estimate(state, v, panel.targets(state), panel.alpha_BK, w_B)

    def between_branches(self, state: State, v_branch: Tensor, panel: Panel, weight: float) -> Tensor:
        """The same distance (B,) between the conditional branches, before guidance."""
        w_B = torch.full_like(state.sigma_B, weight)
        return kernels.velocity_mse(v_branch, panel.targets(state), panel.alpha_BK, w_B)[0]

    def panels(
        self, teachers: dict[str, Teacher], plan: Plan, batch: MicroBatch, texts: TextBatch
    ) -> dict[float, Panel]:
        """Weight of the anchor -> whom to ask, and how much the answers count, where it has that weight."""
        panels = {}
        for weight in {plan.anchor_T[i] for i in plan.queried}:
            alpha_NK = plan.routed_NK
            if weight > 0:
                column = list(self.teachers).index(self.cfg.anchor)
                alpha_NK = routing.anchored(alpha_NK, column, weight)
            panels[weight] = Panel(teachers, alpha_NK, batch, texts, self.model.device)
        return panels

    # ---- what goes beyond a step ----

    def judge(self, plan: Plan, batches: list[MicroBatch], walks: list[list[State]]) -> tuple[Plan, dict]:
        """Score the finished images; route by the scores, or note what they are worth."""
        hearings = []
        for batch, states in zip(batches, walks, strict=True):
            images = self.model.decode(states[-1].x_next)
            hearings += self.judges.start(batch, plan.prompts_N, images)
        scores_NJ = self.judges.verdict(hearings, len(plan.prompts_N), plan.step)
        scores_PG = self.judges.own_scores(scores_NJ, plan.prompts_N)
        if self.cfg.routing == "reward":
            route_N = self.judges.routes(scores_NJ, plan.route_N)
            routed_NK = routing.rows(route_N, list(self.teachers))
            plan = replace(plan, route_N=route_N, routed_NK=routed_NK)
        if self.cfg.reward_weight > 0:
            plan = replace(plan, advantage_N=self.judges.advantages(scores_PG, plan.prompts_N))
        return plan, self.judges.metrics(scores_PG, plan.prompts_N)

    def adapt_anchor(self, metrics: dict) -> None:
        """With --anchor-target: log the anchor's weight, then move it towards the target."""
        if self.cfg.anchor_target == 0:
            return
        weight = float(self.trained.carried["anchor_weight"])
        metrics["anchor_weight"] = weight
        weight = routing.adapted(weight, metrics["anchor"]["loss"], self.cfg.anchor_target)
        self.trained.carried["anchor_weight"].fill_(weight)


def queried_states(cfg: DistillationConfig, step: int) -> list[int]:
    """Indices of the states that are trained on in this step: all of those that may be, or K drawn without
    replacement from Beta."""
    states = list(cfg.queryable())
    if cfg.queries == 0:
        return states
    middle = (torch.arange(len(states), dtype=torch.float64) + 0.5) / len(states)
    a, b = torch.tensor(cfg.query_beta)
    density = torch.distributions.Beta(a, b).log_prob(middle.float()).exp()
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "query"))
    drawn = torch.multinomial(density, cfg.queries, generator=generator).tolist()
    return sorted(states[place] for place in drawn)


# ---- the stages --------------------------------------------------------------------------------------------

Stage = Distillation | GRPO | SFT


def choose_stage(
    cfg: RunConfig, model: Model, data: Data, rewards: dict[str, Reward], trained: Trained
) -> Stage:
    """The work of a step: `stage.step(number)` -> (metrics, gradient norm)."""
    if isinstance(cfg, DistillationConfig):
        return Distillation(cfg, model, data, rewards, trained)
    if isinstance(cfg, GRPOConfig):
        return GRPO(cfg, model, data, rewards, trained)
    return SFT(cfg, model, data, trained)


if __name__ == "__main__":
    main()
