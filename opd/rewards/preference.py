"""Scores of human preference, and of an edit, that are a CLIP model and a formula. Raw scores are those of
the tables.

Each takes other weights as its argument: `pickscore@/weights/PickScore_v1`; aesthetic and hpsv2 take a file
or directory and, after a comma, the CLIP that they build on:
`hpsv2@/weights/HPS_v2.1_compressed.pt,/weights/vit-h`. Files are safetensors, or pickles read with
weights_only=True. All is float32. Pictures are resized by PIL, where Flow-GRPO's clipscore resizes tensors:
last digits differ.

ImageReward (BLIP with a cross-attending text encoder) has no class in transformers that loads its weights:
run it as a worker (opd/rewards/remote.py)."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from opd.formats.hub import locate
from opd.rewards.clip import VIT_H, VIT_L, Clip, load_clip, load_processor, read_weights, with_clip
from opd.rewards.inputs import pictures, source_fault, sources_of, versions

PICKSCORE = "yuvalkirstain/PickScore_v1"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"
AESTHETIC_FILE = "aesthetic-model.pth"
LAYERS = (0, 2, 4, 6, 7)  # of the predictor: linear, without activations; its Dropouts have the other places
HPS = "xswu/HPSv2"
HPS_FILE = "HPS_v2.1_compressed.pt"


class ClipScore:
    """Cosine of picture and prompt. Argument: directory or Hub id of a CLIP model."""

    divisor = 0.3  # Flow-GRPO's: logits / 30
    facts = "MIT, 428 M parameters: cosine of picture and prompt, about .28"

    def __init__(self, source: str = VIT_L):
        self.source = source
        self.about = f"{source}, {self.facts}; {engine()}"

    def load(self, device: torch.device) -> None:
        self.clip = load_clip(self.source, device)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return (self.clip.of_pictures(pictures(images_BCHW)) * self.clip.of_texts(prompts)).sum(1)


class PickScore(ClipScore):
    """The cosine by a CLIP that was trained on choices, times its logit scale."""

    divisor = 26.0
    facts = "MIT, 986 M parameters: exp(logit scale) * cosine of picture and prompt, about 20-24"

    def __init__(self, source: str = PICKSCORE):
        super().__init__(source)

    def load(self, device: torch.device) -> None:
        self.clip = load_clip(self.source, device, processor=VIT_H)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return self.clip.scale * super().__call__(images_BCHW, prompts, metadata)


class ClipDirection(ClipScore):
    """Does the picture change as the captions do? (arXiv 2108.00946, by CLIP's unit vectors E and T)

        cos(E(picture) - E(source), T(target caption) - T(source caption)), in [-1, 1]

    of the first source picture and the metadata "source_caption" and "target_caption": what each picture
    shows, not the instruction. 0 where picture and source are equal. Argument as of clipscore."""

    metadata_keys = ("source_caption", "target_caption")
    prompt_fault = staticmethod(source_fault)
    divisor = 1.0
    facts = "MIT, 428 M parameters: cosine of the changes from source to picture and from caption to caption"

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        sources_BD = self.clip.of_pictures([sources_of(row)[0] for row in metadata])
        befores_BD = self.clip.of_texts([row["source_caption"] for row in metadata])
        afters_BD = self.clip.of_texts([row["target_caption"] for row in metadata])
        change_BD = self.clip.of_pictures(pictures(images_BCHW)) - sources_BD
        return F.cosine_similarity(change_BD, afters_BD - befores_BD)


class Aesthetic:
    """Argument: the predictor's file or directory[,CLIP]. Looks at the picture alone."""

    divisor = 10.0

    def __init__(self, sources: str = AESTHETIC):
        self.source, self.clip_source = with_clip(sources, VIT_L)
        models = f"{self.source}, Apache-2.0, on {self.clip_source}, MIT, 428 M parameters"
        self.about = f"{models}: LAION's improved MLP of CLIP's unit vector of the picture, 1-10; {engine()}"

    def load(self, device: torch.device) -> None:
        """KeyError if the weights are not the predictor's."""
        weights = read_weights("aesthetic predictor", self.source, AESTHETIC_FILE)
        self.clip = load_clip(self.clip_source, device)
        names = [(f"layers.{place}.weight", f"layers.{place}.bias") for place in LAYERS]
        self.layers = [(weights[weight].float(), weights[bias].float()) for weight, bias in names]

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        x_BD = self.clip.of_pictures(pictures(images_BCHW))
        for weight_OI, bias_O in self.layers:
            x_BD = F.linear(x_BD, weight_OI, bias_O)
        return x_BD[:, 0]


class HPSv2:
    """Argument: the weights' file or directory[,CLIP ViT-H, for its sizes and its tokenizer]."""

    def __init__(self, sources: str = HPS):
        self.source, self.clip_source = with_clip(sources, VIT_H)
        formula = "HPSv2.1: cosine of picture (longest side 224, padded with black) and prompt, .2-.35"
        self.about = f"{self.source}, Apache-2.0, 986 M parameters: {formula}; {engine()}"

    def load(self, device: torch.device) -> None:
        """RuntimeError if the weights do not fit the CLIP that is named."""
        from transformers import CLIPConfig, CLIPModel

        weights = read_weights("HPSv2", self.source, HPS_FILE)
        processor = load_processor(self.clip_source)
        config = CLIPConfig.from_pretrained(locate("CLIP", self.clip_source, ["config.json"]))
        model = CLIPModel(config).float()
        model.load_state_dict(in_transformers_names(weights))
        self.clip = Clip(model, processor, device)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        size = self.clip.model.config.vision_config.image_size
        padded = [padded_to_square(picture, size) for picture in pictures(images_BCHW)]
        pixels = self.clip.processor.image_processor(
            images=padded, do_resize=False, do_center_crop=False, return_tensors="pt"
        ).pixel_values
        return (self.clip.of_pixels(pixels) * self.clip.of_texts(prompts)).sum(1)


def padded_to_square(picture: Image.Image, size: int) -> Image.Image:
    """Longest side `size` (bicubic), in the middle of a black square."""
    square = Image.new("RGB", (size, size))
    small = ImageOps.contain(picture, square.size, Image.Resampling.BICUBIC)
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


# HPSv2's weights have open_clip's names. Applied in this order: `visual.` is gone before the text's turn.
OPEN_CLIP_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def in_transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict as one for CLIPModel. The projections are transposed, and attention's joint
    input projection is cut into query, key and value."""
    renamed = {}
    for name, tensor in weights.items():
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T
        for old, new in OPEN_CLIP_NAMES.items():
            name = name.replace(old, new)
        if ".in_proj_" in name:
            for part, rows in zip(("q_proj.", "k_proj.", "v_proj."), tensor.chunk(3), strict=True):
                renamed[name.replace("in_proj_", part)] = rows
        else:
            renamed[name] = tensor
    return renamed


def engine() -> str:
    return f"{versions('transformers')}, float32"
