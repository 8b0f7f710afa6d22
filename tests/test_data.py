"""Prompt files, the prompts of a step, and the micro-batches of a rank, against brute force."""

from collections import Counter
from itertools import groupby

import pytest

from opd import data
from opd.data import MicroBatch, Prompt
from opd.formats.prompts import load_prompts, load_tasks

# ---- files -------------------------------------------------------------------------------------------------


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    "name, text, prompts",
    [
        (
            "a.txt",  # blank lines are dropped
            "\ufeffone\n\n  two words  \r\nthree\u2028still three\n",
            [Prompt("one", "t"), Prompt("two words", "t"), Prompt("three\u2028still three", "t")],
        ),
        (
            "a.jsonl",  # fields become metadata and may name the task
            '{"prompt": "x\u2028y", "tag": "a", "include": [{"class": "cat"}]}\n\n'
            '{"prompt": "z", "task": "other"}\n',
            [Prompt("x\u2028y", "t", {"tag": "a", "include": [{"class": "cat"}]}), Prompt("z", "other")],
        ),
        (
            "a.csv",  # and so do columns
            '\ufeffprompt,task,note\n"a, b",other,n\nc,,\n',
            [Prompt("a, b", "other", {"note": "n"}), Prompt("c", "t", {"note": ""})],
        ),
    ],
)
def test_what_a_file_holds(tmp_path, name, text, prompts):
    """Any task is accepted where none are given."""
    for tasks in (["t", "other"], None):
        found = load_prompts(write(tmp_path, name, text), "t", tasks)
        assert found == prompts and [p.metadata for p in found] == [p.metadata for p in prompts]


# (file name, content or None, expected error, pieces of the message)
BAD_FILES = [
    ("a.txt", None, FileNotFoundError, ["task 't'", "a.txt"]),
    ("a.csv", "prompt\n", ValueError, ["a.csv", "holds no prompt"]),
    ("a.parquet", "x", ValueError, ["a.parquet", "'.parquet'", ".txt, .jsonl, .csv"]),
    ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', ValueError, ["a.jsonl:2", "not JSON"]),
    ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', ValueError, ["a.jsonl:2", "no prompt"]),
    (
        "a.jsonl",
        '{"prompt": "x", "task": "u"}\n',
        ValueError,
        ["a.jsonl:1", "unknown task 'u'", "t, other", "--prompts"],
    ),
    ("a.csv", "text,task\nx,t\n", ValueError, ["a.csv:1", "no column 'prompt'", "'text'"]),
    ("a.txt", "x\n" + "y" * 10_000_000, ValueError, ["a.txt:2", "a prompt of 10000000 characters"]),
    ("a.txt", "x\nred\0dot\n", ValueError, ["a.txt:2", "holds a NUL"]),
    ("a.jsonl", '{"prompt": "half \\ud800"}\n', ValueError, ["a.jsonl:1", "half a surrogate pair"]),
    ("a.jsonl", "[" * 100_000, ValueError, ["a.jsonl:1", "not JSON"]),
    ("a.csv", "prompt\n" + "y" * 200_000, ValueError, ["a.csv:2", "not CSV"]),
    ("a.csv", 'prompt,task\n"x\ny",t\nz,u\n', ValueError, ["a.csv:4", "unknown task 'u'"]),
]


@pytest.mark.parametrize("name, content, error, pieces", BAD_FILES)
def test_bad_files_are_refused_by_line(name, content, error, pieces, tmp_path):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(error) as caught:
        load_prompts(str(tmp_path / name), "t", ["t", "other"])
    assert all(piece in str(caught.value) for piece in pieces), caught.value


def test_load_tasks_pools_by_task_and_refuses_an_empty_one(tmp_path):
    a = write(tmp_path, "a.jsonl", '{"prompt": "x", "task": "b"}\n{"prompt": "y"}\n')
    b = write(tmp_path, "b.txt", "z\n")
    assert load_tasks({"a": a, "b": b}) == {
        "a": [Prompt("y", "a")],
        "b": [Prompt("x", "b"), Prompt("z", "b")],
    }
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
        assert len(epochs) > 1 and all(
            sorted(e) == sorted(p.text for p in pools(**sizes)[task]) for e in epochs
        )
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
    assert other != forwards and [[p.task for p in s] for s in other] == [
        [p.task for p in s] for s in forwards
    ]


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
    assert sorted(n for b in batches for n, real in zip(b.samples, b.real, strict=True) if real) == sorted(
        task_of
    )
    sizes = {len(b.samples) for b in batches}
    assert 1 <= min(sizes) and max(sizes) <= min(size, min(sizes) + 1)
    for b in batches:
        kinds = [task_of[n] for n in b.samples]
        assert len(b.real) == len(b.samples) and len(set(b.real)) == 1
        assert len(set(kinds)) == len([kind for kind, _ in groupby(kinds)])  # every kind in one run
    for turn in zip(*ranks, strict=True):
        assert all(b.turn == [n for other in turn for n in other.samples] for b in turn)
    real = [b for b in batches if b.real[0]]
    assert len(batches) - len(real) < world
    cut = sum(len({task_of[n] for n in b.samples}) for b in real)
    assert cut <= len(real) + len(set(tasks)) - 1  # a kind is cut by ends of batches only


def test_micro_batches_are_even_and_few():
    """9 samples, at most 4 at once: 3 + 3 + 3, not 4 + 4 + 1; tasks share one where they fit."""
    assert [len(b.samples) for b in data.micro_batches(dict.fromkeys(range(9), "a"), 4, 1, 0)] == [3, 3, 3]
    assert data.micro_batches(dict(enumerate("abab")), 8, 1, 0) == [
        MicroBatch([0, 2, 1, 3], [1] * 4, [0, 2, 1, 3])
    ]
    two = [data.micro_batches(dict(enumerate("abb")), 1, 2, rank) for rank in (0, 1)]
    assert two == [
        [MicroBatch([0], [1], [0, 1]), MicroBatch([2], [1], [2, 2])],
        [MicroBatch([1], [1], [0, 1]), MicroBatch([2], [0], [2, 2])],
    ]  # the last is padding


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    for name in ("latin.txt", "latin.csv"):
        (tmp_path / name).write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name}: not UTF-8 .*save it as UTF-8"):
            load_prompts(str(tmp_path / name), "t", None)
