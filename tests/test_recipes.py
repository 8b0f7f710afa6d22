"""Recipes: every setting of distillation beside the paper's own, against linearity, a case by hand, or itself
another way; who teaches whom; estimators of the gradient against the closed form, in float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from opd import flow, lora, routing
from opd.data import MicroBatch, Prompt, micro_batches
from opd.estimators import ESTIMATORS, pathwise
from opd.presets import PRESETS
from opd.rewards import find_reward
from opd.teachers import RewardRouter
from opd.trajectory import State
from tests import tiny
from tests.test_train import build, gradient, record
from tests.tiny import distance, velocity_by_hand
from tests.tiny_grpo import BRIGHT, DARK

ALONE = {"anchor_weight": 0.0}  # the routed teachers alone


@pytest.fixture(scope="module")
def plain(world):
    return gradient(world, **ALONE)[0]


# ---- targets past the teacher ------------------------------------------------------------------------------
def test_extrapolation_adds_what_lies_between_teacher_and_reference(world, plain):
    """Of a squared distance the gradient is linear in the target, so it moves in proportion to l - 1."""
    past = [dict.fromkeys(("red", "blue"), factor) for factor in (1.25, 1.5)]
    a, b = (gradient(world, extrapolate=each, **ALONE)[0] for each in past)
    assert distance(a, plain) > 0.05 and distance(b - plain, 2 * (a - plain)) < 1e-4
    itself = gradient(world, extrapolate={"red": 1.0}, **ALONE)[0]
    assert distance(itself, plain) < 1e-6


def test_its_reference_is_guided_as_the_teacher_is(world):
    scales = {"teacher_guidance": 4.5, "teacher_guidances": {"red": 2.0}}
    _, model, _, _, stage = build(world, extrapolate={"red": 1.5}, **scales, **ALONE)
    x, sigma = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)), 0.7
    v, base = (velocity_by_hand(model, name, x, sigma, "a red dot", 2.0) for name in ("red", "base"))
    found = stage.teachers["red"](x, torch.tensor([sigma]), ["a red dot"])
    assert distance(found, v + 0.5 * (v - base)) < 1e-5


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
    plan = stage.plan(0)
    sums_RT, _ = stage.accumulate(plan)
    handle.remove()
    late = sum(sigma <= 0.8 for sigma in model.sigmas(cfg.steps)[:-1])
    assert 0 < late < cfg.steps and [name for name, *_ in calls].count("base") == late
    row = stage.metrics(plan, sums_RT)
    assert set(row) == {"loss", "red", "blue", "anchor"}
    own = (row["red"]["loss"] + row["blue"]["loss"]) / 2
    by_hand = own + 2.0 * row["anchor"]["loss"] * late / cfg.steps
    assert row["loss"] == pytest.approx(by_hand, rel=1e-5)


# ---- routing -----------------------------------------------------------------------------------------------
def test_shares_of_a_route():
    assert routing.shares("text", "here") == {"text": 1.0}
    assert routing.shares("0.7*text + 0.3*quality", "here") == {"text": 0.7, "quality": 0.3}
    for bad in ("", "a+", "0*a", "-1*a", "nan*a", "x*a", "a+a", "1e999*a"):
        with pytest.raises(ValueError, match="here"):
            routing.shares(bad, "here")


def test_a_soft_route_is_the_sum_of_its_teachers(world):
    routes = [dict.fromkeys(("red", "blue"), route) for route in ("0.7*red+0.3*blue", "red", "blue")]
    soft, red, blue = (gradient(world, routes=each, **ALONE)[0] for each in routes)
    assert distance(red, blue) > 0.1 and distance(soft, 0.7 * red + 0.3 * blue) < 1e-5


def test_a_route_of_a_prompt_goes_before_its_tasks(world, tmp_path):
    file = tmp_path / "red.jsonl"
    file.write_text('{"prompt": "a red circle", "route": "blue"}\n{"prompt": "a red dot", "route": "blue"}\n')
    changes = {"prompts": {"red": str(file)}, **ALONE}
    own = gradient(world, routes={"red": "0.5*red+0.5*blue"}, **changes)[0]  # of the task
    by_task = gradient(world, routes={"red": "blue"}, **changes)[0]
    assert torch.equal(own, by_task)
    file.write_text('{"prompt": "a red circle", "route": "green"}\n')
    with pytest.raises(ValueError, match="'a red circle' names 'green', which is not among the teachers"):
        build(world, **changes)


def test_claimed_compares_in_units_of_each_rewards_spread():
    nan = math.nan
    scores = torch.tensor([[0.9, 10.0], [0.1, 30.0], [0.5, nan], [nan, nan], [0.5, 20.0]]).double()
    # Means .5 and 20, spreads .283 and 8.165: in units of them (1.41, -1.22), (-1.41, 1.22), (0, none), ...
    assert routing.claimed(scores) == [0, 1, 0, None, 0]


def test_routing_by_reward_asks_the_teacher_whose_reward_finds_most(world):
    """Red's reward likes bright images, blue's dark ones: the brighter images go to red, not by task; and the
    images that are judged are those of the trajectories that are trained on."""
    changes = {"routing": "reward", "train_rewards": {"red": BRIGHT, "blue": DARK}, **ALONE}
    cfg, model, _, _, stage = build(world, **changes)
    plan = stage.plan(0)
    rollouts = [cfg.rollout] * cfg.steps
    steps = tiny.steps_by_hand(cfg, model, plan.prompts_N[:: cfg.group], "student", rollouts)
    bright_N = torch.stack([model.decode(after).mean() for _, i, _, after in steps if i == cfg.steps - 1])
    expected = ["red" if brightness > bright_N.mean() else "blue" for brightness in bright_N]
    by_task = [prompt.task for prompt in plan.prompts_N]
    assert plan.route_N == expected and set(expected) == {"red", "blue"} and expected != by_task
    assert torch.equal(plan.routed_NK, routing.rows(expected, stage.names))
    metrics, _ = stage.step(0)
    own_N = torch.where(torch.tensor([task == "red" for task in by_task]), bright_N, -bright_N)
    red = own_N[torch.tensor([task == "red" for task in by_task])].mean()
    assert metrics["reward"]["red"] == pytest.approx(float(red), rel=1e-4)


def test_a_reward_that_needs_metadata_does_not_claim_prompts_without(world):
    cfg = tiny.config(world, routing="reward", train_rewards={"red": BRIGHT, "blue": DARK})
    rewards = {BRIGHT: find_reward(BRIGHT), DARK: find_reward("tests.test_rewards:needs_target")}
    router = RewardRouter(cfg, SimpleNamespace(device=torch.device("cpu")), rewards)
    batch = MicroBatch([0, 1], [1, 1], [0, 1])
    prompts = [Prompt("a", "red"), Prompt("b", "red", {"target": 1})]
    pending = {"red": [], "blue": []}
    router.start(batch, prompts, torch.rand(2, 3, 4, 4), pending)
    judged = {task: [samples for samples, _ in mine] for task, mine in pending.items()}
    assert judged == {"red": [[0, 1]], "blue": [[1]]}


# ---- off-policy --------------------------------------------------------------------------------------------
def test_off_policy_every_sample_walks_with_its_own_teachers(world):
    """Whatever the student's weights are, a sample's states are those of its teacher alone, or of the
    weighted mean of two, at states that are trained on and at those that are not."""
    routes = {"blue": "0.5*red+1.5*blue"}
    cfg, model, _, trained, stage = build(world, walker="teacher", routes=routes, queries=2, micro_batch=100)
    for parameter in trained.parameters.values():
        parameter.data.add_(0.1)
    shares = {"red": {"red": 1.0}, "blue": {"red": 0.25, "blue": 0.75}}
    plan = stage.plan(0)
    seen, walk = [], stage.walk
    stage.walk = lambda *given: (seen.append(state) or state for state in walk(*given))
    stage.accumulate(plan)
    assert len(seen) == plan.queried[-1] + 1
    order = next(iter(micro_batches(dict(enumerate(plan.route_N)), 100, 1, 0))).samples
    for b, n in enumerate(order):
        prompt = plan.prompts_N[n]
        text = model.text([prompt.text])
        for state, expected in zip(seen, walk(0, [n]), strict=False):
            v = torch.zeros_like(expected.x)
            with torch.no_grad():
                for name, share in shares[prompt.task].items():
                    with lora.use(model.transformer, cfg.adapter_of(name)):
                        v += share * model.velocity(expected.x, expected.sigma_B, text, 1.0)
            expected.step(v)
            torch.testing.assert_close(state.x[b], expected.x[0], rtol=1e-5, atol=1e-5)


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
    narrow = replace(cfg, query_beta=(1000.0, 1000.0), queries=len(states))  # its density is 0 in float32
    assert train.queried_states(narrow, 0) == states


ODE = {"rollout": "ode", "anchor_weight": 0.0, "cold_start": "base"}
PAPERS = {
    "flow-opd": {"rollout": "sde", "weight": "kl", "anchor_weight": 0.02, "cold_start": "merge"},
    "diffusion-opd": ODE | {"weight": "ode_kl"},
    "dance-opd": ODE | {"weight": "uniform", "query_beta": (5.0, 2.0)},
    "gfd-opd": {"guidance": 1.0, "anchor_weight": 0.0},
}


@pytest.mark.parametrize("where", ["mini", "sd35"])
def test_presets_are_their_papers(where):
    for paper, wanted in PAPERS.items():
        cfg = PRESETS[f"{where}-{paper}"]
        assert {name: getattr(cfg, name) for name in wanted} == wanted, paper
        assert cfg.queries == (paper == "dance-opd")
    assert cfg.teacher_guidance > 1 and len(cfg.queryable()) == 2
    assert cfg.extrapolate == dict.fromkeys(cfg.teachers, 1.25)


DIMENSIONS, SAMPLES = 3, 60_000


class Tiny:
    """v = x W at one state x, two teachers, and SAMPLES steps from there."""

    def __init__(self, sampler="sde", scale=1.0):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        sigma, sigma_next = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
        self.transition = flow.TRANSITIONS[sampler](sigma, sigma_next, 0.7)
        self.x = draw(1, DIMENSIONS).expand(SAMPLES, DIMENSIONS)
        self.W = draw(DIMENSIONS, DIMENSIONS).requires_grad_()
        self.targets = [scale * draw(1, DIMENSIONS).expand_as(self.x) for _ in range(2)]
        self.alpha_BK = torch.tensor([[1.0, 0.3]], dtype=torch.float64).expand(SAMPLES, 2)
        self.w_B = torch.full((SAMPLES,), 0.7, dtype=torch.float64)

    def state(self):
        index = torch.arange(len(self.x))
        return State(0, self.x.contiguous(), torch.full((len(self.x),), 0.6), self.transition, 7, index)

    def gradients(self, name):
        """(mean over samples of the gradient in W, its standard error, summed variance of a sample's)."""
        v = (self.x @ self.W).detach().requires_grad_()
        loss_B, *_ = ESTIMATORS[name](self.state(), v, self.targets, self.alpha_BK, self.w_B)
        (by_v_BD,) = torch.autograd.grad(loss_B.sum(), v)
        each = torch.einsum("bi,bj->bij", self.x, by_v_BD)  # dv/dW is x, for every sample by itself
        return each.mean(0), each.std(0) / SAMPLES**0.5, float(each.var(0).sum())


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_pg_averages_to_the_pathwise_gradient_and_pg_state_to_zero(sampler):
    tiny = Tiny(sampler)
    exact, _, none = tiny.gradients("pathwise")
    pg, error, variance = tiny.gradients("pg")
    zero, error_of_zero, _ = tiny.gradients("pg_state")
    assert exact.norm() > 20 * error.norm()  # else agreement within errors would say nothing
    assert ((pg - exact).abs() < 4 * error).all()
    assert (zero.abs() < 4 * error_of_zero).all() and ((zero - exact).abs() > 4 * error_of_zero).any()
    assert none < 1e-12 < variance


def test_pg_live_is_pathwise_and_a_score_of_mean_zero_until_it_clamps():
    tiny = Tiny()
    exact, *_ = tiny.gradients("pathwise")
    live, error, _ = tiny.gradients("pg_live")
    assert ((live - exact).abs() < 4 * error + 1e-12).all()
    far = Tiny(scale=30.0)  # distances of hundreds: the clamp cuts the pathwise part off
    clamped, error, _ = far.gradients("pg_live")
    assert (clamped.abs() < 4 * error).all() and far.gradients("pathwise")[0].norm() > 100 * error.norm()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_step_alike_and_log_the_same_distances(name):
    """The draw does not depend on how the gradient is made."""
    tiny = Tiny()
    v = (tiny.x @ tiny.W).detach().requires_grad_()
    arguments = (tiny.state(), v, tiny.targets, tiny.alpha_BK, tiny.w_B)
    _, squares, x_next = pathwise(*arguments)
    _, same, other = ESTIMATORS[name](*arguments)
    assert torch.equal(x_next, other) and torch.allclose(squares, same, rtol=1e-12)
    assert not other.requires_grad
