"""The top-level folder `kernels/`: it hides no package of that name, and an installed wheel has it as
`opd.kernels`. The modules of the package stand in one order, and each imports only from above it."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT, path=""):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = (sys.executable, *command)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def stranger(tmp_path):
    """A folder with an installed package `kernels`, as `pip install kernels` would leave it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text('__version__ = "0.10.0"\nWHOSE = "the stranger"\n')
    metadata = tmp_path / "kernels-0.10.0.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n")
    return tmp_path


def test_the_stranger_keeps_its_name_and_ours_is_below_opd(stranger):
    imports = ["import kernels", "from opd import kernels as ours"]
    shown = "print(kernels.WHOSE, '|', ours.sde_step.__module__)"
    for order in (imports, reversed(imports)):
        assert run("-c", "; ".join([*order, shown]), path=stranger) == "the stranger | opd.kernels.ops\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=left_out)
    run("-c", f"import setuptools.build_meta as build; build.build_wheel({str(out)!r})", cwd=source)
    (wheel,) = out.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_has_every_module_the_miniature_and_no_top_level_kernels(installed):
    code = {path.relative_to(ROOT) for path in (ROOT / "opd").rglob("*.py")}
    code |= {"opd" / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == code
    assert not (installed / "kernels").exists()
    for folder in ("opd/mini/weights", "opd/mini/prompts"):
        shipped = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert shipped
        for path in shipped:
            assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


A_STEP = """
import sys
import torch, opd.kernels.fused
from opd import flow, kernels
z = torch.zeros(1, 4)
transition = flow.ode_transition(torch.tensor(0.5), torch.tensor(0.4), 0.0)
x_next, _ = kernels.sde_step(z, z + 1, transition, seed=1)
print(kernels.__file__, opd.kernels.fused.__file__, x_next[0, 0].item())
print({"diffusers", "transformers", "peft"} & sys.modules.keys())
"""


def test_the_installed_kernels_step_and_need_torch_only(installed, tmp_path):
    module, submodule, value, heavy = run("-c", A_STEP, cwd=tmp_path, path=installed).split()
    assert module == str(installed / "opd/kernels.py")
    assert submodule == str(installed / "opd/kernels/fused.py")
    assert float(value) == pytest.approx(-0.1)
    assert heavy == "set()"


# A row imports from itself and from above. A name stands for all below it that no other row names.
ROWS = """
opd.flow opd.kernels
opd.files opd.formats.settings opd.cli opd.errors opd.ranks opd.signals opd.data opd.routing opd.trajectory
opd.families opd.formats opd.rewards
opd opd.mini.presets
opd.formats.export opd.formats.teacher_files opd.rewards.groups opd.optim opd.sft opd.runfolder
opd.grpo opd.nft
opd.evaluation
opd.report
opd.setup train sample
opd.mini
opd.bench opd.mini.study
"""
LEVEL = {name: level for level, row in enumerate(ROWS.split("\n")) for name in row.split()}


def level_of(module):
    """That of the longest name in ROWS that the module's begins with."""
    while module not in LEVEL:
        module = module.rpartition(".")[0]
    return LEVEL[module]


def sources():
    found = {"train": ROOT / "train.py", "sample": ROOT / "sample.py"}
    for folder, prefix in ((ROOT / "opd", "opd"), (ROOT / "kernels", "opd.kernels")):
        for file in sorted(folder.rglob("*.py")):
            parts = [prefix, *file.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = file
    return found


def imports(file):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in sources() else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("opd", "train", "sample", "kernels"))


@pytest.mark.parametrize("module", sources())
def test_a_module_imports_from_its_row_and_from_above(module):
    """The method knows no report and no benchmark; nothing of ours is called `kernels` at the top level."""
    for name in imports(sources()[module]):
        assert level_of(name) <= level_of(module), f"{module} imports {name}"


MODELS = ["diffusers", "transformers", "peft"]
# In this order, in one process: what each of them, and those before it, must not have brought.
ABSENT = {
    "opd.flow, opd.kernels": [*MODELS, "tyro"],
    "opd.presets, opd.cli, opd.config": [*MODELS, "huggingface_hub"],
    "opd.trajectory, opd.routing, opd.data, opd.families": MODELS,
    "opd.rewards": [*MODELS, "rapidocr", "onnxruntime", "opd.rewards.ocr"],
    "opd.rewards.ocr": [*MODELS, "rapidocr", "onnxruntime"],
    "opd.rewards.geneval, opd.rewards.judge": MODELS,
}


def test_what_an_import_costs():
    """The equations and kernels need torch, and the settings no model library: `--help` stays quick."""
    code = "import {0}; print([name for name in {1} if name in sys.modules], {0!r})"
    lines = ["import sys", *(code.format(modules, absent) for modules, absent in ABSENT.items())]
    assert run("-c", "\n".join(lines)) == "".join(f"[] {modules}\n" for modules in ABSENT)
