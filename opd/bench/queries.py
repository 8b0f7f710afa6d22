"""What fewer queried states save: the same work with all states and with some, taking turns in one process,
the passes counted in the very updates that are timed."""

import statistics
from dataclasses import dataclass, field, replace

import torch

from opd.bench.clock import counting, timed_step
from opd.bench.model import Work, make_world, our_stage
from opd.errors import require
from train import Distillation


@dataclass
class Turn:
    """One of the two, and what its updates took."""

    stage: Distillation
    seconds: list[float] = field(default_factory=list)
    passes: dict = field(default_factory=dict)
    steps: int = 1
    """Updates so far; the first warms up."""

    def run(self, updates: int) -> None:
        transformer = self.stage.model.transformer
        hook = transformer.register_forward_hook(counting(self.passes, "student"), with_kwargs=True)
        try:
            for _ in range(updates):
                self.seconds.append(timed_step(self.stage, self.steps))
                self.steps += 1
        finally:
            hook.remove()

    def rows(self) -> float:
        """Forward and backward rows per update, of student, teachers and anchor."""
        return sum(entry["rows"] for entry in self.passes.values()) / len(self.seconds)


def compare_queries(work: Work, device: torch.device, rounds: int, updates: int) -> dict:
    """All states against --queries of --query-range, A B A B: `rounds` turns of `updates` updates of each.
    Per side the median seconds of an update and its rows; and both as shares of all states'."""
    fewer = work.queries > 0 or work.query_range != (0, 0)
    require(fewer, "--against-all compares with fewer states: give --queries or --query-range")
    require(rounds >= 1, f"--rounds is {rounds}; it must be at least 1")
    turns = {}
    for name, states in {"all": replace(work, queries=0, query_range=(0, 0)), "queried": work}.items():
        turns[name] = Turn(our_stage(make_world(states, device)))
        turns[name].stage.step(0)
    for _ in range(rounds):
        for turn in turns.values():
            turn.run(updates)
    result = {}
    for name, turn in turns.items():
        result[name] = {
            "seconds": turn.seconds,
            "seconds_per_update": statistics.median(turn.seconds),
            "rows_per_update": turn.rows(),
        }
    for figure in ("seconds_per_update", "rows_per_update"):
        result[f"share_of_{figure}"] = result["queried"][figure] / result["all"][figure]
    return result


def in_words(result: dict) -> str:
    lines = []
    for name in ("all", "queried"):
        side = result[name]
        spread = f"{min(side['seconds']):.4g} to {max(side['seconds']):.4g}, {len(side['seconds'])} updates"
        rows = f"{side['rows_per_update']:.4g} rows"
        lines.append(f"{name:8} {side['seconds_per_update']:8.4g} s per update ({spread}), {rows}")
    seconds, rows = (result[f"share_of_{figure}"] for figure in ("seconds_per_update", "rows_per_update"))
    lines.append(f"queried / all: {seconds:.3f} of the seconds, {rows:.3f} of the rows")
    return "\n".join(lines)
