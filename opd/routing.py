"""Who teaches which sample: rows of weights alpha_NK over the teachers, pure functions of the batch.

The loss knows nothing else of routing: L_b = w_b sum_k alpha_bk |v_b - v_k,b|^2 (eq. 16). A one-hot row is
hard routing, any non-negative row soft routing, and the anchor is weight added in its column. A teacher is
asked about the samples whose alpha is not 0.

A route is a text: a teacher's name, or a weighted sum such as 0.7*text+0.3*quality.
"""

import math

import torch
from torch import Tensor

from opd.errors import require


def shares(route: str, where: str) -> dict[str, float]:
    """Teacher -> its weight. ValueError, with `where` the route stands, unless it is a sum of NAME or
    WEIGHT*NAME with positive weights and no name twice."""
    found = {}
    for term in route.split("+"):
        weight_text, star, name = term.rpartition("*")
        weight = 1.0
        if star:
            weight = number(weight_text, f"{where}: {route!r}")
        name = name.strip()
        require(name != "", f"{where}: {route!r} is no sum of teachers; write NAME or 0.7*NAME+0.3*NAME")
        require(name not in found, f"{where}: {route!r} names {name!r} twice")
        found[name] = weight
    return found


def number(text: str, where: str) -> float:
    """A positive, finite weight."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    require(0 < weight < math.inf, f"{where}: the weight {text!r} must be a positive number")
    return weight


def rows(routes_N: list[str], names_K: list[str]) -> Tensor:
    """Eq. 7 for one-hot routes, soft routing for sums: (N, K) float32 on the CPU."""
    alpha_NK = torch.zeros(len(routes_N), len(names_K))
    for n, route in enumerate(routes_N):
        for name, weight in shares(route, "route").items():
            alpha_NK[n, names_K.index(name)] = weight
    return alpha_NK


def anchored(alpha_NK: Tensor, column: int, weight: float) -> Tensor:
    """The anchor (MAR, eq. 16): every sample is held to the teacher in `column` too, with weight lambda."""
    anchored_NK = alpha_NK.clone()
    anchored_NK[:, column] += weight
    return anchored_NK


def anchor_weights(sigmas_T: list[float], weight: float, levels: dict[str, float]) -> list[float]:
    """lambda at each state: `weight` down to the first of `levels`, then that level's, to the next."""
    falling = sorted(levels, key=float, reverse=True)
    weights_T = []
    for sigma in sigmas_T:
        below = [level for level in falling if sigma <= float(level)]
        if below:
            weights_T.append(levels[below[-1]])
        else:
            weights_T.append(weight)
    return weights_T


def claimed(scores_NJ: Tensor) -> list[int | None]:
    """Reward routing: which of J rewards claims each sample, that in whose units it stands highest.

    `scores_NJ`: raw scores, NaN where a reward does not apply or failed. Each column is centred and divided
    by its spread over the step, (r - mean) / (std + 1e-4), since rewards share no unit. None: no score.
    """
    known_NJ = scores_NJ.isfinite()
    count_J = known_NJ.sum(0).clamp(min=1)
    mean_J = scores_NJ.nan_to_num(0.0).sum(0) / count_J
    centred_NJ = torch.where(known_NJ, scores_NJ - mean_J, 0.0)
    std_J = (centred_NJ.square().sum(0) / count_J).sqrt()
    units_NJ = torch.where(known_NJ, centred_NJ / (std_J + 1e-4), -torch.inf)
    best_N = units_NJ.argmax(1).tolist()
    claims = []
    for n, best in enumerate(best_N):
        if known_NJ[n, best]:
            claims.append(best)
        else:
            claims.append(None)
    return claims
