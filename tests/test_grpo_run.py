"""Stage grpo as a run: every knob, groups computed once, rewards that fail, interrupted runs, bad input."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from opd import grpo, ranks
from opd.data import MicroBatch, prompts_of_step
from opd.model import Model
from opd.rewards import find_reward
from opd.setup import set_up
from tests.tiny import grpo_config
from tests.tiny_grpo import BRIGHT, build, distance, flat, recorded, run

# ---- the run -----------------------------------------------------------------------------------------------


def test_parts_and_epochs_make_so_many_updates_of_whole_groups(world):
    *_, trained, stage = build(world, updates=2, epochs=3)
    calls, original = [], trained.update
    trained.update = lambda *a: calls.append(a) or original(*a)
    stage.step(5)
    assert calls == [(5, turn, 6) for turn in range(6)]
    halves = [recorded(world, u, updates=2, lr=1e-9, cold_start=str(world / "red"))[0] for u in (0, 1)]
    assert distance((halves[0] + halves[1]) / 2, recorded(world, cold_start=str(world / "red"))[0]) < 1e-3


def test_average_moves_every_so_many_updates(world):
    _, _, _, trained, _ = build(world, ema=0.9, ema_every=3)
    before = {n: a.clone() for n, a in trained.average.items()}
    moved = []
    for turn in range(3):
        for p in trained.parameters.values():
            p.grad = torch.ones_like(p)
        trained.update(0, turn, 3)
        moved.append(
            any(not torch.equal(ranks.full(a), ranks.full(before[n])) for n, a in trained.average.items())
        )
    assert moved == [False, False, True]


@pytest.mark.parametrize("shared", [False, True])
def test_groups_share_their_start_only_if_asked(world, shared):
    """Same first state for a group, other noise after it, other first states for other groups."""
    cfg, model, data, _, stage = build(world, shared_start=shared)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    batch = MicroBatch(list(range(8)), [1] * 8, list(range(8)))
    sampled = stage.sample(batch, "red", prompts, 0, [0, 1])
    first, second = (state.x.view(2, 4, *model.shape) for state in sampled.states)
    assert torch.equal(first[:, :1].expand_as(first), first) == shared
    assert not torch.equal(first[0], first[1]) and not torch.equal(second[:, 0], second[:, 1])


@pytest.mark.parametrize(
    "changes", [{}, {"window": 2, "window_range": (1, 3)}, {"guidance": 2.0, "guard": True}]
)
def test_a_group_that_stands_together_is_computed_once(world, monkeypatch, changes):
    """The same gradient as with a forward pass for every sample, from fewer samples in the transformer."""
    changes = dict(changes, shared_start=True, beta=0.1, cold_start=str(world / "red"))
    gradients, samples = [], []
    for once in (True, False):
        cfg, model, *_, trained, stage = build(world, **changes)
        if not once:

            def everyone(batch):
                alone = list(range(len(batch.samples)))
                return grpo.SharedPrefix(alone, torch.tensor(alone), torch.tensor(alone))

            monkeypatch.setattr(stage, "shared_prefix", everyone)
        rows = []
        model.transformer.register_forward_hook(lambda *given, rows=rows: rows.append(len(given[-1][0])))
        monkeypatch.setattr(trained, "update", lambda *_: 1.0)
        stage.step(0)
        gradients.append(flat(p.grad for p in trained.parameters.values()))
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
    with pytest.raises(
        RuntimeError, match=r"a ratio is .* off 1 \(tolerance 5e-05.*dtype.*dropout.*guidance"
    ):
        stage.step(0)


def test_alternate_gives_each_step_one_task(world):
    rows = [recorded(world, alternate=True)[1], recorded(world)[1]]
    assert list(rows[0]["reward"]) == ["red"] and list(rows[1]["reward"]) == ["red", "blue"]


def test_zero_spread_groups_are_counted_and_teach_nothing(world):
    gradient, row = recorded(world, train_rewards={"red": "tests.tiny_grpo:constant", "blue": BRIGHT})
    assert row["groups"] == {"zero_spread": 2, "dropped": 0, "all": 4} and gradient.norm() > 0


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "ema_every": 2, "epochs": 2, "updates": 2}], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bits(world, tmp_path, changes, monkeypatch):
    whole = run(grpo_config(world, out=str(tmp_path / "a"), iterations=4, save_every=2, **changes))[0]
    cfg = grpo_config(world, out=str(tmp_path / "b"), iterations=4, save_every=2, **changes)
    original = grpo.GRPO.step

    def interrupted(stage, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(stage, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo.GRPO, "step", interrupted)
        run(cfg)
    resumed = run(cfg)[0]
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    states = [load_file(file) for f in "ab" for file in (tmp_path / f / "state/000004").glob("*.safetensors")]
    assert len(states) == 2 and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_full_fine_tuning_trains_the_transformer(world, tmp_path):
    folder, _, trained, _ = run(grpo_config(world, out=str(tmp_path), full=True, lr=1e-3))
    assert (
        len(trained.parameters) > 50
        and (tmp_path / "student" / "diffusion_pytorch_model.safetensors").is_file()
    )
    assert all(row["grad_norm"] > 0 for row in folder.metrics())


# ---- rewards that fail -------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    "mode, reason",
    [
        ("exception", "raised OSError: no more memory"),
        ("sleep", "took longer than 0.3 s"),
        ("nan", "returned nan"),
    ],
)
def test_a_reward_killed_mid_run_leaves_training_running_and_the_count_in_the_log(
    world, tmp_path, mode, reason
):
    CALLS.clear()
    MODE[0] = mode
    cfg = grpo_config(
        world,
        out=str(tmp_path),
        iterations=8,
        train_rewards={"red": "tests.test_grpo_run:failing", "blue": BRIGHT},
        reward_timeout=0.3,
    )
    rows = run(cfg)[0].metrics()
    dropped = [row["groups"]["dropped"] for row in rows]
    assert len(rows) == 8 and sum(dropped) >= 1 and dropped[0] == 0 and max(dropped) == 1
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    named = [text for row in rows if "failed_rewards" in row for text in row["failed_rewards"]]
    assert len(named) == sum(dropped) and all("'a red circle'" in text and reason in text for text in named)


def test_a_step_without_any_reward_changes_nothing_but_goes_on(world, tmp_path):
    """Not even by the momentum of a step before; and the next step learns again."""
    *_, trained, stage = build(world, weight_decay=0.1)
    weights = []
    for step, spec in enumerate((BRIGHT, "tests.test_grpo_run:nothing", BRIGHT)):
        stage.reward_of = dict.fromkeys(("red", "blue"), find_reward(spec))
        row, norm = stage.step(step)
        weights.append(flat(p.detach() for p in trained.parameters.values()))
        assert row["groups"]["dropped"] == (0 if spec == BRIGHT else 4) and (norm > 0) == (spec == BRIGHT)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_watched_scorer_that_fails_does_not_end_the_run(world, tmp_path):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    cfg = grpo_config(
        world,
        out=str(tmp_path),
        heldout=files,
        rewards={"red": BRIGHT, "blue": "tests.test_grpo_run:nothing"},
        watch_every=1,
        watch_prompts=3,
    )
    rows = run(cfg)[0].metrics()
    assert len(rows) == 2 and 0 < rows[0]["watch"]["red"] < 1 and math.isnan(rows[0]["watch"]["blue"])


def test_a_scorer_that_fails_costs_its_column_and_not_the_table(world, tmp_path):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    scorers = {"red": BRIGHT, "blue": "tests.test_grpo_run:nothing"}
    cfg = grpo_config(
        world, out=str(tmp_path), heldout=files, rewards=scorers, evaluate=True, eval_prompts=4, eval_steps=2
    )
    *_, trained, report = run(cfg)
    report.table(trained)
    student = json.loads((tmp_path / "scores.json").read_text())["student"]["held-out"]
    assert 0 < student["red"] < 1 and math.isnan(student["blue"])


def nothing(images, prompts, metadata):
    return torch.full((len(images),), math.nan)


# ---- what the log holds ------------------------------------------------------------------------------------


def test_held_out_tasks_are_watched_trained_on_or_not(world, tmp_path):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    cfg = grpo_config(
        world,
        out=str(tmp_path),
        prompts={"red": files["red"]},
        heldout=files,
        rewards={"red": BRIGHT, "blue": BRIGHT},
        watch_every=2,
        watch_prompts=3,
        iterations=3,
    )
    rows = run(cfg)[0].metrics()
    assert [sorted(row["watch"]) if "watch" in row else None for row in rows] == [
        None,
        ["blue", "red"],
        ["blue", "red"],
    ]
    assert list(rows[0]["reward"]) == ["red"]


def test_report_scores_base_and_student(world, tmp_path):
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    cfg = grpo_config(
        world,
        out=str(tmp_path),
        heldout=files,
        rewards={"red": BRIGHT, "blue": BRIGHT},
        evaluate=True,
        eval_prompts=4,
        eval_steps=2,
    )
    *_, trained, report = run(cfg)
    report.table(trained)
    assert list(json.loads((tmp_path / "scores.json").read_text())) == ["base", "student"]


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group": 1}, "--group 1: an advantage compares the images of one prompt"),
        ({"rollout": "ode"}, "needs the likelihood of a noisy step"),
        ({"noise_level": 0.0}, "needs the likelihood of a noisy step"),
        ({"full": True, "beta": 0.1}, "--beta 0.1 with --full"),
        ({"cold_start": "merge"}, "--cold-start merge"),
        ({"updates": 3}, "--updates 3 does not divide --prompts-per-step 4"),
        ({"window": 3, "window_range": (2, 4)}, "--window 3 does not fit into --window-range 2 4"),
        ({"window": 2, "window_range": (2, 4), "skip_last": True}, r"of the 3 states \(--steps, --skip-last"),
        ({"window": 2, "window_range": (3, 9)}, r"of the 4 states \(--steps"),
        (
            {"train_rewards": {"red": BRIGHT}},
            "task 'blue' has no reward to train on; add --train-rewards blue=module:function",
        ),
        ({"clip_range": 0.0}, "--clip-range is 0.0"),
        ({"beta": -1.0}, "--beta is -1.0"),
    ],
)
def test_impossible_settings_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        grpo_config(world, **changes).check(1)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no.such:reward", "cannot be imported"),
        ("tests.test_grpo_run:whole_numbers", "which is not floating"),
        ("tests.test_grpo_run:too_long", r"returned shape \(3,\) for 2 images"),
        ("tests.test_grpo_run:needy", "needs 'include' with every prompt"),
    ],
)
def test_bad_rewards_are_refused_before_weights_load(world, spec, message, monkeypatch):
    monkeypatch.setattr(Model, "load", lambda *a: pytest.fail("weights were loaded"))
    cfg = grpo_config(world, train_rewards={"red": spec, "blue": BRIGHT})
    with pytest.raises(ValueError, match=message):
        set_up(cfg, ranks.start())


def test_a_scorer_of_the_table_that_lacks_metadata_is_refused_before_weights_load(world, monkeypatch):
    monkeypatch.setattr(Model, "load", lambda *a: pytest.fail("weights were loaded"))
    files = {t: str(world / f"{t}.txt") for t in ("red", "blue")}
    scorers = {"red": BRIGHT, "blue": "tests.test_grpo_run:needy"}
    cfg = grpo_config(world, heldout=files, rewards=scorers, watch_every=1)
    with pytest.raises(ValueError, match="needs 'include' with every prompt"):
        set_up(cfg, ranks.start())


def test_held_out_prompts_are_not_read_where_nothing_is_scored(world, tmp_path):
    cfg = grpo_config(world, out=str(tmp_path), heldout={"red": "no/such/file.txt"}, iterations=1)
    assert len(run(cfg)[0].metrics()) == 1


def whole_numbers(images, prompts, metadata):
    return torch.ones(len(images), dtype=torch.long)


def too_long(images, prompts, metadata):
    return torch.ones(len(images) + 1)


def needy(images, prompts, metadata):
    return torch.tensor([float(len(record["include"])) for record in metadata])


needy.metadata_keys = ("include",)
