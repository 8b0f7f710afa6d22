"""Scores of human preference that are a CLIP model and a formula. Raw scores are the tables'.

| name | weights | licence | size | score |
|---|---|---|---|---|
| pickscore | yuvalkirstain/PickScore_v1 | MIT | 986 M | exp(logit scale) cos(picture, prompt), 20-24 |
| clipscore | openai/clip-vit-large-patch14 | MIT | 428 M | cos(picture, prompt), about .28 |
| aesthetic | LAION's improved predictor on that | Apache-2.0 | 428 M | MLP of the picture, 1-10 |
| hpsv2 | xswu/HPSv2, HPS_v2.1, ViT-H | Apache-2.0 | 986 M | cos(picture, prompt), .2-.35 |

Rewards of papers: pickscore / 26, clipscore / 0.3 (Flow-GRPO). Each takes other weights as its argument:
`pickscore@/weights/PickScore_v1`; aesthetic and hpsv2 take a file or directory and, after a comma, the CLIP
that they build on: `hpsv2@/weights/HPS_v2.1_compressed.pt,/weights/vit-h`. Files are safetensors, or pickles
read with weights_only=True. All is float32. Pictures are resized by PIL, where Flow-GRPO's clipscore resizes
tensors: last digits differ.

ImageReward (BLIP with a cross-attending text encoder) has no class in transformers that loads its weights:
run it as a worker (opd/rewards/remote.py)."""

import importlib.metadata

import torch
from PIL import Image
from torch import Tensor, nn

from opd.flags import require
from opd.rewards.about import About
from opd.rewards.clip import VIT_H, VIT_L, Clip, file_in, load_clip, load_processor, read_weights
from opd.rewards.inputs import pictures
from opd.rewards.openclip import to_transformers

PICKSCORE = "yuvalkirstain/PickScore_v1"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"
AESTHETIC_FILE = "aesthetic-model.pth"
HPS = "xswu/HPSv2"
HPS_FILE = "HPS_v2.1_compressed.pt"


def _engine() -> str:
    return f"transformers {importlib.metadata.version('transformers')}, float32"


class PickScore:
    """Argument: directory or Hub id of the weights."""

    def __init__(self, source: str = PICKSCORE):
        self.source = source
        self.about = About(
            model=source,
            licence="MIT",
            size="986 M parameters",
            definition="exp(logit scale) * cosine of picture and prompt; about 20-24",
            engine=_engine(),
            divisor=26.0,
        )

    def load(self, device: torch.device) -> None:
        self.clip = load_clip(self.source, device, processor=VIT_H)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return self.clip.scale * _cosines(self.clip, images_BCHW, prompts)


class ClipScore:
    """Argument: directory or Hub id of a CLIP model."""

    def __init__(self, source: str = VIT_L):
        self.source = source
        self.about = About(
            model=source,
            licence="MIT",
            size="428 M parameters",
            definition="cosine of picture and prompt; about .28",
            engine=_engine(),
            divisor=0.3,
        )

    def load(self, device: torch.device) -> None:
        self.clip = load_clip(self.source, device)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return _cosines(self.clip, images_BCHW, prompts)


class Aesthetic:
    """Argument: the predictor's file or directory[,CLIP]. Looks at the picture alone."""

    def __init__(self, sources: str = AESTHETIC):
        self.source, self.clip_source = _pair(sources, VIT_L)
        self.about = About(
            model=f"{self.source} on {self.clip_source}",
            licence="Apache-2.0, CLIP: MIT",
            size="428 M parameters",
            definition="LAION's improved aesthetic predictor: MLP of CLIP's unit vector of the picture; 1-10",
            engine=_engine(),
            divisor=10.0,
        )

    def load(self, device: torch.device) -> None:
        """ValueError if the weights are not the predictor's."""
        weights = read_weights(file_in("aesthetic predictor", self.source, AESTHETIC_FILE))
        self.clip = load_clip(self.clip_source, device)
        self.head = AestheticHead(self.clip.model.config.projection_dim)
        _load_strictly(self.head, weights, self.source)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return self.head(self.clip.of_pictures(pictures(images_BCHW)))


class HPSv2:
    """Argument: the weights' file or directory[,CLIP ViT-H, for its sizes and its tokenizer]."""

    def __init__(self, sources: str = HPS):
        self.source, self.clip_source = _pair(sources, VIT_H)
        self.about = About(
            model=f"{self.source}, {HPS_FILE}",
            licence="Apache-2.0",
            size="986 M parameters",
            definition="HPSv2.1: cosine of picture (longest side 224, padded with black) and prompt; .2-.35",
            engine=_engine(),
        )

    def load(self, device: torch.device) -> None:
        """ValueError if the weights do not fit the CLIP that is named."""
        from transformers import CLIPConfig, CLIPModel

        weights = to_transformers(read_weights(file_in("HPSv2", self.source, HPS_FILE)))
        processor = load_processor(self.clip_source)
        config = CLIPConfig.from_pretrained(file_in("CLIP", self.clip_source, "config.json"))
        model = CLIPModel(config).float()
        _load_strictly(model, weights, self.source)
        self.clip = Clip(model, processor, device)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        size = self.clip.model.config.vision_config.image_size
        padded = [padded_to_square(picture, size) for picture in pictures(images_BCHW)]
        pixels = self.clip.processor.image_processor(
            images=padded, do_resize=False, do_center_crop=False, return_tensors="pt"
        ).pixel_values
        return (self.clip.of_pixels(pixels) * self.clip.of_texts(prompts)).sum(1)


def _cosines(clip: Clip, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """(B,) cosine of each picture and its own prompt."""
    return (clip.of_pictures(pictures(images_BCHW)) * clip.of_texts(prompts)).sum(1)


class AestheticHead(nn.Module):
    """Linear layers without activations; the places of the released Dropouts are kept, as the weights are
    named by place."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features_BD: Tensor) -> Tensor:
        """(B,)"""
        return self.layers(features_BD)[:, 0]


def padded_to_square(picture: Image.Image, size: int) -> Image.Image:
    """Longest side `size` (bicubic), in the middle of a black square."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (size, size))
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def _pair(sources: str, clip: str) -> tuple[str, str]:
    """WEIGHTS[,CLIP] -> both."""
    weights, comma, named = sources.partition(",")
    if comma:
        return weights, named
    return weights, clip


def _load_strictly(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """ValueError naming the first tensor that is missing, left over, or of another shape."""
    own = module.state_dict()
    ignored = {name for name in weights if name.endswith("position_ids")}
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys() - ignored)
    require(not missing and not extra, f"{source}: missing tensors {missing[:2]}, unknown ones {extra[:2]}")
    for name, tensor in own.items():
        shapes = f"{source}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        require(weights[name].shape == tensor.shape, shapes)
    module.load_state_dict({name: weights[name].float() for name in own})
