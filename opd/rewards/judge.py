"""Judges: vision-language models behind an OpenAI-style HTTP endpoint (vLLM, SGLang) that grade a picture.

Argument: the endpoint, as in `qwenvl@http://localhost:8001/v1`; the model is the one that the server says it
runs, at temperature 0. Raw grades are the tables', 1 to 5; reward = grade / 5. A key goes into JUDGE_API_KEY.
The texts are written here from their descriptions, NOT word for word those of the papers, so grades are to be
compared with grades of this code; a subclass with another `text` and `pattern` is a judge of its own.

An answer without a grade, or with one out of range, is a failure and never 0."""

import os
import re

import torch
from PIL import Image
from torch import Tensor

from opd.rewards.endpoint import ask, checked_url, gather, png_base64, text_at
from opd.rewards.inputs import pictures

HIGHEST = 5.0

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


class Judge:
    """What the judges share; a subclass says what is asked and where the grade stands."""

    model: str  # the model that the text was written for, and its licence
    text: str
    pattern: str  # of the answer; its group is the grade
    pixels = 0  # resize pictures to so many pixels per side; 0 = as they are
    divisor = HIGHEST

    def __init__(self, endpoint: str = ""):
        self.endpoint = checked_url(endpoint, "qwenvl@http://localhost:8001/v1")
        self.key = os.environ.get("JUDGE_API_KEY", "")
        self.about = f"{self.model}: grade 1-5 by a text worded here, not the paper's words, temperature 0"

    def load(self, device: torch.device) -> None:
        """Ask the server for its model. ValueError if it does not answer."""
        url = f"{self.endpoint}/models"
        self.served = text_at(url, ask(url, key=self.key), "data", 0, "id")
        self.about = f"{self.about}; {self.endpoint} runs {self.served}"

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Grades (B,); NaN where the judge gave none."""
        return gather(self.grade, pictures(images_BCHW), prompts)

    def grade(self, picture: Image.Image, prompt: str) -> float:
        """The grade of one picture. ValueError if the server fails or its answer holds none."""
        if self.pixels:
            picture = picture.resize((self.pixels, self.pixels))
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64(picture)}"}}
        question = {"type": "text", "text": self.text.replace("{prompt}", prompt)}
        body = {
            "model": self.served,
            "messages": [{"role": "user", "content": [image, question]}],
            "temperature": 0,
            "max_tokens": 2048,
        }
        url = f"{self.endpoint}/chat/completions"
        said = text_at(url, ask(url, body, self.key), "choices", 0, "message", "content")
        match = re.search(self.pattern, said)
        if match is None:
            raise ValueError(f"{self.endpoint}: no grade in {said[-80:]!r}")
        grade = float(match.group(1))
        if not 1 <= grade <= HIGHEST:
            raise ValueError(f"{self.endpoint}: the grade {grade:g} is not in 1-5")
        return grade


class UnifiedReward(Judge):
    model = "CodeGoat24/UnifiedReward-7b-v1.5, see its card for the licence, 8 B parameters"
    text = UNIFIED
    pattern = r"Final Score:\s*(-?\d+(?:\.\d+)?)"
    pixels = 512


class QwenVL(Judge):
    model = "Qwen/Qwen3-VL-30B-A3B-Instruct, Apache-2.0, 3 B of 30 B parameters active, text after Fig. 6"
    text = QWENVL
    pattern = r"<OverallScore>\s*(-?\d+(?:\.\d+)?)\s*</OverallScore>"


class QwenVLReleased(QwenVL):
    """By the text of Flow-OPD's released code: five grades per axis."""

    model = "Qwen/Qwen3-VL-30B-A3B-Instruct, Apache-2.0, 3 B of 30 B parameters active, text after the code"
    text = QWENVL_RELEASED
