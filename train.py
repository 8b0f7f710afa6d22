"""Train: on-policy distillation of flow-matching teachers into one student; before it, the teachers by GRPO
(opd/grpo.py) and flow-matching fine-tuning (opd/sft.py).

    torchrun train.py                                    # the miniature: three teachers, one student
    torchrun train.py mini --seed 1 --out runs/seed1     # PRESET --field value; see opd/presets.py
    torchrun --nproc_per_node 8 train.py sd35 --shard-size 8
    python train.py --dry-run                            # print the resolved configuration
    python train.py sd35-grpo --help                     # a preset's stage decides which flags there are

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
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from opd import adapters, flow, kernels, merging, ranks, routing, trajectory
from opd.adapters import BASE, START, STUDENT
from opd.conditioning import TextBatch
from opd.config import Distil, Finetune, Grow, Run
from opd.data import MicroBatch, Prompt, load_tasks, micro_batches, prompts_of_step, seed_of
from opd.diagnostics import Squares
from opd.families import load_family
from opd.flags import require
from opd.grpo import Growing
from opd.images import Images, load_images
from opd.lora_files import Lora
from opd.model import Model
from opd.optim import Trained, due, learning_rate
from opd.presets import PRESETS
from opd.ranks import say
from opd.report import Report, say_phases, shown_texts, splits
from opd.rewards import Reward, find_reward
from opd.runfolder import RunFolder
from opd.settings import describe, parse, starting_point
from opd.sft import Finetuning
from opd.teachers import Panel, load_teachers, read_teachers
from opd.trajectory import State


def main() -> None:
    try:
        cfg = parse(sys.argv[1:], PRESETS)
        cfg.check(ranks.declared_world())
        if cfg.dry_run:
            print(describe(cfg, starting_point(sys.argv[1:], PRESETS)[0]))
            return
        device = ranks.start()
        folder = RunFolder(cfg, active=ranks.rank() == 0)
        model, data, rewards = set_up(cfg, device)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    trained = Trained(cfg, model)
    report = Report(cfg, model, data, rewards, folder)
    try:
        train(cfg, choose_stage(cfg, model, data, rewards, trained), trained, folder, report)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    report.table(trained)
    say(f"run folder: {folder.path}")
    ranks.stop()


def train(cfg: Run, stage: "Stage", trained: Trained, folder: RunFolder, report: Report) -> None:
    """The loop of every stage: step, watch, log, save, show. The same command again goes on after the last
    checkpoint."""
    first = folder.resume(trained)
    bad_steps = 0
    samples = cfg.samples_per_step()
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, disable=not folder.active)
    for step in bar:
        started = time.perf_counter()
        metrics, norm = stage.step(step)
        seconds = time.perf_counter() - started
        done = step + 1

        if math.isfinite(norm):
            bad_steps = 0
        else:
            bad_steps += 1
            say(f"step {step}: non-finite gradient; step skipped")
        if bad_steps >= cfg.max_bad_steps:
            raise FloatingPointError(
                f"{bad_steps} non-finite steps in a row; lower --lr {cfg.lr} or use --dtype float32"
            )

        metrics |= report.watch(trained, done)
        if math.isfinite(norm) and folder.worth_logging(metrics, done):
            metrics |= {"grad_norm": norm, "lr": learning_rate(cfg, step)}
            metrics |= {"effective_batch": samples, "samples_per_second": samples / seconds}
            folder.log({"step": done} | metrics)
            bar.set_postfix_str(f"loss={metrics['loss']:.4g}")
        if due(done, cfg.save_every, cfg.iterations):
            folder.save(trained, done)
        if due(done, cfg.sample_every, cfg.iterations):
            report.sample_grid(trained, done)
    say_phases(folder.metrics())
    folder.curves()


# ---- one optimizer step: on-policy distillation ------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an optimizer step trains on, the same on every rank: a pure function of (seed, step)."""

    step: int
    texts_N: list[str]
    teacher_N: list[str]
    """The teacher that each sample's task is routed to; samples of one teacher share micro-batches."""
    routed_NK: Tensor
    alpha_NK: Tensor
    """The routing with the anchor's weight in its column: what the loss sees."""
    queried: list[int]
    """Indices of the states that are trained on."""


class Distillation:
    """Stage opd: each step walks the student's own trajectories and pulls its velocity to its teachers'."""

    def __init__(self, cfg: Distil, model: Model, pools: dict[str, list[Prompt]], trained: Trained):
        self.cfg, self.model, self.pools, self.trained = cfg, model, pools, trained
        self.teachers = load_teachers(cfg, model)
        self.weights = flow.state_weights(cfg.weight, model.sigmas(cfg.steps), cfg.rollout, cfg.noise_level)

    def step(self, step: int) -> tuple[dict, float]:
        """One optimizer step: (metrics, gradient norm)."""
        squares = self.accumulate(self.plan(step))
        norm = self.trained.update(step)
        # Read only now: the norm that the update needs was the step's first wait for the device.
        squares.collect()
        squares.name_non_finite(step)
        return squares.metrics(), norm

    def plan(self, step: int) -> Plan:
        cfg, names = self.cfg, list(self.teachers)
        prompts = prompts_of_step(
            self.pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
        )
        texts_N = [prompt.text for prompt in prompts for _ in range(cfg.group)]
        teacher_N = [cfg.route(prompt.task) for prompt in prompts for _ in range(cfg.group)]
        routed_NK = routing.one_hot(teacher_N, names)
        alpha_NK = routed_NK
        if cfg.anchor_weight > 0:
            alpha_NK = routing.anchored(routed_NK, names.index(cfg.anchor), cfg.anchor_weight)
        return Plan(step, texts_N, teacher_N, routed_NK, alpha_NK, queried_states(cfg, step))

    def accumulate(self, plan: Plan) -> Squares:
        """The gradient of one optimizer step over this rank's micro-batches, left in the student's .grad."""
        cfg = self.cfg
        squares = Squares(cfg, self.model, list(self.teachers))
        kinds = dict(enumerate(plan.teacher_N))
        for batch in micro_batches(kinds, cfg.micro_batch, ranks.world(), ranks.rank()):
            squares_BTK = self.walk(plan, batch)
            squares.add(squares_BTK, plan.routed_NK[batch.samples], batch.real, plan.queried)
        return squares

    def walk(self, plan: Plan, batch: MicroBatch) -> Tensor:
        """Walk a micro-batch from noise along the student's own trajectory; at every queried state ask its
        teachers and go backward. Returns |v_b - v_k,b|^2 (B, T, K), mean over dimensions, 0 where alpha is 0.

        A queried state costs a sample one student forward and backward and a forward of each of its teachers.
        """
        cfg, model = self.cfg, self.model
        index = torch.tensor(batch.samples, device=model.device)
        texts = TextBatch([plan.texts_N[n] for n in batch.samples])
        text = texts.by(model.conditioning)
        panel = Panel(self.teachers, plan.alpha_NK, batch, texts, model.device)
        # Gradients are averaged over ranks; with this factor the sum over samples and states is the global
        # mean.
        scale = ranks.world() / (len(plan.texts_N) * len(plan.queried))

        def student(state: State) -> Tensor:
            return model.velocity(state.x, state.sigma_B, text, cfg.guidance)

        seeds = [seed_of(cfg.seed, plan.step, "noise", i) for i in range(cfg.steps)]
        path = model.path(cfg.steps, cfg.rollout, cfg.noise_level, seeds).until(max(plan.queried) + 1)
        start = seed_of(cfg.seed, plan.step, "start")
        x = kernels.normal((len(index), *model.shape), start, index, device=model.device)
        squares_BTK = torch.zeros(len(index), cfg.steps, len(self.teachers), device=model.device)
        # The adapter stays switched on around backward: recomputed activations must see the one that their
        # forward pass saw.
        with adapters.use(model.transformer, model.trained):
            if cfg.single_pass:
                states = trajectory.walk(x, path, index)
            else:
                states = trajectory.rollout(x, path, index, student)
            for state in states:
                if state.i in plan.queried:
                    targets = panel.targets(state)
                    squares_BTK[:, state.i] = self.learn(
                        state, student(state), targets, panel.alpha_BK, scale
                    )
                elif cfg.single_pass:
                    with torch.no_grad():
                        state.step(student(state))
        return squares_BTK

    def learn(
        self, state: State, v: Tensor, targets: list[Tensor | None], alpha_BK: Tensor, scale: float
    ) -> Tensor:
        """Eq. 16 at one state: loss, its gradient, and the next state, a constant, in one pass over memory.

        `scale` turns the sum over samples and states into the step's mean. Returns |v_b - v_k,b|^2 (B, K).
        """
        w_B = torch.full_like(state.sigma_B, self.weights[state.i])
        loss_B, squares_BK, state.x_next, _ = kernels.opd_step(
            state.x, v, targets, alpha_BK, w_B, state.transition, seed=state.seed, index=state.index
        )
        (loss_B.sum() * scale).backward()
        return squares_BK


def queried_states(cfg: Distil, step: int) -> list[int]:
    """Indices of the states that are trained on in this step: all, or K drawn without replacement from
    Beta."""
    states = cfg.steps - cfg.skip_last
    if cfg.queries == 0:
        return list(range(states))
    middle = (torch.arange(states, dtype=torch.float64) + 0.5) / states
    a, b = torch.tensor(cfg.query_beta)
    density = torch.distributions.Beta(a, b).log_prob(middle.float()).exp()
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "query"))
    return sorted(torch.multinomial(density, cfg.queries, generator=generator).tolist())


# ---- set-up ------------------------------------------------------------------------------------------------

Stage = Distillation | Growing | Finetuning
Data = dict[str, list[Prompt]] | Images


def choose_stage(cfg: Run, model: Model, data: Data, rewards: dict[str, Reward], trained: Trained) -> Stage:
    """The work of a step: `stage.step(number)` -> (metrics, gradient norm)."""
    if isinstance(cfg, Distil):
        return Distillation(cfg, model, data, trained)
    if isinstance(cfg, Grow):
        return Growing(cfg, model, data, rewards, trained)
    return Finetuning(cfg, model, data, trained)


def set_up(cfg: Run, device: torch.device) -> tuple[Model, Data, dict[str, Reward]]:
    """Read and check everything that the user named; only then load weights, attach adapters, shard.

    Returns the model, the data (prompts per task, or images with captions) and every reward of the run by its
    spec.
    """
    model = Model.plan(
        load_family(cfg.family), cfg.model, cfg.dtype, cfg.resolution, cfg.cache, device, cfg.t5
    )
    teachers = {}
    if isinstance(cfg, Distil):
        teachers = read_teachers(cfg, model)
    student = student_start(cfg, model)
    data, texts = load_data(cfg, model)
    rewards = load_rewards(cfg, model, data)
    for name, lora in teachers.items():
        say(f"teacher {name}: {lora.source}  sha256 {lora.sha256[:12]}  |update| {lora.norm():.3f}")

    model.prepare(texts)
    attach_weights(cfg, model, teachers, student)
    if cfg.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    model.transformer.to(device)
    # A frozen base that every rank holds whole needs no FSDP, which would keep a second copy of it.
    if cfg.full or cfg.shard_size > 1:
        blocks = model.family.blocks(model.transformer)
        ranks.shard(model.transformer, blocks, cfg.shard_size, model.dtype, device)
    return model, data, rewards


def attach_weights(cfg: Run, model: Model, teachers: dict[str, Lora], student: Lora) -> None:
    """Load the base, put all adapters on it, and let what is trained require a gradient."""
    if cfg.full:
        model.trained = BASE
        model.load(torch.float32)
        model.transformer.requires_grad_(True)
        return
    model.load()
    for name, lora in teachers.items():
        adapters.attach(model.transformer, name, lora, model.dtype)
    adapters.attach(model.transformer, START, student, model.dtype)
    adapters.attach(model.transformer, STUDENT, student, torch.float32)
    for parameter in adapters.parameters_of(model.transformer, STUDENT).values():
        parameter.requires_grad_(True)


def student_start(cfg: Run, model: Model) -> Lora:
    """The student's first adapter: fresh (= base), several merged, or one from disk."""
    if cfg.cold_start == "base":
        targets = model.family.LORA_TARGETS
        return adapters.fresh_lora(model.skeleton, targets, cfg.rank, cfg.alpha, cfg.seed)
    if cfg.cold_start == "merge":
        merged = {name: source for name, source in cfg.merged().items() if source != BASE}
        loras = {name: model.read_lora(source) for name, source in merged.items()}
        weights = {name: cfg.merge_weight(name) for name in merged}
        recipe = merging.Recipe(cfg.merge, cfg.rank, cfg.merge_density, cfg.seed)
        return merging.merge(loras, weights, recipe, cfg.alpha)
    lora = model.read_lora(cfg.cold_start)
    largest = max(a.shape[0] for a in lora.A.values())
    require(
        largest <= cfg.rank,
        f"--cold-start {cfg.cold_start!r} has rank {largest}; use --rank {largest} or more",
    )
    return merging.fitted(lora, cfg.rank, cfg.alpha)


def load_data(cfg: Run, model: Model) -> tuple[Data, list[str]]:
    """(prompts per task, or images with captions; every text that the run will show to the model)."""
    if isinstance(cfg, Finetune):
        images = load_images(cfg.data, model)
        return images, images.captions + shown_texts(cfg, images)
    pools = load_tasks(cfg.prompts)
    texts = shown_texts(cfg, pools)
    for step in range(cfg.iterations):
        prompts = prompts_of_step(
            pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
        )
        texts += [prompt.text for prompt in prompts]
    return pools, texts


def load_rewards(cfg: Run, model: Model, data: Data) -> dict[str, Reward]:
    """Every reward that the run will call, found and loaded once; those to train on are tried on grey
    images."""
    if isinstance(cfg, Finetune):
        return {}
    specs = []
    if cfg.evaluate or cfg.watch_every:
        specs += cfg.rewards.values()
    if isinstance(cfg, Grow):
        specs += cfg.train_rewards.values()
    rewards = {spec: find_reward(spec) for spec in specs}
    if cfg.evaluate or cfg.watch_every:
        for pools in splits(cfg, data).values():
            for task, pool in pools.items():
                if task in cfg.rewards:
                    rewards[cfg.rewards[task]].check_metadata(task, pool)
    for reward in rewards.values():
        reward.load(model.device)
    if isinstance(cfg, Grow):
        pixels = cfg.resolution or model.family.default_resolution(model.folder)
        for task, pool in data.items():
            rewards[cfg.train_rewards[task]].check(task, pool, pixels)
    return rewards


if __name__ == "__main__":
    main()
