"""What is SD3's alone: its table of positions, shifts by hand, and the token that stands for T5's zeros."""

import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models import embeddings

from opd.families import sd3
from tests import tiny


def test_the_table_of_positions_is_read_and_not_computed(world, monkeypatch):
    """SD3.5's takes some ten seconds; with the file's the transformer is diffusers' own to the last bit."""
    theirs = SD3Transformer2DModel.from_pretrained(world / "pipeline" / "transformer", dtype=torch.bfloat16)
    devices, table = [], embeddings.get_2d_sincos_pos_embed

    def watched(*arguments, **named):
        result = table(*arguments, **named)
        devices.append(result.device.type)
        return result

    monkeypatch.setattr(embeddings, "get_2d_sincos_pos_embed", watched)
    ours = sd3.load_transformer(world / "pipeline", torch.bfloat16)
    assert devices == ["meta"] and "pos_embed.pos_embed" in ours.state_dict()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


DYNAMIC = {"use_dynamic_shifting": True, "max_shift": 1.15}
# (scheduler, side of the latent, log of the shift): dynamic, linear in the number of 2 x 2 patches, .5 at 256
# and 1.15 at 4096.
SHIFTS = [
    ({"shift": 1.0}, 4, 0.0),
    ({"shift": 3.0}, 4, math.log(3)),
    (DYNAMIC, 32, 0.5),
    (DYNAMIC, 128, 1.15),
    (DYNAMIC, 64, 0.5 + 0.65 * 768 / 3840),
    (DYNAMIC | {"time_shift_type": "linear"}, 32, math.log(0.5)),
]


@pytest.mark.parametrize("settings, side, log_shift", SHIFTS)
def test_a_shift_multiplies_the_odds(settings, side, log_shift, world, tmp_path):
    """Those of the second of three levels, which lies halfway between 1 and the shifted 1/1000. That all
    levels are the pipeline's: tests/test_families.py."""
    pipeline = tiny.with_scheduler(world / "pipeline", tmp_path / "pipeline", settings)
    assert sd3.log_shift(pipeline, (4, side, side)) == pytest.approx(log_shift)
    if "shift" not in settings:
        level, u = sd3.sigmas(pipeline, (4, side, side), 3)[1], (1 + 0.001) / 2
        assert math.log(level / (1 - level) * (1 - u) / u) == pytest.approx(log_shift, abs=1e-5)


def random_transformer(**changes):
    shape = dict(attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, pos_embed_max_size=4)
    text = dict(joint_attention_dim=6, pooled_projection_dim=5)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(4, in_channels=4, num_layers=3, **shape, **text, **changes)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer.double()


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "rms_norm"}, {"dual_attention_layers": (0, 1)}], ids=("normed", "dual attention")
)
def test_a_blank_token_stands_for_the_zeros_that_diffusers_reads(changes):
    """Velocity and every gradient against diffusers' own attention with the zeros written out. In float64,
    but for the norms of the heads, which diffusers computes in float32."""
    ours, theirs = random_transformer(**changes), random_transformer(**changes)
    shapes = {"embeds": (2, 3, 6), "pooled": (2, 5)}
    text = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    zeros = torch.zeros_like(text["embeds"])
    written_out = text | {"embeds": torch.cat([text["embeds"], zeros], dim=1)}
    x, sigma = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.tensor([0.3, 0.8])
    lengths = []
    first = ours.transformer_blocks[0].ff_context
    first.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    v = sd3.velocity(ours, x, sigma, text | {"blank": zeros[:, :1]})
    expected = sd3.velocity(theirs, x, sigma, written_out)
    torch.testing.assert_close(v, expected, rtol=1e-7, atol=1e-9)
    assert lengths == [3 + 1]
    v.square().sum().backward()
    expected.square().sum().backward()
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    of_interest = [(name, p.grad, q.grad) for (name, p), q in pairs if q.grad is not None]
    assert len(of_interest) > 80
    for name, gradient, wanted in of_interest:
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm() + 1e-9, name
    once = text | {"embeds": written_out["embeds"][:, :4]}
    assert (sd3.velocity(theirs, x, sigma, once) - expected).abs().max() > 1e-3
