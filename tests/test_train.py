"""What the training step does: gradients against an independent computation, and every knob against its
effect."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from opd import lora, ranks
from opd.data import Prompt, prompts_of_step
from opd.diagnostics import name_non_finite, summed
from opd.formats import lora_files
from opd.optim import learning_rate
from tests import tiny
from tests.tiny import distance, gradient_of, steps_by_hand, velocity_by_hand

# Ten steps of the tiny model.
GOLDEN = [0.06670622, 0.0567389, 0.07028888, 0.04412541, 0.03477782]
GOLDEN += [0.03444718, 0.03829305, 0.0271111, 0.02824556, 0.04205731]


def build(world, **changes):
    return tiny.build(tiny.config(world, **changes))


def gradient(world, step: int = 0, **changes):
    """(flat gradient of one step, the step's metrics)."""
    *_, trained, stage = build(world, **changes)
    plan = stage.plan(step)
    sums_RT, _ = stage.accumulate(plan)
    return gradient_of(trained), stage.metrics(plan, sums_RT)


def record(model):
    """(list that grows by (adapter, with gradient?, samples) at every forward, handle that ends it)."""
    layer = lora.lora_layers(model.transformer)[0]
    calls = []

    def note(module, arguments, output):
        calls.append((layer.slot or "base", torch.is_grad_enabled(), len(output[0])))

    return calls, model.transformer.register_forward_hook(note)


@pytest.fixture(scope="module")
def reference(world):
    return gradient(world)


# ---- same gradient -----------------------------------------------------------------------------------------
def weight_by_hand(name, grid, i):
    sigma, dt = grid[i], grid[i] - grid[i + 1]
    s = 0.7 * (sigma / (1 - (grid[1] if i == 0 else sigma))) ** 0.5
    kl = dt / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
    return {"kl": kl, "ode_kl": dt**2 / 2, "uniform": 1.0}[name]


SETTINGS = [{"guidance": 2.0, "teacher_guidance": 3.0}, {"rollout": "ode", "weight": "ode_kl", "queries": 2}]
SETTINGS += [{"rollout": "cps", "weight": "uniform", "skip_last": True}]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_gradient_matches_autograd_of_equation_16_written_out(world, changes):
    """Rebuild the step by hand, as the released code goes: walk to the end sample by sample, keep every
    state, and plain autograd through a sum over samples and states in passes of their own."""
    single, row = gradient(world, **changes)
    cfg, model, data, trained, _ = build(world, **changes)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    grid, queried, loss = model.sigmas(cfg.steps), train.queried_states(cfg, 0), 0.0
    for n, i, x, _ in steps_by_hand(cfg, model, prompts, "student", [cfg.rollout] * cfg.steps):
        if i not in queried:
            continue
        task, text = prompts[n // cfg.group].task, prompts[n // cfg.group].text
        v = velocity_by_hand(model, "student", x, grid[i], text, cfg.guidance)
        for name, share in ((task, 1.0), ("blue", cfg.anchor_weight)):
            with torch.no_grad():
                target = velocity_by_hand(model, name, x, grid[i], text, cfg.teacher_guidance)
            loss = loss + weight_by_hand(cfg.weight, grid, i) * share * (v - target).square().mean()
    loss = loss / (cfg.prompts_per_step * cfg.group * len(queried))
    loss.backward()
    assert single.norm() > 1e-4 and distance(single, gradient_of(trained)) < 1e-5
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("micro_batch, turns", [(1, 3), (2, 2), (100, 1)])
def test_three_ranks_run_alike_and_add_up_to_one(world, reference, monkeypatch, micro_batch, turns):
    """Ranks hold different tasks and padding; collectives match only if all call the same adapters in the
    same order."""
    cfg, model, _, trained, stage = build(world, micro_batch=micro_batch)
    sequences, table = [], []
    monkeypatch.setattr(ranks, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        calls, handle = record(model)
        sums_RT, _ = stage.accumulate(stage.plan(0))
        table.append(sums_RT)
        handle.remove()
        sequences.append([(name, grad) for name, grad, _ in calls])
    assert sequences[0] == sequences[1] == sequences[2]
    assert sequences[0].count(("student", True)) == turns * cfg.steps
    mean = gradient_of(trained) / 3  # as FSDP averages
    assert distance(mean, reference[0]) < 1e-5
    whole = stage.metrics(stage.plan(0), sum(table))
    assert whole["loss"] == pytest.approx(reference[1]["loss"], rel=1e-5)


# ---- every knob has its effect -----------------------------------------------------------------------------
def test_queries_prefer_low_noise_with_beta_5_2(world):
    cfg = tiny.config(world, steps=10, queries=1)
    drawn = torch.tensor([train.queried_states(cfg, step)[0] for step in range(400)]).float()
    # Beta(5, 2) has mean 5/7; the mean of 400 draws on 10 cells is within 4 standard errors of it.
    assert abs((drawn.mean() + 0.5) / 10 - 5 / 7) < 4 * 0.16 / 20


def test_the_rate_warms_up_and_falls_along_a_cosine(world):
    cfg = tiny.config(world, lr=8.0, warmup=1, decay="cosine", iterations=5)
    wanted = [4.0, 8.0, 4 + 8**0.5, 4.0, 4 - 8**0.5]  # at 0, 45, 90 and 135 degrees after warm-up
    assert [learning_rate(cfg, step) for step in range(5)] == pytest.approx(wanted)


def test_metrics_say_which_teacher(world, reference):
    row = reference[1]
    assert set(row) == {"loss", "red", "blue", "anchor"}
    own = (row["red"]["loss"] + row["blue"]["loss"]) / 2
    assert row["loss"] == pytest.approx(own + 0.1 * row["anchor"]["loss"], rel=1e-5)
    alone = gradient(world, routes={"red": "blue"}, anchor_weight=0.0)[1]
    assert set(alone) == {"loss", "blue"} and alone["blue"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


# ---- cost --------------------------------------------------------------------------------------------------
# (what differs, samples that each frozen adapter sees at a state, passes at a state); the prompts are 2 red,
# 2 blue, twice each
COSTS = [
    ({"micro_batch": 4, "anchor": "base"}, {"red": 4, "blue": 4, "base": 8}, 6),
    ({"micro_batch": 100, "anchor": "base"}, {"red": 4, "blue": 4, "base": 8}, 4),
    ({"micro_batch": 100, "anchor": "blue"}, {"red": 4, "blue": 8}, 3),  # its forward serves its own too
    ({"micro_batch": 100, "anchor": "base", "routes": {"red": "blue"}}, {"blue": 8, "base": 8}, 3),
    ({"micro_batch": 3, "anchor_weight": 0.0}, {"red": 4, "blue": 4}, 7),  # rrr rbb bb
]


@pytest.mark.parametrize("changes, seen, passes", COSTS, ids=str)
def test_at_a_state_student_teacher_and_anchor_see_each_sample_once(world, changes, seen, passes):
    cfg, model, _, _, stage = build(world, **changes)
    calls, _ = record(model)
    backwards = []
    model.family.blocks(model.transformer)[-1].register_full_backward_hook(lambda *_: backwards.append(1))
    stage.accumulate(stage.plan(0))
    samples = Counter()
    for name, grad, count in calls:
        samples[name, grad] += count
    seen = {"student": 8, **seen}
    assert samples == {(name, name == "student"): count * cfg.steps for name, count in seen.items()}
    assert len(calls) == passes * cfg.steps
    assert len(backwards) == sum(grad for _, grad, _ in calls)


def test_off_policy_the_teachers_walk_and_the_anchor_is_asked_where_it_counts(world):
    changes = {"micro_batch": 100, "anchor": "base", "walker": "teacher", "query_range": (2, 3)}
    _, model, _, _, stage = build(world, **changes)
    calls, _ = record(model)
    stage.accumulate(stage.plan(0))
    assert Counter(name for name, *_ in calls) == {"red": 3, "blue": 3, "student": 1, "base": 1}


def test_student_masters_are_float32_under_a_bfloat16_base_and_teachers_are_not(world):
    cfg, model, _, trained, stage = build(world, dtype="bfloat16")
    student = list(trained.parameters.values())
    assert {p.dtype for p in lora.parameters_of(model.transformer, "red").values()} == {torch.bfloat16}
    stage.accumulate(stage.plan(0))
    assert {p.dtype for p in student} == {p.grad.dtype for p in student} == {torch.float32}
    before = [ranks.full(p.detach()).clone() for p in student]
    trained.cfg = replace(cfg, lr=1e-5)  # far below bf16's resolution of these weights
    trained.update(0)
    assert any((ranks.full(p.detach()) != b).any() for p, b in zip(student, before, strict=True))


# ---- the loop ----------------------------------------------------------------------------------------------
def test_golden_losses(world, tmp_path):
    """Ten steps of the tiny model. A refactor reproduces them; a change of method changes them on purpose."""
    folder, *_ = tiny.run(tiny.config(world, iterations=10, out=str(tmp_path)))
    assert [row["loss"] for row in folder.metrics()] == pytest.approx(GOLDEN, rel=2e-4)


def test_student_reaches_its_teachers(world, tmp_path):
    """With red and blue routed to the same teacher and a rank that can hold it, the student becomes that
    teacher."""
    easy = {"routes": {"red": "blue"}, "anchor_weight": 0.0, "rank": 8, "alpha": 16.0}
    schedule = {"iterations": 30, "lr": 3e-2, "clip": 10.0, "decay": "cosine"}
    cfg = tiny.config(world, out=str(tmp_path), **easy, **schedule)
    folder, *_ = tiny.run(cfg)
    losses = [row["loss"] for row in folder.metrics()]
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_saved_is_the_student_or_its_moving_average(world, tmp_path, ema):
    _, _, trained, _ = tiny.run(tiny.config(world, out=str(tmp_path), iterations=3, ema=ema))
    student, moved = lora_files.read_lora(str(tmp_path / "student")), 0.0
    for name, parameter in trained.parameters.items():
        module, _, kind = name.partition(".lora_")
        wanted = trained.average[name] if ema else parameter
        saved = student.A[module]
        if kind.startswith("B"):
            saved = student.B[module] / 2  # alpha / r = 8 / 4 is folded in
        assert torch.equal(saved, ranks.full(wanted.detach()))
        moved += float((wanted - parameter).detach().abs().sum())
    assert (moved > 0) == (ema > 0)
    assert lora_files.read_lora(str(tmp_path / "checkpoints" / "000003")).sha256 == student.sha256


INTERRUPTED = [(tiny.config, {"decay": "cosine", "warmup": 2})]
INTERRUPTED += [(tiny.grpo_config, {"ema": 0.9, "ema_every": 2, "updates": 2})]
INTERRUPTED += [(tiny.nft_config, {"ema": 0.9, "updates": 2, "old_decay": (0.0, 0.1, 0.5)})]


@pytest.mark.parametrize("config, changes", INTERRUPTED)
def test_an_interrupted_run_resumes_to_the_same_bits(world, tmp_path, monkeypatch, config, changes):
    """And begins by encoding the prompts of the step at hand."""
    monkeypatch.setattr("opd.conditioning.WINDOW", 1)
    changes = {"iterations": 4, "save_every": 2} | changes
    whole, *_ = tiny.run(config(world, out=str(tmp_path / "a"), **changes))
    cfg = config(world, out=str(tmp_path / "b"), **changes)

    def interrupt(model, stage):
        step = stage.step

        def stop_at_3(number):
            if number == 3:
                raise KeyboardInterrupt
            return step(number)

        stage.step = stop_at_3

    with pytest.raises(KeyboardInterrupt):
        tiny.run(cfg, interrupt)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a kill may leave it
    windows = []
    resumed, *_ = tiny.run(cfg, lambda model, stage: windows.append(model.conditioning.current))
    assert windows == [2]  # one a step
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    states = [load_file(file) for f in "ab" for file in (tmp_path / f / "state/000004").glob("*.safetensors")]
    assert len(states) == 2 and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    one, other = (tmp_path / f / "student/adapter_model.safetensors" for f in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_non_finite_steps_are_named_skipped_and_end_the_run(world, tmp_path, capsys):
    """A teacher that breaks at low noise: its velocity is NaN, and the run says whose and where."""

    def broken(module, arguments, keywords, output):
        if keywords["timestep"][0] < 500 and not torch.is_grad_enabled():
            return (output[0] * float("nan"),)

    def break_it(model, stage):
        model.transformer.register_forward_hook(broken, with_kwargs=True)

    with pytest.raises(FloatingPointError, match="5 steps in a row with a non-finite gradient; lower --lr"):
        tiny.run(tiny.config(world, out=str(tmp_path), iterations=5), break_it)
    printed = capsys.readouterr().out
    where = "step 1: non-finite velocity difference to red at state 3; task 'red', prompt '(.*)'"
    named = re.search(where, printed)
    assert named[1] in tiny.PROMPTS["red"] and "step 1: a non-finite gradient; step skipped" in printed
    assert not (tmp_path / "student").exists()


DIVERGED = [
    ({"lr": 1e6, "iterations": 6}, "4 steps in a row with a non-finite gradient; lower --lr"),
    ({"lr": 1e3, "weight_decay": 1e38, "iterations": 1}, "after step 1 model/.* holds NaN or infinite num"),
]


@pytest.mark.parametrize("settings, message", DIVERGED)
def test_a_run_that_diverged_saves_no_student(world, tmp_path, settings, message):
    """Its last steps were skipped, or its weights are no numbers."""
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train.run(tiny.config(world, out=str(tmp_path), **settings))
    assert not (tmp_path / "student").exists() and not list(tmp_path.glob("state/*"))


def test_the_first_bad_state_is_named_with_its_own_teacher(capsys):
    """A NaN of a sample of blue is no NaN of red, though red anchors it too."""
    distances_BTK = torch.ones(2, 4, 2)
    distances_BTK[1, 2:] = float("nan")
    prompts = [Prompt("a red dot", "red"), Prompt("a blue dot", "blue")]
    sums_RT = summed(distances_BTK, torch.eye(2), 0)
    name_non_finite(7, ["red", "blue"], sums_RT, [(prompts, distances_BTK)])
    where = "step 8: non-finite velocity difference to blue at state 2; task 'blue', prompt 'a blue dot'"
    assert where in capsys.readouterr().out
    assert sums_RT[0].isfinite().all()
