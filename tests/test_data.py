"""Where a source lies; prompt files, the prompts of a step, micro-batches of a rank, against brute force."""

import hashlib
import json
import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

import opd
from opd import data
from opd.data import MicroBatch, Prompt
from opd.files import digest, resolve
from opd.formats.hub import find_pipeline, locate
from opd.formats.lora_files import find_adapter
from opd.formats.prompts import load_prompts, load_tasks
from tests import tiny


# ---- files -------------------------------------------------------------------------------------------------
def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    return str(folder / name)


CATS = {"tag": "a", "include": [{"class": "cat"}]}
FILES = {
    "a.txt": (  # blank lines are dropped
        "\ufeffone\n\n  two words  \r\nthree\u2028still three\n",
        [Prompt("one", "t"), Prompt("two words", "t"), Prompt("three\u2028still three", "t")],
    ),
    "a.jsonl": (  # fields become metadata and may name the task
        json.dumps({"prompt": "x\u2028y"} | CATS) + '\n\n{"prompt": "z", "task": "other"}\n',
        [Prompt("x\u2028y", "t", CATS), Prompt("z", "other")],
    ),
    "a.csv": (  # and so do columns, but for blank cells
        '\ufeffprompt,task,route\n"a, b",other,n\nc,,\n',
        [Prompt("a, b", "other", {"route": "n"}), Prompt("c", "t")],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_holds(tmp_path, name):
    """Any task is accepted where none are given."""
    text, prompts = FILES[name]
    for tasks in (["t", "other"], None):
        found = load_prompts(write(tmp_path, name, text), "t", tasks)
        assert found == prompts and [p.metadata for p in found] == [p.metadata for p in prompts]


# (file name, content or None, pieces of the message)
BAD_FILES = [
    ("a.txt", None, ["a.txt: [Errno 2] No such file"]),
    ("a.csv", "prompt\n", ["a.csv", "holds no prompt"]),
    ("a.csv", "prompt\ncaf\udce9\n", ["a.csv: 'utf-8' codec can't decode"]),
    ("a.parquet", "x", ["a.parquet", "'.parquet'", ".txt, .jsonl, .csv"]),
    ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', ["a.jsonl:2", "not JSON"]),
    ("a.jsonl", '{"prompt": "x"}\n{"words": "y"}\n', ["a.jsonl:2", "no prompt"]),
    ("a.jsonl", '{"prompt": "x", "task": "u"}\n', ["a.jsonl:1", "unknown task 'u'", "t, other", "--prompts"]),
    ("a.txt", "x\nred\0dot\n", ["a.txt:2", "holds a NUL"]),
    ("a.jsonl", '{"prompt": "x", "task": "mean"}\n', ["a.jsonl:1", "'mean'", "another name"]),
    ("a.jsonl", '{"prompt": "half \\ud800"}\n', ["a.jsonl:1", "half a surrogate pair"]),
    ("a.jsonl", "[" * 100_000, ["a.jsonl:1", "not JSON"]),
    ("a.csv", "prompt\n" + "y" * 200_000, ["a.csv: not CSV"]),
    ("a.csv", 'prompt,task\n"x\ny",t\nz,u\n', ["a.csv:4", "unknown task 'u'"]),
]


@pytest.mark.parametrize("name, content, pieces", BAD_FILES)
def test_bad_files_are_refused_by_line(name, content, pieces, tmp_path):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(tmp_path / name), "t", ["t", "other"])
    assert all(piece in str(caught.value) for piece in pieces), caught.value


def test_load_tasks_pools_by_task_and_refuses_an_empty_one(tmp_path):
    a = write(tmp_path, "a.jsonl", '{"prompt": "x", "task": "b"}\n{"prompt": "y"}\n')
    b = write(tmp_path, "b.txt", "z\n")
    pools = {"a": [Prompt("y", "a")], "b": [Prompt("x", "b"), Prompt("z", "b")]}
    assert load_tasks({"a": a, "b": b}) == pools
    other = write(tmp_path, "c.jsonl", '{"prompt": "x", "task": "b"}\n')
    with pytest.raises(ValueError, match="task 'c' has no prompts.*c.jsonl.*names another task"):
        load_tasks({"c": other, "b": b})


# ---- the prompts of a step ---------------------------------------------------------------------------------
def pools(**sizes):
    return {task: [Prompt(f"{task}{i}", task) for i in range(size)] for task, size in sizes.items()}


@pytest.mark.parametrize(
    "sizes, mix, count",
    [
        (dict(a=5, b=3, c=7), dict(a=3, b=1, c=1), 4),
        (dict(a=4), dict(a=2), 3),
        (dict(a=2, b=11), dict(a=1, b=2), 7),
    ],
)
def test_ratio_and_epochs_by_brute_force(sizes, mix, count):
    steps = 120
    chosen = [p for step in range(steps) for p in data.prompts_of_step(pools(**sizes), mix, count, 0, step)]
    assert len(chosen) == steps * count
    cycle = sum(mix.values())
    for start in range(0, len(chosen) - cycle, cycle):  # the ratio holds in every round
        assert Counter(p.task for p in chosen[start : start + cycle]) == mix
    for task, size in sizes.items():
        texts = [p.text for p in chosen if p.task == task]
        epochs = [texts[i : i + size] for i in range(0, len(texts) - size + 1, size)]
        whole = sorted(p.text for p in pools(**sizes)[task])
        assert len(epochs) > 1 and all(sorted(epoch) == whole for epoch in epochs)
        assert size < 4 or len(set(map(tuple, epochs))) > 1  # shuffled anew


def test_tasks_are_interleaved_not_blocked():
    assert data.interleave({"a": 3, "b": 1}) == ["a", "a", "b", "a"]
    assert data.interleave({"a": 2, "b": 2}) == ["a", "b", "a", "b"]


def test_a_step_is_a_pure_function_of_seed_and_step():
    mix, many = dict(a=2, b=1), pools(a=20, b=9)
    forwards = [data.prompts_of_step(many, mix, 6, 3, step) for step in range(9)]
    data.permutation.cache_clear()
    backwards = [data.prompts_of_step(many, mix, 6, 3, step) for step in reversed(range(9))]
    assert forwards == backwards[::-1]
    other = [data.prompts_of_step(many, mix, 6, 4, step) for step in range(9)]
    tasks, others = ([[p.task for p in step] for step in steps] for steps in (forwards, other))
    assert other != forwards and others == tasks


def test_seed_of_tells_its_parts_apart_and_fits_63_bits():
    parts = [(0,), ("0",), (0, 1), (1, 0), (0, "1"), ("a", "b"), ("ab",), (0, "noise", 1), (0, "noise", 11)]
    seeds = [data.seed_of(*p) for p in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= s < 2**63 for s in seeds)
    assert data.seed_of(0, "noise", 1) == 2376061928063757211  # a run must resume on another machine


# ---- micro-batches -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", range(1, 6))
@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize(
    "tasks, numbers",
    [("aabab", None), ("abc" * 7, None), ("a", None), ("ab" * 16, None), ("babc", [9, 2, 30, 4])],
)
def test_every_sample_once_in_runs_of_tasks_and_ranks_in_step(tasks, numbers, size, world):
    task_of = dict(zip(numbers or range(len(tasks)), tasks, strict=True))
    ranks = [data.micro_batches(task_of, size, world, rank) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) >= 1
    batches = [b for batches in ranks for b in batches]
    real = [n for b in batches for n in b.samples if b.real]
    assert sorted(real) == sorted(task_of)
    sizes = {len(b.samples) for b in batches}
    assert 1 <= min(sizes) and max(sizes) <= min(size, min(sizes) + 1)
    for b in batches:
        kinds = [task_of[n] for n in b.samples]
        assert len(set(kinds)) == len([kind for kind, _ in groupby(kinds)])  # every kind in one run
    for turn in zip(*ranks, strict=True):
        assert all(b.turn == [n for other in turn for n in other.samples] for b in turn)
    real = [b for b in batches if b.real]
    assert len(batches) - len(real) < world
    cut = sum(len({task_of[n] for n in b.samples}) for b in real)
    assert cut <= len(real) + len(set(tasks)) - 1  # a kind is cut by ends of batches only


def test_micro_batches_are_even_and_few():
    """9 samples, at most 4 at once: 3 + 3 + 3, not 4 + 4 + 1; tasks share one where they fit."""
    assert [len(b.samples) for b in data.micro_batches(dict.fromkeys(range(9), "a"), 4, 1, 0)] == [3, 3, 3]
    (whole,) = data.micro_batches(dict(enumerate("abab")), 8, 1, 0)
    assert whole == MicroBatch([0, 2, 1, 3], True, [0, 2, 1, 3])
    two = [data.micro_batches(dict(enumerate("abb")), 1, 2, rank) for rank in (0, 1)]
    assert two == [
        [MicroBatch([0], True, [0, 1]), MicroBatch([2], True, [2, 2])],
        [MicroBatch([1], True, [0, 1]), MicroBatch([2], False, [2, 2])],
    ]  # the last is padding


def test_ranks_share_the_samples_of_several_shapes():
    """A micro-batch has one shape, and shapes that one rank alone has samples of cost the others nothing."""
    shapes = dict(enumerate("abbcdbe"))
    ranks = [data.micro_batches(dict.fromkeys(range(7), "x"), 4, 3, rank, shapes) for rank in range(3)]
    batches = [b for batches in ranks for b in batches]
    assert all(len({shapes[n] for n in b.samples}) == 1 for b in batches)
    assert sorted(n for b in batches for n in b.samples if b.real) == list(range(7))
    assert {len(batches) for batches in ranks} == {3} and sum(not b.real for b in batches) == 2


PACKAGE = Path(opd.__file__).parent
PACKAGED = "opd/mini/prompts/text.test.txt"


def texts_of(source):
    return [prompt.text for prompt in load_prompts(source, "text", ["text"])]


def test_a_source_lies_beside_the_user_else_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    packaged, own = PACKAGE / "mini/prompts/text.test.txt", tmp_path / PACKAGED
    assert resolve(PACKAGED) == locate("prompts", PACKAGED) == packaged
    assert texts_of(PACKAGED) == [line.strip() for line in packaged.read_text().splitlines() if line.strip()]
    assert locate("adapter", "opd/mini/weights/text") == PACKAGE / "mini/weights/text"
    own.parent.mkdir(parents=True)
    own.write_text("mine\n")
    assert resolve(PACKAGED).resolve() == locate("prompts", PACKAGED).resolve() == own
    assert texts_of(PACKAGED) == ["mine"]
    assert resolve(f"~/{PACKAGED}") == resolve(str(own)) == own
    # README.md and tests/ lie beside the package too, but nobody who names them means those.
    for source in ("README.md", "tests/tiny.py", "opd/nothing.txt", "./opd/mini/weights/base"):
        assert resolve(source) == Path(source) and not resolve(source).exists()
    for source in ("opd/mini/weights/nothing", "./opd/mini/weights/base"):
        with pytest.raises(FileNotFoundError, match=f"model '{source}': no such file or directory"):
            locate("model", source)
        with pytest.raises(ValueError, match="No such file|unknown ending"):
            load_prompts(source, "task", ["task"])


OTHERS = {"nowhere": "no such file or directory", "folder": "not a pipeline", "x.gguf": "not a pipeline"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_pipeline_is_named(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.gguf").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=OTHERS[name]) as caught:
        find_pipeline(str(tmp_path / name))
    assert f"model '{tmp_path / name}'" in str(caught.value)


# What else a repository may list: all weights again, and what diffusers has no need of.
URL = "https://huggingface.co/owner/name/blob/main/x.safetensors"


@pytest.mark.parametrize("source", [r"C:\models\x", URL, "owner/name/folder"])
@pytest.mark.parametrize("find", [find_pipeline, find_adapter])
def test_what_is_neither_path_nor_hub_id_is_told_the_forms_of_one(find, source):
    message = "no Hub id, which is owner/name, .*owner/name:FOLDER"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        find(source)
    assert repr(source) in str(caught.value)


SHA = "0123456789" * 4
UNWANTED = """
README.md LICENSE.md sd3.5_medium.safetensors SD3.5M_example_workflow.json
text_encoders/t5xxl_fp16.safetensors text_encoder/generation_config.json
text_encoder/model.fp16.safetensors transformer/diffusion_pytorch_model.bin
transformer/README.md vae/diffusion_pytorch_model.fp16.safetensors
""".split()
NEEDED = ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer.json"]


def cached(pipeline, cache, monkeypatch, listed):
    """owner/name as diffusers leaves it in the Hub's cache; the listing has `listed` too. No network."""
    repo = cache / "models--owner--name"
    snapshot = shutil.copytree(pipeline, repo / "snapshots" / SHA)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
    write_tree_cache(str(repo), SHA, {name: TreeCacheEntry(1, "0" * 40) for name in names + listed})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_what_diffusers_left_in_the_cache_is_enough_off_the_network(world, tmp_path, monkeypatch):
    snapshot = cached(world / "pipeline", tmp_path, monkeypatch, UNWANTED)
    assert find_pipeline("owner/name") == snapshot
    tiny.build(tiny.config(world, teachers={"red": "owner/name", "blue": str(world / "blue")}))
    for name in NEEDED:
        moved = (snapshot / name).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=f"model 'owner/name': .*{name}") as caught:
            find_pipeline("owner/name")
        assert "\n" not in str(caught.value)
        moved.rename(snapshot / name)


def test_a_repository_of_a_variant_alone_is_fetched_as_that(world, tmp_path, monkeypatch):
    pipeline = shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    for file in pipeline.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    snapshot = cached(pipeline, tmp_path, monkeypatch, ["README.md"])
    assert find_pipeline("owner/name") == snapshot
    (snapshot / "transformer/diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model 'owner/name': .*pytorch_model.fp16.safetensors"):
        find_pipeline("owner/name")


def test_of_a_large_file_the_size_and_the_ends_tell(tmp_path):
    """A file of weights: a header in front, numbers that training moves behind."""
    file, size = tmp_path / "x", 3 * 2**20
    seen = set()
    for change in (None, 7, size - 7, size // 2):
        content = bytearray(size)
        if change is not None:
            content[change] = 1
        file.write_bytes(content)
        seen.add(digest(file, most=2**20))
        assert digest(file, most=size) == hashlib.sha256(content).hexdigest()
    file.write_bytes(bytes(size + 1))
    assert len(seen | {digest(file, most=2**20)}) == 4  # a change in the middle is not seen
