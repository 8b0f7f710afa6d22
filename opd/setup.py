"""Set-up of a run: read and check everything that the user named; only then load weights, attach adapters,
shard."""

import math
from pathlib import Path

import torch

from opd import compiled, lora, ranks
from opd.cli import flag_words
from opd.config import DistillationConfig, NFTConfig, Rollout, RunConfig, SFTConfig
from opd.data import Asked, Edit, Pools, prompts_of_step
from opd.errors import require
from opd.files import LARGE, digest, path_of, reading, resolve
from opd.formats import merging
from opd.formats.hub import is_hub_id, weight_files
from opd.formats.latents import Images, load_images
from opd.formats.lora_files import Lora, find_adapter
from opd.formats.prompts import load_tasks
from opd.formats.state import latest_state
from opd.formats.teacher_files import Whole, described, read_teachers
from opd.lora import BASE, EMA, OLD, START, STUDENT
from opd.mini.presets import MADE_BY
from opd.model import Model
from opd.ranks import say
from opd.report.shown import Shown, prompts_to_show, routed
from opd.rewards import Rewards, find_reward, specs_of
from opd.teachers import teacher_names

Data = Pools | Images
"""What a stage trains on: prompts per task, or images with captions."""
READ = {"prompts": False, "heldout": False, "sample_prompts": False, "data": False}
READ |= {"model": True, "cold_start": True, "merge_from": True, "teachers": True}
"""Fields that name what a run reads -> whether the Hub may have it."""


def set_up(cfg: RunConfig, device: torch.device) -> tuple[Model, Data, Shown, Rewards]:
    """(the model, what to train on, what to show, every reward of the run by its spec), checked and loaded.

    ValueError or FileNotFoundError, naming the value, for what the user can mend.
    """
    if cfg.compile:
        compiled.check_compiler()
    for _, _, source in read_by(cfg):
        made = source not in MADE_BY or resolve(source).exists()
        require(made, f"{source} is not there yet; make it by: {MADE_BY.get(source)}")
    lost = absent(cfg)
    way_out = "give paths that exist; models and adapters may be Hub ids, owner/name or owner/name:PART"
    require(not lost, f"not on this disk: {', '.join(lost)}; {way_out}")
    model = Model.plan(cfg.model, cfg.dtype, cfg.resolution, device, cfg.t5)
    teachers = {}
    if isinstance(cfg, DistillationConfig):
        teachers = read_teachers(cfg, model)
    check_sampling(cfg, model, teachers)
    student = student_start(cfg, model, teachers)
    data, steps = load_data(cfg, model)
    shown = prompts_to_show(cfg, data)
    if isinstance(cfg, DistillationConfig):
        teacher_names(cfg, routed(data, shown.grid))  # refuses a route that cannot be followed
    rewards = load_rewards(cfg, model, data, shown)
    for name, teacher in teachers.items():
        say(f"teacher {name}: {teacher.source}  {described(teacher)}")

    done, asked = latest_state(path_of(cfg.out)), shown.asked(cfg)
    model.prepare(asked)
    model.follow(steps, done)
    for name, teacher in teachers.items():
        if isinstance(teacher, Whole) and teacher.model.conditioning is not model.conditioning:
            with reading(f"teacher {name!r}"):
                for prompts in (asked, *steps):
                    teacher.model.conditioning.check(prompts)
            teacher.model.prepare(asked)
            teacher.model.follow(steps, done)
    load_weights(cfg, model, teachers, student)
    if cfg.checkpointing:
        model.recompute()
    model.transformer.to(device)
    if cfg.compile:
        compiled.compile_blocks(model.family.blocks(model.transformer))
    # A frozen base that every rank holds whole needs no FSDP, which would keep a second copy of it.
    if cfg.full or cfg.shard_size > 1:
        # What is trained, and what follows it.
        names = (STUDENT, EMA, OLD)
        adapters = {p for name in names for p in lora.parameters_of(model.transformer, name).values()}
        for each in (model, *model.teachers.values()):
            blocks = each.family.blocks(each.transformer)
            ranks.shard(each.transformer, blocks, cfg.shard_size, each.dtype, each.device, whole=adapters)
    return model, data, shown, rewards


def absent(cfg: RunConfig) -> list[str]:
    """What the run would read and is neither on this disk nor a Hub id, as `--flag value`."""
    lost = []
    for name, words, source in read_by(cfg):
        path = source.partition(":alpha=")[0]
        there = source in ("", "merge", *lora.WITHOUT_WEIGHTS) or resolve(path).exists()
        if not there and not (READ[name] and is_hub_id(path)):
            lost.append(words)
    return lost


def read_by(cfg: RunConfig) -> list[tuple[str, str, str]]:
    """(field, `--flag value`, source) of everything that a run reads."""
    found = []
    for name in READ:
        if hasattr(cfg, name):
            given = getattr(cfg, name)
            flag, *words = flag_words(name, given)
            sources = given.values() if isinstance(given, dict) else [given]
            found += [(name, f"{flag} {word}", source) for word, source in zip(words, sources, strict=True)]
    return found


def check_sampling(cfg: RunConfig, model: Model, teachers: dict[str, Lora | Whole]) -> None:
    """ValueError for a guidance or a number of steps that the model it is for cannot be run at."""
    own = {name: teacher.model for name, teacher in teachers.items() if isinstance(teacher, Whole)}
    asked = [(model, cfg.guidance), (model, cfg.deployed_guidance())]
    if isinstance(cfg, DistillationConfig):
        for name in [*cfg.teachers, *teacher_names(cfg, {})]:
            asked.append((own[name] if name in own else model, cfg.guidance_of(name)))
    for one, guidance in asked:
        one.family.arguments(one.folder, cfg.t5, guidance)
    if isinstance(cfg, Rollout):
        with reading(f"--steps {cfg.steps}"):
            model.sigmas(cfg.steps)
    for one in (model, *own.values()):
        with reading(f"--eval-steps {cfg.eval_steps}"):
            one.sigmas(cfg.eval_steps)


def load_weights(cfg: RunConfig, model: Model, teachers: dict[str, Lora | Whole], student: Lora) -> None:
    """Load the base and the teachers, put all adapters on it, and let what is trained require a gradient."""
    if cfg.full:
        model.trained = BASE
        model.load(torch.float32)
        model.transformer.requires_grad_(True)
        return
    model.load()
    for name, teacher in teachers.items():
        if isinstance(teacher, Whole):
            model.teachers[name] = teacher.load(model.vae)
        else:
            lora.attach(model.transformer, name, teacher, model.dtype)
    if isinstance(cfg, DistillationConfig) and EMA in cfg.teachers.values():
        lora.attach(model.transformer, EMA, student, torch.float32)
    if isinstance(cfg, NFTConfig):
        lora.attach(model.transformer, OLD, student, torch.float32)
    lora.attach(model.transformer, START, student, model.dtype)
    lora.attach(model.transformer, STUDENT, student, torch.float32)
    for parameter in lora.parameters_of(model.transformer, STUDENT).values():
        parameter.requires_grad_(True)


def student_start(cfg: RunConfig, model: Model, teachers: dict[str, Lora | Whole]) -> Lora:
    """The student's first adapter: fresh (= base), several merged, or one from disk."""
    if cfg.cold_start == "base":
        targets = model.family.LORA_TARGETS
        return lora.fresh_lora(model.skeleton, targets, cfg.rank, cfg.alpha, cfg.seed)
    if cfg.cold_start == "merge":
        read = {} if cfg.merge_from else teachers
        sources = {name: source for name, source in cfg.merged().items() if source != BASE}
        loras = [read[name] if name in read else model.read_lora(sources[name]) for name in sources]
        share = 1 / len(cfg.merged())  # the base counts too: its update is zero
        return merging.merge(cfg.merge, loras, share, cfg.rank, cfg.alpha)
    adapter = model.read_lora(cfg.cold_start)
    largest = max(a.shape[0] for a in adapter.A.values())
    require(
        largest <= cfg.rank,
        f"--cold-start {cfg.cold_start!r} has rank {largest}; use --rank {largest} or more",
    )
    return merging.fitted(adapter, cfg.rank, cfg.alpha)


def load_data(cfg: RunConfig, model: Model) -> tuple[Data, list[list[Asked]]]:
    """(prompts per task, or images with captions; what every step asks)."""
    if isinstance(cfg, SFTConfig):
        images = load_images(cfg.data, model)
        chosen = [images.of_step(cfg.prompts_per_step, cfg.seed, step) for step in range(cfg.iterations)]
        return images, [[images.captions[n] for n in numbers] for numbers in chosen]
    pools = load_tasks(cfg.prompts)
    steps = []
    for step in range(cfg.iterations):
        prompts = prompts_of_step(
            pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, alternate=cfg.alternate
        )
        steps.append([prompt.asked for prompt in prompts])
    return pools, steps


def load_rewards(cfg: RunConfig, model: Model, data: Data, shown: Shown) -> Rewards:
    """Every reward that the run will call, found, loaded and tried on grey images once for each task."""
    if isinstance(cfg, SFTConfig):
        return {}
    scorers = {}
    if shown.splits:
        scorers = {task: specs_of(text) for task, text in cfg.rewards.items()}
    specs = [*sum(scorers.values(), []), *cfg.training_rewards().values()]
    rewards = {spec: find_reward(spec) for spec in specs}
    called = {(task, spec): data[task] for task, spec in cfg.training_rewards().items()}
    for pools in shown.splits.values():
        for task in scorers.keys() & pools.keys():
            for spec in scorers[task]:
                called[task, spec] = called.get((task, spec), []) + pools[task]
    for (task, spec), prompts in called.items():
        rewards[spec].check_metadata(task, prompts)
    for reward in rewards.values():
        reward.load(model.device)
    for (task, spec), prompts in called.items():
        rewards[spec].check(task, prompts, model.pixels)
    return rewards


# ---- what it reads -----------------------------------------------------------------------------------------


def contents(cfg: RunConfig, model: Model, data: Data) -> dict[str, str]:
    """What a run reads, by content: a run that resumes must find what it began with, wherever that lies now.
    And the dtype, which "auto" chooses by the machine."""
    weights = weight_files(model.folder / "transformer")
    found = {"dtype": str(model.dtype), "base": digest(*weights, most=LARGE)}
    sources = source_pictures(data)
    if sources:
        found["source pictures"] = digest(*sources, most=2**21)
    found["cold start"] = content_of(cfg.cold_start)
    if cfg.cold_start == "merge":
        found |= {f"merged {name}": content_of(source) for name, source in cfg.merged().items()}
    if isinstance(cfg, DistillationConfig):
        found |= {f"teacher {name}": content_of(source) for name, source in cfg.teachers.items()}
    if isinstance(cfg, SFTConfig):
        return found | {"data": content_of(cfg.data, most=math.inf)}
    for number, (task, source) in enumerate(cfg.prompts.items(), 1):
        found[f"prompt file of {task} (task {number})"] = digest(resolve(source))
    return found


def source_pictures(data: Data) -> list[Path]:
    """Of all prompts or captions, in their order, whether or not a step of this run reads them: a run may go
    on for more steps than it began with."""
    asked = data.captions if isinstance(data, Images) else [p.asked for pool in data.values() for p in pool]
    paths = [path for one in asked if isinstance(one, Edit) for path in one.pictures]
    return [Path(path) for path in dict.fromkeys(paths)]


def content_of(source: str, most: float = LARGE) -> str:
    """sha256 of a file, of all files below a directory but README.md, or of an adapter on the Hub, with the
    alpha that the source names; what is no file, such as "base", stands for itself."""
    if source in (*lora.WITHOUT_WEIGHTS, "merge"):
        return source
    place, colon, alpha = source.partition(":alpha=")
    path = resolve(place)
    if path.is_dir():
        # A student's card is written anew whenever it is scored.
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "README.md"]
        content = digest(*sorted(files), most=most)
        return content + colon + alpha
    try:
        return digest(find_adapter(place), most=most) + colon + alpha
    except FileNotFoundError:
        return source
