"""Scorers' models in small: the real classes with random weights, saved as their repositories are."""

from pathlib import Path

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from opd import rewards
from opd.rewards.geneval import CLASSES
from tests.tiny_clip import make_tokenizer

WORDS = "a photo of red green blue dog cat object two the".split()
SIZE = 28


def loaded(spec: str) -> rewards.Reward:
    reward = rewards.find_reward(spec)
    reward.load(torch.device("cpu"))
    return reward


def clip_parts(width: int = 32, projection: int = 16):
    """(CLIPModel, CLIPProcessor): two layers a tower, 28 px, weights large enough to tell pictures apart."""
    tokenizer = make_tokenizer(WORDS)
    tokenizer.model_max_length = 32
    layers = dict(hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(layers, vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=projection)
    text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_act="gelu")
    vision = dict(layers, image_size=SIZE, patch_size=14, projection_dim=projection, hidden_act="gelu")
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def save_clip(folder: Path) -> Path:
    model, processor = clip_parts()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_detector(folder: Path, seen: str) -> Path:
    """A Mask2Former on Swin that takes every query for a `seen`, or for nothing at all."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = dict(depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
    stages["out_features"] = [f"stage{n}" for n in (1, 2, 3, 4)]
    torch.manual_seed(0)
    widths = dict(hidden_dim=32, feature_size=32, mask_feature_size=32)
    widths |= dict(encoder_feedforward_dim=16, dim_feedforward=16)
    layers = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6)
    names = dict(id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)})
    backbone = SwinConfig(image_size=64, embed_dim=8, window_size=4, **stages)
    config = Mask2FormerConfig(backbone_config=backbone, **widths, **layers, **names)
    model = Mask2FormerForUniversalSegmentation(config)
    wanted = len(CLASSES)  # the label of nothing
    if seen:
        wanted = CLASSES.index(seen)
    with torch.no_grad():
        model.class_predictor.bias[wanted] += 20
    model.save_pretrained(folder)
    transformers.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_blip(folder: Path, words: list[str]) -> Path:
    """A BLIP for questions whose vocabulary is `words`, yes and no."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipProcessor

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "yes", "no", *words, "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    start = len(vocabulary) - 2
    layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = dict(layers, vocab_size=len(vocabulary), encoder_hidden_size=32, max_position_embeddings=48)
    text |= dict(bos_token_id=start, pad_token_id=0, sep_token_id=3, eos_token_id=3, is_decoder=True)
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=dict(layers, image_size=SIZE, patch_size=14))
    model = BlipForQuestionAnswering(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder
