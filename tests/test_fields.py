"""Every setting does something: changed, it changes what is trained, or how a run goes, which is read."""

import ast
from dataclasses import replace
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

# Another value of every field, by stage.
SWAPPED = {"red": DARK, "blue": BRIGHT}
EVERY_STAGE = {"model": "place/other_pipeline", "t5": False, "dtype": "bfloat16", "resolution": "8x16"}
EVERY_STAGE |= {"rank": 2, "alpha": 4.0, "cold_start": "place/red", "merge": "naive", "seed": 1}
EVERY_STAGE |= {"merge_from": {"red": "place/red"}, "prompts": {"red": "place/red.txt"}, "mix": {"red": 3}}
EVERY_STAGE |= {"lr": 1e-3, "warmup": 1, "decay": "cosine", "weight_decay": 0.5, "clip": 1e-7}
EVERY_STAGE |= {"ema": 0.9, "ema_every": 2, "alternate": True}
LOOP = {"prompts_per_step": 4, "guidance": 2.0, "group": 3, "steps": 3, "rollout": "cps"}
LOOP |= {"noise_level": 0.3, "skip_last": True}
OPD = {"teachers": {"red": "place/blue", "blue": "place/red"}, "routes": {"red": "blue"}}
OPD |= {"routing": "reward", "train_rewards": SWAPPED, "anchor": "base", "anchor_weight": 0.0}
OPD |= {"anchor_levels": {"0.9": 2.0}, "weight": "kl_released", "queries": 1, "query_beta": (1.0, 60.0)}
OPD |= {"query_range": (0, 1), "walker": "teacher", "estimator": "pg", "teacher_guidance": 2.0}
OPD |= {"teacher_guidances": {"red": 2.0}, "extrapolate": {"red": 1.5}}
REWARDED = {"train_rewards": SWAPPED, "beta": 0.5, "advantage_std": "group", "updates": 2}
GRPO = {"full": True, "clip_range": 1e-3, "guard": True, "window": 1, "window_range": (1, 2)}
GRPO |= {"shared_start": True}
NFT = {"strength": 0.1, "levels": 1}
NFT |= {"old_decay": (0.0, 0.5, 0.9), "adam_eps": 1e-3}
CHANGES = {
    "opd": EVERY_STAGE | LOOP | OPD,
    "grpo": LOOP | REWARDED | GRPO,
    "nft": LOOP | REWARDED | NFT,
    "sft": {"prompts_per_step": 4, "full": True, "data": "place/other_latents", "caption_dropout": 0.9},
}
ROWS = [(stage, name) for stage, changes in CHANGES.items() for name in changes]
# The settings under which a field counts, where the stage's own are not enough.
MERGED = {"cold_start": "merge", "merge_from": COLOURS, "rank": 8}
ROUTED = {"routing": "reward", "train_rewards": REWARDS | {"blue": DARK}}
UNDER = {"t5": {"model": "place/pipeline_with_t5"}, "merge": MERGED, "merge_from": MERGED}
UNDER |= {"ema_every": {"ema": 0.9}, "rollout": {"skip_last": True}, "nft-noise_level": {"rollout": "sde"}}
UNDER |= {"routing": ROUTED | {"routing": "task"}, "opd-train_rewards": ROUTED, "clip_range": {"updates": 2}}
UNDER |= {"queries": {"steps": 3}, "query_beta": {"steps": 3, "queries": 1}, "query_range": {"steps": 3}}
UNDER |= {"advantage_std": {"prompts_per_step": 4}, "window": {"window_range": (0, 2)}}
UNDER |= {"window_range": {"steps": 3, "window": 1, "window_range": (0, 2)}}


@pytest.mark.parametrize("stage, name", ROWS, ids=map("-".join, ROWS))
def test_a_changed_field_changes_what_is_trained(trained_by, stage, name):
    under = next((UNDER[key] for key in (f"{stage}-{name}", name) if key in UNDER), {})
    assert not same(trained_by(stage, under), trained_by(stage, under | {name: CHANGES[stage][name]}))


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
