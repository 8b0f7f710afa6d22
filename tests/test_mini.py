"""The shipped miniature: its weights are the recorded ones, it is a genuine pipeline, and the real commands
run on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from opd import adapters
from opd.evaluation import evaluate
from opd.families import sd3
from opd.formats import lora_files
from opd.mini import build, world
from opd.presets import PRESETS

ROOT = Path(__file__).parent.parent
MINI = ROOT / "opd/mini"


def test_shipped_weights_have_the_recorded_sha256():
    assert (build.WEIGHTS / "SHA256SUMS").read_text() == build.sums()


def test_plain_diffusers_loads_the_miniature_and_our_teachers():
    """`pipe(...)` with a teacher, no line of ours in between, reads as its prompt says, better than the
    base."""
    from opd.mini import rewards

    pipe = StableDiffusion3Pipeline.from_pretrained(
        MINI / "weights/base", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    adapters.attach(pipe.transformer, "text", lora_files.read_lora(str(MINI / "weights/text")), torch.float32)
    prompts = world.split("text")[1][::4]
    scores = {}
    for name in ("base", "text"):
        with adapters.use(pipe.transformer, name):
            images = pipe(
                prompts,
                num_inference_steps=10,
                guidance_scale=1.0,
                max_sequence_length=12,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
        scores[name] = rewards.text(images.float(), prompts, [{}] * len(prompts)).mean()
    assert scores["text"] > scores["base"] + 0.15 and scores["text"] > 0.75


def test_every_world_prompt_fits_the_tokenizer():
    pipe = sd3.load_text(MINI / "weights/base", torch.float32, torch.device("cpu"), t5=True)
    for task in world.TASKS:
        for prompt in world.all_prompts(task):
            assert len(pipe.tokenizer(prompt).input_ids) <= build.TOKENS, prompt


def test_tokenizer_is_reproducible_and_knows_its_words():
    words = ["circle", "circles", "red", "square"]
    tokenizer = build.make_tokenizer(words)
    assert all(tokenizer.tokenize(w) == [w + "</w>"] for w in words)
    assert build.learn_merges(words) == build.learn_merges(list(reversed(words)))
    assert tokenizer.tokenize("K7") == ["k</w>", "7</w>"]


def test_vae_training_learns_and_normalises_its_latents():
    images, _ = build.draw(256, 0, build.BASE_MIX)
    torch.manual_seed(0)
    vae = build.make_vae((8, 16)).requires_grad_(True)
    before = reconstruction_error(vae, images)
    build.train_vae(vae, images, steps=60, batch=16)
    assert reconstruction_error(vae, images) < 0.5 * before
    latents = sd3.encode_images(vae, images / 255)
    assert abs(latents.mean()) < 0.01 and abs(latents.std() - 1) < 0.01


def reconstruction_error(vae, images):
    with torch.no_grad():
        x = images.float() / 127.5 - 1
        return float((vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean())


def test_specialists_data_is_clean_in_what_they_specialise_in():
    from opd.mini import rewards

    right, captions = build.draw(300, 0, {"text": 1.0}, caption_error=0.0)
    assert rewards.text(right / 255, captions, [{}] * 300).mean() > 0.999
    wrong, captions = build.draw(300, 0, {"text": 1.0})
    share = 1 - world.CAPTION_ERROR["text"]
    assert (
        share - 0.05 < rewards.text(wrong / 255, captions, [{}] * 300).mean() < share + 0.08
    )  # a wrong character may match its neighbour


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The README's first command, shortened."""
    out = tmp_path_factory.mktemp("mini")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "train.py",
            "--iterations",
            "2",
            "--prompts-per-step",
            "6",
            "--eval-prompts",
            "8",
            "--eval-steps",
            "5",
            "--sample-every",
            "2",
            "--out",
            str(out),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_first_command_ends_with_the_table(run):
    out, printed = run
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["base", "compose", "text", "quality", "start", "student"]
    for row in scores.values():
        for split in ("train", "held-out"):
            assert list(row[split]) == ["compose", "text", "quality", "mean"]
            assert row[split]["mean"] == pytest.approx(sum(row[split][t] for t in world.TASKS) / 3)
    assert (out / "table.txt").read_text().strip() in printed
    assert scores["text"]["train"]["text"] > scores["base"]["train"]["text"]


def test_run_folder_holds_everything(run):
    out, _ = run
    for name in (
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "samples/000002.png",
        "student/adapter_model.safetensors",
        "student/adapter_config.json",
        "student/pytorch_lora_weights.safetensors",
        "student/README.md",
        "report.html",
        "checkpoints/000002",
        "state/000002",
    ):
        assert (out / name).exists(), name
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "loss",
        "grad_norm",
        "samples_per_second",
        "states_per_second",
        "effective_batch",
        "compose",
        "text",
        "quality",
    } <= set(row)
    assert row["effective_batch"] == 6 and len(row["compose"]["kl"]) == PRESETS["mini"].queries


def test_evaluate_command_agrees_with_the_run(run, capsys, tmp_path):
    out, _ = run
    evaluate.main(
        [
            "--adapters",
            f"student={out / 'student'}",
            "--count",
            "8",
            "--steps",
            "5",
            "--out",
            str(tmp_path / "scores.json"),
        ]
    )
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    inside = json.loads((out / "scores.json").read_text())
    assert "student" in capsys.readouterr().out
    assert scores["base"] == inside["base"]
    for split in (
        "train",
        "held-out",
    ):  # the run computes with the same bf16 weights, cast by FSDP instead of by us
        for task in world.TASKS:
            assert scores["student"][split][task] == pytest.approx(inside["student"][split][task], abs=0.13)
