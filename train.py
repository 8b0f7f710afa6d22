"""Train: on-policy distillation of flow-matching teachers into one student; before it, the teachers by GRPO
(opd/grpo.py) or without likelihoods (opd/nft.py), and flow-matching fine-tuning (opd/sft.py).

    python train.py                                      # the miniature: three teachers, one student
    python train.py mini --seed 1 --out runs/seed1       # PRESET --field value; see opd/presets.py
    torchrun --nproc_per_node 8 train.py sd35 --shard-size 8
    python train.py sd35-grpo-ocr --help                 # its stage's flags; --dry-run prints their values

The method (arXiv 2605.08063). The student samples its own trajectory x_1 -> x_0, by SDE unless told. At every
visited state the teacher of the prompt's task, and an anchor, say which velocity they would have taken; the
squared difference, weighted by the KL's w, is the exact KL of the two transitions. The anchor is one more
teacher of every sample: alpha is 1 for the task's teacher, and lambda more for the anchor.

    L_b = w_b sum_k alpha_bk |v_b - v_k,b|^2                                            (eq. 16)

States carry no gradient, so the forward pass that drives the rollout is the one the loss needs: loss,
backward, next state. Where we differ from the paper and its code, and why: README, "Where we differ".

Shapes: N samples of a step over all ranks, B of a micro-batch, T states of a trajectory, K teachers, R rows
of the log: one per teacher, and one of all samples for the anchor.
"""

import opd  # isort: skip  # noqa: F401 (sets OpenMP's waiting before torch reads it)
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from opd import compiled, errors, flow, lora, ranks, routing, signals
from opd.cli import describe, given_fields, parse, starting_point
from opd.config import DistillationConfig, GRPOConfig, NFTConfig, RewardedConfig, RunConfig
from opd.config.own import step_aside
from opd.data import MicroBatch, Pools, Prompt, micro_batches, prompts_of_step, seed_of
from opd.diagnostics import brief, distance_metrics, name_non_finite, reward_metrics, summed
from opd.estimators import ESTIMATORS
from opd.grpo import GRPO
from opd.model import Model
from opd.nft import NFT
from opd.optim import Trained, due, learning_rate
from opd.presets import PRESETS
from opd.ranks import say
from opd.report.card import check_login
from opd.report.memory import forecast
from opd.report.report import Report
from opd.report.tracker import check_tracker
from opd.rewards import Rewards
from opd.runfolder import RunFolder
from opd.setup import Data, absent, contents, set_up
from opd.sft import SFT
from opd.teachers import RewardRouter, ask, load_teachers, mean_velocity, route_of, teacher_queries
from opd.trajectory import State

MAX_BAD_STEPS = 5
"""A run ends after so many steps in a row that change nothing; where its last steps do, at its end."""


def main() -> None:
    """The command. What the user can mend ends in one line, and so does a signal, with status 0."""
    with errors.in_one_line(ValueError, OSError):
        cfg, changes = step_aside(parse(sys.argv[1:], PRESETS), given_fields(sys.argv[1:]))
        cfg.check(ranks.declared_world())
        if cfg.dry_run:
            source, *_ = starting_point(sys.argv[1:], PRESETS)
            print("\n".join([*(f"# {line}" for line in changes), describe(cfg, source)]), flush=True)
            for lost in absent(cfg):
                print(f"# not on this disk: {lost}", flush=True)
            print(forecast(cfg))
            return
    with signals.handled():
        run(cfg, changes)


def run(cfg: RunConfig, changes: list[str] | tuple = ()) -> None:
    """Set up, train, score. `changes`: what to say of the settings first."""
    with errors.in_one_line(ValueError, OSError):
        check_login(cfg.push)
        check_tracker(cfg.tracker)
        device = ranks.start(cfg.deterministic)
        if changes:
            say("the preset steps aside for what the command line names:")
        for line in changes:
            say(line)
        folder = RunFolder(cfg, active=ranks.rank() == 0)
        model, data, shown, rewards = set_up(cfg, device)
        if folder.active:
            folder.check_contents(contents(cfg, model, data))
    with errors.in_one_line(FloatingPointError, OSError):
        trained = Trained(cfg, model)
        report = Report(cfg, model, data, shown, rewards, folder)
        stage = choose_stage(cfg, model, data, rewards, trained)
        with signals.deferred():
            unscored = train(cfg, stage, trained, folder, report)
        if unscored is not None:
            report.close()
            say(f"run folder: {folder.path}")
            if unscored:
                way_out = "mend the scorer; the same command scores the student again"
                errors.leave(f"error: pictures of {', '.join(unscored)} have no score; {way_out}")
    ranks.stop()


def train(
    cfg: RunConfig, stage: "Stage", trained: Trained, folder: RunFolder, report: Report
) -> list[str] | None:
    """The loop of every stage: step, log, save, show; then the scores. The same command again goes on after
    the last checkpoint. Returns the tasks without a score; None where a signal stopped it between two states.
    """
    done = folder.resume(trained)
    bad_steps, samples = 0, cfg.samples_per_step()
    quiet = not folder.active or cfg.iterations == 0
    try:
        report.begin(trained, done)
        bar = tqdm(range(done, cfg.iterations), initial=done, total=cfg.iterations, disable=quiet)
        for step in bar:
            signals.boundary()
            trained.model.ahead(step)
            started = time.perf_counter()
            metrics, norm = stage.step(step)
            seconds = time.perf_counter() - started
            done = step + 1

            fault = fault_of_step(cfg, metrics, norm)
            bad_steps = bad_steps + 1 if fault else 0
            if fault:
                say(f"step {done}: {fault}; step skipped")
            if bad_steps == MAX_BAD_STEPS or fault and done == cfg.iterations:
                raise FloatingPointError(f"{bad_steps} steps in a row with {fault}; {WAYS_OUT[fault]}")

            if math.isfinite(norm):
                metrics |= {"grad_norm": norm, "lr": learning_rate(cfg, step)}
                metrics |= {"effective_batch": samples, "samples_per_second": samples / seconds}
                metrics |= {"states_per_second": cfg.states_per_sample() * samples / seconds}
                if cfg.compile:
                    metrics |= {"graphs": compiled.graphs()}
                report.log({"step": done} | metrics)
                bar.set_postfix_str(brief(metrics))
            if due(done, cfg.save_every, cfg.iterations):
                folder.save(trained, done)
            report.show(trained, done)
        if cfg.iterations == 0:  # a merge without training
            folder.export(trained, 0)
        return report.table(trained)
    except signals.Stopped as signal:
        trained.undo(done)  # what the step after it had begun; the run that goes on makes it again
        folder.save_to_go_on(trained, done)
        where = f"step {done} of {cfg.iterations}; the same command goes on there"
        if done == cfg.iterations:
            where = "the last step; the same command goes on with the scores"
        say(f"stopped by {signal} after {where}")
        return None


WAYS_OUT = {
    "a non-finite gradient": "lower --lr or use --dtype float32",
    "no reward for any group": "mend the reward, or give it longer with --reward-timeout",
}


def fault_of_step(cfg: RunConfig, metrics: dict, norm: float) -> str:
    """Why a step has changed nothing, one of WAYS_OUT; "" if it has."""
    if not math.isfinite(norm):
        return "a non-finite gradient"
    # Distillation routed by rewards learns from its teachers even where no reward came.
    if isinstance(cfg, RewardedConfig) and metrics["groups"]["dropped"] == metrics["groups"]["all"]:
        return "no reward for any group"
    return ""


# ---- one optimizer step of distillation --------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an optimizer step trains on, the same on every rank."""

    step: int
    prompts_N: list[Prompt]
    route_N: list[str]
    """Each sample's teacher, or weighted sum of teachers."""
    routed_NK: Tensor
    """The same as weights over the teachers."""
    queried: list[int]
    """Indices of the states that are trained on, rising."""
    metrics: dict
    """What was measured to make it: the rewards, with --routing reward."""


class Distillation:
    """Stage opd: the student walks, and at each state is pulled to its teachers' velocity."""

    def __init__(
        self, cfg: DistillationConfig, model: Model, pools: Pools, rewards: Rewards, trained: Trained
    ):
        self.cfg, self.model, self.pools, self.trained = cfg, model, pools, trained
        self.teachers = load_teachers(cfg, model, pools)
        self.names = list(self.teachers)
        self.estimate = ESTIMATORS[cfg.estimator]
        self.anchor = 0
        """The anchor's column; without one its weight is 0 at every state."""
        if cfg.anchored():
            self.anchor = self.names.index(cfg.anchor)
        sigmas = model.sigmas(cfg.steps)
        self.weight_T = flow.state_weights(cfg.weight, sigmas, cfg.rollout, cfg.noise_level)
        """w at each state."""
        self.anchor_T = routing.anchor_weights(sigmas[:-1], cfg.anchor_weight, cfg.anchor_levels)
        """The anchor's weight (lambda) there."""
        self.router = None
        if cfg.routing == "reward":
            self.router = RewardRouter(cfg, model, rewards)

    def step(self, step: int) -> tuple[dict, float]:
        """One optimizer step: (metrics, gradient norm)."""
        plan = self.plan(step)
        sums_RT, parts = self.accumulate(plan)
        # Sent without waiting: the next line is the step's only wait for the device.
        sums_RT = ranks.total(sums_RT).double().to("cpu", non_blocking=True)
        norm = self.trained.update(step)
        name_non_finite(step, self.names, sums_RT, parts)
        return self.metrics(plan, sums_RT), norm

    def metrics(self, plan: Plan, sums_RT: Tensor) -> dict:
        """The log's row of a step, from its sums on the CPU."""
        weights = self.weight_T, self.anchor_T
        return distance_metrics(sums_RT, plan.routed_NK, plan.queried, *weights, self.names) | plan.metrics

    def accumulate(self, plan: Plan) -> tuple[Tensor, list[tuple[list[Prompt], Tensor]]]:
        """The gradient of one optimizer step over this rank's micro-batches, left in the student's .grad.
        Returns the sums of their distances to the teachers, and the distances of each."""
        sums_RT = torch.zeros(len(self.names) + 1, self.cfg.steps, device=self.model.device)
        parts = []
        # Samples of one teacher stay together in a micro-batch. Source pictures of two sizes do not stack.
        routes = dict(enumerate(plan.route_N))
        shapes = self.model.shapes([prompt.asked for prompt in plan.prompts_N])
        # The adapter stays on around backward: recomputed activations must see the one of their forward pass.
        with lora.use(self.model.transformer, self.model.trained):
            for batch in micro_batches(routes, self.cfg.micro_batch, ranks.world(), ranks.rank(), shapes):
                distances_BTK = self.walk_and_learn(plan, batch)
                if batch.real:
                    sums_RT += summed(distances_BTK, plan.routed_NK[batch.samples], self.anchor)
                    parts.append(([plan.prompts_N[n] for n in batch.samples], distances_BTK))
        return sums_RT, parts

    def plan(self, step: int) -> Plan:
        """A pure function of (seed, step); with --routing reward also of the student, which samples first."""
        cfg, metrics = self.cfg, {}
        prompts = prompts_of_step(
            self.pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
        )
        prompts_N = [prompt for prompt in prompts for _ in range(cfg.group)]
        route_N = [route_of(cfg, prompt) for prompt in prompts_N]
        if self.router is not None:
            route_N, scores_PG = self.router.routes(prompts_N, route_N, self.walk, step)
            metrics = reward_metrics(scores_PG, [prompt.task for prompt in prompts])
        routed_NK = routing.rows(route_N, self.names)
        return Plan(step, prompts_N, route_N, routed_NK, queried_states(cfg, step), metrics)

    def walk(self, step: int, index: list[int]) -> Iterator[State]:
        """The trajectories of samples `index`, a function of (seed, step)."""
        cfg = self.cfg
        path = self.model.path(cfg.steps, cfg.rollout, cfg.noise_level, (cfg.seed, step, "noise"))
        return self.model.walk(path, seed_of(cfg.seed, step, "start"), index)

    def walk_and_learn(self, plan: Plan, batch: MicroBatch) -> Tensor:
        """Walk a micro-batch from noise to its last queried state; at every queried state ask the teachers
        and go backward. Returns |v_b - v_k,b|^2 (B, T, K), mean over dimensions, 0 where alpha is 0.

        A queried state costs a sample one student forward and backward and a forward of each of its teachers.
        """
        cfg, model, teachers = self.cfg, self.model, list(self.teachers.values())
        prompts = [plan.prompts_N[n].asked for n in batch.samples]
        text = model.text(prompts)
        # Whom to ask hangs on the state only by the anchor's weight (lambda) there.
        whom_at = {}
        for weight in set(self.anchor_T):
            alpha_NK = routing.anchored(plan.routed_NK, self.anchor, weight)
            whom_at[weight] = teacher_queries(alpha_NK, batch, model.device)
        if cfg.walker == "teacher":
            routed = teacher_queries(plan.routed_NK, batch, model.device)
            routed_BK = plan.routed_NK[batch.samples].to(model.device, non_blocking=True)
        # Gradients are averaged over ranks; with this factor the sum over samples and states is their mean.
        scale = ranks.world() / (len(plan.prompts_N) * len(plan.queried))
        distances_BTK = torch.zeros(len(text), cfg.steps, len(teachers), device=model.device)

        # From noise on, state by state; the walk goes on at state.x_next, which each branch sets.
        for state in self.walk(plan.step, batch.samples):
            signals.boundary()
            if state.i in plan.queried:
                # The one forward pass of the student: it has the gradient, and it drives the rollout.
                v = model.velocity(state.x, state.sigma_B, text, cfg.guidance)
                whom = whom_at[self.anchor_T[state.i]]
                targets = ask(teachers, whom, state, prompts)
                w_B = torch.full_like(state.sigma_B, self.weight_T[state.i])
                # Eq. 16 and, in the same pass over memory, the student's step to the next state, a constant.
                loss_B, squares_BK, x_next = self.estimate(state, v, targets, whom.alpha_BK, w_B)
                (loss_B.sum() * scale).backward()
                distances_BTK[:, state.i] = squares_BK
                state.x_next = x_next
            elif cfg.walker == "student":
                # Not trained on: the student only walks past it.
                with torch.no_grad():
                    state.step(model.velocity(state.x, state.sigma_B, text, cfg.guidance))
            if state.i == plan.queried[-1]:
                break
            if cfg.walker == "teacher":  # off-policy: the sample's teachers take the step, not the anchor
                if state.i not in plan.queried:
                    targets = ask(teachers, routed, state, prompts)
                state.step(mean_velocity(targets, routed_BK))
        return distances_BTK


def queried_states(cfg: DistillationConfig, step: int) -> list[int]:
    """Indices of the states that are trained on in this step: all of those that may be, or K drawn without
    replacement from Beta."""
    states = list(cfg.queryable())
    if cfg.queries == 0:
        return states
    middle = (torch.arange(len(states), dtype=torch.float64) + 0.5) / len(states)
    a, b = torch.tensor(cfg.query_beta)
    # A state so far out that its density is 0 in float32 can still be drawn, last.
    density = torch.distributions.Beta(a, b).log_prob(middle.float()).exp().clamp(min=1e-37)
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "query"))
    drawn = torch.multinomial(density, cfg.queries, generator=generator).tolist()
    return sorted(states[place] for place in drawn)


# ---- the stages --------------------------------------------------------------------------------------------

Stage = Distillation | GRPO | NFT | SFT


def choose_stage(cfg: RunConfig, model: Model, data: Data, rewards: Rewards, trained: Trained) -> Stage:
    """The work of a step: `stage.step(number)` -> (metrics, gradient norm)."""
    if isinstance(cfg, DistillationConfig):
        return Distillation(cfg, model, data, rewards, trained)
    if isinstance(cfg, GRPOConfig):
        return GRPO(cfg, model, data, rewards, trained)
    if isinstance(cfg, NFTConfig):
        return NFT(cfg, model, data, rewards, trained)
    return SFT(cfg, model, data, trained)


if __name__ == "__main__":
    main()
