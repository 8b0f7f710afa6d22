"""Stage grpo: the gradient against finite differences and the policy gradient, advantages by brute force, every knob, a known optimum."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from kernels.sde_log_prob import sde_log_prob_reference
from opd import adapters, config, flow, grpo, ranks
from opd.data import seed_of
from opd.runfolder import RunFolder
from tests import tiny

BRIGHT = "tests.test_grpo:brightness"


def brightness(images, prompts, metadata):
    """Mean pixel: something a random tiny model can change."""
    return images.mean((1, 2, 3))


def grpo_config(world, **changes):
    return replace(tiny.config(world, stage="grpo", teachers={}, anchor_weight=0.0, group=4, micro_batch=8, iterations=2, steps=4,
                               train_rewards={"red": BRIGHT, "blue": BRIGHT}, beta=0.0), **changes)


def build(world, **changes):
    cfg = grpo_config(world, **changes)
    config.check(cfg, 1)
    m, data = train.build(cfg, ranks.start())
    return cfg, m, data, train.Trained(cfg, m)


def run(cfg):
    config.check(cfg, 1)
    m, data = train.build(cfg, ranks.start())
    folder = RunFolder(cfg, True)
    return folder, m, train.train(cfg, m, data, folder)


def flat(tensors):
    return torch.cat([ranks.full(t).flatten() for t in tensors])


def recorded(world, turn: int = 0, **changes):
    """(gradient of optimizer step number `turn` of one iteration, the iteration's metrics)."""
    cfg, m, data, trained = build(world, **changes)
    gradients, original = [], trained.update
    def update(*args):
        gradients.append(flat(p.grad for p in trained.parameters.values()))
        return original(*args)
    trained.update = update
    row, _ = grpo.iteration(cfg, m, data, trained, 0, True)
    return gradients[turn], row


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


# ---- the gradient ----------------------------------------------------------------------------------------------

def test_at_ratio_one_the_gradient_is_minus_advantage_times_score_by_finite_differences(world):
    """Central differences of -A log p in float64 along five random directions, on the tiny transformer."""
    cfg, m, data, trained = build(world, cold_start=str(world / "red"))
    transformer = m.family.load_transformer(world / "pipeline", torch.float64)
    lora = adapters.read_lora(str(world / "red"))
    adapters.attach(transformer, "student", lora, torch.float64)
    parameters = [p.requires_grad_() for p in adapters.parameters_of(transformer, "student").values()]
    embeds, pooled = (c.double() for c in m.conditioning(["a red circle"] * 3))
    generator = torch.Generator().manual_seed(0)
    x, x_next = torch.randn(2, 3, *m.shape, generator=generator, dtype=torch.float64)
    sigma, sigma_next, s = (torch.full((3,), value, dtype=torch.float64) for value in (0.8, 0.6, 0.9))
    advantage = torch.tensor([1.5, -0.7, 0.3], dtype=torch.float64)

    def log_prob():
        with adapters.use(transformer, "student"):
            v = transformer(hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0]
        return sde_log_prob_reference(x_next, x, v, sigma, sigma_next, s, None, 1.0)

    now = log_prob()
    grpo.clipped_loss(now - now.detach(), advantage, 1e-4).sum().backward()
    for seed in range(5):
        direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for p in parameters]
        def shifted(h):
            with torch.no_grad():
                for p, d in zip(parameters, direction):
                    p.add_(d, alpha=h)
                value = float(-(advantage * log_prob()).sum())
                for p, d in zip(parameters, direction):
                    p.sub_(d, alpha=h)
            return value
        coarse, fine = ((shifted(h) - shifted(-h)) / (2 * h) for h in (2e-3, 1e-3))
        numeric = (4 * fine - coarse) / 3  # steps well above the float32 that diffusers' norms fall back to
        exact = float(sum((p.grad * d).sum() for p, d in zip(parameters, direction)))
        assert abs(exact) > 1e-4 and numeric == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"guidance": 2.0}, {"window": 2, "window_range": (0, 4)}, {"skip_last": True}, {"micro_batch": 3}], ids=str)
def test_first_update_is_the_policy_gradient_written_out(world, changes):
    """Roll out sample by sample with flow's equations, score, take -A log p by autograd: the iteration's first gradient."""
    cfg, m, data, trained = build(world, cold_start=str(world / "red"), **changes)
    prompts = grpo.prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    grid, states = m.grid(cfg.steps), grpo.trained_states(cfg, 0)
    transitions, images = [], []

    def velocity(x, i, text):
        sigma = torch.tensor([grid[i]])
        with adapters.use(m.transformer, "student"):
            v, u = (m.family.velocity(m.transformer, x, sigma, m.conditioning([t])) for t in (text, ""))
        return u + cfg.guidance * (v - u)

    def schedule(i):
        sigma, sigma_next = torch.tensor([grid[i]]), torch.tensor([grid[i + 1]])
        return sigma, sigma_next, flow.diffusion_coefficient(sigma, grid[1], cfg.noise_level)

    for n in range(cfg.prompts_per_step * cfg.group):
        text, index = prompts[n // cfg.group].text, torch.tensor([n])
        x = train.kernels.normal((1, *m.shape), seed_of(0, 0, "start"), index)
        for i in range(cfg.steps):
            sigma, sigma_next, s = schedule(i)
            v = velocity(x, i, text).detach()
            if cfg.window and i not in states:
                x = flow.ode_step(x, v, sigma, sigma_next)
                continue
            z = train.kernels.normal(x.shape, seed_of(0, 0, "noise", i), index)
            after = flow.sde_mean(x, v, sigma, sigma_next, s) + float(flow.step_std(sigma, sigma_next, s)) * z
            if i in states:
                transitions.append((n, i, x, after))
            x = after
        images.append(m.family.decode(m.vae, x))
    rewards = torch.stack([i.mean() for i in images]).double().view(-1, cfg.group)
    tasks = [p.task for p in prompts]
    advantage = torch.zeros_like(rewards)
    for p, task in enumerate(tasks):
        same = rewards[[q for q, t in enumerate(tasks) if t == task]]
        advantage[p] = (rewards[p] - rewards[p].mean()) / (same.numpy().std() + 1e-4)
    loss = 0.0
    for n, i, x, after in transitions:
        sigma, sigma_next, s = schedule(i)
        mean, std = flow.sde_mean(x, velocity(x, i, prompts[n // cfg.group].text), sigma, sigma_next, s), flow.step_std(sigma, sigma_next, s)
        log_p = torch.distributions.Normal(mean, std).log_prob(after).mean()
        loss = loss - advantage.flatten()[n] * log_p / len(transitions)
    loss.backward()
    wanted = flat(p.grad for p in trained.parameters.values())
    assert wanted.norm() > 1e-3
    assert distance(recorded(world, cold_start=str(world / "red"), **changes)[0], wanted) < 1e-4


def test_clip_changes_the_second_update_and_not_the_first(world):
    """At ratio 1 nothing is clipped; after a step it is."""
    changes = dict(epochs=2, lr=3e-2, cold_start=str(world / "red"))
    tight, wide = ([recorded(world, turn, clip_range=clip, **changes) for turn in (0, 1)] for clip in (1e-4, 10.0))
    assert distance(tight[0][0], wide[0][0]) < 1e-6
    assert distance(tight[1][0], wide[1][0]) > 0.1
    assert tight[0][1]["ratio"]["clipped"] > 0.3 and wide[0][1]["ratio"]["clipped"] == 0


def test_kl_term_adds_the_gradient_of_the_exact_kl(world):
    """Its gradient is linear in beta, and it pulls the policy to the base: a step along minus it lowers the KL."""
    start = dict(cold_start=str(world / "red"))
    without, half, full = (recorded(world, beta=beta, **start) for beta in (0.0, 0.5, 1.0))
    assert distance(full[0] - without[0], 2 * (half[0] - without[0])) < 1e-3
    assert (full[0] - without[0]).norm() > 1e-4 and full[1]["kl"] > 1e-4 and without[1]["kl"] == 0
    only = dict(train_rewards={"red": "tests.test_grpo:constant", "blue": "tests.test_grpo:constant"}, beta=1.0, lr=1e-3, iterations=8, **start)
    cfg, m, data, trained = build(world, **only)
    kls = [grpo.iteration(cfg, m, data, trained, step, step == 0)[0]["kl"] for step in range(8)]
    assert kls[-1] < 0.9 * kls[0]


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.25)


def test_guarded_ratio_is_the_noise_times_the_mean_difference():
    """std (log ratio + KL) = z . (mean - mean_old) / d, the closed form, whatever the step."""
    generator = torch.Generator().manual_seed(0)
    x, v, v_old, z = torch.randn(4, 5, 2, 3, 3, generator=generator, dtype=torch.float64)
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1]).double(), torch.tensor([0.95, 0.7, 0.4, 0.2, 0.0]).double()
    s = flow.diffusion_coefficient(sigma, 0.95, 0.7)
    std, mean, mean_old = flow.step_std(sigma, sigma_next, s), *(flow.sde_mean(x, u, sigma, sigma_next, s) for u in (v, v_old))
    after = mean_old + std.view(-1, 1, 1, 1) * z
    log_ratio = flow.log_prob_mean(after, mean, std) - flow.log_prob_mean(after, mean_old, std)
    kl_old = flow.kl_weight(sigma, sigma_next, s) * (v - v_old).square().flatten(1).mean(1)
    wanted = (z * (mean - mean_old)).flatten(1).mean(1)
    assert torch.allclose(grpo.guarded(log_ratio, kl_old, std), wanted, atol=1e-12)


def test_guard_changes_the_second_update(world):
    changes = dict(epochs=2, lr=1e-2, cold_start=str(world / "red"), clip_range=10.0)
    plain, guarded = (recorded(world, 1, guard=g, **changes)[0] for g in (False, True))
    assert distance(guarded, plain) > 0.1


# ---- advantages --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scope", ["global", "group"])
def test_advantages_equal_a_brute_force_version(scope):
    rng = np.random.default_rng(0)
    rewards, tasks = rng.random((6, 5)) * [[1], [1], [10], [1], [10], [1]], ["a", "a", "b", "a", "b", "a"]
    rewards[3, 2] = math.nan  # a dropped group
    rewards[5] = 0.5          # a flat group
    got = grpo.advantages(torch.tensor(rewards), tasks, scope, 1.2)
    for p in range(6):
        whole = [rewards[q] for q in range(6) if tasks[q] == tasks[p] and not np.isnan(rewards[q]).any()]
        std = np.std(np.stack(whole)) if scope == "global" else np.std(rewards[p])
        wanted = np.clip((rewards[p] - rewards[p].mean()) / (std + 1e-4), -1.2, 1.2)
        assert np.allclose(got[p], wanted, equal_nan=True)
    assert got[3].isnan().all() and (got[5] == 0).all() and got.nan_to_num().abs().max() == 1.2


def test_advantage_knobs_change_the_gradient(world):
    plain = recorded(world, cold_start=str(world / "red"))[0]
    for changes in ({"advantage_std": "group"}, {"advantage_clip": 0.5}, {"window": 1, "window_range": (0, 4)}, {"skip_last": True}):
        assert distance(recorded(world, cold_start=str(world / "red"), **changes)[0], plain) > 0.01, changes


# ---- a known optimum ---------------------------------------------------------------------------------------------

def test_one_dimension_reaches_the_known_optimum():
    """A velocity that is one number per state; reward -(x_0 - 2)^2. The noise is fixed, so the best policy has E[x_0] = 2."""
    torch.manual_seed(0)
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    theta = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.05)

    def sample(count):
        x, steps = torch.randn(count, 1), []
        for i in range(4):
            sigma, after = grid[i].expand(count), grid[i + 1].expand(count)
            s, v = flow.diffusion_coefficient(sigma, grid[1], 0.7), theta[i].detach().expand(count, 1)
            if i == 3:
                return flow.ode_step(x, v, sigma, after), steps
            mean, std = flow.sde_mean(x, v, sigma, after, s), flow.step_std(sigma, after, s)
            x_next = mean + std[:, None] * torch.randn(count, 1)
            steps.append((i, x, x_next, sigma, after, s, flow.log_prob_mean(x_next, mean, std)))
            x = x_next

    with torch.no_grad():
        before = float(sample(4096)[0].mean())
    for _ in range(150):
        x, steps = sample(64 * 8)
        advantage = grpo.advantages(-(x - 2).square().view(64, 8), ["toy"] * 64, "global", 5.0).flatten()
        for _ in range(2):
            loss = 0.0
            for i, x_i, x_next, sigma, after, s, old in steps:
                mean = flow.sde_mean(x_i, theta[i].expand(len(x_i), 1), sigma, after, s)
                log_ratio = flow.log_prob_mean(x_next, mean, flow.step_std(sigma, after, s)) - old
                loss = loss + grpo.clipped_loss(log_ratio, advantage, 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert abs(before - 2) > 1 and abs(float(sample(4096)[0].mean()) - 2) < 0.1


def test_reward_rises_on_the_tiny_model(world, tmp_path):
    cfg = grpo_config(world, out=str(tmp_path), iterations=25, group=8, prompts_per_step=4, micro_batch=32, lr=1e-2, epochs=2, clip_range=1e-2)
    rows = run(cfg)[0].metrics()
    means = [(row["reward"]["red"] + row["reward"]["blue"]) / 2 for row in rows]
    spread = rows[0]["reward_std"]["red"]
    assert np.mean(means[-5:]) > np.mean(means[:3]) + spread, (means, spread)


# ---- the run -----------------------------------------------------------------------------------------------------

def test_parts_and_epochs_make_so_many_updates_of_whole_groups(world):
    cfg, m, data, trained = build(world, updates=2, epochs=3)
    calls, original = [], trained.update
    trained.update = lambda *a: calls.append(a) or original(*a)
    grpo.iteration(cfg, m, data, trained, 5, True)
    assert calls == [(5, turn, 6) for turn in range(6)]
    halves = [recorded(world, u, updates=2, lr=1e-9, cold_start=str(world / "red"))[0] for u in (0, 1)]
    assert distance((halves[0] + halves[1]) / 2, recorded(world, cold_start=str(world / "red"))[0]) < 1e-3


def test_average_moves_every_so_many_updates(world):
    cfg, m, data, trained = build(world, ema=0.9, ema_every=3)
    before = {n: a.clone() for n, a in trained.average.items()}
    moved = []
    for turn in range(3):
        for p in trained.parameters.values():
            p.grad = torch.ones_like(p)
        trained.update(0, turn, 3)
        moved.append(any(not torch.equal(ranks.full(a), ranks.full(before[n])) for n, a in trained.average.items()))
    assert moved == [False, False, True]


@pytest.mark.parametrize("shared", [False, True])
def test_groups_share_their_start_only_if_asked(world, shared):
    """Same first state for a group, other noise after it, other first states for other groups."""
    cfg, m, data, _ = build(world, shared_start=shared)
    prompts = grpo.prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    batch = grpo.MicroBatch(list(range(8)), ["red"] * 8, [1] * 8, ["red"])
    trajectory, images = grpo.sample_trajectory(cfg, m, batch, prompts, 0, [0, 1])
    first, second = (x.view(2, 4, *m.shape) for x in trajectory.x[:2])
    assert torch.equal(first[:, :1].expand_as(first), first) == shared
    assert not torch.equal(first[0], first[1]) and not torch.equal(second[:, 0], second[:, 1])


@pytest.mark.parametrize("changes", [{}, {"window": 2, "window_range": (1, 3)}, {"guidance": 2.0, "guard": True}])
def test_a_group_that_stands_together_is_computed_once(world, monkeypatch, changes):
    """The same gradient as with a forward pass for every sample, from fewer samples in the transformer."""
    changes = dict(changes, shared_start=True, beta=0.1, cold_start=str(world / "red"))
    rows, original = [], grpo.rollout.velocities
    monkeypatch.setattr(grpo.rollout, "velocities", lambda family, transformer, x, *rest: (rows.append(len(x)), original(family, transformer, x, *rest))[1])
    once, counted = recorded(world, **changes)[0], sum(rows)
    rows.clear()
    monkeypatch.setattr(grpo, "velocities", lambda cfg, m, batch, i, states, *rest: grpo.rollout.velocities(m.family, m.transformer, *rest, cfg.guidance))
    assert distance(once, recorded(world, **changes)[0]) < 1e-4
    cfg = grpo_config(world, **changes)
    first = grpo.trained_states(cfg, 0)[0]
    spared = cfg.prompts_per_step * (cfg.group - 1) * (first + 1 + 2)  # rollout up to there, policy and reference in the update
    assert sum(rows) - counted == spared > 0


def test_window_moves_over_its_range_and_only_over_it(world):
    cfg = grpo_config(world, steps=10, window=2, window_range=(1, 6))
    drawn = [grpo.trained_states(cfg, step) for step in range(200)]
    assert {tuple(d) for d in drawn} == {(1, 2), (2, 3), (3, 4), (4, 5)}
    assert drawn == [grpo.trained_states(cfg, step) for step in range(200)]


def test_self_test_names_causes_when_training_sees_another_policy(world, monkeypatch):
    original = grpo.rollout.velocities
    def changed(family, transformer, x, *rest):
        v, u = original(family, transformer, x, *rest)
        return (v.bfloat16().float() if torch.is_grad_enabled() else v), u
    monkeypatch.setattr(grpo.rollout, "velocities", changed)
    with pytest.raises(RuntimeError, match=r"a ratio is .* off 1 \(tolerance 5e-05.*dtype.*dropout.*guidance"):
        recorded(world)


def test_cosine_of_two_tasks(world):
    """Sums of the tasks' gradients are the update's; the logged cosine is that of gradients computed one task at a time."""
    start = dict(cold_start=str(world / "red"), prompts_per_step=4, beta=0.1)
    both, row = recorded(world, cosine_every=1, **start)
    alone = []
    for task in ("red", "blue"):
        cfg, m, data, trained = build(world, **start)
        original = grpo.advantages
        def masked(rewards, tasks, *rest):
            got = original(rewards, tasks, *rest)
            got[[t != task for t in tasks]] = math.nan
            return got
        grpo.advantages = masked
        try:
            trained.update = lambda *a: 0.0
            grpo.iteration(cfg, m, data, trained, 0, True)
        finally:
            grpo.advantages = original
        alone.append(flat(p.grad for p in trained.parameters.values()))
    assert distance((alone[0] + alone[1]) / 2, both) < 1e-4
    assert row["cosine"]["red/blue"] == pytest.approx(float(torch.nn.functional.cosine_similarity(*alone, dim=0)), abs=1e-4)
    assert "cosine" not in recorded(world, **start)[1]


def test_alternate_gives_each_step_one_task(world):
    rows = [recorded(world, alternate=True)[1], recorded(world)[1]]
    assert list(rows[0]["reward"]) == ["red"] and list(rows[1]["reward"]) == ["red", "blue"]


def test_zero_spread_groups_are_counted_and_teach_nothing(world):
    gradient, row = recorded(world, train_rewards={"red": "tests.test_grpo:constant", "blue": BRIGHT})
    assert row["groups"] == {"zero_spread": 2, "dropped": 0, "all": 4} and gradient.norm() > 0


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "ema_every": 2, "epochs": 2, "updates": 2}], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bits(world, tmp_path, changes, monkeypatch):
    whole = run(grpo_config(world, out=str(tmp_path / "a"), iterations=4, save_every=2, **changes))[0]
    cfg = grpo_config(world, out=str(tmp_path / "b"), iterations=4, save_every=2, **changes)
    original = grpo.iteration
    def interrupted(cfg, m, data, trained, step, first):
        if step == 3:
            raise KeyboardInterrupt
        return original(cfg, m, data, trained, step, first)
    monkeypatch.setattr(grpo, "iteration", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    monkeypatch.setattr(grpo, "iteration", original)
    resumed = run(cfg)[0]
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    assert (tmp_path / "a/state.safetensors").read_bytes() == (tmp_path / "b/state.safetensors").read_bytes()


def test_full_fine_tuning_trains_the_transformer(world, tmp_path):
    folder, _, trained = run(grpo_config(world, out=str(tmp_path), full=True, lr=1e-3))
    assert len(trained.parameters) > 50 and (tmp_path / "student" / "diffusion_pytorch_model.safetensors").is_file()
    assert all(row["grad_norm"] > 0 for row in folder.metrics())


# ---- rewards that fail -------------------------------------------------------------------------------------------

CALLS = []


def failing(images, prompts, metadata):
    """Fine at first; later one prompt's images raise, hang or are NaN."""
    import time
    CALLS.append(prompts)
    scores = images.mean((1, 2, 3))
    if len(CALLS) > 4 and "a red circle" in prompts:
        if MODE[0] == "exception":
            raise OSError("no more memory")
        if MODE[0] == "sleep":
            time.sleep(30)
        scores[[p == "a red circle" for p in prompts]] = math.nan
    return scores


MODE = ["exception"]


@pytest.mark.parametrize("mode, reason", [("exception", "raised OSError: no more memory"), ("sleep", "took longer than 0.3 s"), ("nan", "returned nan")])
def test_a_reward_killed_mid_run_leaves_training_running_and_the_count_in_the_log(world, tmp_path, mode, reason):
    CALLS.clear()
    MODE[0] = mode
    cfg = grpo_config(world, out=str(tmp_path), iterations=8, train_rewards={"red": "tests.test_grpo:failing", "blue": BRIGHT}, reward_timeout=0.3)
    rows = run(cfg)[0].metrics()
    dropped = [row["groups"]["dropped"] for row in rows]
    assert len(rows) == 8 and sum(dropped) >= 1 and dropped[0] == 0 and max(dropped) == 1
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    named = [text for row in rows if "failed_rewards" in row for text in row["failed_rewards"]]
    assert len(named) == sum(dropped) and all("'a red circle'" in text and reason in text for text in named)


def test_a_step_without_any_reward_changes_nothing_but_goes_on(world, tmp_path):
    """Not even by the momentum of a step before; and the next step learns again."""
    cfg, m, data, trained = build(world, weight_decay=0.1)
    weights = []
    for step, spec in enumerate((BRIGHT, "tests.test_grpo:nothing", BRIGHT)):
        row, norm = grpo.iteration(replace(cfg, train_rewards=dict.fromkeys(("red", "blue"), spec)), m, data, trained, step, False)
        weights.append(flat(p.detach() for p in trained.parameters.values()))
        assert row["groups"]["dropped"] == (0 if spec == BRIGHT else 4) and (norm > 0) == (spec == BRIGHT)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_watched_scorer_that_fails_does_not_end_the_run(world, tmp_path):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    cfg = grpo_config(world, out=str(tmp_path), heldout=files, rewards={"red": BRIGHT, "blue": "tests.test_grpo:nothing"}, watch_every=1, watch_prompts=3)
    rows = run(cfg)[0].metrics()
    assert len(rows) == 2 and 0 < rows[0]["watch"]["red"] < 1 and math.isnan(rows[0]["watch"]["blue"])


def nothing(images, prompts, metadata):
    return torch.full((len(images),), math.nan)


# ---- what the log holds --------------------------------------------------------------------------------------------

def test_held_out_tasks_are_watched_trained_on_or_not(world, tmp_path):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    cfg = grpo_config(world, out=str(tmp_path), prompts={"red": files["red"]}, heldout=files, rewards={"red": BRIGHT, "blue": BRIGHT},
                      watch_every=2, watch_prompts=3, iterations=3)
    rows = run(cfg)[0].metrics()
    assert [sorted(row["watch"]) if "watch" in row else None for row in rows] == [None, ["blue", "red"], ["blue", "red"]]
    assert list(rows[0]["reward"]) == ["red"]


def test_report_scores_base_and_student(world, tmp_path, capsys):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    cfg = grpo_config(world, out=str(tmp_path), heldout=files, rewards={"red": BRIGHT, "blue": BRIGHT}, evaluate=True, eval_prompts=4, eval_steps=2)
    config.check(cfg, 1)
    m, data = train.build(cfg, ranks.start())
    folder = RunFolder(cfg, True)
    train.report(cfg, m, data, folder, train.train(cfg, m, data, folder))
    assert list(json.loads((tmp_path / "scores.json").read_text())) == ["base", "student"]
    assert "time: rollout" in capsys.readouterr().out


# ---- bad input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"group": 1}, "--group 1: an advantage compares the images of one prompt"),
    ({"rollout": "ode"}, "needs the SDE's likelihood"), ({"noise_level": 0.0}, "needs the SDE's likelihood"),
    ({"full": True, "beta": 0.1}, "--beta 0.1 with --full"), ({"cold_start": "merge"}, "--cold-start merge is for stage opd"),
    ({"updates": 3}, "--updates 3 does not divide --prompts-per-step 4"),
    ({"window": 3, "window_range": (2, 4)}, "--window 3 does not fit into --window-range 2 4"),
    ({"window": 2, "window_range": (2, 4), "skip_last": True}, r"of the 3 states \(--steps, --skip-last"),
    ({"window": 2, "window_range": (3, 9)}, r"of the 4 states \(--steps"),
    ({"train_rewards": {"red": BRIGHT}}, "task 'blue' has no reward to train on; add --train-rewards blue=module:function"),
    ({"clip_range": 0.0}, "--clip-range is 0.0"), ({"beta": -1.0}, "--beta is -1.0"),
])
def test_impossible_settings_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        config.check(grpo_config(world, **changes), 1)


@pytest.mark.parametrize("spec, message", [
    ("no.such:reward", "cannot be imported"), ("tests.test_grpo:whole_numbers", "which is not floating"),
    ("tests.test_grpo:too_long", r"returned shape \(3,\) for 2 images"), ("tests.test_grpo:needy", "needs 'include' with every prompt"),
])
def test_bad_rewards_are_refused_before_weights_load(world, spec, message, monkeypatch):
    monkeypatch.setattr(train.Model, "load", lambda *a: pytest.fail("weights were loaded"))
    cfg = grpo_config(world, train_rewards={"red": spec, "blue": BRIGHT})
    with pytest.raises(ValueError, match=message):
        train.build(cfg, ranks.start())


def whole_numbers(images, prompts, metadata):
    return torch.ones(len(images), dtype=torch.long)


def too_long(images, prompts, metadata):
    return torch.ones(len(images) + 1)


def needy(images, prompts, metadata):
    return torch.tensor([float(len(record["include"])) for record in metadata])


needy.metadata_keys = ("include",)
