"""One model at work: its dtype, its paths, images that depend on nothing but seed, index and prompt; prompts
encoded once, ahead of the steps that read them, to bits that no resume changes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd import conditioning
from opd.conditioning import Conditioning
from opd.model import Model, compute_dtype

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]


@pytest.fixture(scope="module")
def model(world):
    model = Model.plan(str(world / "pipeline"), "float32", "", CPU, True)
    model.prepare(PROMPTS)
    model.load()
    return model


def test_auto_is_bfloat16_only_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for amx, device in [(False, "cpu"), (True, "cpu"), (False, "cuda")]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        wanted = torch.bfloat16 if amx or device == "cuda" else torch.float32
        assert compute_dtype("auto", torch.device(device)) == wanted


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


STEPS = [[f"{step} {n}" for n in range(3)] for step in range(5)]


def words(seen: list) -> Conditioning:
    """A family of words in the place of encoders. `seen` gets every batch of prompts, and "loaded" whenever
    the encoders load. What a prompt becomes depends on its batch, as rounding may."""

    def encode_prompts(text, prompts, device):
        seen.append(prompts)
        return [{"words": torch.full((1 + len(p.split()), 3), float(len(prompts)))} for p in prompts]

    family = SimpleNamespace(load_text=lambda *_: seen.append("loaded"), encode_prompts=encode_prompts)
    return Conditioning(family, Path("nowhere"), torch.float32, CPU)


def test_a_prompt_of_a_micro_batch_is_moved_once_for_all_its_states_and_teachers():
    texts = words([])
    texts.prepare(["one", "two"])
    first = texts(["one", "two", "one"])
    assert first[0] is first[2] and texts(["two"])[0] is first[1]


def test_prompts_are_encoded_in_windows_ahead_of_the_steps_that_read_them(monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 6)
    seen = []
    texts = words(seen)
    for _ in range(2):
        texts.prepare(["shown"])
    texts.follow([*STEPS, ["shown", "4 0"]])
    for step, prompts in enumerate(STEPS):
        texts.ahead(step)
        assert len(texts(prompts)) == 3
        assert len(texts.window) <= 6
    batches = [["shown"], STEPS[0] + STEPS[1], STEPS[2] + STEPS[3], STEPS[4]]
    assert seen == [each for batch in batches for each in ("loaded", batch)]


def test_a_run_that_resumes_encodes_the_window_of_its_step_as_before(monkeypatch):
    """Whole, and in the same batches, whatever step it goes on from."""
    monkeypatch.setattr(conditioning, "WINDOW", 6)
    whole, resumed = words([]), words([])
    for texts, steps in ((whole, range(4)), (resumed, [3])):
        texts.follow(STEPS)
        for step in steps:
            texts.ahead(step)
    assert whole.window.keys() == resumed.window.keys()
    for prompt, condition in whole.window.items():
        assert torch.equal(condition["words"], resumed.window[prompt]["words"])


def test_a_step_larger_than_a_window_is_encoded_whole(monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 2)
    texts = words([])
    texts.follow([["a", "b", "c"], ["d"]])
    for step, prompts in enumerate([["a", "b", "c"], ["d"]]):
        texts.ahead(step)
        assert list(texts.window) == prompts
