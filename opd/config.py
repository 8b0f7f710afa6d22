"""The settings of a training run: a flat, frozen dataclass per stage, its checks beside its fields.

    Logistics --- Run --- SFTConfig                  stage sft: flow matching on images
                   |
    Scores ---- Rollout --- DistillationConfig                  stage opd: distillation from teachers
                       \\--- GRPOConfig                    stage grpo: reinforcement learning from rewards

What they share is in opd/config_base.py, the values of named runs in opd/presets.py. Nothing is read here: a
file or an adapter is only a name.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from opd import flow, routing
from opd.config_base import ADAPTERS, METRICS, Logistics, Rollout, RunConfig, Scores, Weights
from opd.flags import Numbers, Texts, at_least_one, below_one, finite, not_negative, positive, require

ESTIMATORS = ("pathwise", "pg", "pg_state", "pg_live")  # the functions of opd/estimators.py

__all__ = [
    "STAGES",
    "DistillationConfig",
    "SFTConfig",
    "GRPOConfig",
    "Logistics",
    "Rollout",
    "RunConfig",
    "Scores",
]


@dataclass(frozen=True)
class DistillationConfig(Rollout):
    """Stage opd: on-policy distillation from teachers."""

    cold_start: str = "merge"
    """Where training starts: base (a fresh LoRA), merge (the teachers merged) or an adapter to load."""
    teachers: Texts = field(default_factory=dict)
    """Teacher -> its source: an adapter, a fine-tuned transformer or a whole pipeline (directory, file or Hub
    id[:subfolder]), base (the base itself) or ema (the moving average of the student)."""
    routes: Texts = field(default_factory=dict)
    """Task -> teacher, for tasks that are not taught by the teacher of the same name, or a weighted sum of
    teachers such as 0.7*text+0.3*quality. A prompt's own field "route" goes before it."""
    routing: Literal["task", "reward"] = "task"
    """Who teaches a sample: the teacher of its task, or that of the task whose reward finds most in the
    finished image, each reward in units of its spread over the step."""
    anchor: str = ""
    """The teacher that anchors every sample (MAR): a name from --teachers, or base."""
    anchor_weight: float = 0.02
    """lambda of eq. 16; 0 (and no --anchor-levels) = no anchor, and no forward pass for it."""
    anchor_levels: Numbers = field(default_factory=dict)
    """Noise level -> lambda from that level down, above the first of them --anchor-weight: 0.6=2 anchors late
    states, which decide texture, more than early ones, which decide composition."""
    weight: Weights = "kl"
    """Weight of the squared velocity difference at each state."""
    queries: int = 0
    """States that are trained on: 0 = all of them; K = that many, drawn per step from Beta(query_beta)."""
    query_beta: tuple[float, float] = (5.0, 2.0)
    """Density of drawn queries over these states; 0 is their start (noise), 1 their end (data)."""
    query_range: tuple[int, int] = (0, 0)
    """The states that may be trained on: first, and one past the last; 0 0 = all. A trajectory ends after the
    last state that is trained on."""
    walker: Literal["student", "teacher"] = "student"
    """Whose velocity a trajectory follows: the student's or, off-policy, that of its sample's teachers."""
    estimator: Literal[ESTIMATORS] = "pathwise"
    """How a gradient comes from the distance to the teachers: opd/estimators.py."""
    teacher_guidance: float = 1.0
    """Guidance of teachers and anchor. Higher than --guidance: the student absorbs the difference."""
    teacher_guidances: Numbers = field(default_factory=dict)
    """Teacher -> a guidance of its own, in place of --teacher-guidance."""
    teacher_devices: Texts = field(default_factory=dict)
    """Teacher with a transformer of its own -> where it is: a device such as cuda:1, or offload (it stays on
    the CPU, and comes to the device one layer at a time)."""
    extrapolate: Numbers = field(default_factory=dict)
    """Teacher -> l >= 1: its target lies past it, v_T + (l - 1) (v_T - v_ref)."""
    train_rewards: Texts = field(default_factory=dict)
    """Task -> reward, as in stage grpo; for --routing reward."""

    def check(self, world: int) -> None:
        super().check(world)
        finite(self, "teacher_guidance")
        not_negative(self, "anchor_weight", "queries")
        self.check_walk()
        self.check_names()
        self.check_own_settings(world)
        self.check_start()
        self.check_routes()
        self.check_anchor()
        self.check_extrapolation()
        self.check_likelihood()
        self.check_rewards()

    def states_per_sample(self) -> int:
        return self.queries or self.states()

    def check_walk(self) -> None:
        for number in self.query_beta:
            inside = 0 < number < math.inf
            require(inside, f"--query-beta {self.query_beta}: both numbers must be positive and finite")
        low, high = self.query_range
        inside = (low, high) == (0, 0) or 0 <= low < high <= self.states()
        span = f"the {self.states()} states of a trajectory (--steps, --skip-last)"
        require(inside, f"--query-range {low} {high} does not lie within {span}")
        count = len(self.queryable())
        wanted = f"--queries {self.queries} exceeds the {count} states that may be trained on"
        require(self.queries <= count, f"{wanted}; lower it, raise --steps or widen --query-range")
        self.check_weight()
        if self.noise_level == 0 and self.rollout != "ode":
            silent = "with --noise-level 0 adds no noise"
            raise ValueError(f"--rollout {self.rollout} {silent}; use --rollout ode")
        own = self.estimator == "pathwise" and not self.judged()
        reason = "--estimator and --routing reward judge the student's own steps"
        require(own or self.walker == "student", f"{reason}; leave out --walker {self.walker}")

    def check_weight(self) -> None:
        """A weight that divides by the noise of a step needs some; which steps have it depends on no grid."""
        grid = [1 - i / self.steps for i in range(self.steps + 1)]
        every = flow.state_weights(self.weight, grid, self.rollout, self.noise_level)
        finite_everywhere = all(math.isfinite(every[state]) for state in self.queryable())
        if not finite_everywhere and self.noise_level == 0:
            way_out = "with --noise-level 0 use --weight ode_kl or uniform"
            raise ValueError(f"--weight {self.weight} divides by the SDE's noise; {way_out}")
        reason = f"the last {self.rollout} step has no noise, so its weight is infinite; add --skip-last"
        require(finite_everywhere, f"--rollout {self.rollout} with --weight {self.weight}: {reason}")

    def check_names(self) -> None:
        require(len(self.teachers) > 0, "--teachers is empty: give at least one NAME=ADAPTER pair")
        layers = torch.nn.ModuleDict()  # stores adapters under their names, beside its own attributes
        for name, source in self.teachers.items():
            flag = f"--teachers: the name {name!r}"
            plain = name != "" and not set(name) & set(".*+")
            require(plain, f"{flag} is empty or has a dot, * or +; choose another")
            taken = name in METRICS or name in ADAPTERS or hasattr(layers, name)
            require(not taken, f"{flag} is taken; choose another")
            if name in ("base", "ema"):
                require(source == name, f"{flag} is for the source {name!r}; choose another")
            average = "--ema 0 keeps no moving average to learn from; give one, such as --ema 0.99"
            require(source != "ema" or self.ema > 0, f"--teachers {name}=ema: {average}")

    def check_own_settings(self, world: int) -> None:
        """What single teachers are given."""
        known = [*self.teachers, "base"]
        for name, scale in self.teacher_guidances.items():
            require(name in known, f"--teacher-guidances names {name!r}, which is no teacher; known: {known}")
            require(math.isfinite(scale), f"--teacher-guidances {name}={scale}: it must be finite")
        for name, place in self.teacher_devices.items():
            flag = f"--teacher-devices {name}={place}"
            own = [name for name, source in self.teachers.items() if source not in ("base", "ema")]
            require(name in own, f"{flag}: no teacher with weights of its own; known: {own}")
            everywhere = f"{flag} would be the place of all {world} ranks' teachers"
            require(world == 1 or place == "offload", f"{everywhere}; use offload or --shard-size {world}")
            sharded = f"{flag} and --shard-size {self.shard_size} both spread a teacher out; use one of them"
            require(self.shard_size == 1 or place != "offload", sharded)

    def check_routes(self) -> None:
        known = [*self.teachers, "base"]
        for task in self.prompts:
            for teacher in routing.shares(self.route(task), f"--routes {task}"):
                way_out = f"add it to --teachers or map it with --routes {task}=NAME"
                lost = f"task {task!r} is routed to {teacher!r}, which is not among the teachers {known}"
                require(teacher in known, f"{lost}; {way_out}")
        tasks = list(self.prompts)
        for task in self.routes:
            require(task in tasks, f"--routes names task {task!r}, which has no --prompts; known: {tasks}")

    def check_anchor(self) -> None:
        for level, weight in self.anchor_levels.items():
            flag = f"--anchor-levels {level}={weight}"
            try:
                inside = 0 < float(level) <= 1
            except ValueError:
                inside = False
            require(inside, f"{flag}: a noise level lies in (0, 1]")
            require(0 <= weight < math.inf, f"{flag}: a weight must not be negative, and finite")
        if self.anchored():
            known = [*self.teachers, "base"]
            way_out = "name one of them, or have none: --anchor-weight 0 --anchor-levels"
            lost = f"--anchor {self.anchor!r} is not among the teachers {known}"
            require(self.anchor in known, f"{lost}; {way_out}")

    def check_extrapolation(self) -> None:
        known = [*self.teachers, "base"]
        for name, factor in self.extrapolate.items():
            flag = f"--extrapolate {name}={factor}"
            require(name in known, f"{flag}: no such teacher; known: {known}")
            require(
                1 <= factor < math.inf, f"{flag}: below 1 it would stay behind the teacher; use 1 or more"
            )
            require(self.adapter_of(name) != "base", f"{flag}: the base has nothing to lead away from")

    def check_likelihood(self) -> None:
        """What takes the likelihood of a step needs noise in every step that is trained on."""
        noisy = self.rollout != "ode" and self.noise_level > 0
        last = self.rollout == "cps" and self.steps - 1 in self.queryable()
        way_out = "use --rollout sde, or cps with --skip-last"
        got = f"got --rollout {self.rollout} --noise-level {self.noise_level}"
        if self.estimator != "pathwise":
            flag = f"--estimator {self.estimator}"
            require(noisy and not last, f"{flag} takes the likelihood of noisy steps: {got}; {way_out}")

    def check_rewards(self) -> None:
        for task in self.train_rewards:
            lost = f"--train-rewards names task {task!r}, which has no --prompts"
            require(task in self.prompts, f"{lost}; known: {list(self.prompts)}")
        if self.judged():
            for task in self.prompts:
                flag = f"--train-rewards {task}=module:function"
                require(
                    task in self.train_rewards, f"--routing reward: task {task!r} has no reward; add {flag}"
                )

    def queryable(self) -> range:
        """The states that may be trained on."""
        if self.query_range == (0, 0):
            return range(self.states())
        return range(*self.query_range)

    def merged(self) -> dict[str, str]:
        if self.merge_from:
            return self.merge_from
        taught = set()
        for task in self.prompts:
            taught |= routing.shares(self.route(task), f"--routes {task}").keys()
        merged = {}
        for name, source in self.teachers.items():
            # At the start the average is the start itself; a teacher that only anchors is no task's expert.
            if source != "ema" and (name in taught or name != self.anchor):
                merged[name] = source
        return merged

    def guidance_of(self, teacher: str) -> float:
        if teacher in self.teacher_guidances:
            return self.teacher_guidances[teacher]
        return self.teacher_guidance

    def adapter_of(self, teacher: str) -> str:
        """The adapter on the student's base that the teacher is, "base" for none."""
        if teacher not in self.teachers or self.teachers[teacher] == "base":
            return "base"
        if self.teachers[teacher] == "ema":
            return "ema"
        return teacher

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
class GRPOConfig(Rollout):
    """Stage grpo: a teacher grown from rewards by Flow-GRPO."""

    group: int = 8
    """Trajectories per prompt; they are compared with each other, so at least 2."""
    full: bool = False
    """Train all weights of the transformer instead of a LoRA."""
    train_rewards: Texts = field(default_factory=dict)
    """Task -> reward: module:function, a name from opd/rewards, or a sum like 0.7*a:b+0.3*c:d."""
    beta: float = 0.04
    """Weight of the KL to the base (adapter off); 0 = no KL, and no forward pass for it. The KL is eq. 12;
    Flow-GRPO's code leaves the step size D out of its variance, so its beta weighs D times what the same
    number weighs here."""
    clip_range: float = 1e-4
    """c: how far the ratio may leave 1 before it stops to count."""
    guard: bool = False
    """GRPO-Guard: centre the log-ratio and scale it with the step's noise, so that one (smaller) clip range
    fits all states."""
    advantage_std: Literal["global", "group"] = "global"
    """Advantages are divided by the std of all rewards of the task in this step, or of the group."""
    window: int = 0
    """Train on so many consecutive states, drawn per step: noise there, ODE elsewhere. 0 = noise
    everywhere."""
    window_range: tuple[int, int] = (0, 5)
    """The states that a window may cover: first, and one past the last."""
    shared_start: bool = False
    """Start the trajectories of a group from the same noise (DanceGRPO): their rewards then differ by the
    SDE's steps alone, and up to the first of these one forward pass serves the group."""
    updates: int = 1
    """Optimizer steps per rollout: the prompts are cut into so many parts."""
    epochs: int = 1
    """Passes over the rollout."""

    def check(self, world: int) -> None:
        super().check(world)
        self.check_start()
        at_least_one(self, "updates", "epochs")
        positive(self, "clip_range")
        not_negative(self, "beta", "window")
        alone = f"--group {self.group}: an advantage compares the images of one prompt, alone it is always 0"
        require(self.group >= 2, f"{alone}; use --group 2 or more")
        stochastic = "use --rollout sde or cps and a noise above 0"
        likely = self.rollout != "ode" and self.noise_level > 0
        got = f"--rollout {self.rollout} --noise-level {self.noise_level}"
        require(likely, f"stage grpo needs the likelihood of a noisy step: {got}; {stochastic}")
        if self.full and self.beta > 0:
            reason = "the reference is the base with the adapter off, and --full changes the base"
            raise ValueError(f"--beta {self.beta} with --full: {reason}; use --beta 0 or a LoRA")
        if self.full and self.evaluate:
            raise ValueError("--full with --evaluate: the table compares adapters; add --no-evaluate")
        if self.prompts_per_step % self.updates != 0:
            whole = f"--prompts-per-step {self.prompts_per_step}; every update takes whole groups"
            raise ValueError(f"--updates {self.updates} does not divide {whole}")
        self.check_window()
        for task in self.prompts:
            flag = f"--train-rewards {task}=module:function"
            require(task in self.train_rewards, f"task {task!r} has no reward to train on; add {flag}")

    def training_rewards(self) -> dict[str, str]:
        """Task -> reward that training asks."""
        return {task: self.train_rewards[task] for task in self.prompts}

    def states_per_sample(self) -> int:
        return self.window or self.states()

    def check_window(self) -> None:
        low, high = self.window_range
        inside = 0 <= low and low + self.window <= high <= self.states()
        span = f"--window-range {low} {high} of the {self.states()} states (--steps, --skip-last)"
        require(self.window == 0 or inside, f"--window {self.window} does not fit into {span}")
        last_is_trained = not self.skip_last and (self.window == 0 or high == self.steps)
        if self.rollout == "cps" and last_is_trained:
            reason = "the last CPS step has no noise, hence no likelihood"
            raise ValueError(f"--rollout cps: {reason}; add --skip-last or end --window-range before it")


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Stage sft: flow matching on images with captions."""

    full: bool = False
    """Train all weights of the transformer instead of a LoRA."""
    data: str = ""
    """Directory with metadata.jsonl and images, or with metadata.jsonl and latents.safetensors."""
    caption_dropout: float = 0.1
    """Share of captions replaced by "", so that guidance has something to push away from."""

    def check(self, world: int) -> None:
        super().check(world)
        self.check_start()
        below_one(self, "caption_dropout")
        wanted = "a directory with metadata.jsonl and images or latents"
        require(self.data != "", f"--data is empty: name {wanted}")


STAGES = {"opd": DistillationConfig, "grpo": GRPOConfig, "sft": SFTConfig}
