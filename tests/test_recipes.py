"""Recipes: every setting of distillation beside the paper's own, against linearity, a case by hand, or itself
another way."""

import math
from dataclasses import replace

import pytest
import torch

import train
from opd import adapters, flow, kernels, routing, trajectory
from opd.data import MicroBatch, Prompt, seed_of
from opd.judging import Judges
from opd.presets import PRESETS
from opd.probe import compared
from opd.rewards import find_reward
from opd.teachers import extrapolated, route_of
from tests import tiny
from tests.test_train import build, distance, flat_gradient, gradient, record, velocity_of

BRIGHT, DARK = "tests.tiny_grpo:brightness", "-1*tests.tiny_grpo:brightness"
ALONE = {"anchor_weight": 0.0}  # the routed teachers alone


@pytest.fixture(scope="module")
def plain(world):
    """The gradient without an anchor."""
    return gradient(world, **ALONE)[0]


# ---- targets past the teacher ------------------------------------------------------------------------------


def test_an_extrapolated_teacher_asks_its_reference_about_the_same_samples():
    asked = []

    def teacher(x, sigma_B, texts):
        asked.append(len(texts))
        return 3 * x

    def reference(x, sigma_B, texts):
        asked.append(len(texts))
        return x

    x = torch.ones(2, 3)
    v = extrapolated(teacher, reference, 1.5)(x, torch.ones(2), ["a", "b"])
    assert torch.equal(v, 3 * x + 0.5 * 2 * x) and asked == [2, 2]


def test_extrapolation_adds_what_lies_between_teacher_and_reference(world, plain):
    """Of a squared distance the gradient is linear in the target, so it moves in proportion to l - 1."""
    a, b = (
        gradient(world, extrapolate=dict.fromkeys(("red", "blue"), past), **ALONE)[0] for past in (1.25, 1.5)
    )
    assert distance(a, plain) > 0.05 and distance(b - plain, 2 * (a - plain)) < 1e-4
    itself = gradient(world, extrapolate={"red": 1.0}, **ALONE)[0]
    assert distance(itself, plain) < 1e-6


def test_the_reference_of_a_teacher_may_be_another(world, plain):
    """From red as reference, blue's target is v_blue + .5 (v_blue - v_red): red is asked instead of base."""
    _, model, _, _, stage = build(world, extrapolate={"blue": 1.5}, reference="red", micro_batch=100, **ALONE)
    calls, _ = record(model)
    stage.accumulate(stage.plan(0))
    assert [name for name, *_ in calls[:4]] == ["student", "red", "blue", "red"]
    assert [count for *_, count in calls[:4]] == [8, 4, 4, 4]


# ---- the anchor --------------------------------------------------------------------------------------------


def test_anchor_weights_by_level():
    sigmas = [1.0, 0.9, 0.6, 0.5, 0.1]
    assert routing.anchor_weights(sigmas, 0.02, {}) == [0.02] * 5
    levels = {"0.1": 0.5, "0.6": 2.0}
    assert routing.anchor_weights(sigmas, 0.02, levels) == [0.02, 0.02, 2.0, 2.0, 0.5]
    assert routing.anchor_weights(sigmas, 0.02, {"1": 0.0}) == [0.0] * 5


def test_an_anchor_by_level_is_asked_where_it_counts_and_counts_as_said(world):
    changes = {"anchor": "base", "anchor_weight": 0.0, "anchor_levels": {"0.8": 2.0}, "micro_batch": 100}
    cfg, model, _, _, stage = build(world, **changes)
    calls, handle = record(model)
    squares = stage.accumulate(stage.plan(0))
    handle.remove()
    late = sum(sigma <= 0.8 for sigma in model.sigmas(cfg.steps)[:-1])
    assert 0 < late < cfg.steps and [name for name, *_ in calls].count("base") == late
    squares.collect()
    row = squares.metrics()
    own = (row["red"]["loss"] + row["blue"]["loss"]) / 2
    assert len(row["anchor"]["kl"]) == late
    by_hand = own + 2.0 * sum(row["anchor"]["kl"].values()) / cfg.steps
    assert row["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_the_same_weight_at_every_level_is_a_constant_anchor(world):
    constant, row = gradient(world, anchor_weight=0.3)
    levels, other = gradient(world, anchor_weight=0.0, anchor_levels={"1": 0.3})
    assert distance(levels, constant) < 1e-6 and row["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_adapted_moves_the_weight_towards_the_target():
    assert routing.adapted(0.5, 2.0, 2.0) == 0.5
    assert routing.adapted(0.5, 2.2, 2.0) == pytest.approx(0.5 * 1.1**0.1)
    assert routing.adapted(0.5, 100.0, 2.0) == pytest.approx(0.5 * 2**0.1)
    assert routing.adapted(0.5, 0.001, 2.0) == pytest.approx(0.5 * 0.5**0.1)
    for nothing in (0.0, math.nan, math.inf):
        assert routing.adapted(0.5, nothing, 2.0) == 0.5


def test_an_anchor_target_is_followed_and_survives_a_resume(world, tmp_path):
    """Weight up while the anchor is further than the target; a checkpoint carries the weight."""
    far = {"anchor": "base", "anchor_target": 1e-6, "cold_start": str(world / "red")}
    cfg, _, _, trained, stage = build(world, **far)
    weights = []
    for step in range(3):
        metrics, _ = stage.step(step)
        weights.append(metrics["anchor_weight"])
    assert weights == pytest.approx([0.1, 0.1 * 2**0.1, 0.1 * 2**0.2])
    *_, again, other = build(world, **far)
    again.load(trained.state())
    assert other.plan(3).anchor_T == pytest.approx([0.1 * 2**0.3] * cfg.steps)


# ---- routing -----------------------------------------------------------------------------------------------


def test_shares_of_a_route():
    assert routing.shares("text", "here") == {"text": 1.0}
    assert routing.shares("0.7*text + 0.3*quality", "here") == {"text": 0.7, "quality": 0.3}
    for bad in ("", "a+", "0*a", "-1*a", "nan*a", "x*a", "a+a", "1e999*a"):
        with pytest.raises(ValueError, match="here"):
            routing.shares(bad, "here")


def test_a_soft_route_is_the_sum_of_its_teachers(world):
    """The gradient of .7 red + .3 blue is .7 times red's and .3 times blue's."""
    soft, red, blue = (
        gradient(world, routes={"red": route, "blue": route}, **ALONE)[0]
        for route in ("0.7*red+0.3*blue", "red", "blue")
    )
    assert distance(red, blue) > 0.1 and distance(soft, 0.7 * red + 0.3 * blue) < 1e-5


def test_a_prompt_may_name_its_own_route(world, tmp_path):
    file = tmp_path / "red.jsonl"
    file.write_text('{"prompt": "a red circle", "route": "blue"}\n{"prompt": "a red dot", "route": "blue"}\n')
    changes = {"prompts": {"red": str(file)}, **ALONE}
    own = gradient(world, **changes)[0]
    by_task = gradient(world, routes={"red": "blue"}, **changes)[0]
    assert torch.equal(own, by_task)
    file.write_text('{"prompt": "a red circle", "route": "green"}\n')
    with pytest.raises(ValueError, match="'a red circle' names 'green', which is not among the teachers"):
        build(world, **changes)


def test_claimed_compares_in_units_of_each_rewards_spread():
    nan = math.nan
    scores = torch.tensor(
        [[0.9, 10.0], [0.1, 30.0], [0.5, nan], [nan, nan], [0.5, 20.0]], dtype=torch.float64
    )
    # Means .5 and 20, spreads .283 and 8.165: in units of them (1.41, -1.22), (-1.41, 1.22), (0, none), ...
    assert routing.claimed(scores) == [0, 1, 0, None, 0]


def test_routing_by_reward_asks_the_teacher_whose_reward_finds_most(world):
    """Red's reward likes bright images, blue's dark ones: the brighter images go to red, not by task."""
    changes = {"routing": "reward", "train_rewards": {"red": BRIGHT, "blue": DARK}, **ALONE}
    cfg, model, _, _, stage = build(world, **changes)
    plan = stage.plan(0)
    batches = stage.batches(plan, compare=False)
    with torch.no_grad():
        walks = [stage.rollout(plan, batch) for batch in batches]
    judged, metrics = stage.judge(plan, batches, walks)
    bright_N = torch.zeros(len(plan.prompts_N))
    for batch, states in zip(batches, walks, strict=True):
        bright_N[batch.samples] = model.decode(states[-1].x_next).mean((1, 2, 3))
    expected = ["red" if brightness > bright_N.mean() else "blue" for brightness in bright_N]
    assert judged.route_N == expected and set(expected) == {"red", "blue"} and expected != plan.route_N
    assert torch.equal(judged.routed_NK, routing.rows(expected, list(stage.teachers)))
    assert set(metrics["reward"]) == {"red", "blue"}


def test_a_reward_that_needs_metadata_does_not_claim_prompts_without(world):
    cfg = tiny.config(world, routing="reward", train_rewards={"red": BRIGHT, "blue": DARK})
    rewards = {BRIGHT: find_reward(BRIGHT), DARK: find_reward(DARK)}
    rewards[DARK].metadata_keys = ("words",)
    judges = Judges(cfg, rewards, torch.device("cpu"))
    batch = MicroBatch([0, 1, 2], [1, 1, 0], [0, 1, 2])
    prompts = [Prompt("a", "red"), Prompt("b", "red", {"words": 1}), Prompt("c", "red", {"words": 1})]
    hearings = judges.start(batch, prompts, torch.rand(3, 3, 4, 4))
    scores = judges.verdict(hearings, 3, step=0)
    assert scores.isfinite().tolist() == [[True, False], [True, True], [False, False]]


# ---- off-policy --------------------------------------------------------------------------------------------


def test_off_policy_every_sample_walks_with_its_own_teachers(world):
    """Whatever the student's weights are, a sample's states are those of its teacher alone, or of a weighted
    sum of two."""
    cfg, model, _, trained, stage = build(world, walker="teacher", routes={"blue": "0.25*red+0.75*blue"})
    for parameter in trained.parameters.values():
        parameter.data.add_(0.1)
    shares = {"red": {"red": 1.0}, "blue": {"red": 0.25, "blue": 0.75}}
    plan = stage.plan(0)

    def alone(n):
        prompt = plan.prompts_N[n]
        x, path, index, text = stage.start(plan, MicroBatch([n], [1], [n]))

        def velocity(state):
            v = torch.zeros_like(state.x)
            for name, share in shares[prompt.task].items():
                with adapters.use(model.transformer, cfg.adapter_of(name)):
                    v += share * model.velocity(state.x, state.sigma_B, text, 1.0)
            return v

        return trajectory.rollout(x, path, index, velocity)

    for batch in stage.batches(plan, compare=False):
        states = stage.rollout(plan, batch)
        for b, n in enumerate(batch.samples):
            for state, expected in zip(states, alone(n), strict=True):
                torch.testing.assert_close(state.x[b], expected.x[0], rtol=1e-5, atol=1e-5)


def test_off_policy_gradients_are_of_the_teachers_states(world, plain):
    off = gradient(world, walker="teacher", **ALONE)[0]
    assert off.norm() > 1e-4 and distance(off, plain) > 1e-3


# ---- rewards beside the teachers ---------------------------------------------------------------------------


def test_a_reward_adds_its_policy_gradient(world):
    """Linear in the weight, and nothing where all images of a group score alike."""
    rewards = {"train_rewards": {"red": BRIGHT, "blue": BRIGHT}, **ALONE}
    stored = gradient(world, single_pass=False, **ALONE)[0]
    one, two = (gradient(world, reward_weight=weight, **rewards)[0] for weight in (1.0, 2.0))
    assert distance(one, stored) > 1e-3 and distance(two - stored, 2 * (one - stored)) < 1e-3
    flat = dict.fromkeys(rewards["train_rewards"], "tests.test_recipes:the_same_for_all")
    alike = gradient(world, reward_weight=1.0, train_rewards=flat, **ALONE)[0]
    assert distance(alike, stored) < 1e-6


def the_same_for_all(images, prompts, metadata):
    return torch.ones(len(images))


# ---- queries and what they cost ----------------------------------------------------------------------------


def test_a_run_costs_what_its_queried_states_cost(world):
    """Passes of two early states of ten against those of all ten: the walk ends after the last of them."""

    def passes(**changes):
        _, model, _, _, stage = build(world, steps=10, micro_batch=100, **changes)
        calls, _ = record(model)
        stage.accumulate(stage.plan(0))
        return sum(count * (1 + grad) for _, grad, count in calls)  # a backward counts as another forward

    assert passes(query_range=(0, 2)) == 0.2 * passes()
    # Drawn anywhere, the walk still has to pass the other states.
    assert passes(queries=2, query_range=(0, 4)) <= 0.35 * passes()


@pytest.mark.parametrize("changes, states", [({}, [0, 1, 2, 3]), ({"query_range": (1, 3)}, [1, 2])], ids=str)
def test_a_range_holds_what_is_queried(world, changes, states):
    cfg = tiny.config(world, query_beta=(1.0, 1.0), **changes)
    assert train.queried_states(cfg, 0) == states
    drawn = {state for step in range(60) for state in train.queried_states(replace(cfg, queries=1), step)}
    assert drawn == set(states)


# ---- branches, normalised losses, task gradients -----------------------------------------------------------


def test_the_loss_between_branches_is_that_of_the_conditional_velocities(world):
    """One state of noise: the added gradient equals that of the plain loss at guidance 1, which has no other
    branch; and it grows in proportion to its weight."""
    one_state = {"steps": 1, "guidance": 2.0, "teacher_guidance": 3.0, **ALONE}
    none, half, whole = (gradient(world, branch_weight=weight, **one_state)[0] for weight in (0.0, 0.5, 1.0))
    assert distance(whole - none, 2 * (half - none)) < 1e-4
    unguided = gradient(world, steps=1, **ALONE)[0]
    assert distance(whole - none, unguided) < 1e-4


def test_the_branches_of_a_model(world):
    _, model, *_ = build(world)
    x, sigma = torch.randn(2, *model.shape), torch.full((2,), 0.7)
    text = model.text(["a red circle", "a blue dot"])
    guided, conditional = model.branches(x, sigma, text, 2.5)
    alone = model.velocity(x, sigma, text, 1.0)
    empty = model.velocity(x, sigma, model.text(["", ""]), 1.0)
    assert torch.allclose(conditional, alone, atol=1e-5)
    assert torch.allclose(guided, empty + 2.5 * (alone - empty), atol=1e-4)


def test_task_gradients_are_those_of_each_task_alone(world):
    """The cosine that is logged against gradients of one task at a time, the others' weights set to 0."""
    cfg, _, _, trained, stage = build(world, cosine_every=1, **ALONE)
    logged = stage.accumulate(stage.plan(0)).beside["cosine"]
    alone = []
    for column in range(2):
        trained.optimizer.zero_grad()
        plan = stage.plan(0)
        routed_NK = torch.zeros_like(plan.routed_NK)
        routed_NK[:, column] = plan.routed_NK[:, column]
        stage.accumulate(replace(plan, step=0, routed_NK=routed_NK))
        alone.append(flat_gradient(trained))
    cosine = float(torch.nn.functional.cosine_similarity(*alone, dim=0))
    assert logged == {"red/blue": pytest.approx(cosine, abs=1e-4)} and abs(cosine) < 0.999


# ---- the probe ---------------------------------------------------------------------------------------------


def test_compared_by_hand():
    v, v_teacher, v_base = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[11.0, 0.0]])
    square, cosine, norm, gap = (float(value) for value in compared(v, v_teacher, v_base))
    assert (square, cosine, norm, gap) == pytest.approx((8.0, 0.6, 5 / 3, 0.5))


def test_the_probe_knows_a_student_that_is_the_base_and_one_that_is_the_teacher(world):
    for start, closed in (("base", 0.0), (str(world / "red"), 1.0)):
        changes = {"teachers": {"red": str(world / "red"), "blue": str(world / "red")}, "cold_start": start}
        _, model, _, trained, stage = build(world, diagnose_every=1, **changes, **ALONE)
        found = stage.probe.compare()
        assert found["fixed"] == found["visited"]  # the student still is the start
        for name in ("red", "blue"):
            assert list(found["fixed"][name]["gap"].values()) == pytest.approx([closed] * 4, abs=1e-2)
            if closed:
                assert max(found["fixed"][name]["kl"].values()) < 1e-6
                assert list(found["fixed"][name]["cosine"].values()) == pytest.approx([1.0] * 4, abs=1e-4)
        stage.step(0)
        after = stage.probe.compare()
        if closed == 0.0:
            assert after["fixed"] != found["fixed"] and after["fixed"] != after["visited"]


def test_the_probes_kl_is_equation_12_on_the_starts_states(world):
    """Walked and measured by hand, one prompt."""
    changes = {
        "prompts": {"red": str(world / "red.txt")},
        "diagnose_every": 1,
        "diagnose_prompts": 1,
        **ALONE,
    }
    cfg, model, _, _, stage = build(world, **changes)
    found = stage.probe.compare()["fixed"]["red"]["kl"]
    (prompt,) = stage.probe.prompts_of["red"]
    text, by_hand = model.text([prompt.text]), []
    x = kernels.normal((1, *model.shape), seed_of(0, "probe", "start"), torch.tensor([0]))
    sigma_T = torch.tensor(model.sigmas(cfg.steps), dtype=torch.float64)
    for i in range(cfg.steps):
        sigma = sigma_T[i].float()[None]
        with torch.no_grad():
            v, v_red = (velocity_of(model, name, x, sigma, text) for name in ("start", "red"))
        step = flow.sde_transition(sigma_T[i], sigma_T[i + 1], 0.7)
        by_hand.append(float(step.kl_weight() * (v - v_red).square().mean()))
        z = kernels.normal((1, *model.shape), seed_of(0, "probe", i), torch.tensor([0]))
        x = (step.keep * x - step.move * v + step.std * z).float()
    assert list(found.values()) == pytest.approx(by_hand, rel=1e-4)


# ---- the papers' recipes are rows of the table -------------------------------------------------------------


@pytest.mark.parametrize("where", ["mini", "sd35"])
def test_presets_are_their_papers_formulas(where):
    flow_opd, diffusion, dance, gfd = (
        PRESETS[f"{where}-{name}"] for name in ("flow-opd", "diffusion-opd", "dance-opd", "gfd-opd")
    )
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]

    def weights(cfg):
        return flow.state_weights(cfg.weight, sigmas, cfg.rollout, cfg.noise_level)

    s2 = [0.49 * sigma / (1 - (0.75 if sigma == 1 else sigma)) for sigma in sigmas[:-1]]
    eq_12 = [
        0.125 * (s**0.5 * (1 - sigma) / (2 * sigma) + s**-0.5) ** 2
        for s, sigma in zip(s2, sigmas, strict=False)
    ]
    assert weights(flow_opd) == pytest.approx(eq_12)
    assert (flow_opd.anchor_weight, flow_opd.cold_start, flow_opd.queries) == (0.02, "merge", 0)
    assert weights(diffusion) == pytest.approx([0.25**2 / 2] * 4)
    assert (diffusion.rollout, diffusion.anchor_weight, diffusion.cold_start) == ("ode", 0.0, "base")
    assert weights(dance) == [1.0] * 4
    assert (dance.rollout, dance.queries, dance.query_beta, dance.anchor_weight) == (
        "ode",
        1,
        (5.0, 2.0),
        0.0,
    )
    assert gfd.guidance == 1.0 < gfd.teacher_guidance
    assert len(gfd.queryable()) == 2 and set(gfd.extrapolate.values()) == {1.25}
    assert gfd.extrapolate.keys() == gfd.teachers.keys() and gfd.reference == "base"


# ---- wrong numbers and names are refused by name -----------------------------------------------------------

WRONG = [
    ({"extrapolate": {"red": 0.9}}, "--extrapolate red=0.9: below 1"),
    ({"extrapolate": {"green": 1.5}}, "--extrapolate green=1.5: no such teacher"),
    ({"extrapolate": {"red": 1.5}, "reference": "green"}, "--reference 'green' is not among the teachers"),
    ({"extrapolate": {"red": 1.5}, "reference": "red"}, "the teacher is its own --reference"),
    ({"anchor_levels": {"1.5": 0.1}}, "--anchor-levels 1.5=0.1: a noise level lies in"),
    ({"anchor_levels": {"low": 0.1}}, "--anchor-levels low=0.1: a noise level lies in"),
    ({"anchor_levels": {"0.5": -1.0}}, "--anchor-levels 0.5=-1.0: a weight must not be negative"),
    ({"anchor_target": 0.1, "anchor_weight": 0.0}, "--anchor-target 0.1 moves --anchor-weight, which is 0"),
    ({"anchor_target": 0.1, "anchor_levels": {"0.5": 1.0}}, "choose one of the two"),
    ({"query_range": (2, 9)}, "--query-range 2 9 does not lie within the 4 states"),
    ({"query_range": (2, 2)}, "--query-range 2 2 does not lie within the 4 states"),
    ({"query_range": (0, 2), "queries": 3}, "--queries 3 exceeds the 2 states"),
    ({"normalise": 1.5}, "--normalise is 1.5"),
    ({"branch_weight": 0.5}, "--branch-weight 0.5 with --guidance 1"),
    ({"estimator": "pg", "rollout": "ode"}, "--estimator pg takes the likelihood of noisy steps"),
    (
        {"estimator": "pg", "rollout": "cps", "weight": "uniform"},
        "use --rollout sde, or cps with --skip-last",
    ),
    ({"routing": "reward"}, "--routing reward --reward-weight 0.0: task 'red' has no reward"),
    ({"train_rewards": {"green": BRIGHT}}, "--train-rewards names task 'green'"),
    (
        {"reward_weight": 1.0, "group": 1, "train_rewards": {"red": BRIGHT, "blue": BRIGHT}},
        "--reward-weight 1.0 with --group 1",
    ),
    ({"routes": {"red": "0.5*red+0.5*red"}}, "--routes red: '0.5*red+0.5*red' names 'red' twice"),
    ({"routes": {"red": "0.5*red+0.5*green"}}, "routed to 'green', which is not among the teachers"),
    ({"teachers": {"a+b": "x"}}, "the name 'a+b' is empty or has a dot"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=str)
def test_what_cannot_be_is_refused_by_name(world, changes, message):
    with pytest.raises(ValueError) as refused:
        tiny.config(world, **changes).check(1)
    assert message in str(refused.value)


def test_a_route_of_a_prompt_goes_before_its_tasks(world):
    cfg = tiny.config(world, routes={"red": "blue"})
    assert route_of(cfg, Prompt("a", "red")) == "blue"
    assert route_of(cfg, Prompt("a", "red", {"route": "0.5*red+0.5*blue"})) == "0.5*red+0.5*blue"
