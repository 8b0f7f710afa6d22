"""What a run says of itself before its first step, and how far its student is from the teachers."""

from collections.abc import Iterator

import torch

from opd import lora, ranks, routing, signals
from opd.config import DistillationConfig, Rollout, RunConfig
from opd.data import Pools, Prompt, alike, seed_of
from opd.formats.latents import Images
from opd.lora import BASE, START
from opd.model import Model
from opd.optim import Trained
from opd.teachers import Teacher, mean_velocity, route_of, teacher_names
from opd.trajectory import State

STAGES = {
    "opd": "on-policy distillation of several teachers into one student (Flow-OPD, arXiv 2605.08063)",
    "grpo": "reinforcement learning from rewards (Flow-GRPO, arXiv 2505.05470)",
    "nft": "reinforcement learning from rewards (DiffusionNFT, arXiv 2509.16117)",
    "sft": "flow matching on images with captions",
}


def facts(cfg: RunConfig) -> dict[str, str]:
    """What the log, the page and the student's card say of a run."""
    kind = "all weights" if cfg.full else f"a LoRA of rank {cfg.rank}, alpha {cfg.alpha:g}"
    start = cfg.cold_start
    if start == "merge":
        start = f"the merge of {', '.join(cfg.merged())}"
    found = {"stage": STAGES[cfg.stage], "model": cfg.model, "trained": f"{kind}, from {start}"}
    if isinstance(cfg, DistillationConfig):
        for name in dict.fromkeys([*cfg.teachers, *teacher_names(cfg, {})]):
            source = cfg.teachers[name] if name in cfg.teachers else BASE
            found[f"teacher {name}"] = f"{source}, at guidance {cfg.guidance_of(name):g}"
        if cfg.anchored():
            levels = [f", {w:g} from noise level {level} down" for level, w in cfg.anchor_levels.items()]
            found["anchor"] = f"{cfg.anchor}, weight {cfg.anchor_weight:g}{''.join(levels)}"
    if isinstance(cfg, Rollout):
        found |= {f"reward of {task}": spec for task, spec in cfg.training_rewards().items()}
    return found


def head(cfg: RunConfig, trained: Trained, data: Pools | Images) -> list[str]:
    """A line for each thing that decides what a run does and how long it takes."""
    model, found = trained.model, facts(cfg)
    count = sum(parameter.numel() for parameter in trained.parameters.values()) / 1e6
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    dtype = str(model.dtype).removeprefix("torch.")
    if isinstance(cfg, DistillationConfig):
        for name in cfg.teachers.keys() - teacher_names(cfg, data):
            found[f"teacher {name}"] += ", asked by no prompt"
    found["parameters"] = f"{count:.2f} M"
    found["device"] = f"{ranks.world()} x {model.device.type}, {dtype}{threads}"
    found["resolution"], found["folder"] = f"{model.resolution} px", cfg.out
    if cfg.iterations == 0:
        found["steps"] = "none: the start is the student"
        return lines_of(found)
    if isinstance(data, Images):
        found["images"] = f"{len(data.captions)}, {cfg.prompts_per_step} a step"
    else:
        pools = ", ".join(f"{task} {len(pool)}" for task, pool in data.items())
        found["prompts"] = f"{pools}; {cfg.prompts_per_step} a step, {cfg.group} x each"
    if isinstance(cfg, Rollout):
        walk = f"{cfg.rollout} of {cfg.steps} steps at guidance {cfg.guidance:g}"
        found["walk"] = f"{walk}, {cfg.states_per_sample()} states trained on"
    found["steps"] = f"{cfg.iterations}, saved every {cfg.save_every} and at the end"
    found["pictures"] = f"at the start and every {cfg.sample_every} steps" if cfg.sample_every else "none"
    return lines_of(found)


def lines_of(found: dict[str, str]) -> list[str]:
    width = max(map(len, found))
    return [f"{name:{width}} {fact}" for name, fact in found.items()]


@torch.no_grad()
def distances(
    cfg: DistillationConfig, model: Model, teachers: dict[str, Teacher], pools: Pools
) -> dict[str, float]:
    """Task -> how far the student's velocity is from its teacher's, in percent of the base's distance.

    100 |v - v_T| / |v_base - v_T| over the states of one fixed walk, that of the start from fixed noise with
    the prompts in `pools`: only what is measured on the same states can be compared between steps.
    Nothing for a task whose teacher is the base itself.
    """
    found = {}
    path = model.path(cfg.steps, cfg.rollout, cfg.noise_level, ("distances", "noise"))
    for task, pool in pools.items():
        near = far = 0.0
        for numbers in alike(model.shapes([prompt.asked for prompt in pool])):
            walk = model.walk(path, seed_of("distances", task), numbers)
            more = squared_distances(cfg, model, teachers, [pool[n] for n in numbers], walk)
            near, far = near + more[0], far + more[1]
        if far > 0:
            found[task] = 100 * (near / far) ** 0.5
    return found


def squared_distances(
    cfg: DistillationConfig,
    model: Model,
    teachers: dict[str, Teacher],
    pool: list[Prompt],
    walk: Iterator[State],
) -> tuple[float, float]:
    """Sums over the walk's states of |v - v_T|^2 for student and base."""
    prompts = [prompt.asked for prompt in pool]
    text, names = model.text(prompts), list(teachers)
    weights_BK = routing.rows([route_of(cfg, prompt) for prompt in pool], names).to(model.device)
    near = far = 0.0
    for state in walk:
        signals.boundary()
        targets = []
        for k, name in enumerate(names):
            asked = bool((weights_BK[:, k] > 0).any())
            targets.append(teachers[name](state.x, state.sigma_B, prompts) if asked else None)
        target, v = mean_velocity(targets, weights_BK), {}
        for adapter in (model.trained, BASE, START):
            with lora.use(model.transformer, adapter):
                v[adapter] = model.velocity(state.x, state.sigma_B, text, cfg.guidance)
        near += float((v[model.trained] - target).square().sum())
        far += float((v[BASE] - target).square().sum())
        state.step(v[START])
    return near, far
