"""CLIP, as the preference scores and GenEval's colours use it: unit vectors of pictures and of texts."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opd.formats.hub import locate

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
BATCH = 32  # pictures per forward pass
FILES = ["*.json", "*.txt", "*.safetensors"]  # what is fetched of a Hub repository


class Clip:
    """A CLIP model in float32 (preference scores differ in their last digits; half precision moves them)."""

    def __init__(self, model, processor, device: torch.device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = processor
        self.device = device
        self.scale = model.logit_scale.exp().item()

    def of_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """(B, D) float32 on the CPU, rows of length 1."""
        pixels_BCHW = self.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        return self.of_pixels(pixels_BCHW)

    @torch.no_grad()
    def of_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """The same of pixels that are resized and normalised already."""
        rows = []
        for batch_BCHW in pixels_BCHW.split(BATCH):
            rows.append(self.model.get_image_features(batch_BCHW.to(self.device)).pooler_output.cpu())
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> Tensor:
        """(B, D) float32 on the CPU, rows of length 1; a text is cut at the model's 77 tokens."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        projected_BD = self.model.get_text_features(**tokens).pooler_output
        return F.normalize(projected_BD.cpu(), dim=1)


def with_clip(sources: str, clip: str) -> tuple[str, str]:
    """An argument WEIGHTS[,CLIP] as both; `clip` where it names none."""
    weights, _, named = sources.partition(",")
    return weights, named or clip


def load_clip(source: str, device: torch.device, processor: str = "") -> Clip:
    """CLIP from a directory or Hub id, with the processor of `processor` where `source` has none."""
    from transformers import CLIPModel

    folder = locate("CLIP", source, FILES)
    names = ("preprocessor_config.json", "processor_config.json")
    has_processor = any((folder / name).is_file() for name in names)
    if has_processor or not processor:
        processor = source
    return Clip(whole(CLIPModel.from_pretrained, folder), load_processor(processor), device)


def load_processor(source: str):
    """How pictures are resized and normalised, and texts tokenised."""
    from transformers import CLIPProcessor

    return CLIPProcessor.from_pretrained(locate("CLIP processor", source, ["*.json", "*.txt"]))


def whole(from_pretrained: Callable, folder: Path):
    """The float32 model in `folder`. ValueError if its file lacks weights: transformers makes them up."""
    model, info = from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: its weights lack {len(missing)} tensors, such as {missing[:2]}")
    return model


def read_weights(what: str, source: str, name: str) -> dict[str, Tensor]:
    """Tensors of the file `source`, or of the file `name` in a directory or Hub repository: a .safetensors,
    or a pickle that torch.load reads with weights_only=True."""
    from safetensors.torch import load_file

    file = locate(what, source, [name])
    if file.is_dir():
        file = file / name
    if file.suffix == ".safetensors":
        return load_file(file)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)
