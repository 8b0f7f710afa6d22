"""One model at work: its dtype, its paths, and images that depend on nothing but seed, index and prompt."""

import pytest
import torch

from opd import flow, lora
from opd.data import seed_of
from opd.families import sd3
from opd.model import Model, Sampling, compute_dtype

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]


@pytest.fixture(scope="module")
def model(world):
    model = Model.plan(str(world / "pipeline"), "float32", "", CPU, True)
    model.prepare(PROMPTS)
    model.load()
    return model


@pytest.mark.parametrize(
    "bf16, amx, device, wanted",
    [
        (False, False, "cpu", torch.float32),
        (True, False, "cpu", torch.bfloat16),
        (False, True, "cpu", torch.bfloat16),
        (False, False, "cuda", torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_only_where_the_hardware_has_it(bf16, amx, device, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype("auto", torch.device(device)) == wanted
    assert compute_dtype("float16", torch.device(device)) == torch.float16


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_velocity_is_float32_and_its_gradient_reaches_the_state(guidance, model):
    """The gradient with respect to x of a sum of velocities, against central differences."""
    sigma_B, text = torch.tensor([0.7, 0.3]), model.text(PROMPTS[:2])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.shape, generator=generator, requires_grad=True)
    weights, direction = torch.randn(2, 2, *model.shape, generator=generator)

    def total(x):
        v = model.velocity(x, sigma_B, text, guidance)
        assert v.dtype == torch.float32
        return (v * weights).sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    with torch.no_grad():
        difference = (total(x + 1e-2 * direction) - total(x - 1e-2 * direction)) / 2e-2
    assert difference.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


@pytest.mark.parametrize("rollout", list(flow.TRANSITIONS))
def test_a_path_joins_levels_coefficients_and_seeds(rollout, model):
    path = model.path(4, rollout, 0.7, (0, "noise"))
    assert path.seeds == [seed_of(0, "noise", i) for i in range(4)]
    assert path.sigmas == sd3.sigmas(model.folder, model.shape, 4)
    levels = torch.tensor(path.sigmas, dtype=torch.float64)
    grid = flow.TRANSITIONS[rollout](levels[:-1], levels[1:], 0.7)
    assert len(path.transitions) == 4
    for i, transition in enumerate(path.transitions):
        assert transition.keep.dtype == torch.float64 and transition.keep.ndim == 0
        assert [c.item() for c in transition] == [c[i].item() for c in grid]
    other = model.path(4, rollout, 0.3, (1, "noise"))
    stds = [[t.std.item() for t in p.transitions] for p in (path, other)]
    assert (stds[0] == stds[1]) == (rollout == "ode")  # each noise level has its own coefficients


@pytest.mark.parametrize(
    "settings", [{"guidance": 3.0}, {"guidance": 1.0, "rollout": "sde"}, {"guidance": 1.0, "rollout": "cps"}]
)
def test_images_depend_on_seed_and_index_and_not_on_their_neighbours(settings, model):
    def draw(seed, *which):
        prompts, index = [PROMPTS[i] for i in which], [10 + i for i in which]
        return model.images(lora.BASE, prompts, index, Sampling(3, seed, **settings))

    together = draw(0, 0, 1, 2)
    assert together.shape == (3, 3, 8, 8) and together.dtype == torch.float32
    assert (draw(0, 2, 0) - together[[2, 0]]).abs().max() < 1e-5
    assert (draw(1, 0, 1, 2) - together).abs().max() > 0.01
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("images_at_once, pieces", [(3, [3, 2]), (5, [5]), (0, [1, 1, 1, 1, 1])])
def test_the_vae_decodes_in_pieces_of_bounded_size(images_at_once, pieces, model, monkeypatch):
    latents = torch.randn(5, *model.shape, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    seen = []
    hook = model.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(model, "decode_pixels", images_at_once * 8 * 8)
    parts = model.decode(latents)
    hook.remove()
    assert seen == pieces
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
