"""Who may import whom: the modules of the package stand in one order, and each imports only from above it."""

import ast
from pathlib import Path

import pytest

from tests.test_packaging import forks

ROOT = Path(__file__).parents[1]
ORDER = """
opd
opd.flow
opd.kernels.common opd.kernels.noise
opd.kernels.checks opd.kernels.fused
opd.kernels.ops
opd.kernels
opd.kernels.aot opd.kernels.bench
opd.trajectory opd.ranks opd.files opd.flags
opd.routing opd.estimators
opd.pictures opd.data opd.lora_files opd.svg
opd.merging
opd.config_base
opd.config opd.signals opd.errors
opd.presets opd.settings
opd.families opd.vae opd.schedule opd.lora opd.compiled opd.sd3_names opd.sd3_attention
opd.text_cache opd.patches
opd.rewards.scoring opd.rewards.about opd.rewards.inputs opd.rewards.jpeg opd.rewards.geneval_rules
opd.rewards.endpoint opd.rewards.clip opd.rewards.openclip opd.rewards.worker
opd.rewards.ocr opd.rewards.geneval opd.rewards.preference opd.rewards.blip opd.rewards.judge
opd.rewards.remote opd.prompts
opd.rewards
opd.adapters opd.conditioning opd.families.sd3 opd.families.z_image
opd.families.flux opd.families.flux2 opd.families.qwen_image
opd.model
opd.deployment opd.teacher_files
opd.records
opd.gallery opd.statistics
opd.identity opd.shards opd.images opd.teachers opd.optim opd.layouts opd.tables opd.diagnostics opd.memory
opd.evaluate opd.card
opd.samples
opd.runfolder opd.grpo opd.sft opd.probe
opd.judging opd.page
opd.report
opd.setup
opd.mini
opd.mini.world opd.mini.runs
opd.mini.drawing
opd.mini.rewards opd.mini.build
opd.mini.signs
opd.study_tables
opd.study_plots
opd.study_pages
opd.study
train sample
opd.bench_clock opd.bench_compare opd.bench_model
opd.bench_released opd.bench_queries opd.bench_text opd.fullsize opd.bench_paper
opd.bench
opd.bench_visit
"""
LEVEL = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}


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


def test_every_module_has_its_place():
    assert sources().keys() == LEVEL.keys()


@pytest.mark.parametrize("module", LEVEL)
def test_a_module_imports_from_above_only(module):
    """So there is no circle, and nothing of ours is called `kernels` at the top level."""
    for name in imports(sources()[module]):
        assert LEVEL[name] < LEVEL[module], f"{module} imports {name}"


MODELS = ["diffusers", "transformers", "peft"]
ABSENT = {
    "opd.flow, opd.kernels": [*MODELS, "tyro"],
    "opd.trajectory, opd.routing, opd.data, opd.families": MODELS,
    "opd.presets, opd.settings, opd.config": [*MODELS, "huggingface_hub"],
    "opd.rewards": [*MODELS, "rapidocr", "onnxruntime", "opd.rewards.ocr"],
    "opd.rewards.ocr, opd.prompts": [*MODELS, "rapidocr", "onnxruntime"],
    "opd.rewards.geneval, opd.rewards.judge": MODELS,
}


def test_what_an_import_costs():
    """The equations and kernels need torch, and the settings no model library: `--help` stays quick."""
    codes = [
        f"import {modules}; print([name for name in {absent} if name in sys.modules], {modules!r})"
        for modules, absent in ABSENT.items()
    ]
    assert forks(*codes) == "".join(f"[] {modules}\n" for modules in ABSENT)


def test_only_the_presets_and_the_study_name_the_miniature():
    for name, file in sources().items():
        if not name.startswith(("opd.mini", "opd.presets", "opd.study")):
            paths = [text for text in strings(file) if "opd/mini" in text or "opd.mini" in text]
            assert not paths, name


def strings(file):
    """The strings that the code of a file works with: not those that stand alone, its documentation."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value
