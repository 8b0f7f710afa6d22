"""Stage nft: the identities of its loss in float64, the gradient of an iteration written out. A reward
that rises: tests/test_grpo.py."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from opd import flow, kernels, lora
from opd.config import NFTConfig
from opd.data import prompts_of_step, seed_of
from opd.diagnostics import brief
from opd.families import sd3
from opd.nft import Noised, nft_loss, old_share
from opd.report import plots
from tests import tiny
from tests.tiny import distance, gradient_of, steps_by_hand, velocity_by_hand
from tests.tiny_grpo import advantages_by_hand, update_of

CFG = NFTConfig()


def drawn(advantage=None, samples=5):
    """(x0, eps, v, what a loss is made of) of a few samples in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, v, v_old = torch.randn(4, samples, 2, 3, 3, generator=generator, dtype=torch.float64)
    sigma = torch.linspace(0.1, 1.0, samples, dtype=torch.float64)
    if advantage is None:
        advantage = torch.linspace(-6, 6, samples, dtype=torch.float64)
    return x0, eps, v.requires_grad_(), Noised(eps - x0, v_old, sigma, advantage)


def gradient(loss_B, v):
    return torch.autograd.grad(loss_B.sum(), v)[0]


def mean(x):
    return x.flatten(1).mean(1)


@pytest.mark.parametrize("b", [1.0, 0.1])
def test_nft_is_the_released_loss(b):
    """On predicted images x0' = x - sigma v': mean (x0' - x0)^2 / mean |x0' - x0|, the latter constant."""
    x0, eps, v, noised = drawn()
    sigma, r = noised.sigma_B.view(-1, 1, 1, 1), (noised.advantage_B / 10 + 0.5).clamp(0, 1)
    x = (1 - sigma) * x0 + sigma * eps
    terms = []
    for policy in (b * v + (1 - b) * noised.v_old, (1 + b) * noised.v_old - b * v):
        error = x - sigma * policy - x0
        terms.append(mean(error**2) / mean(error.detach().abs()))
    wanted = 5 * (r * terms[0] + (1 - r) * terms[1]) / b
    loss = nft_loss(v, noised, b)
    assert torch.allclose(loss, wanted, rtol=1e-12)
    assert distance(gradient(loss, v), gradient(wanted, v)) < 1e-12


@pytest.mark.parametrize("b", [1.0, 0.1])
def test_on_the_policy_nft_is_a_weighted_policy_gradient(b):
    """Of -|v - u|^2 as log-likelihood, as in AWM; whatever b, and though the loss itself does not depend on
    the reward there."""
    advantage = torch.linspace(-4.5, 4.5, 5, dtype=torch.float64)
    losses, gradients = [], []
    for sign in (1, -1):
        _, _, _, noised = drawn(sign * advantage)
        v = noised.v_old.clone().requires_grad_()
        losses.append(nft_loss(v, noised, b))
        gradients.append(gradient(losses[-1], v))
        weight = noised.advantage_B * noised.sigma_B / mean((noised.u - noised.v_old).abs())
        wanted = gradient(weight * mean((v - noised.u) ** 2), v)
        assert distance(gradients[-1], wanted) < 1e-12
    assert torch.allclose(*losses, rtol=1e-12) and distance(gradients[0], -gradients[1]) < 1e-12


def test_with_the_best_reward_nft_is_flow_matching():
    """r = 1 and b = 1, without its weight: five times eq. 1."""
    x0, eps, v, noised = drawn(torch.full((5,), 5.0, dtype=torch.float64))
    weight = noised.sigma_B**2 / (noised.sigma_B * mean((v - noised.u).detach().abs()))
    wanted = 5 * weight * flow.flow_matching_loss(v, x0, eps)
    assert torch.allclose(nft_loss(v, noised, 1.0), wanted, rtol=1e-12)


def test_the_old_policy_follows_by_the_released_schedules():
    """DiffusionNFT's own: min(.001 n, .5); for OCR 0 until 75, then min(.0075 (n - 75), .999)."""
    slow, ocr = replace(CFG, old_decay=(0.0, 0.001, 0.5)), replace(CFG, old_decay=(75.0, 0.0075, 0.999))
    assert [old_share(slow, n) for n in (0, 100, 500, 9000)] == pytest.approx([0.0, 0.1, 0.5, 0.5])
    assert [old_share(ocr, n) for n in (0, 75, 175, 9000)] == pytest.approx([0.0, 0.0, 0.75, 0.999])


def build(world, **changes):
    return tiny.build(tiny.nft_config(world, **changes))


def behind(world, **changes):
    """With an old policy that has half of the policy's update."""
    *others, trained, stage = build(world, cold_start=str(world / "red"), **changes)
    for name, old in trained.old.items():
        if ".lora_B." in name:
            old.data *= 0.5
    return *others, trained, stage


SETTINGS = [{"guidance": 2.0, "micro_batch": 3}, {"beta": 0.5}]
SETTINGS += [{"strength": 0.1, "levels": 0, "rollout": "sde"}]
SETTINGS += [{"old_decay": (0.0, 0.0, 0.0), "beta": 0.0, "levels": 1}]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_the_first_update_written_out(world, changes):
    """Roll out sample by sample, score, noise each picture afresh, take the loss by autograd."""
    cfg, model, data, trained, stage = behind(world, **changes)
    prompts = prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, 0)
    steps = steps_by_hand(cfg, model, prompts, "old", [cfg.rollout] * cfg.steps)
    latents = [after for _, i, _, after in steps if i == cfg.steps - 1]
    advantages = advantages_by_hand([model.decode(x) for x in latents], prompts)

    def velocity(adapter, x, sigma, text):
        return velocity_by_hand(model, adapter, x, sigma, text, cfg.guidance)

    levels_NL, total = stage.drawn_levels(0), 0.0
    for n, x0 in enumerate(latents):
        for j, sigma in enumerate(levels_NL[n].tolist()):
            eps = kernels.normal(x0.shape, seed_of(0, 0, "level", j), torch.tensor([n]))
            x, u, text = (1 - sigma) * x0 + sigma * eps, eps - x0, prompts[n // cfg.group].text
            v, base = velocity("student", x, sigma, text), velocity("base", x, sigma, text).detach()
            a, old = advantages[n], v.detach()
            if not cfg.on_policy():
                old = velocity("old", x, sigma, text).detach()
            r, b = 0.5 + a / 10, cfg.strength
            pair = (old + b * (v - old), old - b * (v - old))
            sizes = [(p - u).abs().mean().detach() for p in pair]
            good, bad = (sigma * (p - u).square().mean() / s for p, s in zip(pair, sizes, strict=True))
            loss = 5 / b * (r * good + (1 - r) * bad)
            total = total + (loss + cfg.beta * (v - base).square().mean()) / levels_NL.numel()
    total.backward()
    wanted = gradient_of(trained)
    assert wanted.norm() > 1e-4
    assert distance(update_of(behind(world, **changes))[0], wanted) < 1e-4


def test_every_picture_draws_its_own_levels_once(world):
    cfg, model, *_, stage = build(world, steps=4, levels=3, skip_last=True)
    drawn_NL = stage.drawn_levels(0)
    allowed = sorted(np.float32(model.sigmas(4)[:3]).tolist())
    assert all(sorted(row) == allowed for row in drawn_NL.tolist())  # three of three, none twice
    assert len({tuple(row) for row in drawn_NL.tolist()}) > 3
    assert torch.equal(drawn_NL, stage.drawn_levels(0)) and not torch.equal(drawn_NL, stage.drawn_levels(1))


def test_the_old_policy_makes_the_pictures(world):
    """It stays what it is for both updates of a rollout, then keeps a tenth of itself, as released."""
    *_, model, _, trained, stage = build(world, updates=2, old_decay=(0.0, 1.0, 0.1))
    names, used = list(trained.parameters), set()
    before = {name: trained.old[name].detach().clone() for name in names}
    original, update, moves = trained.move_old, trained.update, []

    def kept(*arguments):
        assert all(torch.equal(trained.old[name], before[name]) for name in names)
        return update(*arguments)

    trained.update = kept

    def move(share):
        original(share)
        for name in names:
            before[name] = share * before[name] + (1 - share) * trained.parameters[name].detach()
        moves.append(share)

    trained.move_old = move
    walk, layer = model.walk, lora.lora_layers(model.transformer)[0]
    model.walk = lambda *given: used.add(layer.slot) or walk(*given)
    stage.step(0)
    assert moves == [0.1] and used == {"old"}
    assert all(torch.allclose(trained.old[name], before[name], atol=1e-7) for name in names)
    assert any(not torch.equal(trained.old[name], trained.parameters[name]) for name in names)


AT_ONCE = {"beta": 0.0, "old_decay": (0.0, 0.0, 0.0)}
PASSES = [(AT_ONCE, 1), (AT_ONCE | {"updates": 2}, 2), ({"beta": 0.0}, 2), ({"beta": 0.1}, 3)]


@pytest.mark.parametrize("changes, passes", PASSES)
def test_a_level_costs_a_pass_of_the_policy_and_of_each_that_is_asked(world, changes, passes):
    """Beside the rollout's steps."""
    cfg, model, *_, stage = build(world, steps=3, **changes)
    rows = []
    model.transformer.register_forward_hook(lambda *given: rows.append(len(given[-1][0])))
    stage.step(0)
    assert sum(rows) == cfg.prompts_per_step * cfg.group * (3 + 2 * passes)


def test_what_a_run_shows_of_itself(world, tmp_path):
    """In the bar, in its curves and on its card; without beta nobody knows the base."""
    settings = {"iterations": 2, "save_every": 1}
    folder, *_ = tiny.run(tiny.nft_config(world, out=str(tmp_path / "run"), beta=0.1, **settings))
    assert re.fullmatch(r"reward red 0\.\d+ blue 0\.\d+, from_base=\S+", brief(folder.metrics()[1]))
    panels = {panel.get_title("left"): panel for panel in plots.curve_figure(folder.metrics(), {}).axes}
    expected = ["reward", "|v - v_base|², mean over dimensions", plots.SIZE, "loss", "gradient norm"]
    assert list(panels) == expected and panels[plots.SIZE].get_yscale() == "linear"
    assert "- reward of red: `tests" in (folder.path / "student/README.md").read_text()
    folder, *_ = tiny.run(tiny.nft_config(world, out=str(tmp_path / "other"), **settings))
    assert not {"kl", "from_base", "log_size"} & set(folder.metrics()[1])
    assert "grad_rms=" in brief(folder.metrics()[1])


def test_guidance_is_warned_of(world, capsys, monkeypatch):
    """But where it is a number that the network is told."""
    build(world, guidance=2.0)
    warning = "--guidance 2: stage nft is known to learn little with guidance"
    assert capsys.readouterr().out.count(warning) == 1
    monkeypatch.setattr(sd3, "guide", None)
    build(world, guidance=2.0)
    assert "--guidance" not in capsys.readouterr().out
