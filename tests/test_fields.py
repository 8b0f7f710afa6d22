"""Every setting does something: changed, it changes what is trained, or how a run goes, which is read."""

import ast
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.cli import field_names
from opd.config import STAGES, Logistics, Scores
from opd.formats.latents import write_samples
from tests import tiny
from tests.test_packaging import sources
from tests.tiny_grpo import BRIGHT, DARK

COLOURS = {"red": "place/red", "blue": "place/blue"}
REWARDS = {"red": BRIGHT, "blue": BRIGHT}


RUN = {"out": "run", "iterations": 2, "prompts_per_step": 2, "micro_batch": 4}
ROLLOUT = RUN | {"group": 2, "steps": 2}
PLACE = Path("place")
BASES = {
    "opd": tiny.config(PLACE, **ROLLOUT),
    "grpo": tiny.grpo_config(PLACE, **ROLLOUT),
    "nft": tiny.nft_config(PLACE, levels=0, **ROLLOUT),
    "sft": tiny.sft_config(PLACE, data="place/latents", **RUN),
}

MERGED = {"cold_start": "merge", "merge_from": COLOURS, "rank": 8}
ROUTED = {"routing": "reward", "train_rewards": REWARDS | {"blue": DARK}}
WINDOW = {"steps": 3, "window": 1, "window_range": (0, 2)}
EVERY_STAGE = {
    "model": (["place/other_pipeline"], {}),
    "dtype": (["bfloat16"], {}),
    "t5": ([False], {"model": "place/pipeline_with_t5"}),
    "resolution": (["8x16"], {}),
    "rank": ([2], {}),
    "alpha": ([4.0], {}),
    "cold_start": (["place/red"], {}),
    "merge": (["naive"], MERGED),
    "merge_from": ([{"red": "place/red"}], MERGED),
    "lr": ([1e-3], {}),
    "warmup": ([1], {}),
    "decay": (["cosine"], {}),
    "weight_decay": ([0.5], {}),
    "clip": ([1e-7], {}),
    "ema": ([0.9], {}),
    "ema_every": ([2], {"ema": 0.9}),
    "seed": ([1], {}),
    "prompts": ([{"red": "place/red.txt"}], {}),
    "mix": ([{"red": 3}], {}),
    "alternate": ([True], {}),
}
# What the stages' own loops read.
LOOP = {
    "prompts_per_step": ([4], {}),
    "guidance": ([2.0], {}),
    "group": ([3], {}),
    "steps": ([3], {}),
    "rollout": (["cps"], {"skip_last": True}),
    "noise_level": ([0.3], {}),
    "skip_last": ([True], {}),
}
CHANGES = {
    "opd": EVERY_STAGE
    | LOOP
    | {
        "teachers": ([{"red": "place/blue", "blue": "place/red"}], {}),
        "routes": ([{"red": "blue"}], {}),
        "routing": (["reward"], ROUTED | {"routing": "task"}),
        "train_rewards": ([{"red": DARK, "blue": BRIGHT}], ROUTED),
        "anchor": (["base"], {}),
        "anchor_weight": ([0.0], {}),
        "anchor_levels": ([{"0.9": 2.0}], {}),
        "weight": (["kl_released"], {}),
        "queries": ([1], {"steps": 3}),
        "query_beta": ([(1.0, 60.0)], {"steps": 3, "queries": 1}),
        "query_range": ([(0, 1)], {"steps": 3}),
        "walker": (["teacher"], {}),
        "estimator": (["pg"], {}),
        "teacher_guidance": ([2.0], {}),
        "teacher_guidances": ([{"red": 2.0}], {}),
        "extrapolate": ([{"red": 1.5}], {}),
    },
    "grpo": LOOP
    | {
        "full": ([True], {}),
        "train_rewards": ([{"red": DARK, "blue": BRIGHT}], {}),
        "beta": ([0.5], {}),
        "clip_range": ([1e-3], {"epochs": 2}),
        "guard": ([True], {}),
        "advantage_std": (["group"], {"prompts_per_step": 4}),
        "window": ([1], {"window_range": (0, 2)}),
        "window_range": ([(1, 2)], WINDOW),
        "shared_start": ([True], {}),
        "updates": ([2], {}),
        "epochs": ([2], {}),
    },
    "nft": LOOP
    | {
        "noise_level": ([0.3], {"rollout": "sde"}),
        "objective": (["awm"], {}),
        "strength": ([0.1], {}),
        "levels": ([1], {}),
        "level_range": ([(1, 2)], {}),
        "old_decay": ([(0.0, 0.5, 0.9)], {}),
        "proximal": ([0.1], {"objective": "awm", "updates": 2}),
        "train_rewards": ([{"red": DARK, "blue": BRIGHT}], {}),
        "beta": ([0.5], {}),
        "adam_eps": ([1e-3], {}),
        "advantage_std": (["group"], {"prompts_per_step": 4}),
        "updates": ([2], {}),
    },
    "sft": {
        "prompts_per_step": ([4], {}),
        "full": ([True], {}),
        "data": (["place/other_latents"], {}),
        "caption_dropout": ([0.9], {}),
    },
}
ROWS = [(stage, name) for stage, changes in CHANGES.items() for name in changes]


@pytest.mark.parametrize("stage, name", ROWS, ids=map("-".join, ROWS))
def test_a_changed_field_changes_what_is_trained(trained_by, stage, name):
    values, under = CHANGES[stage][name]
    outcomes = [trained_by(stage, under), *(trained_by(stage, under | {name: value}) for value in values)]
    for one, other in combinations(outcomes, 2):
        assert not same(one, other)


def test_the_same_settings_train_the_same(trained_by):
    for stage in STAGES:
        assert same(trained_by(stage, {}), trained_by(stage, {"keep_last": 1}))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", STAGES)
def test_every_other_field_is_read(stage):
    """By the code beside the checks, as cfg.NAME."""
    rest = field_names(STAGES[stage]) - CHANGES[stage].keys() - CHANGES["opd"].keys()
    assert rest <= field_names(Logistics) | field_names(Scores) | {"teacher_devices"}
    unread = rest - fields_read()
    assert not unread, f"nothing reads {unread}"


def fields_read() -> set[str]:
    names = set()
    for module, file in sources().items():
        for node in unchecked(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner in ("cfg", "self.cfg") or (owner == "self" and module.startswith("opd.config")):
                    names.add(node.attr)
    return names


def unchecked(node: ast.AST):
    """Every node below but those of methods that check."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.ClassDef) and getattr(child, "name", "").startswith("check")):
            yield child
            yield from unchecked(child)


@pytest.fixture(scope="module")
def trained_by(place):
    """(stage, settings beside those of BASES) -> the weights that two steps train; each is made once."""
    known = {}

    def find(stage: str, settings: dict) -> dict[str, torch.Tensor]:
        cfg = replace(BASES[stage], **settings)
        if repr(cfg) not in known:
            *_, trained, work = tiny.build(cfg)
            for step in range(cfg.iterations):
                work.step(step)
            known[repr(cfg)] = trained.weights()
        return known[repr(cfg)]

    return find


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """place/ in the current directory: the tiny world of one block, other pipelines, two sets of latents."""
    folder = tmp_path_factory.mktemp("fields") / "place"
    tiny.make_world(folder, layers=1)
    tiny.make_pipeline_with_t5(folder / "pipeline_with_t5", layers=1)
    other = tiny.make_pipeline(folder / "other_pipeline", layers=1)
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file)
    generator = torch.Generator().manual_seed(0)
    for name in ("latents", "other_latents"):
        latents = torch.randn(5, 4, 4, 4, generator=generator)
        write_samples(folder / name, latents, [{"prompt": prompt} for prompt in tiny.PROMPTS["red"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        yield folder
