"""What the training step does: gradients against an independent computation, and every knob against its
effect."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from opd import kernels, lora, ranks
from opd.data import Prompt, micro_batches, prompts_of_step, seed_of
from opd.diagnostics import name_non_finite, summed
from opd.files import write_safetensors
from opd.formats import lora_files
from opd.report.report import Report
from opd.runfolder import RunFolder
from tests import tiny

GOLDEN = [
    0.06670622,
    0.0567389,
    0.07028888,
    0.04412541,
    0.03477782,
    0.03444718,
    0.03829305,
    0.0271111,
    0.02824556,
    0.04205731,
]


def build(world, **changes):
    """(cfg, model, data, trained, the stage that makes a step)."""
    return tiny.build(tiny.config(world, **changes))


def gradient(world, step: int = 0, **changes):
    """(flat gradient of one step, the step's metrics)."""
    *_, trained, stage = build(world, **changes)
    plan = stage.plan(step)
    sums_RT, _ = stage.accumulate(plan)
    return flat_gradient(trained), stage.metrics(plan, sums_RT)


def flat_gradient(trained):
    return torch.cat([ranks.full(p.grad).flatten() for p in trained.parameters.values()])


def record(model):
    """(list that grows by (adapter, with gradient?, samples) at every forward, handle that ends it)."""
    layer = lora.lora_layers(model.transformer)[0]
    calls = []
    return calls, model.transformer.register_forward_hook(
        lambda _, __, output: calls.append(
            (
                layer.slot or "base",
                torch.is_grad_enabled(),
                len(output[0]),
            )
        )
    )


@pytest.fixture(scope="module")
def reference(world):
    return gradient(world)


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


# ---- same gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout": "ode", "weight": "ode_kl"},
        {"rollout": "cps", "weight": "uniform"},
        {"guidance": 2.0, "teacher_guidance": 3.0},
        {"queries": 2},
        {"skip_last": True},
    ],
    ids=str,
)
def test_the_single_pass_gives_the_gradient_of_stored_trajectories(world, changes):
    """As the released code goes: walk to the end, keep every state, then train on them in passes of their
    own."""
    single, row = gradient(world, **changes)
    cfg, model, _, trained, stage = build(world, **changes)
    plan, loss = stage.plan(0), 0.0
    teachers = list(stage.teachers.values())
    for batch in micro_batches(dict(enumerate(plan.route_N)), cfg.micro_batch, 1, 0):
        prompts = [plan.prompts_N[n].text for n in batch.samples]
        text, states = model.text(prompts), []
        with lora.use(model.transformer, "student"), torch.no_grad():
            for state in stage.walk(0, batch.samples, cfg.steps):
                state.step(model.velocity(state.x, state.sigma_B, text, cfg.guidance))
                states.append(state)
        alpha_BK = plan.routed_NK[batch.samples].clone()
        alpha_BK[:, stage.anchor] += cfg.anchor_weight
        for i in plan.queried:
            with lora.use(model.transformer, "student"):
                v = model.velocity(states[i].x, states[i].sigma_B, text, cfg.guidance)
            for k, teacher in enumerate(teachers):
                target = teacher(states[i].x, states[i].sigma_B, prompts)
                loss = (
                    loss + (plan.weight_T[i] * alpha_BK[:, k] * (v - target).square().mean((1, 2, 3))).sum()
                )
    loss = loss / (len(plan.prompts_N) * len(plan.queried))
    loss.backward()
    assert single.norm() > 1e-4
    assert distance(single, flat_gradient(trained)) < 1e-5
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"micro_batch": 1}, {"micro_batch": 3}, {"micro_batch": 64}, {"checkpointing": True}], ids=str
)
def test_micro_batches_and_recomputation_do_not_change_the_gradient(world, reference, changes):
    assert distance(gradient(world, **changes)[0], reference[0]) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": 2.0, "teacher_guidance": 3.0},
        {"teacher_guidance": 2.0, "anchor": "base"},
        {"anchor_weight": 0.0},
    ],
    ids=str,
)
def test_teachers_share_a_micro_batch(world, changes):
    """All samples in one pass, each against its own teacher: gradient and metrics as with every sample by
    itself."""
    (mixed, row), (single, single_row) = (gradient(world, micro_batch=size, **changes) for size in (64, 1))
    assert distance(mixed, single) < 1e-5 and row.keys() == single_row.keys()
    for name in row.keys() - {"loss"}:
        assert row[name]["loss"] == pytest.approx(single_row[name]["loss"], rel=1e-5)
        assert list(row[name]["kl"].values()) == pytest.approx(
            list(single_row[name]["kl"].values()), rel=1e-5
        )


@pytest.mark.parametrize("micro_batch, turns", [(1, 3), (2, 2), (100, 1)])
def test_three_ranks_run_the_same_adapters_and_add_up_to_one(
    world, reference, monkeypatch, micro_batch, turns
):
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
    mean = flat_gradient(trained) / 3  # as FSDP averages
    assert distance(mean, reference[0]) < 1e-5
    whole = stage.metrics(stage.plan(0), sum(table))
    assert whole["loss"] == pytest.approx(reference[1]["loss"], rel=1e-5)


def velocity_of(model, adapter, x, sigma, text):
    with lora.use(model.transformer, adapter):
        return model.velocity(x, sigma, text, 1.0)


def test_gradient_matches_autograd_of_equation_16_written_out(world, reference):
    """Rebuild the step by hand: same states, plain autograd through a sum over samples and states."""
    cfg, model, data, trained, _ = build(world, micro_batch=100)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    grid, loss = model.sigmas(cfg.steps), 0.0
    for n in range(cfg.prompts_per_step * cfg.group):
        prompt, index = prompts[n // cfg.group], torch.tensor([n])
        x = kernels.normal((1, *model.shape), seed_of(0, 0, "start"), index)
        for i in range(cfg.steps):
            sigma, sigma_next = torch.tensor([grid[i]]), torch.tensor([grid[i + 1]])

            text = model.text([prompt.text])
            with torch.no_grad():
                teacher = velocity_of(model, prompt.task, x, sigma, text)
                anchor = velocity_of(model, "blue", x, sigma, text)
            v = velocity_of(model, "student", x, sigma, text)
            s = 0.7 * (sigma / (1 - (grid[1] if i == 0 else sigma))) ** 0.5
            d = sigma - sigma_next
            w = d / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
            loss = loss + w * ((v - teacher).square().mean() + 0.1 * (v - anchor).square().mean())
            z = kernels.normal((1, *model.shape), seed_of(0, 0, "noise", i), index)
            mean = x * (1 - s**2 * d / (2 * sigma)) - v.detach() * d * (1 + s**2 * (1 - sigma) / (2 * sigma))
            x = mean + s * d.sqrt() * z
    loss = loss.sum() / (cfg.prompts_per_step * cfg.group * cfg.steps)
    loss.backward()
    byhand = flat_gradient(trained)
    assert distance(reference[0], byhand) < 1e-4
    assert reference[1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


# ---- every knob has its effect -----------------------------------------------------------------------------


def test_teacher_equal_to_the_student_gives_loss_zero(world):
    same = {"red": str(world / "red"), "blue": str(world / "red")}
    flat, row = gradient(world, teachers=same, cold_start=str(world / "red"), anchor_weight=0.5)
    assert row["loss"] < 1e-10 and flat.norm() < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"routes": {"red": "blue", "blue": "red"}},
        {"routes": {"red": "base"}},
        {"anchor_weight": 0.0},
        {"anchor_weight": 1.0},
        {"anchor": "red"},
        {"anchor": "base"},
        {"rollout": "ode"},
        {"rollout": "cps", "skip_last": True},
        {"noise_level": 0.3},
        {"weight": "kl_released"},
        {"weight": "ode_kl"},
        {"weight": "uniform"},
        {"queries": 1},
        {"queries": 2, "query_beta": (1.0, 9.0)},
        {"skip_last": True},
        {"guidance": 2.0},
        {"teacher_guidance": 2.0},
        {"seed": 1},
        {"steps": 5},
        {"group": 1},
        {"mix": {"red": 3}},
        {"cold_start": "merge"},
    ],
    ids=str,
)
def test_flag_changes_the_gradient(world, reference, changes):
    flat, _ = gradient(world, **changes)
    assert flat.norm() > 1e-6 and distance(flat, reference[0]) > 1e-2


def test_start_merge_is_nearer_to_the_teachers_than_the_base(world, reference):
    assert gradient(world, cold_start="merge")[1]["loss"] < reference[1]["loss"]


def test_queries_prefer_low_noise_with_beta_5_2(world):
    cfg = tiny.config(world, steps=10, queries=1)
    drawn = torch.tensor([train.queried_states(cfg, step)[0] for step in range(400)]).float()
    # Beta(5, 2) has mean 5/7; the mean of 400 draws on 10 cells is within 4 standard errors of it.
    assert abs((drawn.mean() + 0.5) / 10 - 5 / 7) < 4 * 0.16 / 20


def test_metrics_say_which_teacher_and_sigma(world, reference):
    row = reference[1]
    assert set(row) == {"loss", "red", "blue", "anchor"} and len(row["red"]["kl"]) == 4
    # kl weights: the teachers' share of the loss is the mean of their KLs.
    assert row["loss"] == pytest.approx(
        (row["red"]["loss"] + row["blue"]["loss"]) / 2 + 0.1 * row["anchor"]["loss"], rel=1e-5
    )
    assert row["red"]["loss"] == pytest.approx(sum(row["red"]["kl"].values()) / 4, rel=1e-5)


# ---- cost --------------------------------------------------------------------------------------------------

# (what differs, samples that each frozen adapter sees at a state, passes at a state); the prompts are 2 red,
# 2 blue, twice each
COSTS = [
    ({"micro_batch": 4, "anchor": "base"}, {"red": 4, "blue": 4, "base": 8}, 6),
    ({"micro_batch": 100, "anchor": "base"}, {"red": 4, "blue": 4, "base": 8}, 4),
    (
        {"micro_batch": 100, "anchor": "blue"},
        {"red": 4, "blue": 8},
        3,
    ),  # the anchor's forward serves its own samples too
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
    assert samples == {
        (name, name == "student"): count * cfg.steps for name, count in {"student": 8, **seen}.items()
    }
    assert len(calls) == passes * cfg.steps
    assert len(backwards) == sum(grad for _, grad, _ in calls)


def test_memory_for_teachers_grows_by_their_lora_weights_only(world):
    def parameter_bytes(count):
        names = {f"t{k}": str(world / "red") for k in range(count)}
        _, model, *_ = build(world, teachers=names, routes={"red": "t0", "blue": "t0"}, anchor="t0")
        return sum(p.numel() * p.element_size() for p in model.transformer.parameters())

    lora = lora_files.read_lora(str(world / "red"))
    lora_bytes = sum(t.numel() * 4 for t in [*lora.A.values(), *lora.B.values()])
    assert parameter_bytes(4) - parameter_bytes(1) == 3 * lora_bytes


def test_student_masters_are_float32_under_a_bfloat16_base_and_teachers_are_not(world):
    cfg, model, _, trained, stage = build(world, dtype="bfloat16")
    assert {p.dtype for p in trained.parameters.values()} == {torch.float32}
    assert {p.dtype for p in lora.parameters_of(model.transformer, "red").values()} == {torch.bfloat16}
    stage.accumulate(stage.plan(0))
    assert {p.grad.dtype for p in trained.parameters.values()} == {torch.float32}
    before = [ranks.full(p.detach()).clone() for p in trained.parameters.values()]
    trained.cfg = replace(cfg, lr=1e-5)  # far below bf16's resolution of these weights
    trained.update(0)
    assert any(
        (ranks.full(p.detach()) != b).any() for p, b in zip(trained.parameters.values(), before, strict=True)
    )


# ---- the loop ----------------------------------------------------------------------------------------------


def run(cfg):
    """(run folder, model, trained) of the whole loop."""
    cfg, model, data, trained, stage = tiny.build(cfg)
    folder = RunFolder(cfg, active=True)
    train.train(cfg, stage, trained, folder, Report(cfg, model, data, {}, folder))
    return folder, model, trained


def test_golden_losses(world, tmp_path):
    """Ten steps of the tiny model. A refactor reproduces them; a change of method changes them on purpose."""
    folder, *_ = run(tiny.config(world, iterations=10, out=str(tmp_path)))
    assert [row["loss"] for row in folder.metrics()] == pytest.approx(GOLDEN, rel=2e-4)


def test_student_reaches_its_teachers(world, tmp_path):
    """With red and blue routed to the same teacher and a rank that can hold it, the student becomes that
    teacher."""
    cfg = tiny.config(
        world,
        iterations=60,
        out=str(tmp_path),
        routes={"red": "blue"},
        anchor_weight=0.0,
        lr=2e-2,
        clip=10.0,
        decay="cosine",
        rank=8,
        alpha=16.0,
    )
    folder, _, _ = run(cfg)
    losses = [row["loss"] for row in folder.metrics()]
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


def test_saved_student_is_the_trained_student(world, tmp_path):
    cfg = tiny.config(world, out=str(tmp_path), iterations=2)
    _, m, trained = run(cfg)
    lora = lora_files.read_lora(str(tmp_path / "student"))
    for name, parameter in trained.parameters.items():
        module, _, kind = name.partition(".lora_")
        saved = lora.A[module]
        if kind.startswith("B"):
            saved = lora.B[module] / 2  # alpha / r = 8 / 4 is folded in
        assert torch.equal(saved, ranks.full(parameter.detach()))
    assert lora_files.read_lora(str(tmp_path / "checkpoints" / "000002")).sha256 == lora.sha256


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"decay": "cosine", "warmup": 2}], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bits(world, tmp_path, changes):
    whole, *_ = run(tiny.config(world, out=str(tmp_path / "a"), iterations=4, save_every=2, **changes))

    class Stop(Exception):
        pass

    def killed(cfg):
        cfg, model, data, trained, stage = tiny.build(cfg)
        folder = RunFolder(cfg, active=True)
        model.transformer.register_forward_pre_hook(lambda *_: stop_at(trained.updates))
        train.train(cfg, stage, trained, folder, Report(cfg, model, data, {}, folder))

    def stop_at(updates):
        if updates == 3:
            raise Stop

    cfg = tiny.config(world, out=str(tmp_path / "b"), iterations=4, save_every=2, **changes)
    with pytest.raises(Stop):
        killed(cfg)
    resumed, *_ = run(cfg)
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    states = [load_file(file) for f in "ab" for file in (tmp_path / f / "state/000004").glob("*.safetensors")]
    assert len(states) == 2 and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (tmp_path / "a/student/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/student/adapter_model.safetensors"
    ).read_bytes()


def test_the_memory_of_the_start_does_not_follow_the_student(world, tmp_path):
    """The table's row `start` is where training began, whatever dtype the two adapters share."""
    _, model, _ = run(tiny.config(world, out=str(tmp_path), iterations=2, cold_start=str(world / "red")))
    red = lora_files.read_lora(str(world / "red"))
    moved = 0.0
    for module in red.A:
        start = update_of(model, module, "start")
        assert torch.allclose(start, red.update(module), atol=1e-5)
        moved += float((update_of(model, module, "student") - start).norm())
    assert moved > 0.01


def update_of(model, module, adapter):
    """The weight update of an attached adapter."""
    layer = model.transformer.get_submodule(module)
    return (
        layer.scale[adapter] * layer.lora_B[adapter].weight.detach() @ layer.lora_A[adapter].weight.detach()
    )


def test_moving_average_is_what_is_saved(world, tmp_path):
    plain, *_ = run(tiny.config(world, out=str(tmp_path / "a"), iterations=3))
    _, _, trained = run(tiny.config(world, out=str(tmp_path / "b"), iterations=3, ema=0.9))
    saved = [lora_files.read_lora(str(tmp_path / f / "student")) for f in "ab"]
    assert saved[0].sha256 != saved[1].sha256
    module = next(iter(saved[1].B))
    average = ranks.full(trained.average[f"{module}.lora_B.student.weight"])
    assert torch.equal(saved[1].B[module], 2 * average)  # alpha / r = 8 / 4 is folded in


def test_non_finite_steps_are_named_skipped_and_end_the_run(world, tmp_path, capsys):
    """A teacher that breaks at low noise: its velocity is NaN, and the run says whose and where."""
    cfg = tiny.config(world, out=str(tmp_path), iterations=5)
    cfg, model, data, trained, stage = tiny.build(cfg)

    def broken(module, arguments, keywords, output):
        if keywords["timestep"][0] < 500 and not torch.is_grad_enabled():
            return (output[0] * float("nan"),)

    model.transformer.register_forward_hook(broken, with_kwargs=True)
    folder = RunFolder(cfg, active=True)
    with pytest.raises(FloatingPointError, match="5 steps in a row with a non-finite gradient; lower --lr"):
        train.train(cfg, stage, trained, folder, Report(cfg, model, data, {}, folder))
    printed = capsys.readouterr().out
    where = "step 0: non-finite velocity difference to red at state 3; task 'red', prompt '(.*)'"
    named = re.search(where, printed)
    assert named[1] in tiny.PROMPTS["red"] and "step 0: a non-finite gradient; step skipped" in printed
    assert not (tmp_path / "student").exists()


def test_the_first_bad_state_is_named_with_its_own_teacher(capsys):
    """A NaN of a sample of blue is no NaN of red, though red anchors it too."""
    distances_BTK = torch.ones(2, 4, 2)
    distances_BTK[1, 2:] = float("nan")
    prompts = [Prompt("a red dot", "red"), Prompt("a blue dot", "blue")]
    sums_RT = summed(distances_BTK, torch.eye(2), 0)
    name_non_finite(7, ["red", "blue"], sums_RT, [(prompts, distances_BTK)])
    where = "step 7: non-finite velocity difference to blue at state 2; task 'blue', prompt 'a blue dot'"
    assert where in capsys.readouterr().out
    assert sums_RT[0].isfinite().all()


# ---- flow-matching fine-tuning -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Ten latents: constants that depend on the caption."""
    folder = tmp_path_factory.mktemp("latents")
    captions = ["a red circle", "a blue circle"] * 5
    values = torch.stack([torch.full((4, 4, 4), 1.0 if "red" in c else -1.0) for c in captions])
    write_safetensors(folder / "latents.safetensors", {"latents": values})
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"prompt": c}) + "\n" for c in captions))
    return folder


@pytest.mark.parametrize(
    "full, share, apart", [(True, 0.5, 0.6), (False, 0.75, 0.3)]
)  # a LoRA on a random base can do less
def test_sft_learns_what_the_caption_says(world, tmp_path, latents, full, share, apart):
    cfg = tiny.sft_config(
        world,
        data=str(latents),
        full=full,
        out=str(tmp_path),
        iterations=60,
        lr=1e-2,
        prompts_per_step=16,
        micro_batch=8,
        caption_dropout=0.1,
    )
    folder, model, trained = run(cfg)
    losses = [row["loss"] for row in folder.metrics()]
    assert sum(losses[-5:]) < share * sum(losses[:5])
    captions = ["a red circle", "a blue circle"]
    with lora.use(model.transformer, model.trained), torch.no_grad():
        x, sigma = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.9)
        v = model.velocity(x, sigma, model.text(captions), 1.0)
    data = (x - 0.9 * v).mean((1, 2, 3))  # the predicted clean latents
    assert data[0] - data[1] > apart
    if full:
        weights = load_file(tmp_path / "student" / "diffusion_pytorch_model.safetensors")
        reloaded = model.family.load_transformer(world / "pipeline", torch.float32)
        reloaded.load_state_dict(weights)
        with torch.no_grad():
            text = model.family.collate(model.text(captions))
            again = model.family.velocity(reloaded, x, sigma, text)
        assert torch.allclose(again, v, atol=1e-5)
        # As diffusers knows it, although the run's class is FSDP's: so it can teach (--teachers).
        named = json.loads((tmp_path / "student" / "config.json").read_text())
        assert named["_class_name"] == "SD3Transformer2DModel"
        assert type(model.transformer).__name__ == "FSDPSD3Transformer2DModel"


def test_sft_gradient_is_that_of_equation_1(world, latents):
    cfg = tiny.sft_config(world, data=str(latents), prompts_per_step=6, micro_batch=4, caption_dropout=0.0)
    cfg, model, images, trained, stage = tiny.build(cfg)
    stage.accumulate(0)
    got = flat_gradient(trained)
    chosen, index = images.of_step(6, cfg.seed, 0), torch.arange(6)
    u = kernels.normal((6, 2), seed_of(0, 0, "sigma"), index)[:, 0]
    sigma = torch.sigmoid(u)
    sigma = 3 * sigma / (1 + 2 * sigma)  # the scheduler's shift of 3
    eps = kernels.normal((6, 4, 4, 4), seed_of(0, 0, "eps"), index)
    data, b = images.latents[chosen], (slice(None), None, None, None)
    for p in trained.parameters.values():
        p.grad = None
    with lora.use(model.transformer, "student"):
        x = (1 - sigma[b]) * data + sigma[b] * eps
        v = model.velocity(x, sigma, model.text([images.captions[n] for n in chosen]), 1.0)
        (v - (eps - data)).square().mean().backward()
    want = flat_gradient(trained)
    assert want.norm() > 1e-4 and distance(got, want) < 1e-4


def test_caption_dropout_replaces_captions(world, latents):
    shares = []
    for dropout in (0.0, 0.5):
        cfg = tiny.sft_config(
            world, data=str(latents), prompts_per_step=200, micro_batch=200, caption_dropout=dropout
        )
        _, model, _, _, stage = tiny.build(cfg)
        (empty,) = model.text([""])
        seen = []

        def note(module, arguments, keywords, seen=seen):
            seen.append(keywords["encoder_hidden_states"])

        model.transformer.register_forward_pre_hook(note, with_kwargs=True)
        stage.accumulate(0)
        (embeds,) = seen
        tokens = len(empty["embeds"])
        shares.append(float((embeds[:, :tokens] == empty["embeds"]).flatten(1).all(1).float().mean()))
    assert shares[0] == 0 and 0.35 < shares[1] < 0.65
