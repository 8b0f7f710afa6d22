"""The shipped miniature: its weights are the recorded ones, it is a genuine pipeline, and the real commands
run on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from opd import lora
from opd.evaluation import evaluate
from opd.families import sd3
from opd.formats import lora_files
from opd.mini import build, rewards, world
from opd.presets import PRESETS

ROOT = Path(__file__).parent.parent


def test_shipped_weights_have_the_recorded_sha256():
    assert (build.WEIGHTS / "SHA256SUMS").read_text() == build.sums()


def test_plain_diffusers_loads_the_miniature_and_our_teachers():
    """`pipe(...)` with a teacher, no line of ours in between, reads as its prompt says, better than the
    base."""
    parts = {"text_encoder_3": None, "tokenizer_3": None, "dtype": torch.float32}
    pipe = StableDiffusion3Pipeline.from_pretrained(build.WEIGHTS / "base", **parts)
    pipe.set_progress_bar_config(disable=True)
    adapter = lora_files.read_lora(str(build.WEIGHTS / "text"))
    lora.attach(pipe.transformer, "text", adapter, torch.float32)
    prompts = world.split("text")[1][::8]
    scores = {}
    for name in ("base", "text"):
        with lora.use(pipe.transformer, name):
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
    pipe = sd3.load_text(build.WEIGHTS / "base", torch.float32, torch.device("cpu"), t5=True)
    for prompt in world.specs():
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


@torch.no_grad()
def reconstruction_error(vae, images):
    x = images.float() / 127.5 - 1
    return float((vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean())


def test_specialists_data_is_clean_in_what_they_specialise_in():
    right, captions = build.draw(300, 0, {"text": 1.0}, caption_error=0.0)
    assert rewards.text(right / 255, captions, [{}] * 300).mean() > 0.999
    wrong, captions = build.draw(300, 0, {"text": 1.0})
    share = 1 - world.CAPTION_ERROR["text"]  # a wrong character may match its neighbour
    assert share - 0.05 < rewards.text(wrong / 255, captions, [{}] * 300).mean() < share + 0.08


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The README's first command, shortened."""
    out = tmp_path_factory.mktemp("mini")
    command = "-m torch.distributed.run train.py --iterations 2 --prompts-per-step 6 --eval-prompts 8"
    command += f" --eval-steps 5 --sample-every 2 --out {out}"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_first_command_ends_with_the_table_and_a_folder_that_holds_everything(run):
    out, printed = run
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["base", "compose", "text", "quality", "start", "student"]
    for row in scores.values():
        for split in ("train", "held-out"):
            assert list(row[split]) == ["compose", "text", "quality", "mean"]
            assert row[split]["mean"] == pytest.approx(sum(row[split][t] for t in world.TASKS) / 3)
    assert (out / "table.txt").read_text().strip() in printed
    assert scores["text"]["train"]["text"] > scores["base"]["train"]["text"]
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["effective_batch"] == 6 and len(row["compose"]["kl"]) == PRESETS["mini"].queries
    student = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md")
    for name in (*(f"student/{file}" for file in student), "curves.png", "samples/000002.png", "report.html"):
        assert (out / name).exists(), name


def test_evaluate_command_agrees_with_the_run(run, tmp_path):
    out, _ = run
    flags = f"--count 8 --steps 5 --out {tmp_path}/scores.json"
    evaluate.main(["--adapters", f"student={out}/student", *flags.split()])
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    inside = json.loads((out / "scores.json").read_text())
    assert scores["base"] == inside["base"]
    for split in ("train", "held-out"):
        for task in world.TASKS:  # the run computes with the same bf16 weights, cast by FSDP instead of by us
            assert scores["student"][split][task] == pytest.approx(inside["student"][split][task], abs=0.13)
