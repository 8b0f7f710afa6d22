"""Judges: vision-language models behind an OpenAI-style HTTP endpoint (vLLM, SGLang) that grade a picture.

Argument: the endpoint, as in `qwenvl@http://localhost:8001/v1`; the model is the one that the server says it
runs, at temperature 0. Raw grades are the tables', 1 to 5; reward = grade / 5. Edits are graded 0 to 10
(class QwenVLEdit). A key goes into JUDGE_API_KEY.
The texts are written here from their descriptions, NOT word for word those of the papers, so grades are to be
compared with grades of this code; a subclass with another `text` and `pattern` is a judge of its own.

An answer without a grade, or with one out of range, is a failure and never 0."""

import os
import re

import torch
from PIL import Image, ImageOps
from torch import Tensor

from opd.rewards.inputs import pictures, source_fault, sources_of
from opd.rewards.remote import ask, checked_url, gather, png_base64, text_at

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"

UNIFIED = """You see an image that was generated from a text caption. Judge it by two criteria.
1. Alignment with the caption: are the objects, their attributes and their relations as the caption says?
2. Overall image quality: is the image clear, rich in detail, right in its colours and pleasing to look at?
Weigh both, and give one score from 1 to 5 after the words 'Final Score:'.
Text Caption: [{prompt}]"""

QWENVL = """[ROLE] You judge images that were generated from prompts.
[CRITERIA] Alignment: does the image show what the prompt asks for? Aesthetics: is it well made and pleasing?
1-2: Low. 3: Fair. 4-5: High.
Overall: alignment counts far more than aesthetics.
[PROMPT] {prompt}
[OUTPUT] Reason in a few sentences, then give whole numbers from 1 to 5:
<AlignmentScore>n</AlignmentScore><AestheticScore>n</AestheticScore><OverallScore>n</OverallScore>"""

QWENVL_RELEASED = """You judge images that were generated from prompts. **Be extremely strict.**
Alignment with the prompt:
5: every object, attribute, count, relation and text is right. 4: one small detail is off.
3: the main subject is right, something asked for is missing. 2: much is missing or wrong. 1: unrelated.
Aesthetics:
5: flawless and striking. 4: good, with hardly visible flaws. 3: acceptable. 2: clear artefacts.
1: badly broken.
The overall score rests on the alignment first, and on the aesthetics second.
Prompt: {prompt}
Reason briefly, then answer with whole numbers from 1 to 5:
<AlignmentScore>n</AlignmentScore><AestheticScore>n</AestheticScore><OverallScore>n</OverallScore>"""

EDIT = """You judge an edit. The last picture is the result; each picture before it is a source.
The instruction was: [{prompt}]
Success: does the result show what the instruction asks for?
10: all of it. 5: half of it, or the right thing done poorly. 0: nothing of it.
Preservation: is everything else as it was, such as persons, objects, background, style and layout?
10: only what had to change has changed. 5: the same scene, overedited in part. 0: another picture.
A result that equals its source has the highest preservation and no success.
Reason in a few sentences, then give whole numbers from 0 to 10:
<SuccessScore>n</SuccessScore><PreservationScore>n</PreservationScore>"""


class Judge:
    """What the judges share; a subclass says what is asked and where the grade stands."""

    model: str  # the model that the text was written for, and its licence
    text: str
    pattern: str  # of the answer; its group is the grade, and of several groups the least
    lowest = 1.0
    pixels = 0  # resize pictures to so many pixels per side; 0 = as they are
    divisor = 5.0  # the highest grade

    def __init__(self, endpoint: str = ""):
        self.endpoint = checked_url(endpoint, "qwenvl@http://localhost:8001/v1")
        self.key = os.environ.get("JUDGE_API_KEY", "")
        self.range = f"{self.lowest:g}-{self.divisor:g}"
        words = "by a text worded here, not the paper's words"
        self.about = f"{self.model}: grade {self.range} {words}, temperature 0"

    def load(self, device: torch.device) -> None:
        """Ask the server for its model. ValueError if it does not answer."""
        url = f"{self.endpoint}/models"
        self.served = text_at(url, ask(url, key=self.key), "data", 0, "id")
        self.about = f"{self.about}; {self.endpoint} runs {self.served}"

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Grades (B,); NaN where the judge gave none."""
        return gather(self.grade, list(zip(pictures(images_BCHW), metadata, strict=True)), prompts)

    def grade(self, sample: tuple[Image.Image, dict], prompt: str) -> float:
        """The grade of a picture, given with its prompt's metadata. ValueError if the server fails or its
        answer holds none."""
        body = {
            "model": self.served,
            "messages": [{"role": "user", "content": self.content(*sample, prompt)}],
            "temperature": 0,
            "max_tokens": 2048,
        }
        url = f"{self.endpoint}/chat/completions"
        said = text_at(url, ask(url, body, self.key), "choices", 0, "message", "content")
        match = re.search(self.pattern, said)
        if match is None:
            raise ValueError(f"{self.endpoint}: no grade in {said[-80:]!r}")
        grades = [float(number) for number in match.groups()]
        for grade in grades:
            if not self.lowest <= grade <= self.divisor:
                raise ValueError(f"{self.endpoint}: the grade {grade:g} is not in {self.range}")
        return min(grades)

    def content(self, picture: Image.Image, metadata: dict, prompt: str) -> list[dict]:
        """Of the message: the picture, then the question."""
        return [self.shown(picture), {"type": "text", "text": self.text.replace("{prompt}", prompt)}]

    def shown(self, picture: Image.Image) -> dict:
        """The picture as a part of the message."""
        if self.pixels:
            picture = picture.resize((self.pixels, self.pixels))
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64(picture)}"}}


class UnifiedReward(Judge):
    model = "CodeGoat24/UnifiedReward-7b-v1.5, see its card for the licence, 8 B parameters"
    text = UNIFIED
    pattern = rf"Final Score:{NUMBER}"
    pixels = 512


class QwenVL(Judge):
    model = "Qwen/Qwen3-VL-30B-A3B-Instruct, Apache-2.0, 3 B of 30 B parameters active, text after Fig. 6"
    text = QWENVL
    pattern = rf"<OverallScore>{NUMBER}</OverallScore>"


class QwenVLReleased(QwenVL):
    """By the text of Flow-OPD's released code: five grades per axis."""

    model = "Qwen/Qwen3-VL-30B-A3B-Instruct, Apache-2.0, 3 B of 30 B parameters active, text after the code"
    text = QWENVL_RELEASED


class QwenVLEdit(Judge):
    """Edits, by the two questions of VIEScore's semantic consistency (arXiv 2312.14867), which is the least
    answer: min(success, preservation), 0 to 10; reward = grade / 10. VIEScore's total is the root of this
    times a grade of how natural the picture looks, which is not asked for here.

    The judge sees the prompt's source pictures in their order, then the result."""

    model = "Qwen/Qwen3-VL-30B-A3B-Instruct, Apache-2.0, 3 B of 30 B parameters active, least of two grades"
    text = EDIT
    pattern = rf"(?s)<SuccessScore>{NUMBER}</SuccessScore>.*?<PreservationScore>{NUMBER}</PreservationScore>"
    lowest = 0.0
    divisor = 10.0
    prompt_fault = staticmethod(source_fault)

    def content(self, picture: Image.Image, metadata: dict, prompt: str) -> list[dict]:
        """A source is fitted to the result's size: a camera's pixels would tell nothing more."""
        sources = [ImageOps.contain(source, picture.size) for source in sources_of(metadata)]
        return [*map(self.shown, sources), *super().content(picture, metadata, prompt)]
