"""Score a model and its adapters on every task, on trained and held-out prompts.

    python -m opd.evaluate                                        # the miniature's base and teachers
    python -m opd.evaluate --adapters student=runs/mini/student --out scores.json
    python -m opd.evaluate --model PATH --adapters a=PATH b=PATH --prompts task=FILE --rewards task=module:function

A scorer is a function `(images (B,3,H,W) float in [0,1], prompts, metadata) -> scores (B,)`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from opd import adapters, ranks
from opd.config import Config, Texts, mini_prompts, require
from opd.data import Prompt, load_tasks, permutation
from opd.files import write_json
from opd.model import Model
from opd.rewards import find_reward

_MINI = Config()


def cases(pool: list[Prompt], count: int) -> list[tuple[int, Prompt]]:
    """`count` (noise index, prompt) pairs: every prompt once before any twice, each time with other noise. In a fixed
    shuffled order, because files are sorted by kind and their first lines are no fair sample."""
    order = permutation(len(pool), 0, "evaluate", 0)
    return [(i, pool[order[i % len(pool)]]) for i in range(count)]


def score(model: Model, adapter: str, pool: list[Prompt], reward, *, count: int, steps: int, seed: int, guidance: float,
          batch: int = 128, strict: bool = True) -> float:
    """Mean score of `adapter` over `count` images, the work dealt over the ranks.

    Ranks run the same number of batches (collectives must match), but nothing padded enters the mean. A score that is not
    finite is a ValueError, or with `strict` off left out of the mean.
    """
    work, world = cases(pool, count), ranks.world()
    pieces = [work[i:i + batch] for i in range(0, len(work), batch)]
    total = torch.zeros(2, dtype=torch.float64, device=model.device)
    for i in range(ranks.rank(), -(-len(pieces) // world) * world, world):
        piece = pieces[min(i, len(pieces) - 1)]
        prompts = [p for _, p in piece]
        images = model.images(adapter, [p.text for p in prompts], [n for n, _ in piece], steps=steps, seed=seed, guidance=guidance)
        if i < len(pieces):
            scores = reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
            require(tuple(scores.shape) == (len(piece),), f"the scorer returned shape {tuple(scores.shape)} for {len(piece)} images")
            known = scores[scores.isfinite()]
            require(not strict or len(known) == len(scores), f"the scorer returned a non-finite score for one of {[p.text for p in prompts][:3]}...")
            total += torch.tensor([known.double().sum(), len(known)], dtype=torch.float64, device=model.device)
    ranks.total(total)
    return float(total[0] / total[1])


def evaluate(model: Model, names: list[str], splits: dict[str, dict[str, list[Prompt]]], rewards: dict[str, str], *,
             count: int, steps: int, seed: int, guidance: dict[str, float], say=print, batch: int = 128) -> dict:
    """{adapter: {split: {task: mean, ..., "mean": m}}}, same noise for every adapter. Prompts must be prepared."""
    functions = {task: find_reward(spec) for task, spec in rewards.items()}
    scores = {}
    for name in names:
        scores[name] = {}
        for split, pools in splits.items():
            row = {task: score(model, name, pool, functions[task], count=count, steps=steps, seed=seed,
                               guidance=guidance[name], batch=batch) for task, pool in pools.items()}
            scores[name][split] = row | {"mean": sum(row.values()) / len(row)}
        say(f"  evaluated {name}")
    return scores


def table(scores: dict, note: str) -> str:
    """The scores as text: a row per adapter, the tasks and their mean per split."""
    splits = next(iter(scores.values()))
    columns = [(split, task) for split, row in splits.items() for task in row]
    width = max(len(name) for name in scores) + 2
    lines = [note, " " * width + "".join(f"{split:>10}" for split, _ in columns),
             " " * width + "".join(f"{task:>10}" for _, task in columns)]
    for name, row in scores.items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[s][t]:>10.3f}" for s, t in columns))
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    model: str = _MINI.model
    """Pipeline directory or Hub id."""
    family: str = "sd3"
    """Model family: the module opd/FAMILY.py."""
    adapters: Texts = field(default_factory=lambda: dict(_MINI.teachers))
    """Name and source of each adapter; the base is always scored too."""
    prompts: Texts = field(default_factory=lambda: mini_prompts("train"))
    """Task -> file of prompts that were trained on."""
    heldout: Texts = field(default_factory=lambda: mini_prompts("test"))
    """Task -> file of prompts never trained on."""
    rewards: Texts = field(default_factory=lambda: dict(_MINI.rewards))
    """Task -> scorer, module:function."""
    count: int = 256
    """Images per task and split."""
    steps: int = 10
    """ODE steps."""
    guidance: float = 1.0
    """Guidance of every model."""
    seed: int = 0
    """Seed of the noise."""
    resolution: int = 0
    """Pixels per side; 0 = what the model was made for."""
    dtype: str = "auto"
    """What the transformer computes in: bfloat16, float16, float32, or auto (bfloat16 where the hardware multiplies it)."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    cache: str = "~/.cache/flow-opd"
    """Encoded prompts."""
    out: str = ""
    """JSON file for the scores."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        require(args.count >= 1 and args.steps >= 1, f"--count {args.count} and --steps {args.steps} must be at least 1")
        device = ranks.start()
        splits = {name: load_tasks(files) for name, files in (("train", args.prompts), ("held-out", args.heldout)) if files}
        for task in {t for pools in splits.values() for t in pools}:
            require(task in args.rewards, f"task {task!r} has no scorer; add --rewards {task}=module:function")
            find_reward(args.rewards[task])
        model = Model.ready(args, device, [p.text for pools in splits.values() for pool in pools.values() for p in pool])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    names = [adapters.BASE, *(n for n in args.adapters if n != adapters.BASE)]
    scores = evaluate(model, names, splits, args.rewards, count=args.count, steps=args.steps, seed=args.seed,
                      guidance=dict.fromkeys(names, args.guidance))
    if ranks.rank() == 0:
        settings = f"n={args.count} steps={args.steps} guidance={args.guidance} seed={args.seed} resolution={args.resolution or 'native'}"
        print(table(scores, settings))
        if args.out:
            write_json(Path(args.out), {"settings": vars(args), "scores": scores})


if __name__ == "__main__":
    main()
