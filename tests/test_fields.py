"""Every setting does something: changed, it changes the outcome of a real run, or it is refused by name.

What to change, and where it can matter, is in tests/field_cases.py. An outcome is what a user could notice of
a run; config.json is left out, as it holds every field anyway.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import train
from opd import compiled, ranks
from opd.config import STAGES, RunConfig
from opd.settings import field_names, to_json
from tests import tiny
from tests.field_cases import BASES, CASES

EVERY_FIELD = [(stage, setting.name) for stage, kind in STAGES.items() for setting in fields(kind)]
VARIABLE = (
    "seconds",
    "samples_per_second",
    "states_per_second",
)  # of a row of metrics.jsonl: no two runs agree on them


@pytest.mark.parametrize("stage, name", EVERY_FIELD, ids=map("-".join, EVERY_FIELD))
def test_a_changed_field_changes_what_it_should_or_is_refused(outcome_of, stage, name):
    case = CASES[stage][name]
    before = outcome_of(stage, case.under)
    assert before.error == ""
    after = [outcome_of(stage, case.under | {name: value}) for value in case.values]
    if case.refused:
        for outcome in after:
            assert case.refused in outcome.error and outcome.student == {}
        return
    for part in case.changes:
        for one, other in combinations([before, *after], 2):
            assert getattr(one, part) != getattr(other, part), part
    for outcome in after:
        assert outcome.error == "" or "error" in case.changes
        for part in case.keeps:
            assert getattr(outcome, part) == kept(before, part), part


def kept(outcome: "Outcome", part: str):
    """What a part must equal that stays as it was; another order of summation may change the last digits."""
    if part == "losses":
        return pytest.approx(outcome.losses, rel=1e-4, abs=2e-7)  # GRPO's at ratio 1 are the last digit of 1
    return getattr(outcome, part)


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_has_a_case_and_every_case_a_field(stage):
    assert set(CASES[stage]) == field_names(STAGES[stage])
    for name, case in CASES[stage].items():
        assert case.values and (case.refused or case.changes), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_settings_have_the_same_outcome(place, stage):
    """Else a difference would say nothing. And the parts that are compared hold something."""
    settings = {"sample_every": 1, "eval_steps": 2}
    one, other = (outcome(run(place, configured(stage, settings))) for _ in range(2))
    assert one == other
    for part in ("files", "student", "state", "rows", "losses", "pictures", "printed", "passes", "samples"):
        assert getattr(one, part), part


# ---- outcomes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run left behind, made comparable: nothing here depends on the clock or on where it ran."""

    error: str
    """How it ended, "" if well."""
    printed: list[str]
    files: list[str]
    """In the run's folder and beside it."""
    student: dict[str, str]
    """File -> digest: the weights that the run ships; the copy for diffusers has alpha in its numbers."""
    state: dict[str, str]
    """File -> digest: what it resumes from."""
    pictures: dict[str, str]
    """File -> digest: the sample grids."""
    scores: dict[str, str]
    """File -> digest: scores.json; table.txt has settings in its heading."""
    rows: list[str]
    """The lines of metrics.jsonl, without times."""
    losses: list[float]
    passes: int
    """Forward passes of transformer blocks, those of recomputation too."""
    samples: int
    """Samples that the transformer saw."""


@dataclass
class Ran:
    """A run that has ended: its folder, and what was noted while it went."""

    folder: Path
    error: str = ""
    printed: str = ""
    passes: int = 0
    samples: int = 0


def outcome(ran: Ran) -> Outcome:
    files = sorted(names_below(ran.folder))
    rows = []
    for file in files:
        if file.endswith("metrics.jsonl"):
            rows += [json.loads(line) for line in (ran.folder / file).read_text().splitlines()]
    for row in rows:
        for name in VARIABLE:
            row.pop(name, None)
    return Outcome(
        error=ran.error,
        printed=[line for line in ran.printed.splitlines() if not line.startswith("time:")],
        files=[re.sub(r"tfevents\..*", "tfevents", file) for file in files],
        student=digests(ran.folder, files, r"/student/.*model\.safetensors$"),
        state=digests(ran.folder, files, r"/state\.safetensors$"),
        pictures=digests(ran.folder, files, r"\.png$"),
        scores=digests(ran.folder, files, r"/scores\.json$"),
        rows=[json.dumps(row) for row in rows],
        losses=[row["loss"] for row in rows],
        passes=ran.passes,
        samples=ran.samples,
    )


def names_below(folder: Path) -> list[str]:
    """Files, seen from `folder`; not those behind the link `place`."""
    names = []
    for path, _, files in os.walk(folder):
        names += [str((Path(path) / file).relative_to(folder)) for file in files]
    return names


def digests(folder: Path, files: list[str], pattern: str) -> dict[str, str]:
    """Without the name of the run's folder, so that --out changes nothing here."""
    found = {}
    for file in files:
        if re.search(pattern, file):
            _, _, inside = file.partition("/")
            found[inside] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    return found


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome_of(place):
    """(stage, settings beside those of BASES) -> the outcome; every run is made once."""
    known = {}

    def find(stage: str, settings: dict) -> Outcome:
        cfg = configured(stage, settings)
        key = json.dumps(to_json(cfg))
        if key not in known:
            known[key] = outcome(run(place, cfg))
        return known[key]

    return find


def configured(stage: str, settings: dict) -> RunConfig:
    return replace(STAGES[stage](), **BASES[stage] | settings)


def run(place: Path, cfg: RunConfig) -> Ran:
    """`train.py --config FILE` in a new folder, in this process."""
    folder = place.parent / "runs" / str(len(list((place.parent / "runs").iterdir())))
    folder.mkdir()
    (folder / "place").symlink_to(place)
    file = place.parent / "config.json"
    file.write_text(json.dumps(to_json(cfg)))
    ran, printed = Ran(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, counting(ran):
        patch.setattr(compiled, "BACKEND", "eager")  # the same graphs without minutes of compiling
        patch.setattr(sys, "argv", ["train.py", "--config", str(file)])
        patch.chdir(folder)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            ran.error = ending()
    ran.printed = printed.getvalue()
    return ran


def ending() -> str:
    """Run train.py; returns how it ended, and leaves no process group behind."""
    try:
        train.main()
    except (SystemExit, ArithmeticError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.distributed.is_initialized():
            ranks.stop()
    return ""


@contextlib.contextmanager
def counting(ran: Ran):
    """Note what the transformer is asked for, whoever holds it."""

    def note_pass(module, given):
        if isinstance(module, JointTransformerBlock):
            ran.passes += 1

    def note_samples(module, given, answer):
        if isinstance(module, SD3Transformer2DModel):
            ran.samples += len(answer[0])

    with register_module_forward_pre_hook(note_pass), register_module_forward_hook(note_samples):
        yield


# ---- what the runs read --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The tiny world with a transformer of one block, other pipelines, and two sets of images."""
    folder = tmp_path_factory.mktemp("fields") / "place"
    (folder.parent / "runs").mkdir()
    tiny.make_world(folder, layers=1)
    tiny.make_pipeline_with_t5(folder / "pipeline_with_t5", layers=1)
    other = tiny.make_pipeline(folder / "other_pipeline", layers=1)
    halve(other / "transformer" / "diffusion_pytorch_model.safetensors")
    for seed, name in enumerate(("images", "other_images")):
        save_images(folder / name, seed)
    return folder


def halve(file: Path) -> None:
    """All weights of a file."""
    save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file)


def save_images(folder: Path, seed: int) -> None:
    """A --data directory of noisy pictures, one per red prompt."""
    folder.mkdir()
    lines = []
    noise = np.random.default_rng(seed)
    for number, prompt in enumerate(tiny.PROMPTS["red"]):
        pixels = noise.integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
