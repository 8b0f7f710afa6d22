"""What the stages share: how a run is saved and logged, scored, optimised, and sampled."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from opd import flow
from opd.cli import (
    BelowOne,
    Count,
    Few,
    Finite,
    Given,
    Interval,
    NotNegative,
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
from opd.files import path_of

Rollouts = Literal[tuple(flow.TRANSITIONS)]  # a new row of the table is a new choice of the flag


@dataclass(frozen=True)
class Logistics:
    """How a run is computed, saved and logged. These settings may change when it resumes."""

    out: Annotated[str, Given("the run folder")] = ""
    """Run folder. The same command again resumes it."""
    iterations: Annotated[int, Range(0, 10**6)] = 60
    """Optimizer steps; stages grpo and nft: rollouts. 0 = none: the start, as a merge, is the student."""
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
    """Seconds after which a reward is given up and retried; then stages grpo and nft drop the group."""


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
    """What the transformer computes in; auto: bfloat16 where the hardware has matrix units, else float32. In
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
    """Prompts per optimizer step, over all ranks (stages grpo and nft: per rollout; sft: images)."""
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

    def check_likelihoods(self, what: str, states: range) -> None:
        """ValueError unless each of `states`, which `what` trains on, is left by a noisy step."""
        # Which steps have noise depends on no grid.
        sigma = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        std_T = flow.TRANSITIONS[self.rollout](sigma[:-1], sigma[1:], self.noise_level).std
        for state in states:
            if std_T[state] == 0:
                got = f"--rollout {self.rollout} --noise-level {self.noise_level}"
                silent = f"{what} takes the likelihood of noisy steps; step {state + 1} of {got} has no noise"
                way_out = "use --rollout sde and a noise above 0"
                if std_T.any():
                    way_out = "add --skip-last, or train on earlier states alone"
                raise ValueError(f"{silent}; {way_out}")

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
