"""An SFT start by its two commands: sample.py keeps what the teachers make, train.py fits it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from opd import ranks
from opd.data import load_prompts
from opd.evaluation.score import cases_of
from opd.formats import lora_files
from opd.formats.images import load_images
from opd.model import Sampling
from tests import tiny

BRIGHT = "tests.tiny_grpo:brightness"


def sampled(world, out, *more):
    """The first command, for 7 samples of each task."""
    folders = ["--model", world / "pipeline", "--out", out]
    names = [f"{name}={world / name}" for name in ("red", "blue")]
    files = [f"{name}={world / name}.txt" for name in ("red", "blue")]
    flags = "--save latents --count 7 --steps 3 --batch 4 --dtype float32 --device cpu".split()
    flags += [*folders, "--adapters", *names, "--tasks", *files, *more]
    sample.main([str(flag) for flag in flags])
    lines = (out / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(out / "latents.safetensors")["latents"]


@pytest.fixture(scope="module")
def everything(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "all"
    return out, *sampled(world, out)


@pytest.fixture(scope="module")
def model(world):
    """With red's and blue's adapters, and their prompts encoded."""
    return tiny.build(tiny.config(world))[1]


def test_every_task_is_sampled_by_its_teacher(everything, world, model):
    """Seven samples of five and of four prompts: all prompts, some twice with other noise."""
    _, rows, latents = everything
    assert [row["task"] for row in rows] == ["red"] * 7 + ["blue"] * 7
    assert latents.shape == (14, 4, 4, 4) and latents.dtype == torch.float16
    for task, part in (("red", slice(0, 7)), ("blue", slice(7, 14))):
        prompts = [row["prompt"] for row in rows[part]]
        assert set(prompts) == set(tiny.PROMPTS[task])
        cases = cases_of(load_prompts(str(world / f"{task}.txt"), task, None), 7)
        assert prompts == [prompt.text for _, prompt in cases]
        expected = model.latents(task, prompts, list(range(7)), Sampling(3, 0, 1.0))
        assert (latents[part].float() - expected).abs().max() < 2e-3 * expected.abs().max()
    assert len({tuple(latent.flatten().tolist()) for latent in latents}) == 14


def test_a_reward_filters_by_its_threshold(everything, world, tmp_path, model, capsys):
    _, rows, latents = everything
    red = model.decode(latents[:7].float()).mean((1, 2, 3))
    least = red.sort().values[4].item() - 1e-4
    flags = ["--rewards", f"red={BRIGHT}", "--at-least", f"red={least}"]
    kept_rows, kept = sampled(world, tmp_path / "kept", *flags)
    good = [n for n in range(7) if red[n] >= least]
    assert len(good) == 3
    assert torch.equal(kept, latents[[*good, *range(7, 14)]])
    assert [row["prompt"] for row in kept_rows] == [rows[n]["prompt"] for n in [*good, *range(7, 14)]]
    assert [row["reward"] for row in kept_rows[:3]] == pytest.approx(red[good].tolist(), abs=1e-3)
    assert "red: kept 3 of 7 samples\nblue: kept 7 of 7 samples" in capsys.readouterr().out


def test_two_commands_make_an_sft_start(everything, world, tmp_path, monkeypatch):
    """The latents reach the loss as they were sampled; the student learns; distillation starts from it."""
    data, rows, latents = everything
    folders = ["--model", world / "pipeline", "--out", tmp_path / "sft"]
    flags = """--rank 4 --alpha 8 --iterations 3 --prompts-per-step 8 --warmup 0 --lr 1e-2 --dtype float32
        --sample-every 0"""
    arguments = ["train.py", "mini-sft-start", *folders, "--data", data, *flags.split()]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    try:
        train.main()
    finally:
        if torch.distributed.is_initialized():
            ranks.stop()
    model = tiny.build(tiny.config(world))[1]
    images = load_images(str(data), model)
    assert torch.equal(images.latents, latents) and images.captions == [row["prompt"] for row in rows]
    student = tmp_path / "sft" / "student"
    assert lora_files.read_lora(str(student)).norm() > 0.01
    cfg = tiny.config(world, cold_start=str(student), out=str(tmp_path / "opd"))
    cfg, model, *_ = tiny.build(cfg)
    layer = model.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    start = lora_files.read_lora(str(student)).update("transformer_blocks.0.attn.to_q")
    ours = layer.scale["student"] * layer.lora_B["student"].weight @ layer.lora_A["student"].weight
    assert torch.allclose(ours, start, atol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--count", "0"], "--count is 0; it must be at least 1"),
        (["--tasks"], "--tasks is empty: give at least one TASK=FILE pair"),
        (["--tasks", "green=x.txt"], "task 'green' has no adapter of its name; add --adapters green=ADAPTER"),
        (["--at-least", "red=0.5"], "--at-least red=0.5 has no reward; add --rewards red=module:function"),
        (
            ["--rewards", f"red={BRIGHT}"],
            f"--rewards red={BRIGHT} filters by no threshold; add --at-least red=",
        ),
        (["--rewards", f"dog={BRIGHT}"], "--rewards names task 'dog', which has no --tasks: ['red', 'blue']"),
        (["--rewards", f"red={BRIGHT}", "--at-least", "red=2"], "reaches --at-least red=2.0; lower it"),
        (["--images", "2"], "--images does nothing with --save latents; leave it out"),
        (["--prompts", "a dot"], "--prompts does nothing with --save latents; leave it out"),
        (["--save", "images", "--count", "7", "--tasks", "a=b"], "--tasks does nothing with --save images"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, world, tmp_path):
    with pytest.raises(SystemExit) as caught:
        sampled(world, tmp_path, *flags)
    assert str(caught.value).startswith("error: ") and message in str(caught.value)


def test_samples_are_never_overwritten(everything, world):
    with pytest.raises(SystemExit, match="already holds a metadata.jsonl; choose another folder, or delete"):
        sampled(world, everything[0])
