"""What scored pictures say together: means and their errors, sub-scores by tag, diversity.

Pictures of one prompt are alike, so they are no independent draws: errors are clustered by prompt. Edits of
two source pictures are two prompts, though their text may be the same.
"""

import base64
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from opd.data import Asked
from opd.evaluation.records import Record
from opd.lora import STUDENT

ALL, TAGS = "", "mean of tags"
# How far apart pictures lie, of one prompt and of different ones. The keys are those of committed results.
DIVERSITY, VARIETY = "diversity", "variety"
MEASURES = {DIVERSITY: "within a prompt", VARIETY: "across prompts"}
MOST = 1000  # pictures of a group that are compared across prompts


@dataclass(frozen=True)
class Cell:
    """One number of a table, with what is needed to judge it."""

    row: str
    split: str
    task: str
    scorer: str  # the scorer's spec, or one of MEASURES
    tag: str
    """"" for all pictures of the task, one of their tags, or `mean of tags`: every tag weighs the same."""
    n: int  # pictures with a score; of MEASURES: pairs
    missing: int  # pictures that got no score: they enter no mean
    prompts: int
    mean: float  # raw; NaN if no picture has a score
    error: float  # standard error of the mean, clustered by prompt; NaN for fewer than two prompts
    apart: float = math.nan
    """The same of the student's mean less this one, over the pictures that both have: they share prompts and
    noise. NaN of what is not compared."""


def summarise(records: list[Record], scorers: list[str]) -> list[Cell]:
    """The cells of every row, split and task: per scorer of all pictures, of every tag, and their mean; the
    diversity within a prompt where one has several pictures, and across prompts where there are several.

    Scores of other scorers, which records may hold from before, are left out.
    """
    groups = {}
    for record in records:
        groups.setdefault((record.row, record.split, record.task), []).append(record)
    cells = []
    for place, group in groups.items():
        for scorer in scorers:
            having = [record for record in group if scorer in record.scores]
            if having:
                whole, *parts = cells_of(place, having, scorer)
                student = groups.get((STUDENT, *place[1:]), [])
                cells += [replace(whole, apart=error_apart(student, having, scorer)), *parts]
        cells += diversity_within(place, group) + diversity_across(place, group)
    return cells


def labels_of(records: list[Record]) -> dict[str, str]:
    """Row -> what a table calls it: with the guidance that its pictures were made with."""
    labels = {record.row: record.row for record in records}
    for record in records:
        if "guidance" in record.settings:
            scale = f" g={record.settings['guidance']:g}"
            labels[record.row] = record.row.removesuffix(scale) + scale
    return labels


def cells_of(place: tuple[str, str, str], group: list[Record], scorer: str) -> list[Cell]:
    whole, parts = cell(place, group, scorer, ALL), []
    for tag in sorted({record.tag for record in group} - {""}):
        parts.append(cell(place, [record for record in group if record.tag == tag], scorer, tag))
    if not parts:
        return [whole]
    counts = [sum(getattr(part, name) for part in parts) for name in ("n", "missing", "prompts")]
    mean, error = mean_of([(part.mean, part.error) for part in parts])
    return [whole, *parts, Cell(*place, scorer, TAGS, *counts, mean, error)]


def cell(place: tuple[str, str, str], group: list[Record], scorer: str, tag: str) -> Cell:
    scored = [(record.scores[scorer], record.asked) for record in group if not record.lacks(scorer)]
    values, prompts = [value for value, _ in scored], [prompt for _, prompt in scored]
    counts = len(scored), len(group) - len(scored), len(set(prompts))
    return Cell(*place, scorer, tag, *counts, *clustered(values, prompts))


# ---- means and their errors ----------------------------------------------------------------------


def clustered(values: list[float], clusters: list[Asked]) -> tuple[float, float]:
    """(mean over all values, its standard error). Values of one cluster count as one draw: with r_g the sum
    of a cluster's residuals, n values and G clusters, error^2 = G / (G - 1) sum_g r_g^2 / n^2."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = sum(values) / n
    residuals = dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    count = len(residuals)
    if count < 2:
        return mean, math.nan
    squares = sum(residual**2 for residual in residuals.values())
    return mean, math.sqrt(count / (count - 1) * squares) / n


def error_apart(student: list[Record], others: list[Record], scorer: str) -> float:
    """The standard error of the mean difference of pictures that come from the same prompt and noise."""
    theirs = {record.index: record for record in others if not record.lacks(scorer)}
    both = [record for record in student if record.index in theirs and not record.lacks(scorer)]
    gains = [record.scores[scorer] - theirs[record.index].scores[scorer] for record in both]
    return clustered(gains, [record.asked for record in both])[1]


def mean_of(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """(mean, its standard error) of independent means, with their errors, that weigh the same."""
    means, errors = zip(*pairs, strict=True)
    return sum(means) / len(pairs), math.hypot(*errors) / len(pairs)


# ---- diversity -----------------------------------------------------------------------------------


def diversity_within(place: tuple[str, str, str], group: list[Record]) -> list[Cell]:
    """How far the pictures of one prompt lie apart, averaged over the pairs of a prompt, then over prompts;
    nothing where no prompt has two pictures."""
    pictures = {}
    for record in group:
        if record.thumbnail:
            pictures.setdefault(record.asked, []).append(record)
    several = [own for own in pictures.values() if len(own) > 1]
    if not several:
        return []
    pairs = [math.comb(len(own), 2) for own in several]
    means = [float(distances(own).sum()) / (2 * count) for own, count in zip(several, pairs, strict=True)]
    mean, error = clustered(means, list(map(str, range(len(means)))))
    return [Cell(*place, DIVERSITY, ALL, sum(pairs), 0, len(several), mean, error)]


def diversity_across(place: tuple[str, str, str], group: list[Record]) -> list[Cell]:
    """How far pictures of different prompts lie apart, which shows a style that has spread to all of them;
    nothing where there are fewer than two prompts.

    Averaged over pairs; of many pictures, MOST at a fixed stride. The error is that of a mean over pairs:
    2 / sqrt(P) times the deviation of the P prompts' own mean distances.
    """
    having = [record for record in group if record.thumbnail]
    having = having[:: max(1, math.ceil(len(having) / MOST))]
    names, prompt_N = np.unique([str(record.asked) for record in having], return_inverse=True)
    if len(names) < 2:
        return []
    distance_NN = distances(having)
    apart_NN = prompt_N[:, None] != prompt_N
    own_P = [distance_NN[prompt_N == n][:, prompt_N != n].mean() for n in range(len(names))]
    error = 2 * float(np.std(own_P, ddof=1)) / math.sqrt(len(names))
    mean, pairs = float(distance_NN[apart_NN].mean()), int(apart_NN.sum()) // 2
    return [Cell(*place, VARIETY, ALL, pairs, 0, len(names), mean, error)]


def distances(records: list[Record]) -> np.ndarray:
    """(N, N): the root mean squared difference of every two pictures, reduced to 8 x 8 pixels in [0, 1].
    0 = all alike; pixels that are independent and uniform would have .41."""
    pixels_ND = torch.from_numpy(np.stack([pixels_of(record.thumbnail) for record in records]))
    # By differences: the product of all pairs would leave a picture a distance from itself.
    apart_NN = torch.cdist(pixels_ND, pixels_ND, compute_mode="donot_use_mm_for_euclid_dist")
    return apart_NN.numpy() / math.sqrt(pixels_ND.shape[1])


def pixels_of(thumbnail: str) -> np.ndarray:
    """Base64 -> its numbers in [0, 1]."""
    return np.frombuffer(base64.b64decode(thumbnail), dtype=np.uint8) / 255
