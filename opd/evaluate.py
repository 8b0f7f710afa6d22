r"""Score a model and its adapters on every task, on trained and held-out prompts.

    python -m opd.evaluate                                        # the miniature's base and teachers
    python -m opd.evaluate --adapters student=runs/mini/student --out scores.json
    python -m opd.evaluate --model PATH --adapters a=PATH b=PATH \
        --prompts task=FILE --rewards task=module:function

Scorers are rewards: opd/rewards/__init__.py says what they are and how they are named.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from opd import adapters, ranks
from opd.data import Prompt, load_tasks, permutation
from opd.deployment import guidance_of
from opd.files import write_json
from opd.flags import Texts, at_least_one, require, time_limit
from opd.model import Model
from opd.presets import DEFAULT
from opd.rewards import Reward, find_reward
from opd.rewards.scoring import Scoring

Case = tuple[int, Prompt]  # noise index and prompt: what an image is made from
Rows = dict[str, tuple[str, float]]  # name in the table -> adapter and guidance
Splits = dict[str, dict[str, list[Prompt]]]  # split -> task -> prompts


@dataclass(frozen=True)
class Arguments:
    model: str = DEFAULT.model
    """Pipeline directory or Hub id."""
    family: str = "sd3"
    """Model family: the module opd/families/FAMILY.py."""
    adapters: Texts = field(default_factory=lambda: dict(DEFAULT.teachers))
    """Name and source of each adapter; the base is always scored too."""
    prompts: Texts = field(default_factory=lambda: dict(DEFAULT.prompts))
    """Task -> file of prompts that were trained on."""
    heldout: Texts = field(default_factory=lambda: dict(DEFAULT.heldout))
    """Task -> file of prompts never trained on."""
    rewards: Texts = field(default_factory=lambda: dict(DEFAULT.rewards))
    """Task -> scorer: module:function_or_class, a short name, or a sum like 0.7*a:b+0.3*c:d."""
    reward_timeout: float = 60.0
    """Seconds after which a call of a scorer is given up."""
    count: int = 256
    """Images per task and split."""
    steps: int = 10
    """ODE steps."""
    guidance: tuple[float, ...] = ()
    """Guidance of every model; several: a row for each. None: what is recorded with each adapter, 1 where
    nothing is."""
    seed: int = 0
    """Seed of the noise."""
    resolution: int = 0
    """Pixels per side; 0 = what the model was made for."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the transformer computes in: bfloat16, float16, float32, or auto (bfloat16 where the hardware
    multiplies it)."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    cache: str = "~/.cache/flow-opd"
    """Encoded prompts."""
    out: str = ""
    """JSON file for the scores."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        check(args)
        splits = read_splits(args)
        rows = rows_of(args)
        rewards = find_rewards(args, splits)
        device = ranks.start()
        for reward in rewards.values():
            reward.load(device)
        model = Model.ready(args, device, texts_of(splits))
        try_rewards(model, args, splits, rewards)
        scores = evaluate_all(model, args, rows, splits, rewards)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if ranks.rank() == 0:
        publish(args, rows, scores)


# ---- what is asked for --------------------------------------------


def check(args: Arguments) -> None:
    """Every argument that can be judged by itself. ValueError with its value and the flag."""
    at_least_one(args, "count", "steps")
    for scale in args.guidance:
        require(math.isfinite(scale), f"--guidance is {scale}; it must be finite")
    time_limit(args, "reward_timeout")
    named = bool(args.prompts) or bool(args.heldout)
    require(named, "--prompts and --heldout are both empty: give at least one TASK=FILE pair")
    if args.out:
        check_writable(args.out)


def check_writable(out: str) -> None:
    """ValueError where a JSON file cannot be put: the work of hours would end in it."""
    path = Path(out)
    regular = path.is_file() or not path.exists()
    require(regular, f"--out {out!r} exists and is not a regular file; name a file such as scores.json")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    require(folder.is_dir(), f"--out {out!r}: {str(folder)!r} is not a directory; name another place")


def read_splits(args: Arguments) -> Splits:
    """The prompts of those splits that have files."""
    splits = {}
    if args.prompts:
        splits["train"] = load_tasks(args.prompts)
    if args.heldout:
        splits["held-out"] = load_tasks(args.heldout)
    return splits


def rows_of(args: Arguments) -> Rows:
    """Base and adapters, each with its guidance; where --guidance names several, each with all of them."""
    if len(args.guidance) < 2:
        scales = guidance_of(args.adapters, *args.guidance)
        return {name: (name, scale) for name, scale in scales.items()}
    rows = {}
    for name in dict.fromkeys([adapters.BASE, *args.adapters]):
        for scale in args.guidance:
            rows[f"{name} g={scale:g}"] = (name, scale)
    return rows


def texts_of(splits: Splits) -> list[str]:
    texts = []
    for pools in splits.values():
        for pool in pools.values():
            texts.extend(prompt.text for prompt in pool)
    return texts


def find_rewards(args: Arguments, splits: Splits) -> dict[str, Reward]:
    """Task -> its reward, each found once, with every prompt holding the metadata that it needs."""
    rewards = {}
    for pools in splits.values():
        for task, pool in pools.items():
            fix = f"add --rewards {task}=module:function"
            require(task in args.rewards, f"task {task!r} has no scorer; {fix}")
            if task not in rewards:
                rewards[task] = find_reward(args.rewards[task])
            rewards[task].check_metadata(task, pool)
    return rewards


def try_rewards(model: Model, args: Arguments, splits: Splits, rewards: dict[str, Reward]) -> None:
    """Call every reward once on grey images, before hours are spent on better ones."""
    pixels = args.resolution or model.family.default_resolution(model.folder)
    for pools in splits.values():
        for task, pool in pools.items():
            rewards[task].check(task, pool, pixels)


# ---- scores --------------------------------------------


def evaluate_all(
    model: Model, args: Arguments, rows: Rows, splits: Splits, rewards: dict[str, Reward]
) -> dict:
    """The scores of every row."""
    scores = {}
    for name, row in rows.items():
        scores |= evaluate(
            model,
            {name: row},
            splits,
            rewards,
            images_per_task=args.count,
            ode_steps=args.steps,
            seed=args.seed,
            timeout=args.reward_timeout,
        )
        ranks.say(f"  evaluated {name}")
    return scores


def evaluate(
    model: Model,
    rows: Rows,
    splits: Splits,
    rewards: dict[str, Reward],
    *,
    images_per_task: int,
    ode_steps: int,
    seed: int,
    timeout: float,
    batch: int = 128,
    strict: bool = True,
) -> dict:
    """{row: {split: {task: mean, ..., "mean": m}}}, same noise for every row. Prompts must be
    prepared and rewards loaded. `timeout`, `strict`: as for `score`."""
    scores = {}
    for name, (adapter, guidance) in rows.items():
        scores[name] = {}
        for split, pools in splits.items():
            means = {}
            for task, pool in pools.items():
                means[task] = score(
                    model,
                    adapter,
                    pool,
                    rewards[task],
                    images_per_task=images_per_task,
                    ode_steps=ode_steps,
                    seed=seed,
                    guidance=guidance,
                    timeout=timeout,
                    batch=batch,
                    strict=strict,
                )
            mean = sum(means.values()) / len(means)
            scores[name][split] = means | {"mean": mean}
    return scores


def score(
    model: Model,
    adapter: str,
    pool: list[Prompt],
    reward: Reward,
    *,
    images_per_task: int,
    ode_steps: int,
    seed: int,
    guidance: float,
    timeout: float,
    batch: int = 128,
    strict: bool = True,
) -> float:
    """Mean score of `adapter` over images of one task's prompts, the work dealt over the ranks. A batch is
    scored while the next is generated.

    An image that gets no score (the reward raises, takes longer than `timeout` seconds, is not finite) is a
    ValueError with the reasons, or with `strict` off left out of the mean, which is NaN if none remains."""
    sum_and_count = torch.zeros(2, dtype=torch.float64)
    running = []  # the scoring of the last batch
    for cases, counts in batches_of_rank(cases_of(pool, images_per_task), batch):
        prompts = [prompt for _, prompt in cases]
        texts = [prompt.text for prompt in prompts]
        noise = [index for index, _ in cases]
        images_BCHW = model.images(adapter, texts, noise, steps=ode_steps, seed=seed, guidance=guidance)
        if running:
            sum_and_count += collect(running.pop(), adapter, pool[0].task, reward, strict)
        if counts:
            metadata = [prompt.metadata for prompt in prompts]
            running.append(reward.start(images_BCHW, texts, metadata, timeout))
    if running:
        sum_and_count += collect(running.pop(), adapter, pool[0].task, reward, strict)
    total, known = ranks.total(sum_and_count.to(model.device)).tolist()
    if known == 0:
        return math.nan
    return total / known


def cases_of(pool: list[Prompt], count: int) -> list[Case]:
    """`count` (noise index, prompt) pairs: every prompt once before any twice, each time with other noise.
    In a fixed shuffled order, because files are sorted by kind and their first lines are no fair sample."""
    order = permutation(len(pool), 0, "evaluate", 0)
    return [(index, pool[order[index % len(pool)]]) for index in range(count)]


def batches_of_rank(cases: list[Case], size: int) -> list[tuple[list[Case], bool]]:
    """This rank's batches, and whether each counts: ranks get the same number of them (collectives must
    match), and those that a rank has too few of are repetitions, which enter no mean."""
    batches = [cases[start : start + size] for start in range(0, len(cases), size)]
    mine = []
    for turn in range(math.ceil(len(batches) / ranks.world())):
        place = turn * ranks.world() + ranks.rank()
        counts = place < len(batches)
        mine.append((batches[min(place, len(batches) - 1)], counts))
    return mine


def collect(scoring: Scoring, adapter: str, task: str, reward: Reward, strict: bool) -> Tensor:
    """(sum, count) of the scores of one batch, float64. ValueError with `strict` if some are missing."""
    scores_B, reasons, _ = scoring.result()
    if strict and reasons:
        first = "; ".join(list(reasons.values())[:3])
        missing = f"no score for {len(reasons)} of {len(scores_B)} images of adapter {adapter!r}"
        raise ValueError(f"task {task!r}: reward {reward.spec!r} gave {missing}: {first}")
    known = scores_B[scores_B.isfinite()].double()
    return torch.tensor([known.sum(), len(known)], dtype=torch.float64)


# ---- what comes out --------------------------------------------


def publish(args: Arguments, rows: Rows, scores: dict) -> None:
    """Print the table, and write the file if there is to be one."""
    resolution = args.resolution or "native"
    scales = {name: scale for name, (_, scale) in rows.items()}
    guidance = said(scales)
    sampling = f"n={args.count} steps={args.steps} guidance={guidance}"
    print(table(scores, f"{sampling} seed={args.seed} resolution={resolution}"))
    if args.out:
        write_json(Path(args.out), {"settings": vars(args), "guidance": scales, "scores": scores})


def said(scales: dict[str, float]) -> str:
    """One number where all rows share it, else each row's."""
    different = set(scales.values())
    if len(different) == 1:
        return f"{different.pop():g}"
    return ", ".join(f"{name} {scale:g}" for name, scale in scales.items())


def table(scores: dict, note: str) -> str:
    """The scores as text: a row per adapter, the tasks and their mean per split."""
    splits = next(iter(scores.values()))
    columns = [(split, task) for split, row in splits.items() for task in row]
    width = max(len(name) for name in scores) + 2
    above = "".join(f"{split:>10}" for split, _ in columns)
    heads = "".join(f"{task:>10}" for _, task in columns)
    lines = [note, " " * width + above, " " * width + heads]
    for name, row in scores.items():
        numbers = "".join(f"{row[split][task]:>10.3f}" for split, task in columns)
        lines.append(f"{name:<{width}}" + numbers)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
