"""The prompts that a run shows, measures and scores, read once."""

from dataclasses import dataclass

from opd.config import DistillationConfig, RunConfig, SFTConfig
from opd.data import Asked, Edit, Pools, Prompt, fair_sample
from opd.evaluation.score import Splits
from opd.formats.latents import Images
from opd.formats.prompts import load_prompts, load_tasks

SHOWN = 9
"""Prompts of a sample grid, over all tasks."""
MOST = 16
"""Those of --sample-prompts."""


@dataclass(frozen=True)
class Shown:
    grid: Pools
    """What sample grids show, by task: --sample-prompts, or `measured`, or captions."""
    measured: Pools
    """A few of every task that is trained on, where the distance to its teachers is measured; {} in the
    stages without teachers."""
    splits: Splits
    """The prompts of the table: of each task those held out or, where there are none, those of training; {}
    where the run is not scored."""

    def asked(self, cfg: RunConfig) -> list[Asked]:
        """All that a report will ask."""
        pools = [*self.grid.values(), *self.measured.values()]
        texts = [prompt.asked for pool in pools for prompt in pool]
        count = 0
        if self.splits:
            count = max(cfg.eval_prompts * cfg.evaluate, cfg.watch_prompts * (cfg.watch_every > 0))
        for split in self.splits.values():
            for pool in split.values():
                texts += [prompt.asked for _, prompt in fair_sample(pool, count)]
        return texts


def prompts_to_show(cfg: RunConfig, data: Pools | Images) -> Shown:
    """ValueError / FileNotFoundError for a file that cannot be read."""
    chosen = chosen_prompts(cfg)
    if isinstance(cfg, SFTConfig):
        return Shown(chosen or captions(data), {}, {})
    heldout = load_tasks(cfg.heldout)
    few, splits = few_of_each(data | heldout, list(data)), {}
    if cfg.evaluate or cfg.watch_every > 0:
        splits["train"] = {task: pool for task, pool in data.items() if task not in heldout}
        splits["held-out"] = heldout
    measured = few if isinstance(cfg, DistillationConfig) else {}
    return Shown(chosen or few, measured, {split: pools for split, pools in splits.items() if pools})


def chosen_prompts(cfg: RunConfig) -> Pools:
    """Those of --sample-prompts, as many as a grid can show."""
    if not cfg.sample_prompts:
        return {}
    prompts = load_prompts(cfg.sample_prompts, "--sample-prompts", None)
    prompts = prompts[:: max(1, len(prompts) // MOST)][:MOST]
    tasks = dict.fromkeys(prompt.task for prompt in prompts)
    return {task: [prompt for prompt in prompts if prompt.task == task] for task in tasks}


def captions(images: Images) -> Pools:
    asked = [asked if isinstance(asked, Edit) else Edit(asked, ()) for asked in images.captions]
    few = list(dict.fromkeys(asked))[:SHOWN]
    return {"captions": [Prompt(text, "captions", pictures=pictures) for text, pictures in few]}


def routed(data: Pools, pools: Pools) -> Pools:
    """The prompts of training and others: all whose own routes name teachers."""
    return data | {f"{task}, shown": pool for task, pool in pools.items()}


def few_of_each(pools: Pools, tasks: list[str]) -> Pools:
    """At a fixed stride, so that files sorted by kind show every kind."""
    count = max(1, SHOWN // len(tasks))
    return {task: pools[task][:: max(1, len(pools[task]) // count)][:count] for task in tasks}
