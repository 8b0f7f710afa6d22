"""Stage grpo: the gradient against the policy gradient written out, advantages by brute force, a reward that
rises."""

import math

import numpy as np
import pytest
import torch

from opd import flow, grpo, kernels
from opd.data import prompts_of_step
from opd.rewards import groups
from tests import tiny
from tests.tiny import distance, gradient_of, grpo_config, step_by_hand, steps_by_hand, velocity_by_hand
from tests.tiny_grpo import advantages_by_hand, build, recorded

SETTINGS = [{"guidance": 2.0, "micro_batch": 3}, {"window": 2, "window_range": (0, 4)}]
SETTINGS += [{"rollout": "cps", "skip_last": True}]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_first_update_is_the_policy_gradient_written_out(world, changes):
    """Roll out sample by sample with flow's equations, score, take -A log p by autograd: the iteration's
    first gradient."""
    cfg, model, data, trained, _ = build(world, cold_start=str(world / "red"), **changes)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    grid, states = model.sigmas(cfg.steps), grpo.trained_states(cfg, 0)
    rollouts = [cfg.rollout if not cfg.window or i in states else "ode" for i in range(cfg.steps)]
    steps = steps_by_hand(cfg, model, prompts, "student", rollouts)
    images = [model.decode(after) for _, i, _, after in steps if i == cfg.steps - 1]
    advantages, loss = advantages_by_hand(images, prompts), 0.0
    transitions = [step for step in steps if step[1] in states]
    for n, i, x, after in transitions:
        v = velocity_by_hand(model, "student", x, grid[i], prompts[n // cfg.group].text, cfg.guidance)
        mean, std = step_by_hand(cfg.rollout, grid, i, x, v)
        log_p = torch.distributions.Normal(mean, std).log_prob(after).mean()
        loss = loss - advantages[n] * log_p / len(transitions)
    loss.backward()
    wanted = gradient_of(trained)
    assert wanted.norm() > 1e-3
    assert distance(recorded(world, cold_start=str(world / "red"), **changes)[0], wanted) < 1e-4


def test_kl_term_adds_the_gradient_of_the_exact_kl(world):
    """Its gradient is linear in beta, and it pulls the policy to the base: a step along minus it lowers the
    KL."""
    start = dict(cold_start=str(world / "red"))
    without, half, full = (recorded(world, beta=beta, **start) for beta in (0.0, 0.5, 1.0))
    assert distance(full[0] - without[0], 2 * (half[0] - without[0])) < 1e-3
    assert (full[0] - without[0]).norm() > 1e-4 and full[1]["kl"] > 1e-4 and without[1]["kl"] == 0
    constant = dict.fromkeys(("red", "blue"), "tests.tiny_grpo:constant")
    only = dict(train_rewards=constant, beta=1.0, lr=1e-3, iterations=8, **start)
    *_, stage = build(world, **only)
    kls = [stage.step(step)[0]["kl"] for step in range(8)]
    assert kls[-1] < 0.9 * kls[0]


def test_guarded_ratio_is_the_noise_times_the_mean_difference():
    """std (log ratio + KL) = z . (mean - mean_old) / d, the closed form, whatever the step."""
    generator = torch.Generator().manual_seed(0)
    x, v, v_old, z = torch.randn(4, 5, 2, 3, 3, generator=generator, dtype=torch.float64)
    levels = torch.tensor([[1.0, 0.9, 0.5, 0.3, 0.1], [0.95, 0.7, 0.4, 0.2, 0.0]], dtype=torch.float64)
    step = flow.sde_transition(*levels, 0.7)
    mean, mean_old = (flow.step_mean(x, u, step) for u in (v, v_old))
    after = mean_old + step.std.view(-1, 1, 1, 1) * z
    log_ratio = kernels.log_prob(after, x, v, step) - kernels.log_prob(after, x, v_old, step)
    kl_old = step.kl_weight() * (v - v_old).square().flatten(1).mean(1)
    wanted = (z * (mean - mean_old)).flatten(1).mean(1)
    assert torch.allclose(grpo.guarded(log_ratio, kl_old, step.std), wanted, atol=1e-12)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_advantages_equal_a_brute_force_version(scope):
    rng = np.random.default_rng(0)
    rewards, tasks = rng.random((6, 5)) * [[1], [1], [10], [1], [10], [1]], ["a", "a", "b", "a", "b", "a"]
    rewards[3, 2] = math.nan  # a dropped group
    rewards[5] = 0.5  # a flat group
    got = groups.advantages(torch.tensor(rewards), tasks, scope, 1.2)
    for p in range(6):
        whole = [rewards[q] for q in range(6) if tasks[q] == tasks[p] and not np.isnan(rewards[q]).any()]
        std = np.std(np.stack(whole)) if scope == "global" else np.std(rewards[p])
        wanted = np.clip((rewards[p] - rewards[p].mean()) / (std + 1e-4), -1.2, 1.2)
        assert np.allclose(got[p], wanted, equal_nan=True)
    assert got[3].isnan().all() and (got[5] == 0).all() and got.nan_to_num().abs().max() == 1.2


def test_the_loss_is_clipped_where_the_ratio_has_gone_far_enough_by_hand():
    """A ratio of 1.5 or .5 with a clip range of .2: clipped where the advantage would drive it further."""
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    loss = grpo.clipped_loss(log_ratio, advantage, 0.2)
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2])


def test_reward_rises_on_the_tiny_model(world, tmp_path):
    batch = {"group": 8, "prompts_per_step": 4, "micro_batch": 32}
    steps = {"iterations": 14, "lr": 2e-2, "epochs": 2, "clip_range": 1e-2}
    rows = tiny.run(grpo_config(world, out=str(tmp_path), **batch, **steps))[0].metrics()
    means = [(row["reward"]["red"] + row["reward"]["blue"]) / 2 for row in rows]
    spread = rows[0]["reward_std"]["red"]
    assert np.mean(means[-5:]) > np.mean(means[:3]) + spread, (means, spread)
