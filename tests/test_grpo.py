"""Stage grpo: the gradient against the policy gradient and the KL written out, advantages by brute force; and
as a run: every knob, groups computed once, rewards that fail, bad input."""

import json
import math
import re

import numpy as np
import pytest
import torch

import train
from opd import flow, grpo, kernels, ranks
from opd.data import prompts_of_step
from opd.diagnostics import brief
from opd.model import Model
from opd.rewards import find_reward, groups
from tests import forked, tiny
from tests.tiny import distance, gradient_of, grpo_config, step_by_hand, steps_by_hand, velocity_by_hand
from tests.tiny_grpo import BRIGHT, advantages_by_hand, build, recorded

SETTINGS = [{"guidance": 2.0, "micro_batch": 3, "beta": 0.5}, {"window": 2, "window_range": (0, 4)}]
SETTINGS += [{"rollout": "cps", "skip_last": True}]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_first_update_is_the_policy_gradient_written_out(world, changes):
    """Roll out sample by sample with flow's equations, score, take -A log p and the KL to the base, the
    adapter off, by autograd: the iteration's first gradient."""
    cfg, model, data, trained, _ = build(world, cold_start=str(world / "red"), **changes)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    grid, states = model.sigmas(cfg.steps), grpo.trained_states(cfg, 0)
    rollouts = [cfg.rollout if not cfg.window or i in states else "ode" for i in range(cfg.steps)]
    steps = steps_by_hand(cfg, model, prompts, "student", rollouts)
    images = [model.decode(after) for _, i, _, after in steps if i == cfg.steps - 1]
    advantages, loss, kl = advantages_by_hand(images, prompts), 0.0, 0.0
    transitions = [step for step in steps if step[1] in states]
    for n, i, x, after in transitions:
        v, base = (
            velocity_by_hand(model, name, x, grid[i], prompts[n // cfg.group].text, cfg.guidance)
            for name in ("student", "base")
        )
        mean, std = step_by_hand(cfg.rollout, grid, i, x, v)
        mean_base, _ = step_by_hand(cfg.rollout, grid, i, x, base.detach())
        kl = kl + (mean - mean_base).square().mean() / (2 * std**2).mean() / len(transitions)
        log_p = torch.distributions.Normal(mean, std).log_prob(after).mean()
        loss = loss - advantages[n] * log_p / len(transitions)
    (loss + cfg.beta * kl).backward()
    wanted = gradient_of(trained)
    got, row = recorded(world, cold_start=str(world / "red"), **changes)
    assert wanted.norm() > 1e-3 and distance(got, wanted) < 1e-4
    if cfg.beta:
        assert row["kl"] == pytest.approx(float(kl.detach()), rel=1e-3) and "kl=" in brief(row)
    else:  # the base was not asked
        assert "kl" not in row and re.fullmatch(r"reward red \S+ blue \S+", brief(row))


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


RISING = [(grpo_config, {"lr": 2e-2, "updates": 2, "clip_range": 1e-2})]
RISING.append((tiny.nft_config, {"lr": 2e-2, "beta": 1e-4, "clip": 0.01}))


@pytest.mark.parametrize("config, settings", RISING)
def test_reward_rises_on_the_tiny_model(world, tmp_path, config, settings):
    """Of stage nft the log says how far the old policy is, and what every number of the gradient is."""
    batch = {"group": 8, "prompts_per_step": 4, "micro_batch": 32, "iterations": 14}
    folder, _, trained, _ = tiny.run(config(world, out=str(tmp_path), **batch, **settings))
    rows = folder.metrics()
    means = [(row["reward"]["red"] + row["reward"]["blue"]) / 2 for row in rows]
    spread = rows[0]["reward_std"]["red"]
    assert np.mean(means[-5:]) > np.mean(means[:3]) + spread, (means, spread)
    if config is tiny.nft_config:
        assert rows[0]["log_size"] == pytest.approx(0, abs=1e-6) and abs(rows[-1]["log_size"]) > 1e-3
        count = sum(parameter.numel() for parameter in trained.parameters.values())
        assert rows[0]["grad_norm"] > 0.01 and rows[0]["grad_rms"] == pytest.approx(0.01 / count**0.5)


# ---- the run -----------------------------------------------------------------------------------------------
def test_parts_make_so_many_updates_of_whole_groups(world):
    *_, trained, stage = build(world, updates=2)
    calls, original = [], trained.update
    trained.update = lambda *a: calls.append(a) or original(*a)
    stage.step(5)
    assert calls == [(5, 0, 2), (5, 1, 2)]
    halves = [recorded(world, u, updates=2, lr=1e-9, cold_start=str(world / "red"))[0] for u in (0, 1)]
    assert distance((halves[0] + halves[1]) / 2, recorded(world, cold_start=str(world / "red"))[0]) < 1e-3


GROUPS = [{"window": 2, "window_range": (1, 3)}, {"guidance": 2.0, "guard": True}]


@pytest.mark.parametrize("changes", GROUPS, ids=str)
def test_a_group_that_stands_together_is_computed_once(world, monkeypatch, changes):
    """The same gradient as with a forward pass for every sample, from fewer samples in the transformer."""

    def everyone(batch):
        alone = list(range(len(batch.samples)))
        return grpo.SharedPrefix(alone, torch.tensor(alone), torch.tensor(alone))

    changes = dict(changes, shared_start=True, beta=0.1, cold_start=str(world / "red"))
    gradients, samples = [], []
    for once in (True, False):
        cfg, model, *_, trained, stage = build(world, **changes)
        if not once:
            monkeypatch.setattr(stage, "shared_prefix", everyone)
        rows = []
        model.transformer.register_forward_hook(lambda *given, rows=rows: rows.append(len(given[-1][0])))
        monkeypatch.setattr(trained, "update", lambda *_: 1.0)
        stage.step(0)
        gradients.append(gradient_of(trained))
        samples.append(sum(rows))
    assert gradients[1].norm() > 1e-4 and distance(gradients[0], gradients[1]) < 1e-4
    cfg = grpo_config(world, **changes)
    first = grpo.trained_states(cfg, 0)[0]
    branches = 1 + (cfg.guidance != 1.0)
    # one rollout up to the first trained state, then policy and reference in the update
    spared = cfg.prompts_per_step * (cfg.group - 1) * (first + 1 + 2) * branches
    assert samples[1] - samples[0] == spared > 0


def test_window_moves_over_its_range_and_only_over_it(world):
    cfg = grpo_config(world, steps=10, window=2, window_range=(1, 6))
    drawn = [grpo.trained_states(cfg, step) for step in range(200)]
    assert {tuple(d) for d in drawn} == {(1, 2), (2, 3), (3, 4), (4, 5)}
    assert drawn == [grpo.trained_states(cfg, step) for step in range(200)]


def test_self_test_names_causes_when_training_sees_another_policy(world):
    *_, model, _, _, stage = build(world)

    def rounded(module, given, output):
        if torch.is_grad_enabled():
            return (output[0].bfloat16().float(),)

    model.transformer.register_forward_hook(rounded)
    causes = r"a ratio is .* off 1 \(tolerance 5e-05.*dtype.*dropout.*guidance"
    with pytest.raises(RuntimeError, match=causes):
        stage.step(0)


def test_alternate_gives_each_step_one_task(world):
    rows = [recorded(world, alternate=True)[1], recorded(world)[1]]
    assert list(rows[0]["reward"]) == ["red"] and list(rows[1]["reward"]) == ["red", "blue"]


def failing(images, prompts, metadata):
    """It raises for one prompt's images but grey ones; those of others are all alike to it."""
    if "a red square" in prompts and images.std() > 0:
        raise OSError("no more memory")
    return torch.full((len(images),), 0.25)


def test_groups_without_spread_or_reward_are_counted_and_teach_nothing(world):
    """How else a reward may fail: tests/test_rewards.py."""
    gradient, row = recorded(world, train_rewards={"red": "tests.test_grpo:failing", "blue": BRIGHT})
    assert row["groups"] == {"zero_spread": 1, "dropped": 1, "all": 4}
    assert math.isfinite(row["loss"]) and gradient.isfinite().all() and gradient.norm() > 0
    (named,) = row["failed_rewards"]
    assert "'a red square'" in named and "raised OSError: no more memory" in named


@pytest.mark.parametrize("config", [grpo_config, tiny.nft_config])
def test_a_step_without_any_reward_changes_nothing_but_goes_on(world, config):
    """Not even by the momentum of a step before, and no old policy; and the next step learns again. A run of
    such steps alone ends as one without a gradient does (tests/test_train.py)."""
    cfg, *_, trained, stage = tiny.build(config(world, weight_decay=0.1))
    states = []
    for step, spec in enumerate((BRIGHT, "tests.tiny_grpo:nothing", BRIGHT)):
        stage.reward_of = dict.fromkeys(("red", "blue"), find_reward(spec))
        row, norm = stage.step(step)
        states.append(torch.cat([ranks.full(value.detach()).flatten() for value in trained.state().values()]))
        assert row["groups"]["dropped"] == (0 if spec == BRIGHT else 4) and (norm > 0) == (spec == BRIGHT)
        way_out = train.WAYS_OUT.get(train.fault_of_step(cfg, row, norm), "")
        assert way_out.startswith("mend the reward") == (spec != BRIGHT)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_held_out_tasks_are_watched_and_scored_and_a_failing_scorer_is_said(world, tmp_path, capsys):
    """Whether they are trained on, as red, or not. The failure is said on the way and ends the whole run."""
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    scorers = {"red": BRIGHT, "blue": "tests.tiny_grpo:nothing"}
    scored = {"heldout": files, "rewards": scorers, "watch_every": 2, "watch_prompts": 3}
    table = {"evaluate": True, "eval_prompts": 4, "eval_steps": 2}
    trained_on = {"prompts": {"red": files["red"]}, "iterations": 3}
    cfg = grpo_config(world, out=str(tmp_path), **scored, **table, **trained_on)
    with pytest.raises(SystemExit, match="^error: pictures of blue have no score; mend the scorer; "):
        train.run(cfg)
    assert (tmp_path / "student/README.md").is_file() and (tmp_path / "table.txt").is_file()
    line = "held-out blue, tests.tiny_grpo:nothing: pictures without a score: 3, first: prompt 'two blue"
    printed = capsys.readouterr().out
    assert all(f"step {step}: student, {line}" in printed for step in (2, 3))
    rows = forked.rows(tmp_path)
    assert list(rows[0]["reward"]) == ["red"] and ["watch" in row for row in rows] == [False, True, True]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["base", "student"]
    for found in (rows[1]["watch"], rows[2]["watch"]):
        assert 0 < found["red"] < 1 and math.isnan(found["blue"])
    found = scores["student"]["held-out"]
    assert 0 < found["red"] < 1 and found["blue"] is None


BAD_REWARDS = [
    ("train_rewards", "no.such:reward", "No module named 'no'"),
    ("train_rewards", f"{__name__}:whole_numbers", "which is not floating"),
    ("train_rewards", "tests.tiny_grpo:too_long", r"returned shape \(3,\) for 2 images"),
    ("train_rewards", "tests.test_rewards:needs_target", "needs 'target' with every prompt"),
    ("rewards", "tests.test_rewards:needs_target", "needs 'target' with every prompt"),
    ("rewards", "tests.tiny_grpo:too_long", r"returned shape \(3,\) for 2 images"),
]


@pytest.mark.parametrize("field, spec, message", BAD_REWARDS)
def test_bad_rewards_are_refused_before_weights_load(world, field, spec, message, monkeypatch):
    """That train, and that watch and score."""
    monkeypatch.setattr(Model, "load", lambda *a: pytest.fail("weights were loaded"))
    changes = {field: {"red": BRIGHT, "blue": spec}}
    if field == "rewards":
        changes |= {"heldout": {"blue": str(world / "blue.txt")}, "watch_every": 1}
    with pytest.raises(ValueError, match=message):
        build(world, **changes)


def whole_numbers(images, prompts, metadata):
    return torch.ones(len(images), dtype=torch.long)
