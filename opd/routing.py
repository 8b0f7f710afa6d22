"""Who teaches which sample: rows of weights alpha_NK over the teachers, pure functions of the batch.

The loss knows nothing else of routing: L_b = w_b sum_k alpha_bk |v_b - v_k,b|^2 (eq. 16). A one-hot row is
hard routing, any non-negative row soft routing, and the anchor is weight added in its column. A teacher is
asked about the samples whose alpha is not 0.
"""

import torch
from torch import Tensor


def one_hot(teacher_N: list[str], names_K: list[str]) -> Tensor:
    """Hard routing (eq. 7): each sample has one teacher, that of its prompt's task. (N, K) float32 on the
    CPU."""
    alpha_NK = torch.zeros(len(teacher_N), len(names_K))
    for n, teacher in enumerate(teacher_N):
        alpha_NK[n, names_K.index(teacher)] = 1.0
    return alpha_NK


def anchored(alpha_NK: Tensor, column: int, weight: float) -> Tensor:
    """MAR: every sample is held to the teacher in `column` with weight lambda, on top of its own teachers."""
    anchored_NK = alpha_NK.clone()
    anchored_NK[:, column] += weight
    return anchored_NK
