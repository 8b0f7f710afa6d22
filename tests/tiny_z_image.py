"""A tiny ZImagePipeline, made and saved in a second."""

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests import tiny

WIDTH = 32
CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_pipeline(folder: Path) -> Path:
    """8 px images, 4x4x4 latents, two joint layers and a refiner for each of image and text, 96 wide,
    random (not zero) weights, float32."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ZImagePipeline(
        transformer=make_transformer(),
        vae=tiny.make_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def make_tokenizer() -> Qwen2Tokenizer:
    """A token per byte. With its chat template a prompt of 13 letters is 32 tokens, which is where the
    transformer begins to pad short texts of a batch and to mask the padding."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config).eval()


def make_transformer() -> ZImageTransformer2DModel:
    """Its embedding of time is 1024 wide whatever the rest is: narrower blocks would be dwarfed by it."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 8, 8],
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return transformer
