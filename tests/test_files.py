"""Where a source lies: beside the user, else in the package."""

from pathlib import Path

import pytest

import opd
from opd.data import load_prompts
from opd.files import find_pipeline, locate, resolve

PACKAGE = Path(opd.__file__).parent
PACKAGED = "opd/mini/prompts/text.test.txt"


def test_a_source_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = PACKAGE / "mini/prompts/text.test.txt"
    assert resolve(PACKAGED) == file and locate("prompts", PACKAGED) == file
    texts = [prompt.text for prompt in load_prompts(PACKAGED, "text", ["text"])]
    assert texts == [line.strip() for line in file.read_text().splitlines() if line.strip()]
    assert locate("adapter", "opd/mini/weights/text") == PACKAGE / "mini/weights/text"


def test_what_lies_beside_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / PACKAGED
    own.parent.mkdir(parents=True)
    own.write_text("mine\n")
    assert resolve(PACKAGED).resolve() == own and locate("prompts", PACKAGED).resolve() == own
    assert [prompt.text for prompt in load_prompts(PACKAGED, "text", ["text"])] == ["mine"]


def test_other_sources_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n")
    assert resolve("~/a.txt") == tmp_path / "a.txt" and resolve(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    # README.md and tests/ lie beside the package too, but nobody who names them means those.
    for source in ("README.md", "tests/tiny.py", "opd/nothing.txt", "nothing.txt", "./opd/mini"):
        assert resolve(source) == Path(source) and not resolve(source).exists()


@pytest.mark.parametrize("source", ["./opd/mini/weights/base", "opd/mini/weights/nothing"])
def test_what_is_nowhere_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"model '{source}': no such file or directory"):
        locate("model", source)
    with pytest.raises(FileNotFoundError, match=f"no file '{source}'"):
        load_prompts(source, "task", ["task"])


@pytest.mark.parametrize(
    "content, message",
    [("{", "model_index.json: not JSON"), ("[1]", "expected an object"), ("{}", "no _class_name")],
)
def test_a_broken_index_of_a_pipeline_is_named(content, message, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_pipeline(str(tmp_path), "StableDiffusion3Pipeline")
