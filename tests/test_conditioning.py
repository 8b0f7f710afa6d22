"""The cache of encoded prompts: encoded once, read back exactly, keyed by what made it, bounded in memory."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from opd.conditioning import Conditioning, TextBatch
from opd.families import sd3

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]


def sd3_conditioning(folder, cache, dtype=torch.float32, **changes):
    return Conditioning(sd3, folder, str(cache), dtype, CPU, **changes)


def word_family(loads: list):
    """A family with a token per word, a mask, and no weights; `loads` grows whenever its encoders load."""

    def encode_prompts(text, prompts, device):
        lengths = [1 + len(prompt.split()) for prompt in prompts]
        return [
            {"words": torch.full((n, 3), float(n)), "mask": torch.ones(n, dtype=torch.bool)} for n in lengths
        ]

    return SimpleNamespace(
        TEXT=("vocabulary",), load_text=lambda *_: loads.append("loaded"), encode_prompts=encode_prompts
    )


def same(one, other) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_every_prompt_is_encoded_once_and_read_back_exactly(world, tmp_path):
    first = sd3_conditioning(world / "pipeline", tmp_path)
    assert first.prepare([*PROMPTS, PROMPTS[0]], batch=2) == 3
    encoders = sd3.load_text(world / "pipeline", torch.float32, CPU, True)
    expected = sd3.encode_prompts(encoders, PROMPTS[::-1], CPU)
    for mine, theirs in zip(first(PROMPTS[::-1]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    second = sd3_conditioning(world / "pipeline", tmp_path)
    assert second.prepare(PROMPTS) == 0
    assert same(second(PROMPTS), first(PROMPTS))


def test_conditions_keep_their_keys_dtypes_and_lengths(tmp_path):
    loads = []
    conditioning = Conditioning(word_family(loads), tmp_path, str(tmp_path / "cache"), torch.float32, CPU)
    assert conditioning.prepare(["", "one", "one two"]) == 3
    empty, _, again, longest = conditioning(["", "one", "", "one two"])
    assert [len(c["words"]) for c in (empty, again, longest)] == [1, 1, 3]
    assert longest.keys() == {"words", "mask"} and longest["mask"].dtype == torch.bool
    assert torch.equal(longest["words"], torch.full((3, 3), 3.0))


def test_the_encoders_load_only_for_prompts_that_the_cache_lacks(tmp_path):
    loads = []
    family = word_family(loads)
    Conditioning(family, tmp_path, str(tmp_path / "cache"), torch.float32, CPU).prepare(["one", "two"])
    again = Conditioning(family, tmp_path, str(tmp_path / "cache"), torch.float32, CPU)
    assert again.prepare(["two", "one"]) == 0 and len(loads) == 1
    assert again.prepare(["two", "three"]) == 1 and len(loads) == 2


def test_the_cache_is_keyed_by_folder_dtype_and_t5(world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(world / "pipeline", copy)
    caches = {
        sd3_conditioning(world / "pipeline", tmp_path).cache,
        sd3_conditioning(copy, tmp_path).cache,
        sd3_conditioning(copy, tmp_path, t5=False).cache,
        sd3_conditioning(copy, tmp_path, torch.bfloat16).cache,
    }
    assert len(caches) == 4


@pytest.mark.parametrize("encoder", ["text_encoder_2/model.safetensors", "tokenizer/tokenizer.json"])
def test_the_cache_is_keyed_by_the_files_of_the_encoders(encoder, world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(world / "pipeline", copy)
    before = sd3_conditioning(copy, tmp_path)
    assert before.prepare(PROMPTS) == 3
    os.utime(copy / "transformer" / "config.json", ns=(1, 1))  # not an encoder
    assert sd3_conditioning(copy, tmp_path).prepare(PROMPTS) == 0
    os.utime(copy / encoder, ns=(1, 1))
    assert sd3_conditioning(copy, tmp_path).cache != before.cache
    assert sd3_conditioning(copy, tmp_path).prepare(PROMPTS) == 3


def test_memory_is_bounded_and_eviction_only_costs_a_read(world, tmp_path):
    unbounded = sd3_conditioning(world / "pipeline", tmp_path)
    unbounded.prepare(PROMPTS)
    expected = unbounded(PROMPTS)
    each = unbounded.used // 3
    small = sd3_conditioning(world / "pipeline", tmp_path, limit=2 * each)
    assert same(small(PROMPTS), expected)
    assert len(small.memory) == 2 and small.used == 2 * each
    assert same(small(PROMPTS), expected)  # the evicted one comes back from disk
    tiny = sd3_conditioning(world / "pipeline", tmp_path, limit=1)
    assert same(tiny(PROMPTS), expected) and len(tiny.memory) == 1


def test_the_prompts_of_a_micro_batch_are_read_once_by_each_encoder():
    calls = []

    def reads(name):
        def conditioning(prompts):
            calls.append((name, prompts))
            return [{"text": f"{prompt} by {name}"} for prompt in prompts]

        return conditioning

    one, other = reads("one"), reads("other")
    texts = TextBatch(["r", "s", "t"])
    conditions = texts.by(one)
    assert texts.by(one) is conditions and len(texts) == 3
    part = texts.rows([2, 0])
    assert part.prompts == ["t", "r"] and part.by(one) == [conditions[2], conditions[0]]
    assert part.by(other) == [{"text": "t by other"}, {"text": "r by other"}]
    assert calls == [("one", ["r", "s", "t"]), ("other", ["t", "r"])]
