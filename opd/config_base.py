"""The settings that several stages share. The stages, and the family tree of all classes: opd/config.py."""

import re
from dataclasses import dataclass, field
from typing import Literal

from opd import flow
from opd.files import require_path
from opd.flags import (
    Shares,
    Texts,
    at_least_one,
    at_most,
    below_one,
    check_resolution,
    check_seed,
    dashed,
    finite,
    not_negative,
    plain_names,
    positive,
    require,
    time_limit,
)
from opd.formats import merging

MOST = 10_000  # of what nobody wants more of: ranks of a LoRA, steps of a walk, shares of a task

# What train.py logs beside the teachers' names, and the adapters that it makes itself.
METRICS = (
    "step",
    "loss",
    "anchor",
    "grad_norm",
    "lr",
    "effective_batch",
    "samples_per_second",
    "states_per_second",
    "graphs",
    "seconds",
    "watch",
    "reward",
    "reward_std",
    "groups",
    "failed_rewards",
)
ADAPTERS = ("student", "start")
# A new row of these tables is a new choice of the flag.
Rollouts = Literal[tuple(flow.TRANSITIONS)]
Weights = Literal[tuple(flow.WEIGHTS)]
Merges = Literal[tuple(merging.MERGES)]


@dataclass(frozen=True)
class Logistics:
    """How a run is computed, saved and logged. These settings may change when it resumes."""

    out: str = ""
    """Run folder. The same command again resumes it."""
    iterations: int = 60
    """Optimizer steps; stage grpo: rollouts."""
    micro_batch: int = 48
    """Samples per forward pass on one rank."""
    checkpointing: bool = False
    """Recompute activations in backward: less memory, one more forward."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: minutes at the start, then faster steps."""
    shard_size: int = 1
    """Ranks that share one copy of the weights: 1 = replicate, all ranks = shard fully, between = hybrid. A
    trained adapter is whole on every rank."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, on a GPU slower ones; an operation without one ends
    the run with its name. On a CPU runs are the same bits without it."""
    save_every: int = 20
    """Steps between checkpoints; the last step always saves."""
    keep_last: int = 0
    """Checkpoints that are kept in checkpoints/, the latest ones; 0 = all."""
    force_resume: bool = False
    """Resume although settings, or files that the run reads, have changed since it began."""
    sample_every: int = 20
    """Steps between sample grids; 0 = none."""
    eval_steps: int = 10
    """ODE steps of sample grids and evaluation."""
    deploy_guidance: float = 0.0
    """Guidance that the student is to be sampled with: of its sample grids and scores, and written into its
    folder, where sample.py and opd.evaluation find it. 0 = --guidance."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""
    push: str = ""
    """Hub repository OWNER/NAME that gets the student's folder when the run ends; private if it is new."""
    gpu_memory: float = 0.0
    """GiB of a GPU: a run that is predicted not to fit is refused before weights load. 0 = do not ask."""
    dry_run: bool = False
    """Print the resolved configuration and the predicted memory, and stop."""

    def check(self, world: int) -> None:
        """ValueError, naming flag and value, unless the settings suit each other and the `world` ranks."""
        require(self.out != "", "--out is empty: name the run folder")
        require_path(self.out)
        at_least_one(self, "iterations", "micro_batch", "shard_size", "save_every")
        at_least_one(self, "eval_steps")
        finite(self, "deploy_guidance")
        named = self.push == "" or re.fullmatch(r"[\w.-]+/[\w.-]+", self.push) is not None
        require(named, f"--push {self.push!r}: write a Hub repository as OWNER/NAME")
        not_negative(self, "sample_every", "keep_last", "gpu_memory")
        at_most(self, 10**9, "micro_batch", "save_every")
        at_most(self, 10**6, "iterations")
        at_most(self, MOST, "eval_steps")
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        size = self.shard_size
        choice = f"choose one of {divisors}"
        require(size in divisors, f"--shard-size {size} does not divide the {world} ranks; {choice}")


@dataclass(frozen=True)
class Scores:
    """Scoring of prompts, trained on and held out. These settings may change when a run resumes."""

    evaluate: bool = True
    """Score base, teachers, start and student on every task when training ends."""
    rewards: Texts = field(default_factory=dict)
    """Task -> its scorers for evaluation, `module:function`, commas between; the first makes the mean."""
    heldout: Texts = field(default_factory=dict)
    """Task -> prompts never trained on."""
    eval_prompts: int = 256
    """Prompts per task and split in evaluation, repeated with other noise where a file has fewer."""
    watch_every: int = 0
    """Steps between scores of the student on held-out prompts of every task, in the log; 0 = never."""
    watch_prompts: int = 64
    """Prompts per task in those."""
    reward_timeout: float = 60.0
    """Seconds after which a reward is given up, retried, and its group dropped."""

    def check(self, world: int) -> None:
        at_least_one(self, "eval_prompts", "watch_prompts")
        at_most(self, 10**6, "eval_prompts", "watch_prompts")
        not_negative(self, "watch_every")
        time_limit(self, "reward_timeout")
        watched = self.watch_every > 0
        wanted = f"--watch-every {self.watch_every} scores held-out prompts; give --heldout TASK=FILE"
        require(not watched or len(self.heldout) > 0, wanted)
        if self.evaluate or watched:
            self.check_scored(self.heldout)

    def check_scored(self, tasks: dict[str, str]) -> None:
        for task in tasks:
            flag = f"--rewards {task}=module:function"
            require(task in self.rewards, f"task {task!r} has no scorer; add {flag} or --no-evaluate")


@dataclass(frozen=True)
class RunConfig(Logistics):
    """What every stage has: the model, the LoRA that is trained, the optimizer."""

    full = False  # a setting of the stages that can train all weights, and of no other

    model: str = ""
    """Pipeline directory or Hub id of the base."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the transformer computes in; auto: bfloat16 where the hardware multiplies it, else float32. In
    float16 a mean over the dimensions of a real latent makes gradients underflow to 0, so it is no choice.
    LoRA masters, states and losses are float32, schedules float64, anyway."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    resolution: str = ""
    """Pixels per side, or HEIGHTxWIDTH; "" = what the model was made for."""
    rank: int = 16
    """Rank of the LoRA that is trained."""
    alpha: float = 32.0
    """Its alpha; the update is scaled by alpha / rank."""
    cold_start: str = "base"
    """Where training starts: base (a fresh LoRA), merge (several adapters merged), or an adapter to load."""
    merge: Merges = "svd"
    """How --cold-start merge makes one adapter of several: opd/formats/merging.py has the formulas."""
    merge_from: Texts = field(default_factory=dict)
    """Name -> adapter to merge; none, in stage opd, = the teachers, but for one that only anchors."""
    prompts_per_step: int = 48
    """Prompts per optimizer step, over all ranks (stage grpo: per rollout; stage sft: images)."""
    guidance: float = 1.0
    """Guidance of the student in rollout and loss."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: int = 5
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does after warm-up (cosine: down to zero)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.0
    """Decay of a moving average of the weights, min(ema, (1+n)/(10+n)): what is saved and scored. 0 = off."""
    ema_every: int = 1
    """Optimizer steps between its moves."""
    seed: int = 0
    """All randomness is a function of this, the step and the sample."""

    def check(self, world: int) -> None:
        super().check(world)
        require(self.model != "", "--model is empty: name a pipeline directory or a Hub id owner/name")
        require(self.cold_start != "", "--cold-start is empty: use base or an adapter")
        at_least_one(self, "rank", "prompts_per_step", "ema_every")
        at_most(self, MOST, "rank")
        check_resolution(self.resolution)
        at_most(self, 10**6, "prompts_per_step")
        positive(self, "lr", "alpha", "clip")
        not_negative(self, "warmup", "weight_decay")
        check_seed(self)
        finite(self, "guidance")
        below_one(self, "ema")

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

    def check_start(self) -> None:
        cannot = f"--full trains the base; --cold-start {self.cold_start!r} cannot apply"
        require(not self.full or self.cold_start == "base", cannot)
        if self.cold_start == "merge":
            self.check_merge()
        else:
            self.refuse_merge_settings()

    def check_merge(self) -> None:
        names = list(self.merged())
        require(len(names) > 0, "--cold-start merge has nothing to merge; add --merge-from NAME=ADAPTER ...")

    def refuse_merge_settings(self) -> None:
        for name in ("merge", "merge_from"):
            self.refuse_changed(name, "--cold-start merge")

    def refuse_changed(self, name: str, meant_for: str) -> None:
        """ValueError if a setting that would do nothing is not at its default."""
        value, usual = getattr(self, name), getattr(type(self)(), name)
        require(value == usual, f"--{dashed(name)} {value} is for {meant_for} alone; leave it out")


@dataclass(frozen=True)
class Rollout(RunConfig, Scores):
    """What the stages that sample from prompts have."""

    prompts: Texts = field(default_factory=dict)
    """Task -> prompt file (.txt, .jsonl, .csv)."""
    mix: Shares = field(default_factory=dict)
    """Task -> its share of the prompts, in whole numbers; a task not named has share 1."""
    alternate: bool = False
    """One task per step, the steps taking turns in the ratio of --mix, instead of all tasks in every step."""
    group: int = 1
    """Trajectories per prompt."""
    steps: int = 10
    """Denoising steps T of a rollout."""
    rollout: Rollouts = "sde"
    """How the student walks from state to state."""
    noise_level: float = 0.7
    """a: how much noise an SDE or CPS step adds, and what the kl weights assume."""
    skip_last: bool = False
    """Do not train on the last state, whose SDE likelihood is sharpest."""

    def check(self, world: int) -> None:
        RunConfig.check(self, world)
        Scores.check(self, world)
        at_least_one(self, "group", "steps")
        at_most(self, MOST, "group", "steps")
        not_negative(self, "noise_level")
        self.check_noise()
        none_left = f"--steps {self.steps} with --skip-last leaves no state to train on"
        require(self.states() > 0, f"{none_left}; use --steps 2 or more")
        self.check_tasks()
        if self.evaluate:
            self.check_scored(self.prompts)

    def check_noise(self) -> None:
        noise = self.noise_level
        in_range = noise <= 1 or self.rollout != "cps"
        require(in_range, f"--rollout cps needs --noise-level in (0, 1], got {noise}")

    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.group

    def check_tasks(self) -> None:
        require(len(self.prompts) > 0, "--prompts is empty: give at least one TASK=FILE pair")
        plain_names("--prompts", self.prompts)
        plain_names("--heldout", self.heldout)
        known = list(self.prompts)
        for task, share in self.mix.items():
            require(task in known, f"--mix names task {task!r}, which has no --prompts; known: {known}")
            whole = "shares are whole numbers of at least 1"
            require(share >= 1, f"--mix {task}={share}: {whole}; drop the task from --prompts instead")
            require(share <= MOST, f"--mix {task}={share}: a share must be at most {MOST}")

    def states(self) -> int:
        """How many states of a trajectory can be trained on."""
        return self.steps - self.skip_last

    def states_per_sample(self) -> int:
        return self.states()

    def share(self) -> dict[str, int]:
        """Task -> its share of the prompts."""
        return dict.fromkeys(self.prompts, 1) | self.mix
