"""Stage sft: its gradient against equation 1, and what it saves."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel

from opd import kernels, lora
from opd.data import seed_of
from opd.families import sd3
from tests import tiny
from tests.tiny import distance, gradient_of


@pytest.mark.parametrize("dropout, dropped", [(0.0, 0), (0.5, 3)])
def test_sft_gradient_is_that_of_equation_1(world, latents, dropout, dropped):
    """Captions that are dropped are empty ones."""
    batch = {"prompts_per_step": 6, "micro_batch": 4, "caption_dropout": dropout}
    cfg = tiny.sft_config(world, data=str(latents), **batch)
    cfg, model, images, trained, stage = tiny.build(cfg)
    stage.accumulate(0)
    got = gradient_of(trained)
    chosen, index = images.of_step(6, cfg.seed, 0), torch.arange(6)
    u, coin = kernels.normal((6, 2), seed_of(0, 0, "sigma"), index).T
    sigma = torch.sigmoid(u)
    sigma = 3 * sigma / (1 + 2 * sigma)  # the scheduler's shift of 3
    captions = [images.captions[n] for n in chosen]
    empty = (torch.distributions.Normal(0.0, 1.0).cdf(coin) < dropout).tolist()
    assert sum(empty) == dropped
    captions = ["" if drop else caption for drop, caption in zip(empty, captions, strict=True)]
    eps = kernels.normal((6, 4, 4, 4), seed_of(0, 0, "eps"), index)
    data, b = images.latents[chosen], (slice(None), None, None, None)
    for p in trained.parameters.values():
        p.grad = None
    with lora.use(model.transformer, "student"):
        x = (1 - sigma[b]) * data + sigma[b] * eps
        v = model.velocity(x, sigma, model.text(captions), 1.0)
        (v - (eps - data)).square().mean().backward()
    want = gradient_of(trained)
    assert want.norm() > 1e-4 and distance(got, want) < 1e-4


@pytest.mark.parametrize("guide, told", [(None, 3.5), (sd3.guide, 1.0)])
def test_a_network_that_is_told_its_guidance_learns_at_the_deployed_one(
    guide, told, world, latents, monkeypatch
):
    """As FLUX.1; another learns without guidance, which its sampling adds."""
    cfg = tiny.sft_config(world, data=str(latents), guidance=3.5, prompts_per_step=4, micro_batch=4)
    _, model, *_, stage = tiny.build(cfg)
    monkeypatch.setattr(sd3, "guide", guide)
    heard, velocity = set(), model.family.velocity

    def listening(transformer, x, sigma, text, guidance=1.0):
        heard.add((guidance, len(x)))
        return velocity(transformer, x, sigma, text)

    monkeypatch.setattr(sd3, "velocity", listening)
    stage.accumulate(0)
    assert heard == {(told, 4)}  # a guided pass has both branches


def test_a_fine_tuned_transformer_is_saved_as_diffusers_knows_it(world, tmp_path, latents):
    """Although the run's class is FSDP's: so it can teach (--teachers)."""
    cfg = tiny.sft_config(world, full=True, out=str(tmp_path), iterations=2, lr=1e-2, data=str(latents))
    _, model, *_ = tiny.run(cfg)
    assert type(model.transformer).__name__ == "FSDPSD3Transformer2DModel"
    named = json.loads((tmp_path / "student" / "config.json").read_text())
    assert named["_class_name"] == "SD3Transformer2DModel"
    saved = SD3Transformer2DModel.from_pretrained(tmp_path / "student")
    x, sigma = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.9)
    text = model.text(tiny.PROMPTS["red"][:2])
    with lora.use(model.transformer, model.trained), torch.no_grad():
        v = model.velocity(x, sigma, text, 1.0)
        again = model.family.velocity(saved, x, sigma, model.family.collate(text))
    assert torch.allclose(again, v, atol=1e-5)
