"""GenEval's three scores (arXiv 2310.11513 and Flow-GRPO's reward server), as functions of what was detected.

They differ, and papers seldom say which one they print:

    official    count at least what is asked; colours and positions of the most confident objects; `exclude`
                clauses hold. 0 or 1. Evaluation prints this, as the mean of the six tags' accuracies.
    strict      count exactly what is asked; `exclude` clauses are not looked at. 0 or 1.
    dense       what GRPO is trained on: a mean of partial credits, which may be negative.

Metadata are GenEval's: {"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index of an
earlier clause]]}, ...][, "exclude": [{"class", "count"}, ...]]}."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
MOST_OBJECTS = 16
"""Per class: the most confident ones are kept."""
SLACK = 0.1
"""A centre must be off by more than this share of both sizes to lie left, right, above or below."""
DIRECTION = 0.5
"""Least share of the offset that must point in a direction."""


@dataclass(frozen=True)
class Found:
    """One detected object."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    """left, top, right, bottom, in pixels"""
    mask: Any = None
    """Whatever the colour function needs, such as the object's mask."""


Objects = dict[str, list[Found]]
"""Class -> its objects, the most confident first."""
ColoursOf = Callable[[list[Found]], list[str]]
"""The colour of each of some objects of one class."""


def kept(found: list[Found], tag: str) -> Objects:
    """What counts, by class: counting asks for more confidence."""
    least = CONFIDENCE
    if tag == "counting":
        least = CONFIDENCE_OF_COUNTING
    objects = {}
    for item in sorted(found, key=lambda item: -item.confidence):
        if item.confidence > least:
            objects.setdefault(item.name, []).append(item)
    return {name: items[:MOST_OBJECTS] for name, items in objects.items()}


def relations(a: Found, b: Found) -> set[str]:
    """Where `a` lies, seen from `b`. The offset is shortened by the slack, but divided by its full length."""
    offsets, shortened = [], []
    for axis in (0, 1):
        offset = _centre(a, axis) - _centre(b, axis)
        slack = SLACK * (_size(a, axis) + _size(b, axis))
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - slack, 0), offset))
    x, y = shortened
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    distances = zip(RELATIONS, (-x, x, -y, y), strict=True)
    length = math.hypot(*offsets)
    return {relation for relation, distance in distances if distance / length > DIRECTION}


def _centre(item: Found, axis: int) -> float:
    return (item.box[axis] + item.box[axis + 2]) / 2


def _size(item: Found, axis: int) -> float:
    return abs(item.box[axis + 2] - item.box[axis])


def _all_related(relation: str, some: list[Found], others: list[Found]) -> bool:
    return all(relation in relations(a, b) for a in some for b in others)


def official(objects: Objects, metadata: dict, colours_of: ColoursOf) -> float:
    """1 if every clause holds, else 0."""
    groups = []  # the objects that matched each clause, None where it failed
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])[: clause["count"]]
        groups.append(_match(found, clause, groups, colours_of))
    correct = None not in groups
    for clause in metadata.get("exclude", []):
        correct = correct and len(objects.get(clause["class"], [])) < clause["count"]
    return float(correct)


def strict(objects: Objects, metadata: dict, colours_of: ColoursOf) -> float:
    """1 if every class is there as often as asked for, in colour and place, else 0."""
    groups = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])
        if len(found) > clause["count"]:
            groups.append(None)
        else:
            groups.append(_match(found, clause, groups, colours_of))
    return float(None not in groups)


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
    credits = []
    groups = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])
        group = None
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
    for place, clause in enumerate(metadata["include"]):
        fault = _clause_fault(clause, place)
        if fault:
            return f'"include" {place}: {fault}'
    for place, clause in enumerate(metadata.get("exclude", [])):
        fault = _clause_fault(clause, 0)
        if fault:
            return f'"exclude" {place}: {fault}'
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
        return _position_fault(clause["position"], place)
    return ""


def _position_fault(position, place: int) -> str:
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        return f"position is {position!r}; write [relation, clause] with one of {', '.join(RELATIONS)}"
    if position[1] not in range(place):
        return f"position points at clause {position[1]!r}; it must be an earlier one, counted from 0"
    return ""
