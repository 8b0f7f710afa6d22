"""A tiny StableDiffusion3Pipeline and adapters for it, made and saved in a second: what the tests run on."""

import json
import math
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import train
from opd import kernels, lora, ranks
from opd.config import DistillationConfig, GRPOConfig, NFTConfig, RunConfig, SFTConfig
from opd.data import seed_of
from opd.families import sd3
from opd.formats import export, lora_files
from opd.formats.settings import to_json
from opd.model import Model
from opd.optim import Trained
from opd.report.report import Report
from opd.runfolder import RunFolder
from opd.setup import set_up
from tests import tiny_clip

PROMPTS = {
    "red": ["a red circle", "two red circles", "a red square", "a red triangle", "a red dot"],
    "blue": ["a blue circle", "two blue squares", "a blue square", "a blue dot"],
}


def make_world(folder: Path, layers: int = 2) -> Path:
    """`pipeline/`, adapters `red/` and `blue/`, prompt files `red.txt` and `blue.txt`, all in `folder`."""
    make_pipeline(folder / "pipeline", layers)
    return furnish(folder)


def make_pipeline(folder: Path, layers: int = 2, heads: int = 2, encoders: tuple[int, int] = (1, 2)) -> Path:
    """8 px images, 4x4x4 latents, `layers` transformer blocks, `heads` x 16 wide, random (not zero) weights,
    float32. `encoders`: seeds of the text encoders."""
    torch.manual_seed(0)
    tokenizer = tiny_clip.make_tokenizer("a two red blue circle circles square squares triangle dot".split())
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 4}
    blocks = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 16}
    text = {"joint_attention_dim": 2 * tiny_clip.WIDTH, "pooled_projection_dim": 2 * tiny_clip.WIDTH}
    text |= {"caption_projection_dim": 16 * heads, "qk_norm": "rms_norm"}
    transformer = diffusers.SD3Transformer2DModel(**sizes, **blocks, **text)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=make_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=tiny_clip.make_text_encoder(tokenizer, encoders[0]),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip.make_text_encoder(tokenizer, encoders[1]),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
    "mid_block_add_attention": False,
}
"""Factor 2, 4 latent channels."""


def make_vae() -> diffusers.AutoencoderKL:
    no_quantisation = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(**VAE, **no_quantisation, scaling_factor=0.8, shift_factor=0.1)


def make_t5(width: int = 128) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 of one layer with a token per word."""
    words = ["<pad>", "</s>", "<unk>", *"a two red blue circle squares dot".split()]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(3)
    size = dict(d_model=width, d_kv=32, d_ff=64, num_layers=1, num_heads=4)
    encoder = T5EncoderModel(T5Config(**size, vocab_size=words.get_vocab_size()))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return encoder.eval(), PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make_pipeline_with_t5(folder: Path, layers: int = 2) -> Path:
    encoder, tokenizer = make_t5()
    without = make_pipeline(folder.with_name("without_t5"), layers)
    third = {"text_encoder_3": encoder, "tokenizer_3": tokenizer}
    diffusers.StableDiffusion3Pipeline.from_pretrained(without, **third).save_pretrained(folder)
    return folder


def with_scheduler(pipeline: Path, folder: Path, settings: dict) -> Path:
    """A copy of the pipeline in `folder` with another scheduler."""
    shutil.copytree(pipeline, folder)
    diffusers.FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(folder / "scheduler")
    return folder


def random_lora(
    pipeline: Path, seed: int, rank: int = 4, alpha: float = 8.0, size: float = 0.3, family=sd3
) -> lora.Lora:
    """An adapter that changes the velocity visibly."""
    adapter = lora.fresh_lora(family.skeleton(pipeline), family.LORA_TARGETS, rank, alpha, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    for b in adapter.B.values():
        b.copy_(size * torch.randn(b.shape, generator=generator))
    return adapter


def save(adapter: lora.Lora, folder: Path) -> Path:
    """`lora` as a PEFT directory."""
    weights = {f"{module}.lora_A.x.weight": a for module, a in adapter.A.items()}
    weights |= {f"{module}.lora_B.x.weight": b for module, b in adapter.B.items()}
    rank = next(iter(adapter.A.values())).shape[0]
    export.save_lora(folder, weights, "x", rank, next(iter(adapter.scale.values())) * rank)
    return folder


def fold(world: Path, adapter: str, folder: Path) -> Path:
    """The base with an adapter's update in its weights, as the `transformer/` directory of a pipeline."""
    transformer = sd3.load_transformer(world / "pipeline", torch.float32)
    lora = lora_files.read_lora(str(world / adapter))
    for module in lora.A:
        transformer.get_submodule(module).weight += lora.update(module)
    export.save_transformer(folder, transformer, dict(transformer.named_parameters()), torch.float32)
    return folder


def furnish(folder: Path, family=sd3) -> Path:
    """Add adapters `red/` and `blue/` and prompt files `red.txt` and `blue.txt` to `folder` with its
    `pipeline/`."""
    for seed, (name, prompts) in enumerate(PROMPTS.items(), start=1):
        save(random_lora(folder / "pipeline", seed, family=family), folder / name)
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return folder


def config(world: Path, **changes) -> DistillationConfig:
    """A distillation on the tiny world: two teachers, red and blue; blue is the anchor."""
    lora = {"rank": 4, "alpha": 8.0, "cold_start": "base"}
    step = {"prompts_per_step": 4, "group": 2, "micro_batch": 4, "steps": 4}
    schedule = {"iterations": 3, "lr": 1e-2, "warmup": 0, "decay": "constant"}
    kept = {"out": str(world / "run"), "evaluate": False, "sample_every": 0, "save_every": 100}
    base = DistillationConfig(
        model=str(world / "pipeline"),
        dtype="float32",
        teachers={name: str(world / name) for name in PROMPTS},
        prompts={name: str(world / f"{name}.txt") for name in PROMPTS},
        anchor="blue",
        anchor_weight=0.1,
        **lora,
        **step,
        **schedule,
        **kept,
    )
    return replace(base, **changes)


def grpo_config(world: Path, **changes) -> GRPOConfig:
    base = GRPOConfig(**shared_with(config(world), GRPOConfig))
    rewards = {"red": "tests.tiny_grpo:brightness", "blue": "tests.tiny_grpo:brightness"}
    base = replace(base, train_rewards=rewards, beta=0.0)
    return replace(base, **{"group": 4, "micro_batch": 8, "iterations": 2} | changes)


def nft_config(world: Path, **changes) -> NFTConfig:
    base = NFTConfig(**shared_with(grpo_config(world), NFTConfig))
    return replace(base, **{"rollout": "ode", "levels": 2} | changes)


def sft_config(world: Path, **changes) -> SFTConfig:
    return replace(SFTConfig(**shared_with(config(world), SFTConfig)), **changes)


def shared_with(cfg: RunConfig, stage: type) -> dict:
    names = {field.name for field in fields(stage)}
    return {name: value for name, value in vars(cfg).items() if name in names}


def planned(cfg: RunConfig) -> Model:
    return Model.plan(cfg.model, cfg.dtype, cfg.resolution, torch.device("cpu"), cfg.t5)


def build(cfg: RunConfig):
    """(cfg, model, data, trained, stage): a run set up as train.py does."""
    cfg.check(ranks.declared_world())
    model, data, _, rewards = set_up(cfg, ranks.start())
    trained = Trained(cfg, model)
    return cfg, model, data, trained, train.choose_stage(cfg, model, data, rewards, trained)


def run(cfg: RunConfig, change=None):
    """(run folder, model, trained, report) of the whole loop; `change` is given model and stage before it."""
    cfg.check(1)
    model, data, shown, rewards = set_up(cfg, ranks.start())
    trained, folder = Trained(cfg, model), RunFolder(cfg, active=True)
    report = Report(cfg, model, data, shown, rewards, folder)
    stage = train.choose_stage(cfg, model, data, rewards, trained)
    if change:
        change(model, stage)
    train.train(cfg, stage, trained, folder, report)
    return folder, model, trained, report


def main(cfg: RunConfig, folder: Path) -> None:
    """`python train.py --config FILE`, in this process; the file is written into `folder`."""
    file = folder / "settings.json"
    file.write_text(json.dumps(to_json(cfg)))
    # What a saved run does not hand on.
    own = ["--push", cfg.push, *["--force-resume"] * cfg.force_resume]
    with mock.patch.object(sys, "argv", ["train.py", "--config", str(file), *own]):
        try:
            train.main()
        finally:
            if torch.distributed.is_initialized():
                ranks.stop()


def sde_by_formula(x, v, sigma, sigma_next, noise_level):
    """(mean, std of the step, s) of eq. 5-6 as the paper writes them, with one sigma per sample."""
    sigma, sigma_next = (level.view(-1, *[1] * (x.dim() - 1)) for level in (sigma, sigma_next))
    denominator = torch.where(sigma == 1, 1 - sigma_next, 1 - sigma)
    s = noise_level * torch.sqrt(sigma / denominator)
    dt = sigma - sigma_next
    mean = x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * -dt
    return mean, s * dt.sqrt(), s


def cps_by_formula(x, v, sigma, sigma_next, noise_level):
    """(mean, std of the step) of Flow-CPS as its paper writes them."""
    sigma, sigma_next = (level.view(-1, *[1] * (x.dim() - 1)) for level in (sigma, sigma_next))
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * x0 + torch.sqrt(sigma_next**2 - std**2) * x1, std


def step_by_hand(rollout: str, grid: list[float], i: int, x, v) -> tuple:
    """(mean, std) of a step of noise level 0.7 as its paper writes it."""
    if rollout == "ode":
        return x - (grid[i] - grid[i + 1]) * v, 0.0
    by_formula = {"sde": sde_by_formula, "cps": cps_by_formula}[rollout]
    return by_formula(x, v, *torch.tensor(grid[i : i + 2]).view(2, 1), 0.7)[:2]


def velocity_by_hand(model, adapter: str, x, sigma: float, text: str, guidance: float) -> torch.Tensor:
    """Guided, with a pass for each branch."""
    with lora.use(model.transformer, adapter):
        v, u = (model.velocity(x, torch.tensor([sigma]), model.text([t]), 1.0) for t in (text, ""))
    return u + guidance * (v - u)


def steps_by_hand(cfg, model, prompts: list, adapter: str, rollouts: list[str]) -> list[tuple]:
    """(sample, state, x, the next x) along the first trajectories, sample by sample; a rollout a state."""
    grid, steps = model.sigmas(cfg.steps), []
    for n in range(cfg.prompts_per_step * cfg.group):
        text, index = prompts[n // cfg.group].text, torch.tensor([n])
        x = kernels.normal((1, *model.shape), seed_of(0, 0, "start"), index)
        for i, rollout in enumerate(rollouts):
            v = velocity_by_hand(model, adapter, x, grid[i], text, cfg.guidance).detach()
            mean, std = step_by_hand(rollout, grid, i, x, v)
            after = mean + std * kernels.normal(x.shape, seed_of(0, 0, "noise", i), index)
            steps.append((n, i, x, after))
            x = after
    return steps


def gradient_of(trained: Trained) -> torch.Tensor:
    return torch.cat([ranks.full(p.grad).flatten() for p in trained.parameters.values()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
