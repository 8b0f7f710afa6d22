"""Inputs that nobody would write: each is used, or soon refused in a line of our own."""

import json
import shutil
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.config import STAGES
from opd.data import Prompt
from opd.families import sd3
from opd.formats import lora_files
from opd.formats.latents import find_files
from opd.formats.settings import from_json, to_json
from tests.test_config import EVERY

ROOT = Path(__file__).parents[1]


def fuzz(examples: int):
    checks = list(HealthCheck)
    same = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": checks}
    return settings(max_examples=examples, **same)


def used_or_refused(call) -> None:
    """AssertionError where a library raises, or it takes long."""
    started = time.monotonic()
    try:
        call()
    except (ValueError, OSError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        assert Path(where).is_relative_to(ROOT), f"{where} raised {error!r}"
        assert str(error).strip() and "\n" not in str(error).strip(), repr(error)
    assert time.monotonic() - started < 10


STRANGE = [-1, 0, 10**12, 2**63, "", "..", "a/b", "\0", "../../etc", "base", "nan", "x" * 5000]
strange = st.sampled_from(STRANGE)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | strange
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
damage = st.tuples(st.sampled_from(["cut", "nudge", "noise"]), st.integers(0, 10**6), st.binary(max_size=40))


def damaged(content: bytes, how: tuple[str, int, bytes]) -> bytes:
    kind, place, noise = how
    place %= max(1, len(content))
    if kind == "cut":
        return content[:place]
    if kind == "nudge":  # a letter stays a letter
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    return content[:place] + noise + content[place:]


def with_junk(content: bytes, data) -> bytes:
    values = json.loads(content)
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(junk)
    return json.dumps(values).encode()


@contextmanager
def broken(file: Path, content: bytes):
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


@fuzz(120)
@given(st.sampled_from(EVERY), st.data())
def test_values_of_every_field(cfg, data):
    values = json.loads(with_junk(json.dumps(to_json(cfg)).encode(), data))
    used_or_refused(lambda: from_json(values, STAGES).check(1))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "sub/../../secret.png", "link.png"])
def test_no_image_is_read_outside_its_folder(tmp_path, name):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="leads out of the folder"):
        find_files(folder, [Prompt("x", "images", {"file_name": name})])


@fuzz(60)
@given(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]), st.data())
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
        lora_files.check_fits(lora_files.read_lora(str(folder)), skeleton)

    with broken(folder / name, content):
        used_or_refused(read)
