"""The Qwen-Image-Edit family: QwenImageEditPlusPipeline, which edits one to three source pictures. `CONTRACT`
says what each name is for; all but the prompts is Qwen-Image's.

Its text encoder looks at the pictures too, with the prompt and without, so a Condition holds `embeds` and
`negative_embeds` (L_b, D) beside `picture0`, ... (C, H, W).
"""

from functools import partial
from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as theirs
from PIL import Image

from opd.families import Condition, Editing, qwen_image
from opd.families import _parts as parts
from opd.families.qwen_image import *  # noqa: F403 (what is not said here)

PIPELINE = "QwenImageEditPlusPipeline"
MOST = 3  # what the model was trained with
TOKENS = 1024  # of a prompt and what the encoder sees of a picture, about; nothing is cut off


def text_shapes(folder: Path, t5: bool) -> dict[str, tuple[int, ...]]:
    return {"embeds": (TOKENS, parts.transformer_config(folder)["joint_attention_dim"])}


@torch.no_grad()
def encode_prompts(
    text: QwenImageEditPlusPipeline, prompts: list[str], device: torch.device
) -> list[Condition]:
    """Of prompts without a picture."""
    return [{"embeds": text.encode_prompt([prompt], device=device)[0][0]} for prompt in prompts]


def picture_size(folder: Path, width: int, height: int) -> tuple[int, int]:
    """About a megapixel of the same shape, in multiples of 32. ValueError where the encoder refuses it."""
    if max(width, height) > 200 * min(width, height):
        fits = "give it sides of which one is at most 200 times as long as the other"
        raise ValueError(f"it is {width} x {height} pixels; {fits}")
    return theirs.calculate_dimensions(theirs.VAE_IMAGE_SIZE, width / height)


@torch.no_grad()
def read_with(
    text: QwenImageEditPlusPipeline, prompt: str, pictures: list[Image.Image], device: torch.device
) -> Condition:
    """The encoder sees each picture at about 384 x 384 pixels."""
    seen = []
    for picture in pictures:
        small = theirs.calculate_dimensions(theirs.CONDITION_IMAGE_SIZE, picture.width / picture.height)
        seen.append(picture.resize(small, Image.Resampling.LANCZOS))
    condition = {}
    for name, words in (("embeds", prompt), ("negative_embeds", qwen_image.NEGATIVE)):
        (condition[name],), _ = text.encode_prompt([words], image=seen, device=device)
    return condition


fitted = partial(parts.resized, picture_size)
EDITING = Editing(fewest=1, most=MOST, size=picture_size, fit=fitted, read=read_with)
