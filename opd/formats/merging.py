"""Cold starts by merging: several adapters become one of the student's rank, module by module.

    svd     sum_k w_k U_k, the mean update, truncated to the rank
    cat     the same sum, exact: the factors stand side by side, so ranks add up
    ties    TIES (arXiv 2306.01708): every U_k keeps its largest entries, and of these the mean of those that
            agree with the elected sign counts
    dare    DARE (arXiv 2311.03099): entries are dropped at random and the rest is scaled up
    naive   (sum_k w_k B_k)(sum_k w_k A_k), as the released script has it; not the mean update

U_k = B_k A_k is adapter k's update of a module, w_k its weight. The sums of ties and dare are dense, so these
two take a full SVD per module; svd and cat never form a product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.data import seed_of
from opd.errors import require
from opd.formats.lora_files import Lora

Factors = tuple[Tensor, Tensor]
"""A (q, in) and B (out, q) float32, whose product B A is an update."""


@dataclass(frozen=True)
class Part:
    """What one adapter has to say about one module."""

    name: str
    weight: float
    A: Tensor
    """(r, in) float32; r = 0 where the adapter leaves the module alone."""
    B: Tensor
    """(out, r) float32, with alpha / r in it."""

    def update(self) -> Tensor:
        return self.B @ self.A


@dataclass(frozen=True)
class Recipe:
    """How to merge: `mode` is a name from MERGES, the rest what some of the modes ask for."""

    mode: str
    rank: int
    """Rank of the result."""
    density: float
    """ties, dare: share of an update's entries that are kept."""
    seed: int
    """dare: what drops entries."""


def merge(loras: dict[str, Lora], weights: dict[str, float], recipe: Recipe, alpha: float) -> Lora:
    """One adapter of rank `recipe.rank` out of all `loras`, each with its weight.

    ValueError where there is nothing to merge and where the mode cannot merge these adapters.
    """
    require(len(loras) > 0, "--cold-start merge: there is no adapter to merge; use --cold-start base")
    A, B = {}, {}
    spare = torch.Generator().manual_seed(0)
    for module in sorted(set().union(*(lora.A for lora in loras.values()))):
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, "merge", module))
        a_QI, b_OQ = MERGES[recipe.mode](parts_of(loras, weights, module), recipe, generator)
        A[module], B[module] = widened(a_QI, b_OQ, recipe.rank, spare)
        B[module] *= recipe.rank / alpha
    sources = ", ".join(f"{weights[name]:.3g} {lora.source}" for name, lora in loras.items())
    scale = dict.fromkeys(A, alpha / recipe.rank)
    return Lora(f"{recipe.mode} merge of {sources}", "", A, B, scale)


def fitted(lora: Lora, rank: int, alpha: float) -> Lora:
    """The same update (or, if the adapter has a higher rank, its best approximation) with `rank` and
    `alpha`."""
    return merge({"it": lora}, {"it": 1.0}, Recipe("svd", rank, 1.0, 0), alpha)


def parts_of(loras: dict[str, Lora], weights: dict[str, float], module: str) -> list[Part]:
    having = next(lora for lora in loras.values() if module in lora.A)
    nothing = having.A[module][:0], having.B[module][:, :0]
    parts = []
    for name, lora in loras.items():
        a_RI, b_OR = nothing
        if module in lora.A:
            a_RI, b_OR = lora.A[module], lora.scale[module] * lora.B[module]
        parts.append(Part(name, weights[name], a_RI, b_OR))
    return parts


def widened(a_QI: Tensor, b_OQ: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """The same update in factors of `rank`. Spare rank starts as in a fresh adapter: with A and B both 0 it
    would never get a gradient."""
    used = len(a_QI)
    wide_a_RI = torch.randn(rank, a_QI.shape[1], generator=generator) / rank
    wide_b_OR = torch.zeros(len(b_OQ), rank)
    wide_a_RI[:used] = a_QI
    wide_b_OR[:, :used] = b_OQ
    return wide_a_RI, wide_b_OR


# ---- a function per mode -----------------------------------------------------------------------------------


def svd(parts: list[Part], recipe: Recipe, generator: torch.Generator) -> Factors:
    """The best approximation of the sum in `rank`: QR of both factors, then the SVD of a (sum r, sum r)
    core."""
    a_SI, b_OS = side_by_side(parts)
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b_OS), torch.linalg.qr(a_SI.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[: recipe.rank].sqrt()
    return (root[:, None] * vh[: recipe.rank]) @ q_a.T, q_b @ (u[:, : recipe.rank] * root)


def cat(parts: list[Part], recipe: Recipe, generator: torch.Generator) -> Factors:
    a_SI, b_OS = side_by_side(parts)
    ranks = f"--merge cat adds the adapters' ranks up to {len(a_SI)}, and --rank is {recipe.rank}"
    require(len(a_SI) <= recipe.rank, f"{ranks}; use --rank {len(a_SI)} or more, or --merge svd")
    return a_SI, b_OS


def ties(parts: list[Part], recipe: Recipe, generator: torch.Generator) -> Factors:
    """Trim, elect signs, take the mean of those that agree. Equal weights 1 / K are TIES as published; with
    others both the election and the mean are weighted, and the result is scaled by the sum of weights."""
    kept_KOI = torch.stack([largest(part.update(), recipe.density) for part in parts])
    w_K11 = torch.tensor([part.weight for part in parts])[:, None, None]
    elected_OI = (w_K11 * kept_KOI).sum(0).sign()
    agrees_KOI = kept_KOI.sign() == elected_OI
    total_OI = (w_K11 * agrees_KOI).sum(0)
    mean_OI = (w_K11 * agrees_KOI * kept_KOI).sum(0) / total_OI.where(total_OI != 0, 1)
    return truncated(w_K11.sum() * mean_OI, recipe.rank)


def dare(parts: list[Part], recipe: Recipe, generator: torch.Generator) -> Factors:
    """Its expectation is the sum that svd truncates."""
    total_OI = 0
    for part in parts:
        update_OI = part.update()
        kept_OI = torch.rand(update_OI.shape, generator=generator) < recipe.density
        total_OI = total_OI + part.weight * kept_OI * update_OI / recipe.density
    return truncated(total_OI, recipe.rank)


def naive(parts: list[Part], recipe: Recipe, generator: torch.Generator) -> Factors:
    ranks = {part.name: len(part.A) for part in parts}
    same = "--merge naive averages factors, so all adapters must have one rank and the same layers"
    require(len(set(ranks.values())) == 1, f"{same}; ranks here: {ranks}; use --merge svd")
    rank = len(parts[0].A)
    require(rank <= recipe.rank, f"--merge naive keeps the adapters' rank: use --rank {rank} or more")
    a_RI = sum(part.weight * part.A for part in parts)
    b_OR = sum(part.weight * part.B for part in parts)
    return a_RI, b_OR


MERGES: dict[str, Callable[[list[Part], Recipe, torch.Generator], Factors]] = {
    "svd": svd,
    "cat": cat,
    "ties": ties,
    "dare": dare,
    "naive": naive,
}
SPARSE = ("ties", "dare")  # the modes that look at Recipe.density


def side_by_side(parts: list[Part]) -> Factors:
    """Factors whose product is the weighted sum of all updates; their rank S is the sum of ranks."""
    a_SI = torch.cat([part.A for part in parts])
    b_OS = torch.cat([part.weight * part.B for part in parts], dim=1)
    return a_SI, b_OS


def largest(update_OI: Tensor, density: float) -> Tensor:
    """Only the `density` entries of largest magnitude, the others 0."""
    count = int(density * update_OI.numel())
    chosen = update_OI.abs().flatten().topk(count).indices
    kept = torch.zeros_like(update_OI).flatten()
    kept[chosen] = update_OI.flatten()[chosen]
    return kept.view_as(update_OI)


def truncated(update_OI: Tensor, rank: int) -> Factors:
    """The best factors of `rank` for a dense update."""
    u, s, vh = torch.linalg.svd(update_OI, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
