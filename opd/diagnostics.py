"""What a step measured, in readable numbers: distances to teachers; ratios and rewards."""

import math

import torch
from torch import Tensor

from opd import ranks
from opd.data import Prompt
from opd.ranks import say

# ---- distillation: distances to the teachers ---------------------------------------------------------------


def summed(distances_BTK: Tensor, routed_BK: Tensor, anchor: int) -> Tensor:
    """|v - v_k|^2 summed over the samples of a micro-batch: (K + 1, T), a row per teacher of its own samples,
    each with its weight, and a last row of all samples for the teacher in column `anchor`."""
    own_B1K = routed_BK.to(distances_BTK.device, non_blocking=True)[:, None]
    # Chosen, not multiplied: the NaN of another's sample times 0 would be NaN.
    own_BTK = torch.where(own_B1K != 0, distances_BTK * own_B1K, 0)
    return torch.cat([own_BTK.sum(0).T, distances_BTK[:, :, anchor].sum(0)[None]])


def distance_metrics(
    sums_RT: Tensor,
    routed_NK: Tensor,
    queried: list[int],
    weight_T: list[float],
    anchor_T: list[float],
    names: list[str],
) -> dict:
    """The loss of a step (eq. 16), and that of each teacher in `names` and of the anchor by itself; with the
    KL's weights in nats per dimension.

    `sums_RT`: `summed` over the step. At each state w, and the anchor's lambda.
    """
    w_Q, anchor_Q = torch.tensor([weight_T, anchor_T], dtype=torch.float64)[:, queried]
    loss_RQ, samples = sums_RT[:, queried] * w_Q, len(routed_NK)
    whole = loss_RQ[:-1].sum() + (loss_RQ[-1] * anchor_Q).sum()
    row = {"loss": float(whole) / (samples * len(queried))}
    for k, name in enumerate(names):  # a teacher counts with its share of the samples
        share = float(routed_NK[:, k].sum())
        if share > 0:
            row[name] = {"loss": float(loss_RQ[k].sum()) / (share * len(queried))}
    anchored_Q = anchor_Q > 0  # the anchor with all of them, where it has a weight
    if anchored_Q.any():
        row["anchor"] = {"loss": float(loss_RQ[-1, anchored_Q].mean()) / samples}
    return row


def name_non_finite(
    step: int, names: list[str], sums_RT: Tensor, parts: list[tuple[list[Prompt], Tensor]]
) -> None:
    """Say where the first distance is that is not a number, and whose prompt has one; the step itself is
    skipped by its gradient. `parts`: this rank's micro-batches, their prompts and distances (B, T, K)."""
    bad = (~sums_RT.isfinite()).T.nonzero().tolist()
    if not bad:
        return
    state, row = bad[0]
    words = []
    for prompts_B, distances_BTK in parts:
        bad_B = ~distances_BTK.isfinite().flatten(1).all(1)
        words += [f"task {prompts_B[b].task!r}, prompt {prompts_B[b].asked!r}" for b in bad_B.nonzero()]
    # The table is the same on all ranks, so all of them are here.
    prompts = [prompt for of_rank in ranks.gather(words) for prompt in of_rank]
    where = f"step {step + 1}: non-finite velocity difference to {[*names, 'anchor'][row]} at state {state}"
    say("; ".join([where, *prompts[:1]]))


# ---- stages grpo and nft -----------------------------------------------------------------------------------

STATISTICS = ("policy", "kl", "drift", "square", "clipped", "count")
"""What GRPO sums over samples and states: both losses, ratio - 1, its square, whether it was clipped, 1."""


def policy_metrics(sums: Tensor, largest: Tensor, beta: float) -> dict:
    """From sums of STATISTICS: losses in nats per dimension; of the ratio its std (`spread`), the largest
    distance from 1, and the share that is further from it than the clip range (`clipped`). Without beta the
    base is not asked, and nothing is known of the KL to it."""
    mean = dict(zip(STATISTICS, (sums / sums[-1].clamp(min=1)).tolist(), strict=True))
    spread = math.sqrt(max(mean["square"] - mean["drift"] ** 2, 0.0))
    ratio = {"spread": spread, "largest": float(largest), "clipped": mean["clipped"]}
    if beta == 0:
        return {"loss": mean["policy"], "ratio": ratio}
    return {"loss": mean["policy"] + beta * mean["kl"], "kl": mean["kl"], "ratio": ratio}


MATCHING = ("policy", "from_base", "size", "count")
"""What stage nft sums over samples and noise levels: its loss, |v - v_base|^2, log |v| / |v_base|, 1."""


def matching_metrics(sums: Tensor, beta: float) -> dict:
    """From sums of MATCHING. `log_size` above 0: velocities have grown beyond the base's, as likelihood-free
    losses let them. Without beta the base is not asked, and nothing is known of it."""
    mean = dict(zip(MATCHING, (sums / sums[-1].clamp(min=1)).tolist(), strict=True))
    if beta == 0:
        return {"loss": mean["policy"]}
    loss = mean["policy"] + beta * mean["from_base"]
    return {"loss": loss, "from_base": mean["from_base"], "log_size": mean["size"]}


def reward_metrics(rewards_PG: Tensor, tasks_P: list[str]) -> dict:
    """Rewards per task; how many groups have equal rewards, which teach nothing, and how many were
    dropped."""
    dropped_P = rewards_PG.isnan().any(1)
    flat_P = (rewards_PG == rewards_PG[:, :1]).all(1)
    reward, std = {}, {}
    for task in dict.fromkeys(tasks_P):
        of_task_P = torch.tensor([t == task for t in tasks_P])
        mine = rewards_PG[of_task_P & ~dropped_P]
        if len(mine):
            reward[task] = float(mine.mean())
            std[task] = float(mine.std(correction=0))
    groups = {"zero_spread": int(flat_P.sum()), "dropped": int(dropped_P.sum()), "all": len(tasks_P)}
    return {"reward": reward, "reward_std": std, "groups": groups}


def brief(row: dict) -> str:
    """What the progress bar shows of a row of the log: of stages grpo and nft rewards and the distance to the
    base, where it is known, else the loss."""
    if "ratio" not in row and "grad_rms" not in row:
        return f"loss={row['loss']:.4g}"
    rewards = " ".join(f"{task} {value:.3f}" for task, value in row["reward"].items())
    known = [f", {name}={row[name]:.2g}" for name in ("kl", "from_base", "grad_rms") if name in row]
    return f"reward {rewards}{''.join(known[:1])}"
