"""Stage grpo: the gradient against the policy gradient written out, advantages by brute force, a reward that
rises."""

import math

import numpy as np
import pytest
import torch

from opd import flow, grpo, kernels, lora
from opd.data import prompts_of_step, seed_of
from opd.rewards import groups
from tests import tiny
from tests.tiny import distance, gradient_of, grpo_config, step_by_hand
from tests.tiny_grpo import build, recorded

SETTINGS = [{}, {"guidance": 2.0}, {"window": 2, "window_range": (0, 4)}, {"skip_last": True}]
SETTINGS += [{"micro_batch": 3}, {"rollout": "cps", "skip_last": True}]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_first_update_is_the_policy_gradient_written_out(world, changes):
    """Roll out sample by sample with flow's equations, score, take -A log p by autograd: the iteration's
    first gradient."""
    cfg, model, data, trained, _ = build(world, cold_start=str(world / "red"), **changes)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    grid, states = model.sigmas(cfg.steps), grpo.trained_states(cfg, 0)
    transitions, images = [], []

    def velocity(x, i, text):
        sigma = torch.tensor([grid[i]])
        with lora.use(model.transformer, "student"):
            v, u = (model.velocity(x, sigma, model.text([t]), 1.0) for t in (text, ""))
        return u + cfg.guidance * (v - u)

    for n in range(cfg.prompts_per_step * cfg.group):
        text, index = prompts[n // cfg.group].text, torch.tensor([n])
        x = kernels.normal((1, *model.shape), seed_of(0, 0, "start"), index)
        for i in range(cfg.steps):
            v = velocity(x, i, text).detach()
            if cfg.window and i not in states:
                x = x - (grid[i] - grid[i + 1]) * v
                continue
            z = kernels.normal(x.shape, seed_of(0, 0, "noise", i), index)
            mean, std = step_by_hand(cfg.rollout, grid, i, x, v)
            after = mean + std * z
            if i in states:
                transitions.append((n, i, x, after))
            x = after
        images.append(model.decode(x))
    rewards = torch.stack([i.mean() for i in images]).double().view(-1, cfg.group)
    tasks = [p.task for p in prompts]
    advantage = torch.zeros_like(rewards)
    for p, task in enumerate(tasks):
        same = rewards[[q for q, t in enumerate(tasks) if t == task]]
        advantage[p] = (rewards[p] - rewards[p].mean()) / (same.numpy().std() + 1e-4)
    loss = 0.0
    for n, i, x, after in transitions:
        v = velocity(x, i, prompts[n // cfg.group].text)
        mean, std = step_by_hand(cfg.rollout, grid, i, x, v)
        log_p = torch.distributions.Normal(mean, std).log_prob(after).mean()
        loss = loss - advantage.flatten()[n] * log_p / len(transitions)
    loss.backward()
    wanted = gradient_of(trained)
    assert wanted.norm() > 1e-3
    assert distance(recorded(world, cold_start=str(world / "red"), **changes)[0], wanted) < 1e-4


def test_clip_changes_the_second_update_and_not_the_first(world):
    """At ratio 1 nothing is clipped; after a step it is."""
    changes = dict(epochs=2, lr=3e-2, cold_start=str(world / "red"))
    turns = [[recorded(world, turn, clip_range=clip, **changes) for turn in (0, 1)] for clip in (1e-4, 10.0)]
    tight, wide = turns
    assert distance(tight[0][0], wide[0][0]) < 1e-6
    assert distance(tight[1][0], wide[1][0]) > 0.1
    assert tight[0][1]["ratio"]["clipped"] > 0.3 and wide[0][1]["ratio"]["clipped"] == 0


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
    steps = {"iterations": 25, "lr": 1e-2, "epochs": 2, "clip_range": 1e-2}
    rows = tiny.run(grpo_config(world, out=str(tmp_path), **batch, **steps))[0].metrics()
    means = [(row["reward"]["red"] + row["reward"]["blue"]) / 2 for row in rows]
    spread = rows[0]["reward_std"]["red"]
    assert np.mean(means[-5:]) > np.mean(means[:3]) + spread, (means, spread)
