"""Inputs that nobody would write, by the hundred: each is used, or refused in a line of our own, soon, and
without a change to what is saved."""

import json
import shutil
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample
from opd.config import STAGES
from opd.data import load_prompts
from opd.families import sd3
from opd.formats import lora_files
from opd.formats.latents import find_files, read_metadata
from opd.model import Model
from opd.settings import from_json, read_config, to_json
from tests.test_settings import DISTIL, FINETUNE

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LEAST = {}
"""Test -> how many inputs it had refused."""


def fuzz(examples: int):
    """The same examples every time."""
    checks = list(HealthCheck)
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks
    )


def refused(name: str, call) -> bool:
    """Whether the input is refused; AssertionError where a library raises, or it takes long."""
    started = time.monotonic()
    try:
        call()
        return False
    except (ValueError, OSError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        assert Path(where).is_relative_to(ROOT), f"{where} raised {error!r}"
        assert str(error).strip() and "\n" not in str(error).strip(), repr(error)
        LEAST[name] = LEAST.get(name, 0) + 1
        return True
    finally:
        assert time.monotonic() - started < 10


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 10**12, 2**63, -(2**63) - 1]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "..", "a/b", "\0", "../../etc", "base", "nan", "x" * 5000]),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
damage = st.tuples(
    st.sampled_from(["cut", "flip", "nudge", "noise", "empty"]), st.integers(0, 10**6), st.binary(max_size=40)
)


def damaged(content: bytes, how: tuple[str, int, bytes]) -> bytes:
    kind, place, noise = how
    place %= max(1, len(content))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    if kind == "nudge":  # a letter stays a letter
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    if kind == "noise":
        return content[:place] + noise + content[place:]
    return b""


def with_junk(content: bytes, data) -> bytes:
    """A JSON object with one of its values replaced."""
    values = json.loads(content)
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(junk)
    return json.dumps(values).encode()


@contextmanager
def broken(file: Path, content: bytes):
    """Inside, the file holds `content`."""
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


# ---- settings ----------------------------------------------------------------------------------------------

GROW = STAGES["grpo"](
    out="run",
    model="m",
    prompts={"red": "a"},
    rewards={"red": "m:f"},
    train_rewards={"red": "m:f"},
)


@fuzz(150)
@given(st.sampled_from([DISTIL, FINETUNE, GROW]), st.data())
def test_values_of_every_field(cfg, data):
    values = json.loads(json.dumps(to_json(cfg)))
    name = data.draw(st.sampled_from(sorted(values)))
    values[name] = data.draw(junk)
    refused("values", lambda: from_json(values).check(1))


@fuzz(40)
@given(damage)
def test_files_of_settings(tmp_path_factory, how):
    file = tmp_path_factory.getbasetemp() / "config.json"
    file.write_bytes(damaged(json.dumps(to_json(DISTIL)).encode(), how))
    refused("config.json", lambda: read_config(file).check(1))


@fuzz(60)
@given(st.data())
def test_settings_in_a_png(world, data):
    args = sample.Arguments(model=str(world / "pipeline"), adapters={"red": str(world / "red")})
    values = json.loads(json.dumps(vars(args))) | {"prompts": ["a"]}
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(junk)

    def again():
        used = sample.trusted(args, values)
        sample.check(used)

    refused("png", again)


# ---- files -------------------------------------------------------------------------------------------------


@fuzz(90)
@given(
    st.sampled_from([".txt", ".jsonl", ".csv"]), st.one_of(st.binary(max_size=200), damage), st.lists(junk)
)
def test_prompt_files(tmp_path_factory, suffix, content, rows):
    file = tmp_path_factory.getbasetemp() / f"prompts{suffix}"
    if isinstance(content, tuple):
        lines = [json.dumps({"prompt": "a dot", "task": "red"})] + [
            json.dumps({"prompt": row}) for row in rows
        ]
        content = damaged("\n".join(lines).encode(), content)
    file.write_bytes(content)
    refused("prompts", lambda: load_prompts(str(file), "red", ["red"]))


@fuzz(50)
@given(junk, junk)
def test_metadata_of_images(tmp_path_factory, name, caption):
    folder = tmp_path_factory.getbasetemp() / "images"
    folder.mkdir(exist_ok=True)
    row = {"file_name": name, "prompt": caption}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    refused("images", lambda: find_files(folder, read_metadata(folder)[1]))


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "sub/../../secret.png", "link.png", "a\0b", 7]
)
def test_no_image_is_read_outside_its_folder(tmp_path, name):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(
        ValueError, match="metadata.jsonl: line 1: .*(leads out of the folder|expected the path)"
    ):
        find_files(folder, [{"file_name": name}])


PARTS = ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]


@fuzz(40)
@given(st.sampled_from(PARTS), st.data())
def test_parts_of_pipelines(world, tmp_path_factory, part, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_pipeline"
    if not folder.exists():
        shutil.copytree(world / "pipeline", folder)
    whole = (folder / part).read_bytes()
    content = data.draw(st.sampled_from([with_junk(whole, data), damaged(whole, data.draw(damage))]))
    with broken(folder / part, content):
        refused("pipelines", lambda: Model.plan(str(folder), "float32", "", CPU, True))


ADAPTER = ["adapter_model.safetensors", "adapter_config.json"]


@fuzz(90)
@given(st.sampled_from(ADAPTER), st.data())
def test_adapters(world, tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_adapter"
    if not folder.exists():
        shutil.copytree(world / "red", folder)
    whole = (folder / name).read_bytes()
    content = damaged(whole, data.draw(damage))
    if name.endswith("json") and data.draw(st.booleans()):
        content = with_junk(whole, data)
    skeleton = sd3.skeleton(world / "pipeline")

    def read():
        lora_files.check_fits(lora_files.read_lora(str(folder)), skeleton, sd3.LORA_TARGETS)

    with broken(folder / name, content):
        refused("adapters", read)


def test_there_were_enough_of_them(request):
    """Of those above, which run before; where only some of them are chosen, nothing is said."""
    fuzzed = {name for name, value in globals().items() if hasattr(value, "hypothesis")}
    chosen = {item.originalname for item in request.session.items}
    if fuzzed <= chosen:
        assert len(LEAST) == len(fuzzed) and sum(LEAST.values()) >= 300, LEAST


# ---- strangers' pictures -----------------------------------------------------------------------------------


def test_a_png_fetches_nothing_unless_it_is_trusted(world, monkeypatch, capsys):
    settings = json.loads(json.dumps(vars(sample.Arguments())))
    settings |= {"prompts": ["a"], "model": "stranger/model", "adapters": {"x": "stranger/lora:sub"}}
    args = sample.Arguments(again="a.png")
    with pytest.raises(
        ValueError, match="'stranger/model' is not on this machine; add --trust-png to fetch it"
    ):
        sample.trusted(args, settings)
    local = settings | {"model": str(world / "pipeline")}
    with pytest.raises(ValueError, match="'stranger/lora:sub' is not on this machine; add --trust-png"):
        sample.trusted(args, local)
    assert f"a.png was made with {str(world / 'pipeline')!r}" in capsys.readouterr().out
    used = sample.trusted(sample.Arguments(again="a.png", trust_png=True), settings)
    assert used.model == "stranger/model" and not used.trust_png
