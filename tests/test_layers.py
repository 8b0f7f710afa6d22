"""Who may import whom: the modules of the package stand in one order, and each imports only from above it."""

import ast
from pathlib import Path

import pytest

from tests.test_packaging import forks

ROOT = Path(__file__).parents[1]
# A row imports from itself and from above. A name stands for all below it that no other row names.
ROWS = """
opd.flow opd.kernels
opd.files opd.formats.settings opd.cli opd.errors opd.ranks opd.signals opd.data opd.routing opd.trajectory
opd.families opd.formats opd.rewards
opd opd.mini.presets
opd.formats.export opd.formats.teacher_files opd.optim opd.sft opd.grpo opd.runfolder
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
    """Name -> file of every module of ours."""
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
ABSENT = {
    "opd.flow, opd.kernels": [*MODELS, "tyro"],
    "opd.trajectory, opd.routing, opd.data, opd.families": MODELS,
    "opd.presets, opd.cli, opd.config": [*MODELS, "huggingface_hub"],
    "opd.rewards": [*MODELS, "rapidocr", "onnxruntime", "opd.rewards.ocr"],
    "opd.rewards.ocr, opd.rewards.prompts": [*MODELS, "rapidocr", "onnxruntime"],
    "opd.rewards.geneval, opd.rewards.judge": MODELS,
}


def test_what_an_import_costs():
    """The equations and kernels need torch, and the settings no model library: `--help` stays quick."""
    codes = [
        f"import {modules}; print([name for name in {absent} if name in sys.modules], {modules!r})"
        for modules, absent in ABSENT.items()
    ]
    assert forks(*codes) == "".join(f"[] {modules}\n" for modules in ABSENT)
