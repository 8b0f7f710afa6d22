"""Stage opd: its settings, and what they may not be together."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from opd import flow, lora, routing
from opd.cli import Finite, Given, NotNegative, Numbers, Range, Texts, known_names
from opd.config.shared import Rollout
from opd.estimators import ESTIMATORS, SAMPLED

# A new row of these tables is a new choice of the flag.
Weights = Literal[tuple(flow.WEIGHTS)]
Estimators = Literal[tuple(ESTIMATORS)]

# No names for a teacher: what the log has beside the teachers' losses, what diagnostics.brief looks for, and
# the adapters that a run makes itself.
METRICS = """step loss anchor grad_norm lr effective_batch samples_per_second states_per_second graphs watch
distance reward reward_std groups kl from_base grad_rms ratio""".split()
ADAPTERS = ("student", "start")


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
        known_names("--teacher-guidances", self.teacher_guidances, "teachers", self.may_teach())
        known_names("--extrapolate", self.extrapolate, "teachers", self.may_teach())
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
        known, tasks = self.may_teach(), list(self.prompts)
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
        known = self.may_teach()
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
        if self.estimator in SAMPLED:
            self.check_likelihoods(f"--estimator {self.estimator}", self.queryable())
        if self.walker == "teacher" and (self.estimator in SAMPLED or self.judged()):
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

    def may_teach(self) -> list[str]:
        """What a route and the anchor may name."""
        return [*self.teachers, lora.BASE]

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
