"""GenEval: are the objects of the prompt there, in number, colour and place? (arXiv 2310.11513)

Three scores, which differ; papers seldom say which one they print:

    geneval         official: count at least what is asked; colours and positions of the most confident
                    objects; `exclude` clauses hold. 0 or 1. Tables print the mean of the six tags' means.
    geneval_strict  count exactly what is asked; `exclude` clauses are not looked at. 0 or 1.
    geneval_dense   the training reward of Flow-GRPO's server: a mean of partial credits, may be negative.

Metadata are GenEval's: {"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index of an
earlier clause]]}, ...][, "exclude": [{"class", "count"}, ...]]}.

Detector and CLIP run in transformers (extra geneval: scipy, without which Mask2Former does not start). The
published numbers come from the same network in mmdet 2.x, whose resizing differs a little. Argument:
DETECTOR[,CLIP], directories or Hub ids. An object's colour is the nearest of ten by CLIP: the picture is cut
to the object's box, with everything outside its mask painted #999."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opd.formats.hub import locate
from opd.rewards.clip import FILES, VIT_L, load_clip, whole, with_clip
from opd.rewards.inputs import need, pictures, versions

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GREY = "#999999"
BATCH = 8  # pictures per forward pass of the detector
LEAST_ON_KNOWN = 0.1
"""Confidence that something must reach on the known picture; a detector that sees nothing gives .01."""
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_NAMES = """
    person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
    parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella
    handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard
    surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange
    broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop
    computer_mouse tv_remote computer_keyboard cell_phone microwave oven toaster sink refrigerator book
    clock vase scissors teddy_bear hair_drier toothbrush
"""
CLASSES = tuple(name.replace("_", " ") for name in _NAMES.split())
"""COCO's 80 classes in the detector's order, under GenEval's names."""

CONFIDENCE = 0.3
CONFIDENCE_OF_COUNTING = 0.9
MOST_OBJECTS = 16  # per class: the most confident ones are kept
SLACK = 0.1  # a centre must be off by more than this share of both sizes to lie left, right, above or below
DIRECTION = 0.5  # least share of the offset that must point in a direction


# ---- the rules --------------------------------------------


@dataclass(frozen=True)
class Found:
    """One detected object."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: Tensor | None = None  # (H, W), for its colour


Objects = dict[str, list[Found]]  # class -> its objects, the most confident first
ColoursOf = Callable[[list[Found]], list[str]]  # the colour of each of some objects of one class


def kept(found: list[Found], tag: str) -> Objects:
    """What counts, by class: counting asks for more confidence."""
    least = CONFIDENCE_OF_COUNTING if tag == "counting" else CONFIDENCE
    objects = {}
    for item in sorted(found, key=lambda item: -item.confidence):
        if item.confidence > least:
            objects.setdefault(item.name, []).append(item)
    return {name: items[:MOST_OBJECTS] for name, items in objects.items()}


def relations(a: Found, b: Found) -> set[str]:
    """Where `a` lies, seen from `b`. The offset is shortened by the slack, but divided by its full length."""
    offsets, shortened = [], []
    for axis in (0, 1):
        (a_low, a_high), (b_low, b_high) = a.box[axis::2], b.box[axis::2]
        offset = (a_low + a_high) / 2 - (b_low + b_high) / 2
        slack = SLACK * (abs(a_high - a_low) + abs(b_high - b_low))
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - slack, 0), offset))
    x, y = shortened
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    distances = zip(RELATIONS, (-x, x, -y, y), strict=True)
    length = math.hypot(*offsets)
    return {relation for relation, distance in distances if distance / length > DIRECTION}


def _all_related(relation: str, some: list[Found], others: list[Found]) -> bool:
    return all(relation in relations(a, b) for a in some for b in others)


def official(objects: Objects, metadata: dict, colours_of: ColoursOf) -> float:
    """1 if every clause holds, else 0."""
    correct = None not in _groups(objects, metadata, colours_of)
    for clause in metadata.get("exclude") or []:
        correct = correct and len(objects.get(clause["class"], [])) < clause["count"]
    return float(correct)


def strict(objects: Objects, metadata: dict, colours_of: ColoursOf) -> float:
    """1 if every class is there as often as asked for, in colour and place, else 0."""
    exact = all(len(objects.get(part["class"], [])) == part["count"] for part in metadata["include"])
    return float(exact and None not in _groups(objects, metadata, colours_of))


def _groups(objects: Objects, metadata: dict, colours_of: ColoursOf) -> list[list[Found] | None]:
    """The objects that matched each clause, the most confident ones; None where it failed."""
    groups = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])[: clause["count"]]
        groups.append(_match(found, clause, groups, colours_of))
    return groups


def _match(found: list[Found], clause: dict, groups: list, colours_of: ColoursOf) -> list[Found] | None:
    """`found` if there are enough of them, of the colour asked for, and where they should be."""
    if len(found) < clause["count"]:
        return None
    if "color" in clause and colours_of(found).count(clause["color"]) < clause["count"]:
        return None
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None or not _all_related(relation, found, groups[target]):
            return None
    return found


def dense(objects: Objects, metadata: dict, colours_of: ColoursOf) -> float:
    """The reward of Flow-GRPO's server: the mean of these credits over all clauses,

        count       1 - |found - asked| / asked                    (negative from twice the number on)
        colour      1 - |of that colour - asked| / asked           0 where the count is wrong
        position    1 where it holds, 0 where its target failed; where it does not hold, a 0 AND a 1

    The last is a slip of the server, kept: a wrong position costs half a credit. Where the count is wrong, a
    clause's colour and position are one 0; where the colour is wrong, its position is not looked at."""
    credits, groups = [], []
    for clause in metadata["include"]:
        found, group = objects.get(clause["class"], []), None
        credits.append(_closeness(len(found), clause["count"]))
        if len(found) == clause["count"]:
            credits += _further_credits(found, clause, groups, colours_of)
            group = _match(found, clause, groups, colours_of)
        elif "color" in clause or "position" in clause:
            credits.append(0.0)
        groups.append(group)
    return sum(credits) / len(credits)


def _further_credits(found: list[Found], clause: dict, groups: list, colours_of: ColoursOf) -> list[float]:
    """Of colour and position, where the count is right."""
    credits = []
    if "color" in clause:
        right = colours_of(found).count(clause["color"])
        credits.append(_closeness(right, clause["count"]))
        if right != clause["count"]:
            return credits
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            credits.append(0.0)
        elif _all_related(relation, found, groups[target]):
            credits.append(1.0)
        else:
            credits += [0.0, 1.0]
    return credits


def _closeness(found: int, asked: int) -> float:
    return 1 - abs(found - asked) / asked


def metadata_fault(metadata: dict) -> str:
    """What is wrong with a prompt's metadata, "" if nothing."""
    if metadata["tag"] not in TAGS:
        return f"its tag is {metadata['tag']!r}; known: {', '.join(TAGS)}"
    if not isinstance(metadata["include"], list) or not metadata["include"]:
        return f'"include" must be a list of at least one clause, got {metadata["include"]!r}'
    for part in ("include", "exclude"):
        for place, clause in enumerate(metadata.get(part) or []):
            fault = _clause_fault(clause, place)
            if fault:
                return f'"{part}" {place}: {fault}'
    return ""


def _clause_fault(clause, place: int) -> str:
    if not isinstance(clause, dict) or not {"class", "count"} <= clause.keys():
        return f'a clause is an object with "class" and "count", got {clause!r}'
    if clause["class"] not in CLASSES:
        return f"unknown class {clause['class']!r}; the detector knows COCO's 80, under GenEval's names"
    if not isinstance(clause["count"], int) or clause["count"] < 1:
        return f"count is {clause['count']!r}; it must be a whole number of at least 1"
    if "color" in clause and clause["color"] not in COLOURS:
        return f"unknown color {clause['color']!r}; known: {', '.join(COLOURS)}"
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
            return f"position is {position!r}; write [relation, clause] with one of {', '.join(RELATIONS)}"
        if position[1] not in range(place):
            return f"position points at clause {position[1]!r}; it must be an earlier one, counted from 0"
    return ""


# ---- the scorers --------------------------------------------


class Official:
    """Argument: DETECTOR[,CLIP]."""

    metadata_keys = ("tag", "include")
    rule = staticmethod(official)
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
        return metadata_fault(metadata)

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        found = self.detector.find(images_BCHW)
        scores = []
        for picture, items, row in zip(pictures(images_BCHW), found, metadata, strict=True):
            colours_of = functools.partial(self.detector.colours, picture)
            scores.append(self.rule(kept(items, row["tag"]), row, colours_of))
        return torch.tensor(scores)


class Strict(Official):
    rule = staticmethod(strict)
    definition = "strict: exactly the count, colour and position asked for, excludes ignored; 0 or 1"


class Dense(Official):
    rule = staticmethod(dense)
    definition = "dense reward of Flow-GRPO's server: mean of partial credits; at most 1, may be negative"


class Detector:
    """Mask2Former, and CLIP for colours, shared by the three scores. The objects found in the last pictures
    are kept, so that a second score of the same pictures detects nothing anew."""

    def __init__(self, sources: str):
        self.source, self.clip_source = with_clip(sources, VIT_L)
        self.clip = None
        self.last = (None, None)  # images and what was found in them, replaced as one

    def load(self, device: torch.device) -> None:
        """ValueError if the detector finds nothing in a picture of a stop sign: broken weights or kernels."""
        if self.clip is not None:
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
        self.texts_of = functools.cache(self._texts_of)
        (found,) = self._detect([known_picture()], least=0.0)
        best = max((item.confidence for item in found), default=0.0)
        if best < LEAST_ON_KNOWN:
            seen = f"the detector finds nothing in a picture of a stop sign (best confidence {best:.3f})"
            raise ValueError(f"{seen}: check its weights, {self.source}, and torch's kernels")
        self.clip = load_clip(self.clip_source, device)

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
            for instance in instances:
                items = []
                for segment in instance["segments_info"]:
                    mask_HW = instance["segmentation"][segment["id"]] > 0
                    name = CLASSES[segment["label_id"]]
                    items.append(Found(name, segment["score"], box_of(mask_HW), mask_HW))
                found.append(items)
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


detector_of = functools.cache(Detector)


def box_of(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """left, top, right, bottom: the last two lie past the last pixel."""
    return Image.fromarray(mask_HW.numpy()).getbbox()


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
