"""Stage 1, Flow-GRPO (arXiv 2505.05470): a policy gradient on the transitions of SDE rollouts, from rewards on images.

One iteration samples G images for each prompt, scores them, and updates on the stored transitions:

    A = (r - mean of the group) / (std + 1e-4), clipped                             advantages
    loss = -min(A ratio, A clip(ratio, 1 - c, 1 + c)),  ratio = p / p_old           clipped_loss
           + beta KL(policy || base)                                                kl of the two transitions, eq. 12

Log-probabilities and KL are means over dimensions (nats per dimension), as in Flow-GRPO. States stay float32 from the
rollout to the update: the state that is trained on is, to the bit, the one that was scored.

Shapes: P prompts, G samples each, N = P G samples; B samples of a micro-batch; S trained states of a trajectory.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kernels
from opd import adapters, flow, ranks, rollout
from opd.adapters import BASE, STUDENT
from opd.config import Config
from opd.data import MicroBatch, Prompt, micro_batches, prompts_of_step, seed_of
from opd.model import Model
from opd.optim import Trained
from opd.rewards import Scoring, find_reward


# ---- equations -------------------------------------------------------------------------------------------------

def advantages(rewards_PG: Tensor, tasks_P: list[str], scope: str, limit: float) -> Tensor:
    """(r - mean of the group) / (std + 1e-4), clipped to +-limit: (P, G), NaN in groups that hold a NaN reward.

    The population std is taken over the group, or (scope "global", Flow-GRPO's default) over all groups of the same task,
    because rewards of two tasks share no unit.
    """
    std_P = rewards_PG.std(1, correction=0)
    if scope == "global":
        whole = ~rewards_PG.isnan().any(1)
        for task in set(tasks_P):
            mine = torch.tensor([t == task for t in tasks_P], device=rewards_PG.device)
            if (mine & whole).any():
                std_P = torch.where(mine, rewards_PG[mine & whole].std(correction=0), std_P)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (centred_PG / (std_P[:, None] + 1e-4)).clamp(-limit, limit)


def clipped_loss(log_ratio_B: Tensor, advantage_B: Tensor, clip_range: float) -> Tensor:
    """-min(A ratio, A clip(ratio, 1 - c, 1 + c)) (B,)."""
    ratio_B = log_ratio_B.exp()
    return -torch.minimum(advantage_B * ratio_B, advantage_B * ratio_B.clamp(1 - clip_range, 1 + clip_range))


def guarded(log_ratio_B: Tensor, kl_old_B: Tensor, step_std_B: Tensor) -> Tensor:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): std (log ratio + KL of old and new transition).

    The log-ratio of a sampled step has mean -KL and a spread that goes with 1 / std; without its mean and times std
    it is centred and of one size at every noise level, so that one (smaller) clip range fits all states. Guard's published
    code also divides the loss of a state by its step size; we do not.
    """
    return step_std_B * (log_ratio_B + kl_old_B)


def trained_states(cfg: Config, step: int) -> list[int]:
    """Consecutive indices of the states that are trained on: all, all but the last, or a window drawn for this step."""
    if cfg.window == 0:
        return list(range(cfg.steps - cfg.skip_last))
    low, high = cfg.window_range
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "window"))
    start = low + int(torch.randint(high - low - cfg.window + 1, (), generator=generator))
    return list(range(start, start + cfg.window))


def cosines(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Eq. 4: the cosine between every two tasks' gradients, {"a/b": cos}."""
    names = list(gradients)
    return {f"{a}/{b}": float(torch.nn.functional.cosine_similarity(gradients[a], gradients[b], dim=0))
            for i, a in enumerate(names) for b in names[i + 1:]}


# ---- the rollout -----------------------------------------------------------------------------------------------

@dataclass
class Trajectory:
    """What an update needs of a micro-batch: the S + 1 states around the trained transitions and their S log-probabilities."""
    batch: MicroBatch
    x: list[Tensor] = field(default_factory=list)
    log_prob: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    """Guided velocities of the old policy; kept for --guard alone."""
    scoring: Scoring | None = None


def conditions(cfg: Config, m: Model, batch: MicroBatch, prompts: list[Prompt]):
    """(conditioning, unconditional or None) of a micro-batch."""
    texts = [prompts[n // cfg.group].text for n in batch.samples]
    return m.conditioning(texts), m.conditioning([""]) if cfg.guidance != 1.0 else None


def velocities(cfg: Config, m: Model, batch: MicroBatch, i: int, states: list[int], x: Tensor, sigma_B: Tensor, conditioning, unconditional):
    """(v, v_uncond or None) at state i of the trajectories.

    Groups that share their start stand together until the first trained state, where their SDE begins: up to there one
    sample of a group answers for all, in the rollout, in the update and in its KL.
    """
    if not cfg.shared_start or i > states[0]:
        return rollout.velocities(m.family, m.transformer, x, sigma_B, conditioning, unconditional, cfg.guidance)
    groups = [n // cfg.group for n in batch.samples]
    order = list(dict.fromkeys(groups))
    first, back = [groups.index(g) for g in order], [order.index(g) for g in groups]
    found = rollout.velocities(m.family, m.transformer, x[first], sigma_B[first], [c[first] for c in conditioning], unconditional,
                               cfg.guidance)
    return [v if v is None else v[back] for v in found]


@torch.no_grad()
def sample_trajectory(cfg: Config, m: Model, batch: MicroBatch, prompts: list[Prompt], step: int, states: list[int]):
    """Roll the policy out: SDE on the trained states (with --window: nowhere else). Returns (Trajectory, images (B, 3, H, W))."""
    index = torch.tensor(batch.samples, device=m.device)
    conditioning, unconditional = conditions(cfg, m, batch, prompts)
    grid, trajectory = m.grid(cfg.steps), Trajectory(batch)
    start = index // cfg.group if cfg.shared_start else index
    x = kernels.normal((len(index), *m.shape), seed_of(cfg.seed, step, "start"), start, device=m.device)
    with adapters.use(m.transformer, policy(cfg)):
        for i in range(cfg.steps):
            sigma_B, next_B, s_B = schedule(cfg, grid, i, x)
            v, v_uncond = velocities(cfg, m, batch, i, states, x, sigma_B, conditioning, unconditional)
            if cfg.window and i not in states:
                x = flow.ode_step(x, flow.guided(v, v_uncond, cfg.guidance), sigma_B, next_B)
                continue
            before = x
            x, log_prob_B = kernels.sde_step(x, v, sigma_B, next_B, s_B, seed=seed_of(cfg.seed, step, "noise", i), index=index,
                                             v_uncond=v_uncond, guidance=cfg.guidance)
            if i in states:
                trajectory.x = [*trajectory.x[:-1], before, x]
                trajectory.log_prob.append(log_prob_B)
                trajectory.v += [flow.guided(v, v_uncond, cfg.guidance)] if cfg.guard else []
    return trajectory, m.family.decode(m.vae, x).cpu()


def policy(cfg: Config) -> str:
    return BASE if cfg.full else STUDENT


def schedule(cfg: Config, grid: list[float], i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, sigma_next and s of state i, (B,) each."""
    sigma_B, next_B = (torch.full((len(x),), grid[j], device=x.device) for j in (i, i + 1))
    return sigma_B, next_B, flow.diffusion_coefficient(sigma_B, grid[1], cfg.noise_level)


def gather_rewards(cfg: Config, parts: list[list[Trajectory]], prompts: list[Prompt], device) -> tuple[Tensor, list[str], float]:
    """Wait for the scores. Returns rewards (P, G) float64 of all ranks, NaN where scoring failed, what failed, busy seconds."""
    rewards_N = torch.zeros(len(prompts) * cfg.group, dtype=torch.float64, device=device)
    reasons, busy = [], 0.0
    for trajectory in (t for part in parts for t in part):
        if not any(trajectory.batch.real):
            continue
        scores_B, failed, seconds = trajectory.scoring.result()
        trajectory.scoring = None  # it holds the images
        rewards_N[trajectory.batch.samples] = scores_B.to(device, torch.float64)
        reasons += sorted(set(failed.values()))
        busy += seconds
    ranks.total(rewards_N)
    return rewards_N.view(len(prompts), cfg.group), sum(ranks.gather(reasons), []), busy


# ---- the update ------------------------------------------------------------------------------------------------

STATISTICS = ("policy", "kl", "drift", "square", "clipped", "count")


def learn(cfg: Config, m: Model, trajectory: Trajectory, prompts: list[Prompt], states: list[int], advantage_N: Tensor,
          scale: float) -> tuple[Tensor, Tensor]:
    """Gradient of one micro-batch, left in .grad. Returns sums over samples and states (6,), see STATISTICS, and max |ratio - 1|.

    `advantage_N` is NaN for samples of dropped groups, which count for nothing. `scale` makes the sum the update's mean.
    """
    batch, grid = trajectory.batch, m.grid(cfg.steps)
    conditioning, unconditional = conditions(cfg, m, batch, prompts)
    advantage_B = advantage_N[batch.samples]
    real_B = torch.tensor(batch.real, dtype=torch.float32, device=m.device)
    kept_B = real_B * ~advantage_B.isnan()
    advantage_B = advantage_B.nan_to_num(0.0)
    ones_B1 = torch.ones(len(batch.samples), 1, device=m.device)
    sums, largest = torch.zeros(len(STATISTICS), device=m.device), torch.zeros((), device=m.device)
    for j, i in enumerate(states):
        x = trajectory.x[j]
        sigma_B, next_B, s_B = schedule(cfg, grid, i, x)
        w_B = flow.kl_weight(sigma_B, next_B, s_B)
        reference = [], []
        if cfg.beta > 0:
            with torch.no_grad(), adapters.use(m.transformer, BASE):
                v_ref, uncond_ref = velocities(cfg, m, batch, i, states, x, sigma_B, conditioning, unconditional)
            reference = [v_ref], [uncond_ref]
        with adapters.use(m.transformer, policy(cfg)):  # around backward too, for recomputed activations
            v, v_uncond = velocities(cfg, m, batch, i, states, x, sigma_B, conditioning, unconditional)
            log_prob_B = kernels.sde_log_prob(trajectory.x[j + 1], x, v, sigma_B, next_B, s_B, v_uncond=v_uncond, guidance=cfg.guidance)
            log_ratio_B = log_prob_B - trajectory.log_prob[j]
            if cfg.guard:
                moved_B = (flow.guided(v, v_uncond, cfg.guidance) - trajectory.v[j]).square().flatten(1).mean(1)
                log_ratio_B = guarded(log_ratio_B, w_B * moved_B, flow.step_std(sigma_B, next_B, s_B))
            loss_B = clipped_loss(log_ratio_B, advantage_B, cfg.clip_range)
            loss, kl_B = (loss_B * kept_B).sum(), torch.zeros_like(loss_B)
            if cfg.beta > 0:
                mean_kl, square_B1 = kernels.velocity_mse(v, reference[0], ones_B1, w_B * kept_B, v_uncond=v_uncond, guidance=cfg.guidance,
                                                          targets_uncond=reference[1] if v_uncond is not None else None,
                                                          target_guidance=cfg.guidance)
                loss, kl_B = loss + cfg.beta * mean_kl * len(x), w_B * square_B1[:, 0]
            (loss * scale).backward()
        drift_B = (log_ratio_B.detach().exp() - 1) * real_B
        rows = loss_B.detach(), kl_B, drift_B, drift_B**2, (drift_B.abs() > cfg.clip_range).float(), torch.ones_like(kept_B)
        sums += (torch.stack(rows) * kept_B).sum(1)
        largest = torch.maximum(largest, drift_B.abs().max())
    return sums, largest


def gradients(cfg: Config, m: Model, part: list[Trajectory], prompts: list[Prompt], states: list[int], advantage_N: Tensor,
              trained: Trained, kept: int, compare: bool):
    """Accumulate one update's gradient. Returns sums (6,) and max |ratio - 1| over ranks, and with `compare` eq. 4's cosines.

    A part's trajectories stand task after task, in the same number on every rank, so differences of the growing
    gradient are the tasks' gradients.
    """
    scale = ranks.world() / (max(kept, 1) * len(states))
    sums, largest = torch.zeros(len(STATISTICS), device=m.device), torch.zeros((), device=m.device)
    per_task, before = {}, 0.0
    for n, trajectory in enumerate(part):
        more, drift = learn(cfg, m, trajectory, prompts, states, advantage_N, scale)
        sums, largest = sums + more, torch.maximum(largest, drift)
        task = trajectory.batch.tasks[0]
        if compare and (n + 1 == len(part) or part[n + 1].batch.tasks[0] != task):
            now = torch.cat([ranks.full(p.grad).flatten() for p in trained.parameters.values()])
            per_task[task], before = now - before, now
    return ranks.total(sums), ranks.largest(largest), cosines(per_task)


def self_test(largest: float, clip_range: float) -> None:
    """Before the first update the policy is the one that sampled: every ratio is 1. RuntimeError with the likely causes."""
    tolerance = clip_range / 2
    if not largest <= tolerance:
        raise RuntimeError(
            f"before the first update a ratio is {largest:.3g} off 1 (tolerance {tolerance:.3g}, half of --clip-range): training does "
            "not see the policy that sampled. Likely causes: states or velocities cast to another dtype between rollout and "
            "update, active dropout (a model in train() mode), or another guidance")


def iteration(cfg: Config, m: Model, pools: dict[str, list[Prompt]], trained: Trained, step: int, first: bool) -> tuple[dict, float]:
    """Sample, score, update. Returns the metrics and the gradient norm of the last update (or the first non-finite one).

    The rollout's prompts are cut into `updates` parts, one optimizer step each; `epochs` passes are made over them.
    Scores of a micro-batch are computed in a thread while the next one is rolled out.
    """
    clock = time.perf_counter()
    prompts, states = prompts_of_step(pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, cfg.alternate), trained_states(cfg, step)
    parts = []
    for u in range(cfg.updates):
        per_part = cfg.prompts_per_step * cfg.group // cfg.updates
        tasks = {n: prompts[n // cfg.group].task for n in range(u * per_part, (u + 1) * per_part)}
        parts.append([sample_and_score(cfg, m, batch, prompts, step, states)
                      for task in dict.fromkeys(tasks.values())
                      for batch in micro_batches({n: t for n, t in tasks.items() if t == task}, cfg.micro_batch, ranks.world(), ranks.rank())])
    rolled = time.perf_counter()
    rewards_PG, reasons, busy = gather_rewards(cfg, parts, prompts, m.device)
    scored = time.perf_counter()

    advantage_PG = advantages(rewards_PG, [p.task for p in prompts], cfg.advantage_std, cfg.advantage_clip)
    advantage_N = advantage_PG.float().flatten()
    sums, largest, cosine, norms = torch.zeros(len(STATISTICS), device=m.device), 0.0, {}, []
    turns = cfg.epochs * cfg.updates
    for turn in range(turns):
        u = turn % cfg.updates
        kept = int((~advantage_N.view(cfg.updates, -1)[u].isnan()).sum())
        if kept == 0:  # an optimizer step would follow old momentum and weight decay alone
            continue
        compare = turn == 0 and bool(cfg.cosine_every) and step % cfg.cosine_every == 0
        more, drift, found = gradients(cfg, m, parts[u], prompts, states, advantage_N, trained, kept, compare)
        if first and not norms:
            self_test(float(drift), cfg.clip_range)
        norms.append(trained.update(step, turn, turns))
        sums, largest, cosine = sums + more, max(largest, float(drift)), cosine | found
    row = metrics(cfg, sums, largest, rewards_PG, prompts)
    row |= {"cosine": cosine} if cosine else {}
    row |= {"failed_rewards": reasons} if reasons else {}
    row["seconds"] = {"rollout": rolled - clock, "reward": scored - rolled, "train": time.perf_counter() - scored, "scoring": busy}
    return row, next((n for n in norms if not abs(n) < float("inf")), norms[-1] if norms else 0.0)


def sample_and_score(cfg: Config, m: Model, batch: MicroBatch, prompts: list[Prompt], step: int, states: list[int]) -> Trajectory:
    """One micro-batch (of one task): its trajectory, with the reward already being computed in a thread."""
    trajectory, images = sample_trajectory(cfg, m, batch, prompts, step, states)
    mine = [prompts[n // cfg.group] for n in batch.samples]
    if any(batch.real):
        trajectory.scoring = Scoring(find_reward(cfg.train_rewards[mine[0].task]), images, [p.text for p in mine],
                                     [p.metadata for p in mine], cfg.reward_timeout)
    return trajectory


def metrics(cfg: Config, sums: Tensor, largest: float, rewards_PG: Tensor, prompts: list[Prompt]) -> dict:
    """Readable numbers: losses in nats per dimension; of the ratio its std (`spread`) and the share that is further than the clip
    range from 1 (`clipped`); how many groups have equal rewards, which teach nothing, or were dropped."""
    mean = dict(zip(STATISTICS, (sums / sums[-1].clamp(min=1)).tolist()))
    dropped_P = rewards_PG.isnan().any(1)
    flat_P = (rewards_PG == rewards_PG[:, :1]).all(1)
    reward, std = {}, {}
    for task in dict.fromkeys(p.task for p in prompts):
        mine = rewards_PG[torch.tensor([p.task == task for p in prompts], device=rewards_PG.device) & ~dropped_P]
        if len(mine):
            reward[task], std[task] = float(mine.mean()), float(mine.std(correction=0))
    return {"loss": mean["policy"] + cfg.beta * mean["kl"], "reward": reward, "reward_std": std, "kl": mean["kl"],
            "ratio": {"spread": max(mean["square"] - mean["drift"] ** 2, 0.0) ** 0.5, "largest": largest, "clipped": mean["clipped"]},
            "groups": {"zero_spread": int(flat_P.sum()), "dropped": int(dropped_P.sum()), "all": len(prompts)}}
