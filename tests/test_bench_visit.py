"""The visit to a GPU, rehearsed on the CPU, and its bookkeeping with parts that take no time."""

import json

import pytest
import torch

from opd.bench import visit as bench_visit
from opd.bench.visit import Part, main, make, visit


def test_the_rehearsal_runs_a_real_part_and_writes_its_rows(tmp_path, capsys):
    """Both structures: the real command at its tiny size. (Of the other parts the kernels' tests run in
    tests/test_kernels.py, and the distillation is the README's first command, as in tests/test_mini.py.)"""
    assert main(["--rehearse", "--out", str(tmp_path), "--parts", "loop-512-1"]) == 0
    text = (tmp_path / "tables.md").read_text()
    for structure in ("ours", "released"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| tiny | 64 | 1 | {structure}, ")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        measured = json.loads((tmp_path / "loop-512-1.measured.json").read_text())["structures"][structure]
        assert cells[4] == f"{measured['seconds_per_update']:.4g}" and len(cells) == 9


def stub(name, code, limit=60):
    return Part(name, ["-c", code], limit, {"WORD": name})


def test_a_part_that_failed_or_hung_is_named_and_tried_again(tmp_path, capsys):
    good = stub("good", "import os; print('hello from', os.environ['WORD'])")
    bad, slow = stub("bad", "raise SystemExit(3)"), stub("slow", "import time; time.sleep(60)", limit=2)
    assert make([good, bad, slow], tmp_path, 1000) == 1
    shown = capsys.readouterr()
    assert "bad: failed with exit status 3" in shown.out and "slow: stopped after 2 s" in shown.out
    assert "not measured: bad, slow" in shown.err
    assert "hello from good" in (tmp_path / "tables.md").read_text()
    mended = stub("bad", "print('well')")
    assert make([good, mended], tmp_path, 1000) == 0
    shown = capsys.readouterr().out
    assert "good: done before" in shown and "bad: done\n" in shown


def test_no_part_begins_that_could_outlast_the_visit(tmp_path, capsys):
    assert make([stub("long", "", limit=300)], tmp_path, 200) == 1
    assert "long: left for another visit" in capsys.readouterr().out


@pytest.mark.parametrize("rehearse", [False, True])
def test_parts_have_names_of_their_own_and_end_within_ten_minutes(tmp_path, rehearse):
    parts = visit(tmp_path, rehearse)
    assert len({part.name for part in parts}) == len(parts)
    assert all(0 < part.limit < 600 for part in parts)


@pytest.mark.parametrize("rehearse", [False, True])
def test_flags_of_every_measurement_are_ones_that_opd_bench_takes(tmp_path, rehearse):
    for part in visit(tmp_path, rehearse):
        if part.arguments[:2] == ["-m", "opd.bench"]:
            bench_visit.bench.work_of(bench_visit.bench.parser().parse_args(part.arguments[2:])).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "visit")]) == 2
    assert "no GPU: nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "visit").exists()


def test_an_unknown_part_is_one_line(tmp_path, capsys):
    assert main(["--rehearse", "--out", str(tmp_path), "--parts", "loop"]) == 1
    assert "--parts 'loop' is unknown; choose from kernel-tests, " in capsys.readouterr().err
