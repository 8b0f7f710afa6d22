"""The configuration of a training run: one flat dataclass, a table of presets, and every check on numbers."""

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

MINI = Path(__file__).parent / "mini"


def mini_prompts(split: str) -> dict[str, str]:
    return {"compose": str(MINI / f"prompts/compose.{split}.jsonl"), "text": str(MINI / f"prompts/text.{split}.txt"),
            "quality": str(MINI / f"prompts/quality.{split}.txt")}


def pairs(kind: type) -> PrimitiveConstructorSpec:
    """A flag of NAME=VALUE pairs that replace the default as a whole (tyro by itself would allow the default's names only)."""
    def read(texts: list[str]) -> dict:
        for text in texts:
            require("=" in text, f"expected NAME=VALUE, got {text!r}")
        return {name: kind(value) for name, _, value in (text.partition("=") for text in texts)}
    return PrimitiveConstructorSpec(
        nargs="*", metavar="NAME=VALUE ...", instance_from_str=read, is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={v}" for name, v in value.items()])


Texts = Annotated[dict[str, str], pairs(str)]
Shares = Annotated[dict[str, int], pairs(int)]


@dataclass(frozen=True)
class Config:
    """Defaults are the miniature's: three teachers into one student, on a CPU, in minutes."""

    # model
    stage: Literal["opd", "grpo", "sft"] = "opd"
    """opd: on-policy distillation from teachers. grpo: reinforcement learning from rewards. sft: flow matching on images."""
    family: str = "sd3"
    """Model family: the module opd/FAMILY.py."""
    model: str = str(MINI / "weights/base")
    """Pipeline directory or Hub id of the base."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the transformer computes in; auto: bfloat16 where the hardware multiplies it, else float32. LoRA masters, states,
    schedule and losses are float32 anyway."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    resolution: int = 0
    """Pixels per side; 0 = what the model was made for."""

    # adapters
    full: bool = False
    """Stages sft and grpo: train all weights of the transformer instead of a LoRA."""
    rank: int = 16
    """Rank of the student's LoRA."""
    alpha: float = 32.0
    """Its alpha; the update is scaled by alpha / rank."""
    cold_start: str = "merge"
    """Where the student starts: base (a fresh LoRA), merge (the teachers' mean update), or an adapter to load."""
    teachers: Texts = field(default_factory=lambda: {
        t: str(MINI / "weights" / t) for t in ("compose", "text", "quality")})
    """Name of each teacher and its adapter (directory, file or Hub id[:subfolder]); "base" is the base itself."""
    routes: Texts = field(default_factory=dict)
    """Task -> teacher, for tasks that are not taught by the teacher of the same name."""
    anchor: str = "quality"
    """The teacher that anchors every sample (MAR): a name from --teachers, or base."""
    anchor_weight: float = 0.02
    """lambda of eq. 16; 0 = no anchor, and no forward pass for it."""

    # data
    prompts: Texts = field(default_factory=lambda: mini_prompts("train"))
    """Task -> prompt file (.txt, .jsonl, .csv)."""
    mix: Shares = field(default_factory=dict)
    """Task -> its share of the prompts, in whole numbers; a task not named has share 1."""
    alternate: bool = False
    """One task per step, the steps taking turns in the ratio of --mix, instead of all tasks in every step."""
    data: str = ""
    """Stage sft: directory with metadata.jsonl and images, or with metadata.jsonl and latents.safetensors."""
    caption_dropout: float = 0.1
    """Stage sft: share of captions replaced by "", so that guidance has something to push away from."""

    # batch
    prompts_per_step: int = 48
    """Prompts per optimizer step, over all ranks (stage sft: images)."""
    group: int = 1
    """Trajectories per prompt; stage grpo compares them with each other and needs at least 2."""
    micro_batch: int = 48
    """Samples per forward pass on one rank."""

    # rollout and loss
    steps: int = 10
    """Denoising steps T of a rollout."""
    rollout: Literal["sde", "ode", "cps"] = "sde"
    """How the student walks from state to state."""
    noise_level: float = 0.7
    """a: how much noise an SDE or CPS step adds, and what the kl weights assume."""
    weight: Literal["kl", "kl_released", "ode_kl", "uniform"] = "kl"
    """Weight of the squared velocity difference at each state."""
    queries: int = 0
    """States of a trajectory that are trained on: 0 = all T; K = that many, drawn per step from Beta(query_beta)."""
    query_beta: tuple[float, float] = (5.0, 2.0)
    """Density of drawn queries over the trajectory; 0 is its start (noise), 1 its end (data)."""
    skip_last: bool = False
    """Do not train on the last state, whose SDE likelihood is sharpest."""
    single_pass: bool = True
    """Train in the very pass that drives the rollout. False: store the trajectory, then train; same gradient."""
    guidance: float = 1.0
    """Guidance of the student, in rollout and loss."""
    teacher_guidance: float = 1.0
    """Guidance of teachers and anchor. Higher than --guidance: the student absorbs the difference."""

    # stage grpo
    train_rewards: Texts = field(default_factory=dict)
    """Task -> reward: module:function, a name from opd/rewards.py, or a sum like 0.7*a:b+0.3*c:d."""
    reward_timeout: float = 60.0
    """Seconds after which a reward is given up, retried, and its group dropped."""
    beta: float = 0.04
    """Weight of the KL to the base (adapter off); 0 = no KL, and no forward pass for it. The KL is eq. 12; Flow-GRPO's code
    leaves the step size D out of its variance, so its beta weighs D times what the same number weighs here."""
    clip_range: float = 1e-4
    """c: how far the ratio may leave 1 before it stops to count."""
    guard: bool = False
    """GRPO-Guard: centre the log-ratio and scale it with the step's noise, so that one (smaller) clip range fits all states."""
    advantage_std: Literal["global", "group"] = "global"
    """Advantages are divided by the std of all rewards of the task in this step, or of the group."""
    advantage_clip: float = 5.0
    """Largest advantage."""
    window: int = 0
    """Train on this many consecutive states, drawn per step, with SDE there and ODE elsewhere; 0 = SDE everywhere."""
    window_range: tuple[int, int] = (0, 5)
    """The states that a window may cover: first, and one past the last."""
    shared_start: bool = False
    """Start the trajectories of a group from the same noise (DanceGRPO): their rewards then differ by the SDE's steps alone, and
    up to the first of these one forward pass serves the group."""
    updates: int = 1
    """Optimizer steps per rollout: the prompts are cut into so many parts."""
    epochs: int = 1
    """Passes over the rollout."""
    cosine_every: int = 0
    """Steps between cosines of the tasks' gradients (eq. 4) in the log; 0 = never."""

    # optimizer
    iterations: int = 60
    """Optimizer steps; stage grpo: rollouts."""
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
    """Decay of a moving average of the weights, min(ema, (1+n)/(10+n)); it is what is saved and evaluated. 0 = off."""
    ema_every: int = 1
    """Optimizer steps between its moves."""
    max_bad_steps: int = 5
    """Stop after this many non-finite steps in a row."""

    # ranks and memory
    shard_size: int = 1
    """Ranks that share one copy of the weights: 1 = replicate, the number of ranks = shard fully, between = hybrid."""
    checkpointing: bool = False
    """Recompute activations in backward: less memory, one more forward."""

    # output
    out: str = "runs/mini"
    """Run folder. The same command again resumes it."""
    seed: int = 0
    """All randomness is a function of this, the step and the sample."""
    cache: str = "~/.cache/flow-opd"
    """Encoded prompts."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    save_every: int = 20
    """Steps between checkpoints; the last step always saves."""
    sample_every: int = 20
    """Steps between sample grids; 0 = none."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""

    # evaluation: base, teachers, start and student on every task
    evaluate: bool = True
    """Score base, teachers, start and student when training ends."""
    rewards: Texts = field(default_factory=lambda: {
        "compose": "opd.mini.rewards:compose_strict", "text": "opd.mini.rewards:text", "quality": "opd.mini.rewards:quality"})
    """Task -> scorer `module:function` for evaluation."""
    heldout: Texts = field(default_factory=lambda: mini_prompts("test"))
    """Task -> prompts never trained on."""
    eval_prompts: int = 256
    """Prompts per task and split in evaluation, repeated with other noise where a file has fewer."""
    eval_steps: int = 10
    """ODE steps in evaluation."""
    watch_every: int = 0
    """Steps between scores of the student on held-out prompts of every task, in the log; 0 = never."""
    watch_prompts: int = 64
    """Prompts per task in those."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def route(self, task: str) -> str:
        """The teacher of `task` (eq. 7)."""
        return self.routes[task] if task in self.routes else task

    def on_policy(self) -> bool:
        """Whether the stage samples from prompts."""
        return self.stage != "sft"

    def share(self) -> dict[str, int]:
        return {task: self.mix[task] if task in self.mix else 1 for task in self.prompts}


_SFT = Config(stage="sft", anchor_weight=0.0, cold_start="base", evaluate=False, prompts_per_step=128, micro_batch=128,
              save_every=200, sample_every=200, log_every=10, clip=1.0, warmup=20)
_TRAIN_REWARDS = {t: f"opd.mini.rewards:{t}" for t in ("compose", "text", "quality")}
# The late states' gradients are tens of times larger and almost pure noise (README, "Where a flow policy learns"), so one early
# state is trained at a time; groups share their start, so that this state is computed once for all of a group, and rewards
# differ by the noise of its one step. Six steps are enough to roll out.
_GRPO = Config(stage="grpo", cold_start="base", teachers={}, anchor_weight=0.0, rank=16, alpha=32.0, prompts_per_step=12, group=8,
               micro_batch=48, steps=6, window=1, window_range=(0, 3), shared_start=True, warmup=5, ema=0.9,
               save_every=50, sample_every=30, watch_every=60, watch_prompts=128, eval_prompts=256)
_PUBLIC = "jieliu/SD3.5M-FlowGRPO-"

PRESETS = {
    # kl weighs the high-noise states, which decide the composition, hundreds of times less than the last ones, and a hundred
    # steps are too few to wait for them (README, "What the miniature shows"); 3:1:1 is the paper's mix.
    "mini": Config(weight="uniform", queries=5, query_beta=(1.0, 1.5), skip_last=True, rank=32, alpha=64.0, lr=3e-3,
                   mix={"compose": 3}, prompts_per_step=30, micro_batch=30, iterations=80, save_every=40, sample_every=20,
                   eval_prompts=128),
    "mini-base": replace(_SFT, full=True, model="runs/mini-pipeline", data="runs/mini-data/base", out="runs/mini-base",
                         iterations=8700, prompts_per_step=64, micro_batch=64, lr=1e-3, warmup=200, ema=0.999,
                         weight_decay=0.01, save_every=500, sample_every=500),
    **{f"mini-{t}": replace(_GRPO, out=f"runs/mini-{t}", prompts={t: mini_prompts("train")[t]}, train_rewards={t: _TRAIN_REWARDS[t]},
                            beta=beta, lr=lr, iterations=n)
       for t, beta, lr, n in (("compose", 0.002, 1.3e-3, 240), ("text", 0.04, 2e-3, 60), ("quality", 0.04, 4e-3, 30))},
    "mini-grpo-mix": replace(_GRPO, out="runs/mini-grpo-mix", train_rewards=_TRAIN_REWARDS, mix={"compose": 3}, prompts_per_step=15,
                             beta=0.002, lr=2e-3, iterations=320, cosine_every=40),
    **{f"mini-sft-{t}": replace(_SFT, data=f"runs/mini-data/{t}", out=f"runs/mini-sft-{t}", iterations=n, prompts_per_step=64,
                            micro_batch=64, ema=0.99)
       for t, n in (("compose", 1200), ("text", 500), ("quality", 500))},
    "sd35": Config(
        model="stabilityai/stable-diffusion-3.5-medium", resolution=512, rank=32, alpha=64.0,
        teachers={"geneval": _PUBLIC + "GenEval", "ocr": _PUBLIC + "Text", "pickscore": _PUBLIC + "PickScore"},
        prompts={t: f"dataset/{t}/{f}" for t, f in (("geneval", "train_metadata.jsonl"), ("ocr", "train.txt"),
                                                    ("pickscore", "train.txt"))},
        mix={"geneval": 3, "ocr": 1, "pickscore": 1}, anchor="pickscore", guidance=4.5, teacher_guidance=4.5,
        prompts_per_step=40, group=4, micro_batch=8, iterations=1000, lr=1e-4, warmup=10, decay="constant",
        checkpointing=True, out="runs/sd35", evaluate=False, rewards={}, heldout={}, save_every=25, sample_every=25),
    # Flow-GRPO's numbers for one teacher; add --train-rewards geneval=module:function.
    "sd35-grpo": Config(
        stage="grpo", cold_start="base", teachers={}, anchor_weight=0.0, model="stabilityai/stable-diffusion-3.5-medium", resolution=512,
        rank=32, alpha=64.0, prompts={"geneval": "dataset/geneval/train_metadata.jsonl"}, prompts_per_step=48, group=24, micro_batch=8,
        steps=10, eval_steps=40, skip_last=True, guidance=4.5, updates=2, beta=0.04, clip_range=1e-4, lr=3e-4, warmup=0, decay="constant",
        ema=0.9, ema_every=8, iterations=2000, checkpointing=True, out="runs/sd35-grpo", evaluate=False, rewards={}, heldout={},
        save_every=25, sample_every=25),
}


def parse(arguments: list[str]) -> Config:
    """`[PRESET] --field value ...` -> Config. ValueError for an unknown preset; tyro reports unknown fields."""
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else "mini"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    rest = arguments[1:] if arguments and arguments[0] == preset else arguments
    return tyro.cli(Config, default=PRESETS[preset], args=rest, prog=f"train.py {preset}",
                    description="Presets: " + ", ".join(PRESETS))


def check(cfg: Config, world: int) -> None:
    """Every relation between numbers, before anything is read. ValueError with the numbers and the flag to change."""
    for name in ("prompts_per_step", "group", "micro_batch", "steps", "iterations", "rank", "shard_size", "log_every",
                 "save_every", "max_bad_steps", "eval_prompts", "eval_steps", "watch_prompts", "updates", "epochs", "ema_every"):
        require(getattr(cfg, name) >= 1, f"--{dashed(name)} is {getattr(cfg, name)}; it must be at least 1")
    for name in ("lr", "alpha", "clip", "clip_range", "advantage_clip", "reward_timeout"):
        require(getattr(cfg, name) > 0, f"--{dashed(name)} is {getattr(cfg, name)}; it must be positive")
    for name in ("anchor_weight", "noise_level", "weight_decay", "warmup", "sample_every", "queries", "beta", "window",
                 "cosine_every", "watch_every"):
        require(getattr(cfg, name) >= 0, f"--{dashed(name)} is {getattr(cfg, name)}; it must not be negative")
    for name in ("ema", "caption_dropout"):
        require(0 <= getattr(cfg, name) < 1, f"--{dashed(name)} is {getattr(cfg, name)}; it must lie in [0, 1)")
    require(cfg.rollout != "cps" or cfg.noise_level <= 1, f"--rollout cps needs --noise-level in (0, 1], got {cfg.noise_level}")
    require(world % cfg.shard_size == 0,
            f"--shard-size {cfg.shard_size} does not divide the {world} ranks; choose one of "
            f"{[n for n in range(1, world + 1) if world % n == 0]}")
    require(min(cfg.query_beta) > 0, f"--query-beta {cfg.query_beta}: both numbers must be positive")
    if cfg.on_policy():
        check_tasks(cfg)
        check_opd(cfg) if cfg.stage == "opd" else check_grpo(cfg)
        check_scorers(cfg)
    else:
        require(cfg.watch_every == 0, f"--watch-every {cfg.watch_every} scores prompts; stage sft has none")
        require(cfg.data != "", "stage sft needs --data: a directory with metadata.jsonl and images or latents")
        require(cfg.cold_start != "merge", "--cold-start merge is for stage opd; use base or an adapter")
        require(not (cfg.full and cfg.cold_start != "base"), f"--full trains the base; --cold-start {cfg.cold_start!r} cannot apply")


def check_tasks(cfg: Config) -> None:
    """What every stage that samples from prompts must satisfy."""
    require(bool(cfg.prompts), "--prompts is empty: give at least one TASK=FILE pair")
    require(cfg.steps > cfg.skip_last, f"--steps {cfg.steps} with --skip-last leaves no state to train on; use --steps 2 or more")
    for task, share in cfg.mix.items():
        require(task in cfg.prompts, f"--mix names task {task!r}, which has no --prompts; known: {list(cfg.prompts)}")
        require(share >= 1, f"--mix {task}={share}: shares are whole numbers of at least 1; drop the task from --prompts instead")
    require(not cfg.watch_every or bool(cfg.heldout), f"--watch-every {cfg.watch_every} scores held-out prompts; give --heldout TASK=FILE")


def check_scorers(cfg: Config) -> None:
    for task in [*(cfg.prompts if cfg.evaluate else []), *(cfg.heldout if cfg.evaluate or cfg.watch_every else [])]:
        require(task in cfg.rewards, f"task {task!r} has no scorer; add --rewards {task}=module:function or --no-evaluate")


def check_grpo(cfg: Config) -> None:
    require(cfg.group >= 2, f"--group {cfg.group}: an advantage compares the images of one prompt, alone it is always 0; use --group 2 or more")
    require(cfg.rollout == "sde" and cfg.noise_level > 0,
            f"stage grpo needs the SDE's likelihood: --rollout {cfg.rollout} --noise-level {cfg.noise_level}; use --rollout sde and a noise above 0")
    require(cfg.cold_start != "merge", "--cold-start merge is for stage opd; use base or an adapter")
    require(not (cfg.full and cfg.cold_start != "base"), f"--full trains the base; --cold-start {cfg.cold_start!r} cannot apply")
    require(not (cfg.full and cfg.beta > 0),
            f"--beta {cfg.beta} with --full: the reference is the base with the adapter off, and --full changes the base; use --beta 0 or a LoRA")
    require(cfg.prompts_per_step % cfg.updates == 0,
            f"--updates {cfg.updates} does not divide --prompts-per-step {cfg.prompts_per_step}; every update takes whole groups")
    low, high = cfg.window_range
    states = cfg.steps - cfg.skip_last
    require(cfg.window == 0 or (0 <= low and low + cfg.window <= high <= states),
            f"--window {cfg.window} does not fit into --window-range {low} {high} of the {states} states (--steps, --skip-last)")
    for task in cfg.prompts:
        require(task in cfg.train_rewards, f"task {task!r} has no reward to train on; add --train-rewards {task}=module:function")


def check_opd(cfg: Config) -> None:
    states = cfg.steps - cfg.skip_last
    require(not cfg.full, "--full is for stages sft and grpo; the student of stage opd is a LoRA")
    require(cfg.queries <= states, f"--queries {cfg.queries} exceeds the {states} states of a trajectory; lower it or raise --steps")
    require(not (cfg.weight.startswith("kl") and cfg.noise_level == 0),
            f"--weight {cfg.weight} divides by the SDE's noise; with --noise-level 0 use --weight ode_kl or uniform")
    require(not (cfg.rollout != "ode" and cfg.noise_level == 0),
            f"--rollout {cfg.rollout} with --noise-level 0 adds no noise; use --rollout ode")
    require(bool(cfg.teachers), "--teachers is empty: give at least one NAME=ADAPTER pair")
    require("base" not in cfg.teachers or cfg.teachers["base"] == "base", "--teachers: the name 'base' means the base itself; choose another name")
    known = list(cfg.teachers) + ["base"]
    for name in ("student", "start", "anchor", "loss"):
        require(name not in cfg.teachers, f"--teachers: the name {name!r} is taken; choose another")
    for task in cfg.prompts:
        require(cfg.route(task) in known, f"task {task!r} is routed to {cfg.route(task)!r}, which is not among the "
                f"teachers {known}; add it to --teachers or map it with --routes {task}=NAME")
    for task in cfg.routes:
        require(task in cfg.prompts, f"--routes names task {task!r}, which has no --prompts; known: {list(cfg.prompts)}")
    require(cfg.anchor_weight == 0 or cfg.anchor in known, f"--anchor {cfg.anchor!r} is not among the teachers {known}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def load_family(name: str):
    """The module opd/NAME.py. ValueError if there is none."""
    exists = name.isidentifier() and (Path(__file__).parent / f"{name}.py").is_file()
    if not exists or not hasattr(importlib.import_module(f"opd.{name}"), "PIPELINE"):
        raise ValueError(f"--family {name!r}: there is no model family opd/{name}.py")
    return importlib.import_module(f"opd.{name}")
