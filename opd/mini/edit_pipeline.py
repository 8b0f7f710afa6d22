"""Make the editing miniature: a genuine Flux2KleinPipeline directory, its data, and its shipped weights.

    P=runs/mini-edits-pipeline D=runs/mini-edits-data
    python -m opd.mini.edits runs/mini-edits                # prompt files and their pictures
    python -m opd.mini.edit_pipeline pipeline $P            # encoder, trained VAE, untrained transformer
    python -m opd.mini.edit_pipeline data $D $P             # latents, instructions, source pictures
    torchrun train.py mini-edit-base                        # pretrain the base
    python -m opd.mini.build base $P runs/mini-edit-base/student opd/mini/weights/edits/base
    for t in recolour write paint; do
        torchrun train.py mini-edit-$t
        python -m opd.mini.build teacher runs/mini-edit-$t edits/$t
    done
    python -m opd.mini.build sha256

What came of it: opd/mini/study/RESULTS.md, "Editing".
"""

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from einops import rearrange
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from opd.families import flux2
from opd.formats.latents import write_samples
from opd.mini import build, drawing, edits, world

TOKENS, WIDTH, LATENT = 12, 64, 8
LAYERS = 28  # the pipeline reads the 9th, 18th and 27th
IMAGES = {"recolour": 26_000, "write": 14_000, "paint": 8_000}


def make_tokenizer() -> Qwen2Tokenizer:
    """Each word of the world is a token; digits and letters of a string are one each."""
    prompts = ["make the", 'write "" on the sign', *world.all_prompts("quality")]
    words = {word for prompt in prompts for word in prompt.split()} | {*world.PALETTE, *world.SHAPES}
    marks = ["<|endoftext|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A space belongs to the word behind it, and is written so.
    spelt = [list(start + word) for word in words if word.isalpha() for start in ("", "\u0120")]
    merges = build.learn_merges(spelt)
    tokens = [*marks, *alphabet, *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    # Without the words around a message that a real chat has.
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A frozen random encoder. Wide embeddings, so that every word keeps its own direction."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model.eval()


def make_vae() -> AutoencoderKLFlux2:
    """Factor 8: a picture has as many latents as in opd/mini/build.py. The decoder's channels are where the
    world's own 24 pixels a side are; its outer levels only make them four wide."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 32),
        layers_per_block=0,
        latent_channels=LATENT,
        norm_num_groups=1,
        sample_size=edits.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for convolution in vae.modules():  # at the start each passes on what it gets
        if isinstance(convolution, torch.nn.Conv2d):
            torch.nn.init.dirac_(convolution.weight)
            convolution.weight.data += 0.02 * torch.randn_like(convolution.weight)
    return vae


def set_batch_norm(vae: AutoencoderKLFlux2, z_BCHW: torch.Tensor) -> None:
    """Mean and variance of a patch's channels become those of the VAE's batch norm."""
    patches = rearrange(z_BCHW, "b c (h p) (w q) -> (c p q) (b h w)", p=2, q=2)
    vae.bn.running_mean.copy_(patches.mean(1))
    vae.bn.running_var.copy_(patches.var(1))


def make_transformer() -> Flux2Transformer2DModel:
    """Two double and four single blocks, whose modulations and output start at zero."""
    model = Flux2Transformer2DModel(
        in_channels=4 * LATENT,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=3 * WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 12, 12, 12),
    )
    zero = (
        model.double_stream_modulation_img.linear,
        model.double_stream_modulation_txt.linear,
        model.single_stream_modulation.linear,
        model.norm_out.linear,
        model.proj_out,
    )
    for linear in zero:
        torch.nn.init.zeros_(linear.weight)
    return model


def build_pipeline(folder: Path) -> None:
    """Save the whole pipeline; its transformer is untrained (`train.py mini-edit-base` trains it)."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vae = make_vae()
    counts = {"recolour": 1500, "write": 1500, "paint": 3000}
    images_u8 = torch.stack([after for _, after, _ in samples(counts, seed=1)])
    set_batch_norm(vae, build.train_vae(vae, images_u8, steps=2000, batch=32))
    pipeline = Flux2KleinPipeline(
        transformer=make_transformer(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)


def samples(counts: dict[str, int], seed: int):
    """Yields `counts` training samples of each task: picture before (96, 96, 3) uint8 or None, picture after
    (3, 96, 96) uint8, instruction."""
    rng = np.random.default_rng(seed)
    tasks = rng.permutation(np.repeat(list(counts), list(counts.values()))).tolist()
    landscapes = world.split("quality")[0]
    for task in tasks:
        before = None
        if task == "paint":
            after, text = drawing.training_pair(landscapes[rng.integers(len(landscapes))], rng)
        else:
            pool = edits.split(task)[0]
            edit, other = (pool[number] for number in rng.integers(len(pool), size=2))
            if task == "write":  # any string may stand there before
                edit = replace(edit, before=other.after)
            before, after, _ = edits.draw(edit, rng, rng.random() < edits.FORGETFUL)
            before, text = edits.large(before), edits.misread(edit, rng)
        yield before, rearrange(torch.from_numpy(edits.large(after)), "h w c -> c h w"), text


def write_data(folder: Path, pipeline: Path, counts: dict[str, int]) -> None:
    """Latents, instructions and source pictures, as stage sft reads them."""
    vae = flux2.load_vae(pipeline)
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    rows, latents = [], []
    drawn = enumerate(samples(counts, seed=10))
    while batch := list(islice(drawn, 64)):
        for number, (before, _, text) in batch:
            rows.append({"prompt": text})
            if before is not None:
                rows[-1]["image"] = f"sources/{number}.png"
                Image.fromarray(before).save(folder / rows[-1]["image"])
        after_B3HW = torch.stack([after for _, (_, after, _) in batch]) / 255
        latents.append(flux2.encode_images(vae, after_B3HW).half())
    write_samples(folder, torch.cat(latents), rows)
    print(f"{folder}: {len(rows)} latents", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pipeline", folder]:
            build_pipeline(Path(folder))
        case ["data", folder, pipeline]:
            write_data(Path(folder), Path(pipeline), IMAGES)
        case _:
            sys.exit(__doc__)
