"""Scores that are under way on every rank, waited for and put together."""

import torch
from torch import Tensor

from opd import ranks
from opd.rewards.scoring import Scoring


def gather_scores(
    pending: list[tuple[list[int], Scoring]], count: int, device: torch.device
) -> tuple[Tensor, list[str], float]:
    """Wait for the scorings of some samples each (collectives). Returns the scores (count,) float64 of all
    ranks' samples, NaN where none was asked for or it failed, on `device`; all ranks' failures in words; and
    the seconds that this rank's scorers were busy."""
    scores_N = torch.zeros(count, dtype=torch.float64, device=device)
    asked_N = torch.zeros(count, dtype=torch.float64, device=device)
    failures, busy = [], 0.0
    for samples, scoring in pending:
        scores_B, failed, seconds = scoring.result()
        scores_N[samples] = scores_B.to(device, torch.float64)
        asked_N[samples] = 1.0
        failures += sorted(set(failed.values()))
        busy += seconds
    ranks.total(scores_N)
    ranks.total(asked_N)
    everywhere = [failure for failures_of_rank in ranks.gather(failures) for failure in failures_of_rank]
    return torch.where(asked_N > 0, scores_N, torch.nan), everywhere, busy
