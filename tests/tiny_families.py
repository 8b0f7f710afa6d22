"""Tiny pipelines of the families beside SD3: 8 px images, float32, random (not zero) weights, made and saved
in a second."""

from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers

from tests import tiny, tiny_clip

WIDTH = 32
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
ONE_OF_EACH = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1}
DYNAMIC = {"use_dynamic_shifting": True}


def make_flux(folder: Path, kind: type = diffusers.FluxPipeline, told: bool = True) -> Path:
    """4x4x4 latents, one double and one single block. `told`: its guidance, as FLUX.1-schnell is not."""
    torch.manual_seed(0)
    t5, t5_tokenizer = tiny.make_t5(WIDTH)
    tokenizer = tiny_clip.make_tokenizer("a two red blue circle circles square squares triangle dot".split())
    kind(
        transformer=diffusers.FluxTransformer2DModel(
            **ONE_OF_EACH,
            **HEADS,
            joint_attention_dim=t5.config.d_model,
            pooled_projection_dim=WIDTH,
            guidance_embeds=told,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=tiny.make_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        text_encoder=make_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


def make_flux_kontext(folder: Path) -> Path:
    return make_flux(folder, diffusers.FluxKontextPipeline)


def make_flux2(folder: Path) -> Path:
    """2x2 patches of 16 channels, one double and one single block. The pipeline reads the 9th, 18th and 27th
    layer of its text encoder."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vae = diffusers.AutoencoderKLFlux2(**tiny.VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    diffusers.Flux2KleinPipeline(
        transformer=diffusers.Flux2Transformer2DModel(
            **ONE_OF_EACH,
            **HEADS,
            joint_attention_dim=3 * WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        text_encoder=make_qwen3(transformers.Qwen3ForCausalLM, tokenizer, layers=28, inner=WIDTH),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def make_qwen_image_edit(folder: Path) -> Path:
    """The same with a text encoder that looks at pictures, in patches of 28 pixels."""
    return make_qwen_image(folder, diffusers.QwenImageEditPlusPipeline, with_processor=True)


def make_qwen_image(
    folder: Path, kind: type = diffusers.QwenImagePipeline, with_processor: bool = False
) -> Path:
    """4x4x4 latents, each channel with a mean and a spread of its own, two blocks."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    channels = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "axes_dims_rope": (4, 6, 6)}
    transformer = diffusers.QwenImageTransformer2DModel(joint_attention_dim=WIDTH, **HEADS, **channels)
    stages = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
    spread = {"latents_mean": [-0.7, 0.1, 0.9, 0.4], "latents_std": [2.8, 1.4, 2.3, 0.8]}
    vae = diffusers.AutoencoderKLQwenImage(temperal_downsample=[False], **stages, **spread)
    eyes = {}
    if with_processor:
        eyes = {"processor": PictureProcessor(transformers.Qwen2VLImageProcessor(), tokenizer)}
    kind(
        transformer=transformer,
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
        text_encoder=make_qwen25(tokenizer),
        tokenizer=tokenizer,
        **eyes,
    ).save_pretrained(folder)
    return folder


def make_z_image(folder: Path) -> Path:
    """4x4x4 latents, two joint layers and a refiner for each of image and text. The embedding of time is 1024
    wide whatever the rest is: blocks narrower than 96 would be dwarfed by it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    size = {"dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4}
    axes = {"axes_dims": [8, 8, 8], "axes_lens": [128, 8, 8]}
    transformer = diffusers.ZImageTransformer2DModel(in_channels=4, cap_feat_dim=WIDTH, **size, **axes)
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    diffusers.ZImagePipeline(
        transformer=transformer,
        vae=tiny.make_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=make_qwen3(transformers.Qwen3Model, tokenizer, layers=2, inner=2 * WIDTH),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


class PictureProcessor(transformers.Qwen2VLProcessor):
    """Without its processor of films, which needs torchvision and is never asked here."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = None
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


# As a pipeline's model_index.json names it.
PictureProcessor.__name__, PictureProcessor.__module__ = "Qwen2VLProcessor", "transformers"


CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> transformers.Qwen2Tokenizer:
    """A token per byte. With its chat template a prompt of 13 letters is 32 tokens, which is where the
    transformer of Z-Image begins to pad short texts of a batch and to mask the padding."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def sizes(tokenizer, layers: int, inner: int) -> dict:
    """What the configs of all text encoders here share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_clip(tokenizer) -> transformers.CLIPTextModel:
    own = {"max_position_embeddings": tokenizer.model_max_length, "bos_token_id": tokenizer.bos_token_id}
    size = sizes(tokenizer, layers=1, inner=2 * WIDTH)
    config = transformers.CLIPTextConfig(initializer_factor=10.0, **own, **size)
    return transformers.CLIPTextModel(config).eval()


def make_qwen3(kind: type, tokenizer, layers: int, inner: int):
    shape = {"num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3, "bos_token_id": None}
    return kind(transformers.Qwen3Config(**shape, **sizes(tokenizer, layers, inner))).eval()


def make_qwen25(tokenizer) -> transformers.Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    shape = {"num_key_value_heads": 1, "initializer_range": 0.3, "bos_token_id": None}
    text = sizes(tokenizer, layers=2, inner=WIDTH) | shape | {"rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2}
    vision |= {"out_hidden_size": WIDTH}
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
