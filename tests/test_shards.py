"""A full fine-tuning, sharded over two ranks, goes on on one, and the other way round; what a rank holds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import forked, tiny
from tests.counted_run import counted_by
from tests.forked import losses


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    save_file({"latents": torch.randn(6, 4, 4, 4, generator=generator)}, folder / "latents.safetensors")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in (*tiny.PROMPTS["red"], "a dot")]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def arguments(world, out, latents, **changes):
    shared = {"data": str(latents), "full": True, "save_every": 1, "ema": 0.9, "prompts_per_step": 4}
    cfg = tiny.sft_config(world, out=str(out), **shared | changes)
    return forked.command_line(cfg)


def test_a_sharded_run_goes_on_with_another_number_of_ranks(world, tmp_path, latents):
    """1 -> 2 -> 1: losses and weights of one rank all the way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert forked.train(tmp_path / "log", arguments(world, whole, latents, iterations=6)).ended() == 0
    for done, size in ((2, 1), (4, 2), (6, 1)):
        given = arguments(world, parts, latents, iterations=done, shard_size=size)
        runs = forked.ranks(tmp_path / str(done), size, given)
        assert [run.ended() for run in runs] == [0] * size, runs[0].printed()
        assert [folder.name for folder in (parts / "state").iterdir()] == [f"{done:06d}"]
        assert (f"after step {done - 2}" in runs[0].printed()) == (done > 2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    file = "student/diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(load_file(parts / file), load_file(whole / file), rtol=1e-3, atol=1e-5)

    part = next(file for file in (parts / "state/000006").iterdir() if file.suffix == ".safetensors")
    part.write_bytes(part.read_bytes()[:100])
    again = forked.train(tmp_path / "log", arguments(world, parts, latents, iterations=6))
    assert again.ended() == 1
    assert "error: " in again.printed() and "000006 is damaged" in again.printed()
    assert "Traceback" not in again.printed()


def test_no_rank_holds_more_than_its_share_and_a_block_and_saving_gathers_nothing(world, tmp_path, latents):
    """Weights, gradients, two moments and the average are float32 and sharded; only the files of the student,
    which are whole, gather weights, one at a time."""
    given = arguments(world, tmp_path / "run", latents, iterations=2, shard_size=2, sample_every=0)
    counted = counted_by(forked.ranks(tmp_path, 2, given, "tests.counted_run"))
    share, block = counted["whole"] / 2, counted["whole"] / 2  # of two blocks
    assert counted["parameters"] <= 1.02 * share
    assert counted["alive"] <= 5 * 1.02 * share + block
    assert counted["largest_saved"] <= 0.51 * counted["largest"]
    assert counted["largest_exported"] == counted["largest"]
