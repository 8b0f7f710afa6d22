"""The predicted memory against measurement and closed forms; tests/test_bench.py compares it with what is
alive in real updates of tiny models."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opd.bench import model as bench
from opd.families import sd3
from opd.report import memory
from opd.report.memory import LiveTensors, peak
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch):
    """Settings -> the parts; those that are found by running are left out."""
    monkeypatch.setattr(memory, "activations", lambda *arguments: 0)
    monkeypatch.setattr(memory, "decoding", lambda *arguments: 0)
    return lambda cfg: memory.predict_run(cfg, tiny.planned(cfg))


@pytest.mark.slow
def test_full_size_is_predicted_within_a_tenth_of_its_measurement():
    """opd/bench/BENCHMARKS.md, "SD3.5-Medium's shape": 5.31 GiB of live tensors in bfloat16 at 128 px."""
    one = {"steps": 1, "prompts_per_step": 1, "group": 1, "micro_batch": 1}
    work = replace(bench.WORKS["sd35-medium"], resolution="128", dtype="bfloat16", **one)
    work = bench.with_teachers(work, 1)
    parts = bench.predicted(work, CPU)
    measured = {"peak": 5.31, "base": 4.60, "adapters": 0.175, "optimizer": 0.140, "gradients": 0.070}
    for part, size in measured.items():
        assert parts[part] / 2**30 == pytest.approx(size, rel=0.1 if part == "peak" else 0.01), part
    # The kernel that a GPU has for RMSNorm keeps its input alone.
    assert bench.predicted(work, torch.device("cuda"))["activations"] < 0.9 * parts["activations"]


def test_decoding_is_what_a_decoding_takes(world):
    cfg = tiny.config(world)
    model = tiny.planned(cfg)
    vae = model.family.load_vae(model.folder)
    live = LiveTensors([*vae.parameters(), *vae.buffers()])
    with live:
        model.family.decode(vae, torch.zeros(9, *model.shape))
    parts = memory.predict_run(cfg, tiny.planned(cfg))
    assert parts["decoding"] == pytest.approx(live.peak - live.before, rel=0.1)
    assert parts["vae"] == 4 * sum(p.numel() for p in vae.parameters())
    assert peak(parts) == sum(parts.values()) - min(parts["decoding"], parts["activations"])


def test_text_encoders_count_where_they_come_back(world, counted, monkeypatch):
    """Past the first window of prompts; T5 where it is used."""
    cfg = tiny.config(world, iterations=100)
    assert counted(cfg)["encoding"] == 0
    monkeypatch.setattr(memory, "WINDOW", 2)
    for t5 in (True, False):
        text = sd3.load_text(world / "pipeline", torch.float32, CPU, t5)
        encoders = [
            part for name, part in text.components.items() if name.startswith("text_encoder") and part
        ]
        count = sum(p.numel() for encoder in encoders for p in encoder.parameters())
        assert counted(replace(cfg, t5=t5))["encoding"] == pytest.approx(4 * count, rel=0.01)


def test_what_autograd_keeps_of_a_chain_is_counted_without_storage():
    """exp keeps its result: after n of them n results are alive, of which backward needs all."""
    with FakeTensorMode():
        live = LiveTensors()
        x = torch.empty(1000, requires_grad=True)
        with live:
            y = x
            for _ in range(5):
                y = y.exp()
        assert live.peak == 5 * 4000


def test_sharding_divides_what_is_held_and_gathers_blocks(world, counted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    whole = counted(tiny.config(world, ema=0.9))
    half = counted(tiny.config(world, ema=0.9, shard_size=2))
    for part in ("gradients", "optimizer", "average"):
        assert half[part] == whole[part] > 0
    assert half["teachers"] == whole["teachers"] // 2 > 0
    # The start's share is halved, the student's, of the gradients' size, is not.
    assert whole["adapters"] - half["adapters"] == (whole["adapters"] - whole["gradients"]) // 2 > 0
    fully, alone = (counted(tiny.grpo_config(world, full=True, shard_size=size)) for size in (2, 1))
    for part in ("gradients", "optimizer"):
        assert fully[part] == alone[part] // 2 > 0
    # Both blocks, all that there are, are gathered at some time, beside the half that is held.
    assert half["base"] == pytest.approx(1.5 * whole["base"], rel=0.01)
    assert whole["optimizer"] == 2 * whole["gradients"] == 2 * whole["average"]


def test_training_all_weights_keeps_float32_masters_and_a_copy(world, counted):
    parts = counted(tiny.grpo_config(world, full=True, dtype="bfloat16"))
    weights = parts["gradients"] // 4
    assert parts["base"] == pytest.approx((4 + 2) * weights, rel=0.01)
    assert parts["optimizer"] == 8 * weights and parts["adapters"] == 0


def test_stages_that_store_trajectories_hold_their_states(world, counted):
    """Float32 latents of 4 x 4 x 4 numbers, one more than the states, of every sample of the step."""
    state = 4 * 4 * 4 * 4
    cfg = tiny.grpo_config(world)
    assert counted(cfg)["trajectories"] == cfg.samples_per_step() * (cfg.steps + 1) * state
    cfg = replace(cfg, window=2, window_range=(0, 3))
    assert counted(cfg)["trajectories"] == cfg.samples_per_step() * 3 * state
    assert counted(tiny.config(world))["trajectories"] == 0


def test_teachers_count_for_what_they_load(world, counted, tmp_path):
    """Adapters of rank 4 as they are; a transformer of its own whole, or but for three of its five blocks
    where they come one at a time."""
    red, blue = (str(world / name) for name in ("red", "blue"))
    cfg = tiny.config(world, rank=16)
    model = tiny.planned(cfg)
    read = memory.held_by_teachers(cfg, model)
    full = str(tiny.fold(world, "red", tmp_path / "full"))
    one = replace(cfg, teachers={"red": full, "blue": blue})
    assert memory.held_by_teachers(one, model) == read // 2 + counted(cfg)["base"]
    there = replace(one, teacher_devices={"red": "cuda:0"}, dry_run=True)
    on_gpu = replace(model, device=torch.device("cuda"))
    assert memory.held_by_teachers(there, on_gpu) == memory.held_by_teachers(one, model)
    # On a device that this machine need not have.
    elsewhere = replace(one, teacher_devices={"red": "cuda:1"}, dry_run=True)
    assert memory.held_by_teachers(elsewhere, model) == read // 2
    # What --dry-run says: of what is not here, four times the rank.
    absent = replace(cfg, teachers={"red": red, "blue": "owner/blue"})
    assert memory.held_by_teachers(absent, model) == read // 2 + 2 * read > 0
    assert "taken for a LoRA of --rank 16: blue:" in memory.forecast(absent)
    deep = tiny.make_world(tmp_path / "deep", layers=5)
    away = tiny.config(deep, teachers={"red": str(deep / "pipeline")}, teacher_devices={"red": "offload"})
    model = tiny.planned(away)
    skeleton, left_out = model.skeleton, model.skeleton.transformer_blocks[2:]
    held = {*skeleton.parameters(), *skeleton.buffers()} - {*left_out.parameters()}
    assert memory.held_by_teachers(away, model) == 4 * memory.numbers(held)
