"""What many prompts take, rehearsed on few."""

import re

import pytest

from opd.bench import text as bench_text


def test_windows_of_many_prompts_stay_within_the_cache(tmp_path, capsys):
    out = tmp_path / "made"
    flags = "--size tiny --prompts 400 --windows 3 --cache-gb 3e-4 --out"
    bench_text.main([*flags.split(), str(out)])
    shown = capsys.readouterr().out
    assert "10 steps of 40 prompts drawn" in shown
    windows = re.findall(r"^steps (\d+) to (\d+): \S+ s, then (\S+) GB on disk$", shown, re.MULTILINE)
    assert [int(first) for first, *_ in windows] == [0, *(int(end) for _, end, _ in windows[:2])]
    assert 1e-4 < max(float(size) for *_, size in windows) <= 3e-4
    assert not out.exists()
    out.mkdir()
    with pytest.raises(SystemExit, match="exists, and would be deleted"):
        bench_text.main([*flags.split(), str(out)])


def test_a_kill_in_the_middle_and_two_at_once(tmp_path, capsys):
    bench_text.main([*"--company --size tiny --prompts 800 --out".split(), str(tmp_path / "made")])
    shown = capsys.readouterr().out
    found = re.search(r"killed: (\d+) .* (\d+) are kept, in (\d+) packs", shown)
    encoded, kept, packs = map(int, found.groups())
    assert 400 <= kept <= encoded <= kept + bench_text.PER_PACK and kept == packs * bench_text.PER_PACK
    found = re.search(r"; (\d+) prompts were .* encoded (\d+) and (\d+)", shown)
    lacked, *counts = map(int, found.groups())
    assert lacked == 800 - kept and lacked <= sum(counts) <= 2 * lacked
    assert "all 800 are right" in shown and " 0 half files" in shown
