"""The settings of a training run: a flat, frozen dataclass per stage, with bounds at its fields.

    Logistics --- RunConfig --- SFTConfig                 stage sft: flow matching on images
                      |
    Scores -------- Rollout --- DistillationConfig        stage opd: distillation from teachers
                         |
                   RewardedConfig --- GRPOConfig          stage grpo: reinforcement learning from rewards
                         \\----------- NFTConfig           stage nft: the same without likelihoods

The values of named runs are in opd/presets.py. Nothing is read here: a file or an adapter is only a name.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from opd import flow, lora, routing
from opd.cli import (
    BelowOne,
    Count,
    Few,
    Finite,
    Given,
    Interval,
    NotNegative,
    Numbers,
    Positive,
    Range,
    Seconds,
    Seed,
    Shares,
    Texts,
    check_bounds,
    known_names,
    pixels_of,
    plain_names,
)
from opd.estimators import ESTIMATORS
from opd.files import path_of

# A new row of these tables is a new choice of the flag.
Rollouts = Literal[tuple(flow.TRANSITIONS)]
Weights = Literal[tuple(flow.WEIGHTS)]
Estimators = Literal[tuple(ESTIMATORS)]
Objectives = Literal["nft", "awm"]

# No names for a teacher: what train.py logs beside the teachers', and the adapters that it makes itself.
METRICS = "step loss anchor grad_norm lr effective_batch samples_per_second states_per_second graphs seconds"
METRICS = [*METRICS.split(), "watch", "distance"]
METRICS += ["kl", "ratio", "reward", "reward_std", "groups", "failed_rewards"]
ADAPTERS = ("student", "start")


# ---- what stages share -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logistics:
    """How a run is computed, saved and logged. These settings may change when it resumes."""

    out: Annotated[str, Given("the run folder")] = ""
    """Run folder. The same command again resumes it."""
    iterations: Annotated[int, Range(0, 10**6)] = 60
    """Optimizer steps; stage grpo: rollouts. 0 = none: the start, such as a merge, is the student."""
    micro_batch: Count = 48
    """Samples per forward pass on one rank."""
    checkpointing: bool = False
    """Recompute activations in backward: less memory, one more forward."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: minutes at the start, then faster steps."""
    shard_size: Count = 1
    """Ranks that share one copy of the weights: 1 = replicate, all ranks = shard fully, between = hybrid. A
    trained adapter is whole on every rank."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, on a GPU slower ones; an operation without one ends
    the run with its name. On a CPU runs are the same bits without it."""
    save_every: Annotated[int, Range(1, 10**9)] = 20
    """Steps between checkpoints; the last step always saves."""
    keep_last: Interval = 0
    """Checkpoints that are kept in checkpoints/, the latest ones; 0 = all."""
    force_resume: bool = False
    """Resume although settings, or files that the run reads, have changed since it began."""
    sample_every: Interval = 20
    """Steps between sample grids; 0 = none."""
    sample_prompts: str = ""
    """File of prompts (.txt, .jsonl, .csv) that sample grids show, at most 16, in place of held-out ones. A
    line's own "task" says whose teacher stands above it."""
    eval_steps: Few = 10
    """ODE steps of sample grids and evaluation."""
    deploy_guidance: Annotated[float, Finite] = 0.0
    """Guidance that the student is to be sampled with: of its sample grids and scores, and written into its
    folder, where sample.py and opd.evaluation find it. 0 = --guidance."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""
    push: str = ""
    """Hub repository OWNER/NAME that gets the student's folder when the run ends; private if it is new."""
    dry_run: bool = False
    """Print the resolved configuration and the memory predicted on a GPU, and stop."""


@dataclass(frozen=True)
class Scores:
    """Scoring of prompts, trained on and held out. These settings may change when a run resumes."""

    evaluate: bool = True
    """Score base, teachers, start and student on every task when training ends, on held-out prompts where
    there are some."""
    rewards: Texts = field(default_factory=dict)
    """Task -> its scorers for evaluation, `module:function`, commas between; the first makes the mean."""
    heldout: Texts = field(default_factory=dict)
    """Task -> prompts never trained on."""
    eval_prompts: Count = 256
    """Prompts per task in evaluation, repeated with other noise where a file has fewer."""
    watch_every: Interval = 0
    """Steps between scores of the student on held-out prompts of every task, in the log; 0 = never."""
    watch_prompts: Count = 64
    """Prompts per task in those."""
    reward_timeout: Seconds = 60.0
    """Seconds after which a reward is given up and retried; then stage grpo drops the group."""


@dataclass(frozen=True)
class RunConfig(Logistics):
    """What every stage has: the model, the LoRA that is trained, the optimizer."""

    stage = ""  # its name, in config.json and messages
    first = ()  # the fields that a new user sets, as --help names them
    full = False  # a setting of the stages that can train all weights, and of no other
    adam_eps = 1e-8  # AdamW's epsilon: a setting of stage nft, elsewhere PyTorch's own

    model: Annotated[str, Given("a pipeline directory or a Hub id owner/name")] = ""
    """Pipeline directory or Hub id of the base."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the transformer computes in; auto: bfloat16 where the hardware multiplies it, else float32. In
    float16 a mean over the dimensions of a real latent makes gradients underflow to 0, so it is no choice.
    LoRA masters, states and losses are float32, schedules float64, anyway."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    resolution: str = ""
    """Pixels per side, or HEIGHTxWIDTH; none = what the model was made for."""
    rank: Few = 16
    """Rank of the LoRA that is trained."""
    alpha: Annotated[float, Positive] = 32.0
    """Its alpha; the update is scaled by alpha / rank."""
    cold_start: Annotated[str, Given("base, merge or an adapter")] = "base"
    """Where training starts: base (a fresh LoRA), merge (several adapters merged), or an adapter to load."""
    merge: Literal["svd", "naive"] = "svd"
    """How --cold-start merge makes one adapter of several: opd/formats/merging.py has the formulas."""
    merge_from: Texts = field(default_factory=dict)
    """Name -> adapter to merge; none, in stage opd, = the teachers, but for one that only anchors."""
    prompts_per_step: Count = 48
    """Prompts per optimizer step, over all ranks (stage grpo: per rollout; stage sft: images)."""
    guidance: Annotated[float, Finite] = 1.0
    """Guidance of the student in rollout and loss."""
    lr: Annotated[float, Positive] = 1e-3
    """Peak learning rate of AdamW."""
    warmup: Interval = 5
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does after warm-up (cosine: down to zero)."""
    weight_decay: Annotated[float, NotNegative] = 1e-4
    """AdamW's weight decay."""
    clip: Annotated[float, Positive] = 1.0
    """Largest gradient norm."""
    ema: Annotated[float, BelowOne] = 0.0
    """Decay of a moving average of the weights, min(ema, (1+n)/(10+n)): what is saved and scored. 0 = off."""
    ema_every: Count = 1
    """Optimizer steps between its moves."""
    seed: Seed = 0
    """All randomness is a function of this, the step and the sample."""

    def check(self, world: int) -> None:
        """ValueError, naming flag and value, unless the settings suit each other and the `world` ranks."""
        check_bounds(self)
        path_of(self.out)
        if self.resolution != "":
            pixels_of(self.resolution)
        if world % self.shard_size != 0:
            choice = [n for n in range(1, world + 1) if world % n == 0]
            size = f"--shard-size {self.shard_size}"
            raise ValueError(f"{size} does not divide the {world} ranks; choose one of {choice}")
        if self.push != "" and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"--push {self.push!r}: write a Hub repository as OWNER/NAME")
        self.check_start()

    def check_start(self) -> None:
        if self.full and self.cold_start != "base":
            raise ValueError(f"--full trains the base; --cold-start {self.cold_start!r} cannot apply")
        if self.cold_start == "merge":
            if not self.merged():
                way_out = "add --merge-from NAME=ADAPTER ..."
                raise ValueError(f"--cold-start merge has nothing to merge; {way_out}")
            return
        if self.merge != "svd":
            raise ValueError(f"--merge {self.merge} is for --cold-start merge alone; leave it out")
        if self.merge_from:
            raise ValueError(f"--merge-from {self.merge_from} is for --cold-start merge alone; leave it out")

    def samples_per_step(self) -> int:
        """Trajectories, or images, of one step over all ranks."""
        return self.prompts_per_step

    def states_per_sample(self) -> int:
        """States of a trajectory that a step trains on; an image is noised once."""
        return 1

    def deployed_guidance(self) -> float:
        """The guidance that the student is to be sampled with."""
        if self.deploy_guidance == 0:
            return self.guidance
        return self.deploy_guidance

    def merged(self) -> dict[str, str]:
        """Name -> source of what --cold-start merge merges."""
        return self.merge_from


@dataclass(frozen=True)
class Rollout(RunConfig, Scores):
    """What the stages that sample from prompts have."""

    prompts: Annotated[Texts, Given("at least one TASK=FILE pair")] = field(default_factory=dict)
    """Task -> prompt file (.txt, .jsonl, .csv)."""
    mix: Annotated[Shares, Range(1, 10_000)] = field(default_factory=dict)
    """Task -> its share of the prompts, in whole numbers; a task not named has share 1."""
    alternate: bool = False
    """One task per step, the steps taking turns in the ratio of --mix, instead of all tasks in every step."""
    group: Few = 1
    """Trajectories per prompt."""
    steps: Few = 10
    """Denoising steps T of a rollout."""
    rollout: Rollouts = "sde"
    """How the student walks from state to state."""
    noise_level: Annotated[float, NotNegative] = 0.7
    """a: how much noise an SDE or CPS step adds, and what the kl weights assume."""
    skip_last: bool = False
    """Do not train on the last state, whose SDE likelihood is sharpest."""

    def check(self, world: int) -> None:
        super().check(world)
        self.check_tasks()
        if self.rollout == "cps" and self.noise_level > 1:
            raise ValueError(f"--rollout cps needs --noise-level in (0, 1], got {self.noise_level}")
        if self.states() < 1:
            none_left = f"--steps {self.steps} with --skip-last leaves no state to train on"
            raise ValueError(f"{none_left}; use --steps 2 or more")

    def check_tasks(self) -> None:
        plain_names("--prompts", self.prompts)
        plain_names("--heldout", self.heldout)
        known_names("--mix", self.mix, "tasks of --prompts", self.prompts)
        if self.watch_every > 0 and not self.heldout:
            wanted = "scores held-out prompts; give --heldout TASK=FILE"
            raise ValueError(f"--watch-every {self.watch_every} {wanted}")
        scored = []
        if self.evaluate:
            scored += [*self.prompts, *self.heldout]
        if self.watch_every > 0:
            scored += self.heldout
        for task in scored:
            if task not in self.rewards:
                way_out = f"add --rewards {task}=module:function or --no-evaluate"
                raise ValueError(f"task {task!r} has no scorer; {way_out}")

    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.group

    def states(self) -> int:
        """How many states of a trajectory can be trained on."""
        return self.steps - self.skip_last

    def states_per_sample(self) -> int:
        return self.states()

    def share(self) -> dict[str, int]:
        """Task -> its share of the prompts."""
        return dict.fromkeys(self.prompts, 1) | self.mix


# ---- the stages --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationConfig(Rollout):
    """Stage opd: on-policy distillation from teachers."""

    stage = "opd"
    first = ("model", "teachers", "prompts", "prompts_per_step", "iterations", "lr", "micro_batch", "out")

    cold_start: Annotated[str, Given("base, merge or an adapter")] = "merge"
    """Where training starts: base (a fresh LoRA), merge (the teachers merged) or an adapter to load."""
    teachers: Annotated[Texts, Given("at least one NAME=ADAPTER pair")] = field(default_factory=dict)
    """Teacher -> its source: an adapter, a fine-tuned transformer or a whole pipeline (directory, file or Hub
    id[:subfolder]), base (the base itself) or ema (the moving average of the student)."""
    routes: Texts = field(default_factory=dict)
    """Task -> teacher, for tasks that are not taught by the teacher of the same name, or a weighted sum of
    teachers such as 0.7*text+0.3*quality. A prompt's own field "route" goes before it; with --routing reward
    both are what a sample without any score falls back to."""
    routing: Literal["task", "reward"] = "task"
    """Who teaches a sample: the teacher of its task, or that of the task whose reward finds most in the
    finished image, each reward in units of its spread over the step. A reward judges the prompts of its task,
    and all whose metadata has what it needs."""
    anchor: str = ""
    """The teacher that anchors every sample (MAR): a name from --teachers, or base."""
    anchor_weight: Annotated[float, NotNegative] = 0.02
    """lambda of eq. 16; 0 (and no --anchor-levels) = no anchor, and no forward pass for it."""
    anchor_levels: Annotated[Numbers, NotNegative] = field(default_factory=dict)
    """Noise level -> lambda from that level down, above the first of them --anchor-weight: 0.6=2 anchors late
    states, which decide texture, more than early ones, which decide composition."""
    weight: Weights = "kl"
    """Weight of the squared velocity difference at each state."""
    queries: Annotated[int, Range(0, 10_000)] = 0
    """States that are trained on: 0 = all of them; K = that many, drawn per step from Beta(query_beta)."""
    query_beta: Annotated[tuple[float, float], Range(0.01, 1000.0)] = (5.0, 2.0)
    """Density of drawn queries over these states; 0 is their start (noise), 1 their end (data)."""
    query_range: tuple[int, int] = (0, 0)
    """The states that may be trained on: first, and one past the last; 0 0 = all. A trajectory ends after the
    last state that is trained on."""
    walker: Literal["student", "teacher"] = "student"
    """Whose velocity a trajectory follows: the student's or, off-policy, that of its sample's teachers."""
    estimator: Estimators = "pathwise"
    """How a gradient comes from the distance to the teachers: opd/estimators.py."""
    teacher_guidance: Annotated[float, Finite] = 1.0
    """Guidance of teachers and anchor. Higher than --guidance: the student absorbs the difference."""
    teacher_guidances: Annotated[Numbers, Finite] = field(default_factory=dict)
    """Teacher -> a guidance of its own, in place of --teacher-guidance."""
    teacher_devices: Texts = field(default_factory=dict)
    """Teacher with a transformer of its own -> where it is: a device such as cuda:1, or offload (it stays on
    the CPU, and comes to the device one block at a time)."""
    extrapolate: Annotated[Numbers, Range(1.0, 1000.0)] = field(default_factory=dict)
    """Teacher -> l >= 1: its target lies past it, v_T + (l - 1) (v_T - v_ref)."""
    train_rewards: Texts = field(default_factory=dict)
    """Task -> reward, as in stage grpo; for --routing reward."""

    def check(self, world: int) -> None:
        super().check(world)
        self.check_names()
        self.check_own_settings(world)
        self.check_routes()
        self.check_anchor()
        self.check_states()
        self.check_noise()

    def check_names(self) -> None:
        lora.check_names("--teachers", self.teachers)
        for name, source in self.teachers.items():
            if name in METRICS or name in ADAPTERS or (name == "ema" and source != "ema"):
                raise ValueError(f"--teachers: the name {name!r} is taken; choose another")
            if source == "ema" and self.ema == 0:
                way_out = "--ema 0 keeps no moving average to learn from; give one, such as --ema 0.99"
                raise ValueError(f"--teachers {name}=ema: {way_out}")

    def check_own_settings(self, world: int) -> None:
        """What single teachers are given."""
        known = [*self.teachers, "base"]
        known_names("--teacher-guidances", self.teacher_guidances, "teachers", known)
        known_names("--extrapolate", self.extrapolate, "teachers", known)
        for name, factor in self.extrapolate.items():
            if self.adapter_of(name) == "base":
                flag = f"--extrapolate {name}={factor}"
                raise ValueError(f"{flag}: a target leads away from the base, which cannot lead from itself")
        own = [name for name, source in self.teachers.items() if source not in lora.WITHOUT_WEIGHTS]
        known_names("--teacher-devices", self.teacher_devices, "teachers with weights of their own", own)
        for name, place in self.teacher_devices.items():
            flag = f"--teacher-devices {name}={place}"
            if world > 1 and place != "offload":
                way_out = f"use offload or --shard-size {world}"
                raise ValueError(f"{flag} would be the place of all {world} ranks' teachers; {way_out}")
            if self.shard_size > 1 and place == "offload":
                both = f"{flag} and --shard-size {self.shard_size}"
                raise ValueError(f"{both} both spread a teacher out; use one of them")

    def check_routes(self) -> None:
        known, tasks = [*self.teachers, "base"], list(self.prompts)
        for task in tasks:
            for teacher in routing.shares(self.route(task), f"--routes {task}"):
                if teacher not in known:
                    lost = f"task {task!r} is routed to {teacher!r}, which is not among the teachers {known}"
                    raise ValueError(f"{lost}; add it to --teachers or map it with --routes {task}=NAME")
        known_names("--routes", self.routes, "tasks of --prompts", tasks)
        known_names("--train-rewards", self.train_rewards, "tasks of --prompts", tasks)
        for task in tasks:
            if self.judged() and task not in self.train_rewards:
                way_out = f"add --train-rewards {task}=module:function"
                raise ValueError(f"--routing {self.routing}: task {task!r} has no reward; {way_out}")

    def check_anchor(self) -> None:
        for level, weight in self.anchor_levels.items():
            try:
                inside = 0 < float(level) <= 1
            except ValueError:
                inside = False
            if not inside:
                raise ValueError(f"--anchor-levels {level}={weight}: a noise level lies in (0, 1]")
        known = [*self.teachers, "base"]
        if self.anchored() and self.anchor not in known:
            way_out = "name one of them, or have none: --anchor-weight 0 --anchor-levels"
            raise ValueError(f"--anchor {self.anchor!r} is not among the teachers {known}; {way_out}")
        if self.anchored() and self.anchor in self.extrapolate:
            both = (
                f"--extrapolate {self.anchor}={self.extrapolate[self.anchor]} moves the anchor's target too"
            )
            raise ValueError(f"{both}; leave {self.anchor} out of it, or use another --anchor")

    def check_states(self) -> None:
        low, high = self.query_range
        if (low, high) != (0, 0) and not 0 <= low < high <= self.states():
            span = f"the {self.states()} states of a trajectory (--steps, --skip-last)"
            raise ValueError(f"--query-range {low} {high} does not lie within {span}")
        count = len(self.queryable())
        if self.queries > count:
            wanted = f"--queries {self.queries} exceeds the {count} states that may be trained on"
            raise ValueError(f"{wanted}; lower it, raise --steps or widen --query-range")

    def check_noise(self) -> None:
        """Some weights divide by the noise of a step, and some gradients need its likelihood."""
        # Which steps have noise depends on no grid.
        grid = [1 - i / self.steps for i in range(self.steps + 1)]
        every = flow.state_weights(self.weight, grid, self.rollout, self.noise_level)
        finite = all(math.isfinite(every[state]) for state in self.queryable())
        if not finite and self.noise_level == 0:
            way_out = "with --noise-level 0 use --weight ode_kl or uniform"
            raise ValueError(f"--weight {self.weight} divides by the SDE's noise; {way_out}")
        if not finite:
            reason = f"the last {self.rollout} step has no noise, so its weight is infinite"
            both = f"--rollout {self.rollout} with --weight {self.weight}"
            raise ValueError(f"{both}: {reason}; add --skip-last")
        if self.noise_level == 0 and self.rollout != "ode":
            silent = "with --noise-level 0 adds no noise"
            raise ValueError(f"--rollout {self.rollout} {silent}; use --rollout ode")
        last_is_silent = self.rollout == "cps" and self.steps - 1 in self.queryable()
        if self.estimator != "pathwise" and (self.rollout == "ode" or last_is_silent):
            need = f"--estimator {self.estimator} takes the likelihood of noisy steps"
            got = f"got --rollout {self.rollout} --noise-level {self.noise_level}"
            raise ValueError(f"{need}: {got}; use --rollout sde, or cps with --skip-last")
        if self.walker == "teacher" and (self.estimator != "pathwise" or self.judged()):
            reason = "--estimator and --routing reward judge the student's own steps"
            raise ValueError(f"{reason}; leave out --walker {self.walker}")

    def queryable(self) -> range:
        """The states that may be trained on."""
        if self.query_range == (0, 0):
            return range(self.states())
        return range(*self.query_range)

    def states_per_sample(self) -> int:
        return self.queries or len(self.queryable())

    def merged(self) -> dict[str, str]:
        """Name -> source of what --cold-start merge merges: the teachers of the tasks, unless it is said."""
        if self.merge_from:
            return self.merge_from
        taught = set()
        for task in self.prompts:
            taught |= routing.shares(self.route(task), f"--routes {task}").keys()
        merged = {}
        for name, source in self.teachers.items():
            # At the start the average is the start itself; a teacher that only anchors is no task's expert.
            of_student = source in lora.WITHOUT_WEIGHTS and source != lora.BASE
            if not of_student and (name in taught or name != self.anchor):
                merged[name] = source
        return merged

    def guidance_of(self, teacher: str) -> float:
        if teacher in self.teacher_guidances:
            return self.teacher_guidances[teacher]
        return self.teacher_guidance

    def adapter_of(self, teacher: str) -> str:
        """The adapter on the student's base that the teacher is, "base" for none."""
        if teacher not in self.teachers:
            return lora.BASE
        source = self.teachers[teacher]
        return source if source in lora.WITHOUT_WEIGHTS else teacher

    def teacher_device(self, teacher: str) -> str:
        """Where it is put; "" = where the student is."""
        if teacher in self.teacher_devices:
            return self.teacher_devices[teacher]
        return ""

    def route(self, task: str) -> str:
        """The teacher of `task` (eq. 7), or the weighted sum of teachers."""
        if task in self.routes:
            return self.routes[task]
        return task

    def anchored(self) -> bool:
        """Whether any state has an anchor."""
        return self.anchor_weight > 0 or any(weight > 0 for weight in self.anchor_levels.values())

    def training_rewards(self) -> dict[str, str]:
        """Task -> reward that training asks."""
        if self.judged():
            return self.train_rewards
        return {}

    def judged(self) -> bool:
        """Whether finished images are scored before the walk."""
        return self.routing == "reward"


@dataclass(frozen=True)
class RewardedConfig(Rollout):
    """What the stages that learn from rewards have."""

    group: Few = 8
    """Trajectories per prompt; they are compared with each other, so at least 2."""
    train_rewards: Texts = field(default_factory=dict)
    """Task -> reward: module:function, a name from opd/rewards, or a sum like 0.7*a:b+0.3*c:d."""
    advantage_std: Literal["global", "group", "each"] = "global"
    """Advantages are divided by the std of all rewards of the task in this step, or of the group; each: every
    term of a sum of rewards by its own std in the group, then their sum by its own (GDPO)."""
    updates: Count = 1
    """Optimizer steps per rollout: the prompts are cut into so many parts."""

    def check(self, world: int) -> None:
        super().check(world)
        if self.group < 2:
            alone = "an advantage compares the images of one prompt, alone it is always 0"
            raise ValueError(f"--group {self.group}: {alone}; use --group 2 or more")
        if self.prompts_per_step % self.updates != 0:
            whole = f"--prompts-per-step {self.prompts_per_step}; every update takes whole groups"
            raise ValueError(f"--updates {self.updates} does not divide {whole}")
        for task in self.prompts:
            if task not in self.train_rewards:
                way_out = f"add --train-rewards {task}=module:function"
                raise ValueError(f"task {task!r} has no reward to train on; {way_out}")

    def training_rewards(self) -> dict[str, str]:
        """Task -> reward that training asks."""
        return {task: self.train_rewards[task] for task in self.prompts}


@dataclass(frozen=True)
class GRPOConfig(RewardedConfig):
    """Stage grpo: a teacher grown from rewards by Flow-GRPO."""

    stage = "grpo"
    first = ("model", "prompts", "train_rewards", "prompts_per_step", "group", "iterations", "lr", "out")

    full: bool = False
    """Train all weights of the transformer instead of a LoRA."""
    beta: Annotated[float, NotNegative] = 0.04
    """Weight of the KL to the base (adapter off); 0 = no KL, and no forward pass for it. The KL is eq. 12;
    Flow-GRPO's code leaves the step size D out of its variance, so its beta weighs D times what the same
    number weighs here."""
    clip_range: Annotated[float, Positive] = 1e-4
    """c: how far the ratio may leave 1 before it stops to count."""
    guard: bool = False
    """GRPO-Guard: centre the log-ratio and scale it with the step's noise, so that one (smaller) clip range
    fits all states."""
    window: Annotated[int, Range(0, 10_000)] = 0
    """Train on so many consecutive states, drawn per step: noise there, ODE elsewhere. 0 = noise
    everywhere."""
    window_range: tuple[int, int] = (0, 5)
    """The states that a window may cover: first, and one past the last."""
    shared_start: bool = False
    """Start the trajectories of a group from the same noise (DanceGRPO): their rewards then differ by the
    SDE's steps alone, and up to the first of these one forward pass serves the group."""
    epochs: Count = 1
    """Passes over the rollout."""

    def check(self, world: int) -> None:
        super().check(world)
        if self.full and self.beta > 0:
            reason = "the reference is the base with the adapter off, and --full changes the base"
            raise ValueError(f"--beta {self.beta} with --full: {reason}; use --beta 0 or a LoRA")
        if self.full and self.evaluate:
            raise ValueError("--full with --evaluate: the table compares adapters; add --no-evaluate")
        self.check_noise()

    def check_noise(self) -> None:
        """Every state that is trained on needs a noisy step, whose likelihood the ratio is of."""
        if self.rollout == "ode" or self.noise_level == 0:
            got = f"--rollout {self.rollout} --noise-level {self.noise_level}"
            way_out = "use --rollout sde or cps and a noise above 0"
            raise ValueError(f"stage grpo needs the likelihood of a noisy step: {got}; {way_out}")
        low, high = self.window_range
        if self.window > 0 and not (0 <= low and low + self.window <= high <= self.states()):
            span = f"--window-range {low} {high} of the {self.states()} states (--steps, --skip-last)"
            raise ValueError(f"--window {self.window} does not fit into {span}")
        last_is_trained = not self.skip_last and (self.window == 0 or high == self.steps)
        if self.rollout == "cps" and last_is_trained:
            reason = "the last CPS step has no noise, hence no likelihood"
            raise ValueError(f"--rollout cps: {reason}; add --skip-last or end --window-range before it")

    def states_per_sample(self) -> int:
        return self.window or self.states()


@dataclass(frozen=True)
class NFTConfig(RewardedConfig):
    """Stage nft: a teacher grown from rewards without likelihoods, by DiffusionNFT or AWM."""

    stage = "nft"
    first = ("model", "prompts", "train_rewards", "prompts_per_step", "group", "iterations", "lr", "out")

    rollout: Rollouts = "ode"
    """How samples walk from noise to their picture. No likelihood is needed, so any will do."""
    objective: Objectives = "nft"
    """What pulls the velocity to the better pictures: nft (DiffusionNFT) or awm."""
    strength: Annotated[float, Positive] = 1.0
    """b of DiffusionNFT, its beta: the two implicit policies are v_old + b (v - v_old) and v_old - b (v -
    v_old). Smaller = larger steps: the loss is divided by it."""
    levels: Annotated[int, Range(0, 10_000)] = 0
    """Noise levels of the rollout's grid that every picture is noised to, drawn for it without replacement;
    each costs a pass with gradients. 0 = all of them."""
    level_range: tuple[int, int] = (0, 0)
    """Those that may be drawn: first, and one past the last, 0 being pure noise. 0 0 = all."""
    old_decay: Annotated[tuple[float, float, float], NotNegative] = (0.0, 0.001, 0.5)
    """n0, slope, most: after update n the old policy, which makes nft's pictures and holds awm back, keeps
    min(slope (n - n0), most) of itself, nothing before n0, and moves to the new one by the rest. 0 0 0 = the
    old policy is the new one, and costs no forward pass."""
    proximal: Annotated[float, NotNegative] = 1.0
    """awm: weight of |v - v_old|^2, which keeps a step small."""
    beta: Annotated[float, NotNegative] = 1e-4
    """Weight of |v - v_base|^2, the base being the adapter off; 0 = none, and no forward pass for it. Not in
    the papers' losses but in their code; without it runs are known to collapse."""
    adam_eps: Annotated[float, Positive] = 1e-8
    """AdamW's epsilon. The log's grad_rms is what it is added to: far below it, every step is damped."""

    def check(self, world: int) -> None:
        super().check(world)
        low, high = self.level_range
        if (low, high) != (0, 0) and not 0 <= low < high <= self.states():
            span = f"the {self.states()} noise levels of the rollout's grid (--steps, --skip-last)"
            raise ValueError(f"--level-range {low} {high} does not lie within {span}")
        count = len(self.trainable_levels())
        if self.levels > count:
            wanted = f"--levels {self.levels} exceeds the {count} noise levels that may be drawn"
            raise ValueError(f"{wanted}; lower it, raise --steps or widen --level-range")
        if self.old_decay[-1] >= 1:
            decay = " ".join(f"{number:g}" for number in self.old_decay)
            raise ValueError(
                f"--old-decay {decay}: the old policy would stop to move; let the last be below 1"
            )

    def trainable_levels(self) -> range:
        """Indices of the grid's noise levels that may be drawn."""
        if self.level_range == (0, 0):
            return range(self.states())
        return range(*self.level_range)

    def states_per_sample(self) -> int:
        return self.levels or len(self.trainable_levels())


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Stage sft: flow matching on images with captions."""

    stage = "sft"
    first = ("model", "data", "prompts_per_step", "iterations", "lr", "out")

    full: bool = False
    """Train all weights of the transformer instead of a LoRA."""
    data: Annotated[str, Given("a directory with metadata.jsonl and images or latents")] = ""
    """Directory with metadata.jsonl and images, or with metadata.jsonl and latents.safetensors."""
    caption_dropout: Annotated[float, BelowOne] = 0.1
    """Share of captions replaced by "", so that guidance has something to push away from."""


STAGES = {kind.stage: kind for kind in (DistillationConfig, GRPOConfig, NFTConfig, SFTConfig)}
