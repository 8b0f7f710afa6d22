"""Encoded prompts: encoded once, read back exactly, keyed by what made them, ahead of the steps that read
them, in few files of bounded size that survive damage, kills and company."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from opd import conditioning
from opd.conditioning import Conditioning, size
from opd.families import sd3
from tests.words import word_conditioning

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a dot"]


def sd3_conditioning(folder, cache, dtype=torch.float32, **changes):
    return Conditioning(sd3, folder, str(cache), dtype, CPU, **changes)


def packs(folder):
    return sorted((folder / "cache").rglob("*.safetensors"))


def same(one, other) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


# ---- what is encoded, and when -----------------------------------------------------------------------------


def test_every_prompt_is_encoded_once_and_read_back_exactly(world, tmp_path):
    first = sd3_conditioning(world / "pipeline", tmp_path)
    assert first.prepare([*PROMPTS, PROMPTS[0]]) == 3
    encoders = sd3.load_text(world / "pipeline", torch.float32, CPU, True)
    expected = sd3.encode_prompts(encoders, PROMPTS[::-1], CPU)
    for mine, theirs in zip(first(PROMPTS[::-1]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    second = sd3_conditioning(world / "pipeline", tmp_path)
    assert second.prepare(PROMPTS) == 0
    assert same(second(PROMPTS), first(PROMPTS))


def test_conditions_keep_their_keys_dtypes_and_lengths(tmp_path):
    conditioning = word_conditioning(tmp_path, [])
    assert conditioning.prepare(["", "one", "one two"]) == 3
    empty, _, again, longest = conditioning(["", "one", "", "one two"])
    assert [len(c["words"]) for c in (empty, again, longest)] == [1, 1, 3]
    assert longest.keys() == {"words", "mask"} and longest["mask"].dtype == torch.bool
    assert torch.equal(longest["words"], torch.full((3, 3), 3.0))


def test_the_encoders_load_only_for_prompts_that_the_cache_lacks(tmp_path):
    seen = []
    word_conditioning(tmp_path, seen).prepare(["one", "two"])
    again = word_conditioning(tmp_path, seen)
    assert again.prepare(["two", "one"]) == 0 and seen == ["loaded", "one", "two"]
    assert again.prepare(["two", "three"]) == 1 and seen[3:] == ["loaded", "three"]


def test_the_cache_is_keyed_by_folder_dtype_and_t5(world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(world / "pipeline", copy)
    caches = {
        sd3_conditioning(world / "pipeline", tmp_path).cache.folder,
        sd3_conditioning(copy, tmp_path).cache.folder,
        sd3_conditioning(copy, tmp_path, t5=False).cache.folder,
        sd3_conditioning(copy, tmp_path, torch.bfloat16).cache.folder,
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
    assert sd3_conditioning(copy, tmp_path).cache.folder != before.cache.folder
    assert sd3_conditioning(copy, tmp_path).prepare(PROMPTS) == 3


# ---- windows -----------------------------------------------------------------------------------------------


def test_prompts_are_encoded_in_windows_ahead_of_the_steps_that_read_them(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 6)
    seen = []
    texts = word_conditioning(tmp_path, seen)
    texts.prepare(["shown"])
    steps = [[f"{step} {n}" for n in range(3)] for step in range(5)]
    texts.follow(steps)
    for step, prompts in enumerate(steps):
        texts.ahead(step)
        assert len(texts(prompts)) == 3
    assert [len(part) for part in split(seen, "loaded")] == [1, 6, 6, 3]
    assert Counter(seen) == Counter(["shown", *sum(steps, [])] + ["loaded"] * 4)


def test_a_run_that_resumes_begins_its_windows_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 6)
    seen = []
    texts = word_conditioning(tmp_path, seen)
    texts.follow([[f"{step} {n}" for n in range(3)] for step in range(5)])
    texts.ahead(3)
    assert [prompt.split()[0] for prompt in seen[1:]] == ["3", "3", "3", "4", "4", "4"]
    texts.ahead(4)
    assert len(seen) == 7


def test_a_step_larger_than_a_window_is_encoded_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 2)
    texts = word_conditioning(tmp_path, [])
    steps = [["a", "b", "c"], ["d"]]
    texts.follow(steps)
    for step, prompts in enumerate(steps):
        texts.ahead(step)
        assert all(prompt in texts.cache for prompt in prompts)


def test_windows_shrink_with_the_cache(tmp_path):
    """A third of it, by the largest prepared prompt."""
    large = word_conditioning(tmp_path, [], cache_gb=1.0)
    assert large.window() == conditioning.WINDOW
    texts = word_conditioning(tmp_path, [], cache_gb=9000 / 1e9)
    texts.prepare(["short", "the longest of them all"])
    each = size(texts.read("the longest of them all"))
    assert texts.window() == 3000 // each


def split(items: list, mark):
    parts = []
    for item in items:
        if item == mark:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


# ---- on disk -----------------------------------------------------------------------------------------------


def test_prompts_share_files(tmp_path, monkeypatch):
    prompts = [f"prompt {n}" for n in range(100)]
    texts = word_conditioning(tmp_path, [])
    texts.prepare(prompts)
    assert len(packs(tmp_path)) == 1
    monkeypatch.setattr(conditioning, "PACK", 1000)
    texts.prepare([f"other {n}" for n in range(100)])
    assert len(packs(tmp_path)) == 1 + 4  # a batch of 32 is the least


def test_the_cache_keeps_its_size_by_deleting_what_was_used_longest_ago(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "WINDOW", 10)
    steps = [[f"{step} {n} " + "word " * 40 for n in range(10)] for step in range(12)]
    texts = word_conditioning(tmp_path, [], cache_gb=30e-6)
    texts.prepare(["shown"])
    texts.follow(steps)
    for step, prompts in enumerate(steps):
        texts.ahead(step)
        assert sum(path.stat().st_size for path in packs(tmp_path)) <= 30_000
        assert all(prompt in texts.cache for prompt in ["shown", *prompts])
        assert len(texts(prompts)) == 10
    assert steps[0][0] not in texts.cache and steps[-2][0] in texts.cache


def test_a_cache_too_small_for_what_is_needed_at_once_says_so(tmp_path):
    texts = word_conditioning(tmp_path, [], cache_gb=1e-6)
    with pytest.raises(
        ValueError, match="--cache-gb 1e-06: the prompts that are needed at once take .* raise"
    ):
        texts.prepare([f"prompt {n}" for n in range(100)])


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="--cache .* GB are needed, 1e-08 GB are free; choose another"):
        word_conditioning(tmp_path, []).prepare(["one"])
    assert packs(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    texts = word_conditioning(tmp_path, [])
    texts.cache.folder.parent.mkdir()
    texts.cache.folder.write_text("a file in the way")
    with pytest.raises(ValueError, match="--cache .* cannot be written to .*; choose another"):
        texts.prepare(["one"])


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_pack_is_encoded_again(damage, tmp_path, capsys):
    prompts = [f"prompt {n}" for n in range(40)]
    first = word_conditioning(tmp_path, [])
    first.prepare(prompts)
    expected = [{name: t.clone() for name, t in c.items()} for c in first(prompts)]
    (path,) = packs(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-50])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        content[-1] ^= 255
        path.write_bytes(content)
    seen = []
    again = word_conditioning(tmp_path, seen)
    again.prepare(prompts)
    assert same(again(prompts), expected)
    told = capsys.readouterr()
    assert "damaged" in told.out + told.err
    wanted = 1 if damage == "flipped" else 40
    assert seen[0] == "loaded" and len(seen) == 1 + wanted
    assert same(word_conditioning(tmp_path, [])(prompts), expected)


def test_what_another_run_deletes_is_read_on_or_encoded_again(tmp_path):
    seen = []
    texts = word_conditioning(tmp_path, seen)
    texts.prepare(["one", "two"])
    for path in packs(tmp_path):
        path.unlink()
    assert len(texts(["one", "two"])) == 2 and seen == ["loaded", "one", "two"]
    fresh = word_conditioning(tmp_path, seen)
    assert len(fresh(["one"])) == 1 and seen[3:] == ["loaded", "one"]


WORKER = """
import os, signal, sys, time
from pathlib import Path
from opd import conditioning
from tests.words import word_conditioning
conditioning.PACK = 1
folder, last = Path(sys.argv[1]), int(sys.argv[2])
seen = []
texts = word_conditioning(folder, seen)
encode = texts.family.encode_prompts
def slowly(text, prompts, device):
    time.sleep(0.02)
    if len(seen) > last:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(text, prompts, device)
texts.family.encode_prompts = slowly
print(texts.prepare([f"prompt {n}" for n in range(960)]))
"""


def start(folder, last: int = 10**6):
    """A process that encodes 960 prompts, 32 to a pack, and kills itself after `last`."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(last)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_loses_one_pack_and_two_at_once_get_along(tmp_path):
    killed = start(tmp_path, last=500)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL and 14 <= len(packs(tmp_path)) <= 16
    both = [start(tmp_path), start(tmp_path)]
    lacked = [int(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert max(lacked) <= 960 - 14 * 32
    seen = []
    texts = word_conditioning(tmp_path, seen)
    prompts = [f"prompt {n}" for n in range(960)]
    assert texts.prepare(prompts) == 0 and seen == []
    assert all(len(condition["words"]) == 3 for condition in texts(prompts))
    assert not list((tmp_path / "cache").rglob("*.tmp"))
