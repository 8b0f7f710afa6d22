"""What is Z-Image's alone: its time and sign, its texts, its adapters."""

from fnmatch import fnmatch

import pytest
import torch

from opd import lora
from opd.families import z_image
from opd.formats import lora_files
from tests import tiny_families

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_families.make_z_image(tmp_path_factory.mktemp("z_image") / "pipeline")


def test_time_runs_to_the_data_in_float32_under_a_bfloat16_model():
    """In bfloat16, 1 - 0.901 would become 0.098. A model that says x is asked for -x."""
    seen = {}

    def transformer(x, t, texts, return_dict):
        seen.update(x=x, t=t, texts=texts)
        return (x,)

    x, texts = torch.arange(128.0).view(2, 4, 4, 4), [torch.ones(5, 32).bfloat16()] * 2
    v = z_image.velocity(transformer, x, torch.tensor([0.901, 1.0]), texts)
    assert [part.shape for part in seen["x"]] == [(4, 1, 4, 4)] * 2 and seen["texts"] is texts
    assert seen["t"].dtype == torch.float32 and seen["t"].tolist() == pytest.approx([0.099, 0.0], abs=1e-6)
    assert v.dtype == torch.bfloat16 and torch.equal(v.float(), -x)


def test_a_text_is_as_long_as_its_prompt_in_the_chat_template(pipeline):
    encoders = z_image.load_text(pipeline, torch.float32, CPU, True)
    prompts = [*PROMPTS, z_image.NEGATIVE]
    conditions = z_image.encode_prompts(encoders, prompts, CPU)
    template = len("user\n" + "\n" + "assistant\n") + 3  # three marks are one token each
    assert prompts == [*PROMPTS, ""]  # which the pipeline's own call would have changed
    assert [len(c["embeds"]) for c in conditions] == [template + len(prompt) for prompt in prompts]
    (alone,) = z_image.encode_prompts(encoders, [PROMPTS[2]], CPU)
    torch.testing.assert_close(alone["embeds"], conditions[2]["embeds"], rtol=0, atol=1e-5)
    without = z_image.load_text(pipeline, torch.float32, CPU, False)
    assert torch.equal(z_image.encode_prompts(without, [PROMPTS[2]], CPU)[0]["embeds"], alone["embeds"])


def test_a_fresh_adapter_is_on_the_joint_layers_and_a_wider_one_fits(pipeline):
    skeleton = z_image.skeleton(pipeline)
    fresh = lora.fresh_lora(skeleton, z_image.LORA_TARGETS, rank=2, alpha=4.0, seed=0)
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    assert fresh.A.keys() == {f"layers.{i}.attention.{name}" for i in (0, 1) for name in projections}
    wide = lora.fresh_lora(skeleton, ("attention.to_q",), rank=2, alpha=4.0, seed=0)
    assert any(fnmatch(name, "noise_refiner.*") for name in wide.A)
    for adapter in (fresh, wide):
        lora_files.check_fits(adapter, skeleton, z_image.LORA_TARGETS)
    del fresh.A["layers.1.attention.to_v"]
    with pytest.raises(ValueError, match=r"lacks 1 of these layers: \['layers.1.attention.to_v'\]"):
        lora_files.check_fits(fresh, skeleton, z_image.LORA_TARGETS)
