"""GenEval: are the objects of the prompt there, in number, colour and place? (arXiv 2310.11513)

    geneval             official, 0 or 1: what tables print, as the mean of the six tags' means
    geneval_strict      0 or 1: counts are exact
    geneval_dense       partial credit: the training reward

Definitions: opd/rewards/geneval_rules.py. Detector and CLIP run in transformers (extra geneval: scipy,
without which Mask2Former does not start). The published numbers come from the same network in mmdet 2.x,
whose resizing differs a little. Argument: DETECTOR[,CLIP], directories or Hub ids.

An object's colour is the nearest of ten by CLIP: the picture is cut to the object's box, with everything
outside its mask painted #999; a colour's text vector is the mean of three templates."""

import functools
import warnings

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opd.files import locate
from opd.rewards import geneval_rules
from opd.rewards.clip import FILES, VIT_L, load_clip, whole
from opd.rewards.geneval_rules import CLASSES, COLOURS, CONFIDENCE, Found, kept
from opd.rewards.inputs import need, pictures, versions

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GREY = "#999999"
BATCH = 8
"""Pictures per forward pass of the detector."""
LEAST_ON_KNOWN = 0.1
"""Confidence that something must reach on the known picture; a detector that sees nothing gives .01."""


class Official:
    """Argument: DETECTOR[,CLIP]."""

    metadata_keys = ("tag", "include")
    rule = staticmethod(geneval_rules.official)
    definition = "official: at least the count, colours and positions of the most confident, excludes; 0 or 1"

    def __init__(self, sources: str = DETECTOR):
        need("geneval", "scipy")
        self.detector = detector_of(sources)
        detector, clip = self.detector.source, self.detector.clip_source
        models = f"{detector}, see its card for the licence, 69 M parameters, and {clip}, MIT, 428 M"
        engine = f"{versions('transformers')}, float32 (published: mmdet 2)"
        self.about = f"{models}: {self.definition}; {engine}"

    def load(self, device: torch.device) -> None:
        self.detector.load(device)

    def prompt_fault(self, text: str, metadata: dict) -> str:
        return geneval_rules.metadata_fault(metadata)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Scores (B,). Warns where no picture holds any object."""
        found = self.detector.find(images_BCHW)
        if len(found) >= 8 and not any(found):
            warnings.warn(f"GenEval's detector found no object in any of {len(found)} pictures", stacklevel=2)
        scores = []
        for picture, items, row in zip(pictures(images_BCHW), found, metadata, strict=True):
            colours_of = functools.partial(self.detector.colours, picture)
            scores.append(self.rule(kept(items, row["tag"]), row, colours_of))
        return torch.tensor(scores)


class Strict(Official):
    rule = staticmethod(geneval_rules.strict)
    definition = "strict: exactly the count, colour and position asked for, excludes ignored; 0 or 1"


class Dense(Official):
    rule = staticmethod(geneval_rules.dense)
    definition = "dense reward of Flow-GRPO's server: mean of partial credits; at most 1, may be negative"


class Detector:
    """Mask2Former, and CLIP for colours, shared by the three scores. The objects found in the last pictures
    are kept, so that a second score of the same pictures detects nothing anew."""

    def __init__(self, sources: str):
        self.source, _, clip = sources.partition(",")
        self.clip_source = clip or VIT_L
        self.loaded = False
        self.last = (None, None)  # images and what was found in them, replaced as one

    def load(self, device: torch.device) -> None:
        """ValueError if the detector finds nothing in a picture of a stop sign: broken weights or kernels."""
        if self.loaded:
            return
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        folder = locate("detector", self.source, FILES)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model = whole(Mask2FormerForUniversalSegmentation.from_pretrained, folder)
        classes = self.model.config.num_labels
        if classes != len(CLASSES):
            raise ValueError(f"{folder}: {classes} classes, COCO has {len(CLASSES)}")
        self.model.to(device).eval().requires_grad_(False)
        self.device = device
        self.clip = load_clip(self.clip_source, device)
        self.texts_of = functools.cache(self._texts_of)
        (found,) = self._detect([known_picture()], least=0.0)
        best = max((item.confidence for item in found), default=0.0)
        if best < LEAST_ON_KNOWN:
            seen = f"the detector finds nothing in a picture of a stop sign (best confidence {best:.3f})"
            raise ValueError(f"{seen}: check its weights, {self.source}, and torch's kernels")
        self.loaded = True

    def find(self, images_BCHW: Tensor) -> list[list[Found]]:
        """The objects of each picture, with masks (H, W)."""
        images, found = self.last
        if images is not None and images.shape == images_BCHW.shape and torch.equal(images, images_BCHW):
            return found
        found = self._detect(pictures(images_BCHW), CONFIDENCE)
        self.last = (images_BCHW.clone(), found)
        return found

    @torch.no_grad()
    def _detect(self, batch: list[Image.Image], least: float) -> list[list[Found]]:
        found = []
        for start in range(0, len(batch), BATCH):
            some = batch[start : start + BATCH]
            inputs = self.processor(images=some, return_tensors="pt")
            outputs = self.model(pixel_values=inputs["pixel_values"].to(self.device))
            # On the CPU, where transformers makes the maps that it fills.
            outputs.class_queries_logits = outputs.class_queries_logits.float().cpu()
            outputs.masks_queries_logits = outputs.masks_queries_logits.float().cpu()
            sizes = [(picture.height, picture.width) for picture in some]
            instances = self.processor.post_process_instance_segmentation(
                outputs, threshold=least, target_sizes=sizes, return_binary_maps=True
            )
            found += [_found(instance) for instance in instances]
        return found

    def colours(self, picture: Image.Image, found: list[Found]) -> list[str]:
        """The colour of each of some objects of one class."""
        crops = [cut_out(picture, item) for item in found]
        nearest = (self.clip.of_pictures(crops) @ self.texts_of(found[0].name).T).argmax(1)
        return [COLOURS[index] for index in nearest.tolist()]

    def _texts_of(self, name: str) -> Tensor:
        """(10, D): a unit vector per colour of a thing called `name`."""
        rows = []
        for colour in COLOURS:
            texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
            rows.append(self.clip.of_texts(texts).mean(0))
        return F.normalize(torch.stack(rows), dim=1)


@functools.cache
def detector_of(sources: str) -> Detector:
    return Detector(sources)


def _found(instance: dict) -> list[Found]:
    """The objects of one picture, as transformers returns them."""
    found = []
    for segment in instance["segments_info"]:
        mask_HW = instance["segmentation"][segment["id"]] > 0
        found.append(Found(CLASSES[segment["label_id"]], segment["score"], box_of(mask_HW), mask_HW))
    return found


def box_of(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """left, top, right, bottom: the last two lie past the last pixel."""
    rows, columns = torch.nonzero(mask_HW, as_tuple=True)
    corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return tuple(float(corner) for corner in corners)


def cut_out(picture: Image.Image, item: Found) -> Image.Image:
    """The object alone, on grey."""
    mask = Image.fromarray(item.mask.numpy())
    grey = Image.new("RGB", picture.size, GREY)
    return Image.composite(picture, grey, mask).crop(item.box)


def known_picture() -> Image.Image:
    """A red stop sign before a blue sky."""
    picture = Image.new("RGB", (384, 384), (120, 170, 220))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 320, 384, 384), fill=(90, 120, 70))
    draw.rectangle((184, 200, 200, 350), fill=(130, 130, 130))
    draw.regular_polygon((192, 150, 115), 8, rotation=22.5, fill="white")
    draw.regular_polygon((192, 150, 106), 8, rotation=22.5, fill=(190, 20, 30))
    draw.text((192, 150), "STOP", fill="white", font=ImageFont.load_default(64), anchor="mm")
    return picture
