"""GenEval: each score worked out by hand on made-up detections; the real classes through the whole path."""

import re

import pytest
import torch
from PIL import Image

from opd.formats.pictures import to_pil
from opd.rewards import geneval
from opd.rewards.geneval import Found, dense, kept, official, relations, strict
from tests.tiny_scorers import loaded, save_clip, save_detector

# A scene is written as words: "name colour confidence left top" for a thing of 10 x 10 pixels.


def scene(*things):
    found = []
    for thing in things:
        name, colour, confidence, left, top = thing.split()
        left, top = float(left), float(top)
        found.append(Found(name, float(confidence), (left, top, left + 10, top + 10), colour))
    return found


def colours_of(found):
    return [item.mask for item in found]


def clause(name, count=1, color="", position=None):
    more = {"color": color, "position": position}
    return {"class": name, "count": count} | {key: value for key, value in more.items() if value}


def asked(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


ONE = asked("single_object", clause("dog"))
TWO = asked("two_object", clause("dog"), clause("cat"))
THREE = asked("counting", clause("dog", 3), exclude=[clause("dog", 4)])
RED = asked("colors", clause("dog", color="red"))
BOTH = asked("color_attr", clause("dog", color="red"), clause("cat", color="blue"))
LEFT = asked("position", clause("cat"), clause("dog", position=["left of", 0]))
REDS = asked("colors", clause("dog", 2, color="red"))
LEFT_RED = asked("position", clause("cat"), clause("dog", color="red", position=["left of", 0]))

DOG = "dog red .95 0 0"
DOG2 = "dog blue .94 50 0"
DOG3 = "dog red .93 90 0"
DOG4 = "dog red .92 120 0"
WEAK = "dog red .31 60 60"
CAT = "cat blue .95 100 0"
BELOW = "cat blue .95 0 100"

# metadata, things, official, strict, dense; the dense column says how it comes about
CASES = [
    ("no dog", ONE, [], 0, 0, 0),  # 1 - 1/1
    ("three dogs for one", ONE, [DOG, DOG2, DOG3], 1, 0, -1),  # 1 - 2/1
    ("a weak dog counts outside counting", ONE, [WEAK], 1, 1, 1),
    ("too weak a dog", ONE, ["dog red .3 0 0"], 0, 0, 0),  # more than .3 is asked for
    ("an exclude of nothing", ONE | {"exclude": None}, [DOG], 1, 1, 1),
    ("one of two", TWO, [DOG], 0, 0, 0.5),  # (1 + 0) / 2
    ("three of three", THREE, [DOG, DOG2, DOG3], 1, 1, 1),
    ("four of three: excluded", THREE, [DOG, DOG2, DOG3, DOG4], 0, 0, 2 / 3),
    ("a weak fourth is not counted", THREE, [DOG, DOG2, DOG3, WEAK], 1, 1, 1),
    ("blue for red", RED, [DOG2], 0, 0, 0.5),  # count 1, colour 1 - 1/1
    ("the surest is red, the other blue", RED, [DOG, DOG2], 1, 0, 0),  # count 1 - 1/1, then 0
    ("one red of two dogs", REDS, [DOG, DOG2], 0, 0, 0.75),  # count 1, colour 1 - 1/2
    ("both colours", BOTH, [DOG, CAT], 1, 1, 1),
    ("colours swapped", BOTH, ["dog blue .9 0 0", "cat red .9 50 0"], 0, 0, 0.5),  # (1+0+1+0) / 4
    ("one colour right", BOTH, [DOG, "cat red .9 50 0"], 0, 0, 0.75),  # (1+1+1+0) / 4
    ("left", LEFT, [CAT, DOG], 1, 1, 1),  # (1+1+1) / 3
    ("above for left", LEFT, [BELOW, DOG], 0, 0, 0.75),  # (1+1+0+1) / 4: the server's extra 1
    ("the target is missing", LEFT, [DOG], 0, 0, 1 / 3),  # (0+1+0) / 3
    ("two targets: the surest counts", LEFT, [CAT, "cat red .4 -50 0", DOG], 1, 0, 1 / 3),  # (0+1+0) / 3
    ("blue and left", LEFT_RED, [CAT, "dog blue .9 0 0"], 0, 0, 2 / 3),  # (1+1+0) / 3: place unasked
    ("red and right", LEFT_RED, [CAT, "dog red .9 200 0"], 0, 0, 0.8),  # (1+1+1+0+1) / 5
]


@pytest.mark.parametrize(
    "name, metadata, things, is_official, is_strict, credit", CASES, ids=[case[0] for case in CASES]
)
def test_the_three_scores(name, metadata, things, is_official, is_strict, credit):
    objects = kept(scene(*things), metadata["tag"])
    scores = [rule(objects, metadata, colours_of) for rule in (official, strict, dense)]
    assert scores == [is_official, is_strict, pytest.approx(credit)]


def test_an_exclude_of_another_class_is_for_the_official_score_alone():
    metadata = asked("single_object", clause("dog"), exclude=[clause("cat", 1)])
    objects = kept(scene(DOG, CAT), "single_object")
    assert [rule(objects, metadata, colours_of) for rule in (official, strict, dense)] == [0, 1, 1]


RELATIONS = {
    (-30, 0): {"left of"},
    (0, 30): {"below"},
    (30, 30): {"right of", "below"},  # shortened to 28, over 42.4: .66 each
    (2, 0): set(),  # within the slack of .1 x (10 + 10)
    (3, 0): set(),  # shortened to 1, over 3: .33
    (5, 0): {"right of"},  # 3 / 5
    (40, -20): {"right of"},  # 38 / 44.7 = .85; 18 / 44.7 = .40
}


@pytest.mark.parametrize("place, expected", RELATIONS.items())
def test_relations(place, expected):
    x, y = place
    a, b = Found("a", 1, (x, y, x + 10, y + 10)), Found("b", 1, (0, 0, 10, 10))
    assert relations(a, b) == expected


def test_at_most_sixteen_of_a_class_are_kept_the_surest_first():
    found = [Found("dog", 0.4 + n / 100, (0, 0, 1, 1), n) for n in range(20)]
    assert [item.mask for item in kept(found, "colors")["dog"]] == list(range(19, 3, -1))


@pytest.mark.parametrize(
    "metadata, fault",
    [
        ({"tag": "colour", "include": [clause("dog")]}, "tag is 'colour'"),
        (asked("colors", {"class": "dog"}), '"include" 0: a clause is an object with "class" and "count"'),
        (asked("colors", clause("doge")), "unknown class 'doge'"),
        (asked("colors", clause("dog", color="grey")), "unknown color 'grey'"),
        (asked("position", clause("dog"), clause("cat", position=["beside", 0])), "write .relation, clause."),
        (asked("position", clause("dog", position=["above", 0])), '"include" 0: position points at clause 0'),
    ],
)
def test_metadata_of_another_schema_are_refused(metadata, fault):
    assert geneval.metadata_fault(ONE | {"exclude": None}) == ""
    assert re.search(fault, geneval.metadata_fault(metadata))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A detector that takes everything for stop signs, and a CLIP."""
    pytest.importorskip("scipy", reason="the extra geneval is not installed; .[test] brings it")
    folder = tmp_path_factory.mktemp("geneval")
    save_detector(folder / "detector", seen="stop sign")
    save_detector(folder / "blind", seen="")
    save_clip(folder / "clip")
    return folder


def test_detector_and_colours_run_through_the_whole_path(sources):
    spec = f"@{sources}/detector,{sources}/clip"
    names = ["geneval", "geneval_strict", "geneval_dense"]
    found = [loaded(name + spec) for name in names]
    images_BCHW = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    sign, dog = asked("single_object", clause("stop sign")), ONE
    metadata = [sign, dog, asked("colors", clause("stop sign", color="red"))]
    scores = [reward(images_BCHW, ["", "", ""], metadata).tolist() for reward in found]
    detector = found[0].terms[0].function.detector
    objects = [kept(items, "colors") for items in detector.find(images_BCHW)]
    counts = [len(some.get("stop sign", [])) for some in objects]
    assert min(counts) >= 1 and all(set(some) == {"stop sign"} for some in objects)
    assert scores[0][:2] == [1, 0]  # at least one sign, no dog
    assert scores[1][:2] == [float(counts[0] == 1), 0]
    assert scores[2][:2] == [1 - abs(counts[0] - 1), 0]  # 1 - |found - 1| / 1; no dog
    (item, *_) = objects[2]["stop sign"]
    colour = detector.colours(to_pil(images_BCHW[2], 0), [item])
    assert scores[0][2] == float(colour == ["red"])
    about = found[2].about[names[2] + spec]
    assert "dense" in about and str(sources) in about and "transformers" in about


def test_the_colour_of_a_cut_out_object_is_the_nearest_of_ten_by_hand(sources):
    """Against CLIPModel's own logits, template by template."""
    detector = geneval.detector_of(f"{sources}/detector,{sources}/clip")
    detector.load(torch.device("cpu"))
    picture = Image.new("RGB", (60, 60), (200, 30, 30))
    mask_HW = torch.zeros(60, 60, dtype=torch.bool)
    mask_HW[10:30, 20:50] = True
    mask_HW[12, 22] = False
    item = Found("dog", 1.0, geneval.box_of(mask_HW), mask_HW)
    assert item.box == (20, 10, 50, 30)
    crop = geneval.cut_out(picture, item)
    assert crop.size == (30, 20) and crop.getpixel((0, 0)) == (200, 30, 30)
    assert crop.getpixel((2, 2)) == (0x99, 0x99, 0x99)
    texts = []
    for colour in geneval.COLOURS:
        things = (f"{colour} dog", f"{colour}-colored dog", f"{colour} object")
        texts += [f"a photo of a {thing}" for thing in things]
    inputs = detector.clip.processor(text=texts, images=[crop], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = detector.clip.model(**inputs)
    centres = out.text_embeds.view(10, 3, -1).mean(1)
    cosines = (centres / centres.norm(dim=1, keepdim=True)) @ out.image_embeds[0]
    assert detector.colours(picture, [item]) == [geneval.COLOURS[cosines.argmax()]]


def test_a_detector_that_sees_nothing_is_refused(sources):
    with pytest.raises(ValueError, match=r"finds nothing in a picture of a stop sign \(best confidence 0.0"):
        loaded(f"geneval@{sources}/blind,{sources}/clip")
