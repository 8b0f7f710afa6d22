"""Cold starts by merging: several adapters become one of the student's rank, module by module.

    svd     (1 / K) sum_k U_k, the mean update, truncated to the rank
    naive   (1 / K sum_k B_k) (1 / K sum_k A_k), as the released script has it; not the mean update

U_k = B_k A_k is adapter k's update of a module. svd never forms a product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from opd.errors import require
from opd.formats.lora_files import Lora

Factors = tuple[Tensor, Tensor]  # A (q, in) and B (out, q) float32, whose product B A is an update


def merge(mode: str, loras: list[Lora], share: float, rank: int, alpha: float) -> Lora:
    """One adapter of `rank` and `alpha` out of all `loras`, each of which counts `share`: 1 / K for a mean.

    ValueError where there is nothing to merge and where the mode cannot merge these adapters.
    """
    require(len(loras) > 0, "--cold-start merge: there is no adapter to merge; use --cold-start base")
    A, B = {}, {}
    spare = torch.Generator().manual_seed(0)
    for module in sorted(set().union(*(lora.A for lora in loras))):
        a_QI, b_OQ = MERGES[mode](loras, module, share, rank)
        A[module], B[module] = widened(a_QI, b_OQ, rank, spare)
        B[module] *= rank / alpha
    sources = ", ".join(lora.source for lora in loras)
    return Lora(f"{mode} merge of {sources}", "", A, B, dict.fromkeys(A, alpha / rank))


def fitted(lora: Lora, rank: int, alpha: float) -> Lora:
    """The same update (or, if the adapter has a higher rank, its best approximation) with `rank` and
    `alpha`."""
    return merge("svd", [lora], 1.0, rank, alpha)


def svd(loras: list[Lora], module: str, share: float, rank: int) -> Factors:
    """The best approximation of the sum in `rank`: with the factors side by side, S the sum of their ranks,
    QR of both, then the SVD of a (S, S) core. An adapter without the module counts as zero."""
    loras = [lora for lora in loras if module in lora.A]
    a_SI = torch.cat([lora.A[module] for lora in loras])
    b_OS = torch.cat([share * (lora.scale[module] * lora.B[module]) for lora in loras], dim=1)
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b_OS), torch.linalg.qr(a_SI.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]) @ q_a.T, q_b @ (u[:, :rank] * root)


def naive(loras: list[Lora], module: str, share: float, rank: int) -> Factors:
    ranks = [len(lora.A[module]) if module in lora.A else 0 for lora in loras]
    same = "--merge naive averages factors, so all adapters must have one rank and the same layers"
    require(len(set(ranks)) == 1, f"{same}; their ranks at {module}: {ranks}; use --merge svd")
    require(ranks[0] <= rank, f"--merge naive keeps the adapters' rank: use --rank {ranks[0]} or more")
    a_RI = sum(share * lora.A[module] for lora in loras)
    b_OR = sum(share * (lora.scale[module] * lora.B[module]) for lora in loras)
    return a_RI, b_OR


MERGES: dict[str, Callable[[list[Lora], str, float, int], Factors]] = {"svd": svd, "naive": naive}


def widened(a_QI: Tensor, b_OQ: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """The same update in factors of `rank`. Spare rank starts as in a fresh adapter: with A and B both 0 it
    would never get a gradient."""
    used = len(a_QI)
    wide_a_RI = torch.randn(rank, a_QI.shape[1], generator=generator) / rank
    wide_b_OR = torch.zeros(len(b_OQ), rank)
    wide_a_RI[:used] = a_QI
    wide_b_OR[:, :used] = b_OQ
    return wide_a_RI, wide_b_OR
