"""The script of the real size, rehearsed at a tiny one."""

import re

import pytest

from opd.bench import fullsize


def test_the_full_size_script_measures_what_is_predicted(tmp_path, capsys):
    """What is counted agrees to the byte, what is followed (activations) lies below its prediction."""
    fullsize.main(["--size", "tiny", "--out", str(tmp_path)])
    made = tmp_path / "tiny"
    table = (made / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| (\S+) \| (\S+) \| \S+ \|$", table, re.MULTILINE)
    names = ["base", "adapters", "optimizer", "gradients", "average", "vae", "activations", "peak"]
    assert [name for name, *_ in rows] == names * 2
    for name, measured, predicted in rows:
        if name in ("activations", "peak"):
            assert 0.5 * float(predicted) < float(measured) <= 1.05 * float(predicted)
        else:
            assert measured == predicted
    for run in ("sd35-24gb", "sd35-grpo-geneval"):
        assert f"`train.py {run}`: start" in table
        assert (made / run / "student" / "adapter_model.safetensors").is_file()
    assert (made / "images" / "grid.png").is_file()
    assert "load into diffusers: " in table


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: --size 'huge' is unknown; choose from tiny, sd35-medium"):
        fullsize.main(["--size", "huge", "--out", str(tmp_path)])
