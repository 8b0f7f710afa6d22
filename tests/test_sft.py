"""Stage sft: what it learns, its gradient against equation 1, the captions that it drops."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opd import kernels, lora
from opd.data import seed_of
from opd.formats.latents import write_samples
from tests import tiny
from tests.tiny import distance, gradient_of


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Ten latents: constants that depend on the caption."""
    folder = tmp_path_factory.mktemp("latents")
    captions = ["a red circle", "a blue circle"] * 5
    values = torch.stack([torch.full((4, 4, 4), 1.0 if "red" in c else -1.0) for c in captions])
    write_samples(folder, values, [{"prompt": caption} for caption in captions])
    return folder


def test_sft_learns_what_the_caption_says(world, tmp_path, latents):
    batch = {"data": str(latents), "prompts_per_step": 16, "micro_batch": 8, "caption_dropout": 0.1}
    cfg = tiny.sft_config(world, full=True, out=str(tmp_path), iterations=60, lr=1e-2, **batch)
    folder, model, *_ = tiny.run(cfg)
    losses = [row["loss"] for row in folder.metrics()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    captions = ["a red circle", "a blue circle"]
    with lora.use(model.transformer, model.trained), torch.no_grad():
        x, sigma = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.9)
        v = model.velocity(x, sigma, model.text(captions), 1.0)
    data = (x - 0.9 * v).mean((1, 2, 3))  # the predicted clean latents
    assert data[0] - data[1] > 0.6
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
    got = gradient_of(trained)
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
    want = gradient_of(trained)
    assert want.norm() > 1e-4 and distance(got, want) < 1e-4
