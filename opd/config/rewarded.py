"""The stages that learn from rewards, grpo and nft: their settings."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from opd.cli import Count, Few, NotNegative, Positive, Range, Texts
from opd.config.shared import Rollout, Rollouts


@dataclass(frozen=True)
class RewardedConfig(Rollout):
    """What the stages that learn from rewards have."""

    first = ("model", "prompts", "train_rewards", "prompts_per_step", "group", "iterations", "lr", "out")

    group: Few = 8
    """Trajectories per prompt; they are compared with each other, so at least 2."""
    train_rewards: Texts = field(default_factory=dict)
    """Task -> reward: module:function, a name from opd/rewards, or a sum like 0.7*a:b+0.3*c:d."""
    advantage_std: Literal["global", "group"] = "global"
    """Advantages are divided by the std of all rewards of the task in this step, or of the group."""
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

    def check(self, world: int) -> None:
        super().check(world)
        if self.full and self.beta > 0:
            reason = "the reference is the base with the adapter off, and --full changes the base"
            raise ValueError(f"--beta {self.beta} with --full: {reason}; use --beta 0 or a LoRA")
        if self.full and self.evaluate:
            raise ValueError("--full with --evaluate: the table compares adapters; add --no-evaluate")
        low, high = self.window_range
        if self.window > 0 and not (0 <= low and low + self.window <= high <= self.states()):
            span = f"--window-range {low} {high} of the {self.states()} states (--steps, --skip-last)"
            raise ValueError(f"--window {self.window} does not fit into {span}")
        trained = range(low, high) if self.window > 0 else range(self.states())
        self.check_likelihoods("stage grpo", trained)

    def states_per_sample(self) -> int:
        return self.window or self.states()


@dataclass(frozen=True)
class NFTConfig(RewardedConfig):
    """Stage nft: a teacher grown from rewards without likelihoods, by DiffusionNFT."""

    stage = "nft"

    rollout: Rollouts = "ode"
    """How samples walk from noise to their picture. No likelihood is needed, so any will do."""
    strength: Annotated[float, Positive] = 1.0
    """b of DiffusionNFT, its beta: the two implicit policies are v_old + b (v - v_old) and v_old - b (v -
    v_old). Smaller = a weaker pull back to the old policy; a step that begins at it is the same whatever b
    is."""
    levels: Annotated[int, Range(0, 10_000)] = 0
    """Noise levels of the rollout's grid that every picture is noised to, drawn for it without replacement.
    Each costs a pass with gradients, and one without for the old policy and for the base. 0 = all."""
    old_decay: Annotated[tuple[float, float, float], NotNegative] = (0.0, 0.001, 0.5)
    """n0, slope, most: after each rollout, n updates in, the old policy, which makes the pictures, keeps
    min(slope (n - n0), most) of itself, nothing before n0, and moves to the new one by the rest. 0 0 0 = it
    is the new one, and with one update a rollout costs no forward pass."""
    beta: Annotated[float, NotNegative] = 1e-4
    """Weight of |v - v_base|^2, the base being the adapter off; 0 = none, and no forward pass for it. Not in
    the paper's loss but in its code; without it runs are known to collapse."""
    adam_eps: Annotated[float, Positive] = 1e-8
    """AdamW's epsilon. It is added to what the log calls grad_rms; where that is far below it, every step is
    damped."""

    def check(self, world: int) -> None:
        super().check(world)
        if self.levels > self.states():
            count = f"the {self.states()} noise levels of the rollout's grid (--steps, --skip-last)"
            raise ValueError(f"--levels {self.levels} exceeds {count}; lower it, or raise --steps")
        if self.old_decay[-1] >= 1:
            decay = " ".join(f"{number:g}" for number in self.old_decay)
            raise ValueError(f"--old-decay {decay}: the old policy would never move; use a last below 1")

    def on_policy(self) -> bool:
        """Whether every update begins at the old policy, so that none has to ask it."""
        return self.old_decay[-1] == 0 and self.updates == 1

    def states_per_sample(self) -> int:
        return self.levels or self.states()
