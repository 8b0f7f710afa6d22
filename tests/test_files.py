"""Where a source lies: beside the user, else in the package."""

import hashlib
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import opd
from opd.files import digest, resolve
from opd.formats.hub import find_pipeline, locate
from opd.formats.prompts import load_prompts
from opd.model import Model

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


NO_PIPELINE = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a file": lambda path: path.write_text("x"),
}


@pytest.mark.parametrize("make", NO_PIPELINE.values(), ids=NO_PIPELINE)
def test_what_is_no_pipeline_is_named(make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=f"model '{tmp_path}/model'"):
        find_pipeline(str(tmp_path / "model"))


OTHER = "is a OtherPipeline; known pipelines: .*StableDiffusion3Pipeline"
INDEXES = [("{", "not JSON"), ("{}", "no _class_name"), ('{"_class_name": "OtherPipeline"}', OTHER)]


@pytest.mark.parametrize("content, message", INDEXES)
def test_an_index_of_no_known_pipeline_is_named(content, message, world, tmp_path):
    """Its other parts: tests/test_faults.py."""
    shutil.copytree(world / "pipeline", tmp_path / "copy")
    (tmp_path / "copy" / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Model.plan(str(tmp_path / "copy"), "float32", "", torch.device("cpu"), True)


# As SD3.5-Medium's repository lists them: all weights are there three times.
WANTED = """
README.md model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors
text_encoder_2/config.json text_encoder_2/model.safetensors
text_encoder_3/config.json text_encoder_3/model.safetensors.index.json
text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
tokenizer/merges.txt tokenizer/vocab.json tokenizer/tokenizer_config.json
tokenizer_2/merges.txt tokenizer_3/spiece.model tokenizer_3/tokenizer.json
transformer/config.json transformer/diffusion_pytorch_model.safetensors
vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()
UNWANTED = """
LICENSE.md mmdit-x.png sd3.5_medium.safetensors SD3.5M_example_workflow.json
text_encoders/clip_g.safetensors text_encoders/t5xxl_fp16.safetensors
text_encoder/model.fp16.safetensors text_encoder_3/model.fp16-00001-of-00002.safetensors
text_encoder_3/model.safetensors.index.fp16.json
transformer/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.safetensors
""".split()


def test_of_a_repository_only_the_pipelines_files_are_fetched(world, monkeypatch):
    """By the Hub's own filter."""
    fetched = []

    def download(repo, allow_patterns, ignore_patterns):
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        fetched.extend(filter_repo_objects(WANTED + UNWANTED, **patterns))
        return str(world / "pipeline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_pipeline("owner/name") == world / "pipeline"
    assert sorted(fetched) == sorted(WANTED)


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
