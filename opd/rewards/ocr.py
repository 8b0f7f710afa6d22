"""OCR reward: can the text that a prompt asks for be read off the picture?

PP-OCRv6 small, detection and recognition (31 MB, Apache-2.0), by rapidocr on onnxruntime, on the CPU; the
models lie in rapidocr's wheel, so nothing is downloaded. The formula is that of Flow-GRPO's and Flow-OPD's
released code; their engine is another (paddleocr 2.9.1, English), so numbers are to be compared with the
engine in mind.

    target   text between the first pair of straight double quotes of the prompt
    read     all lines that were found, in reading order, with nothing between them
    both     without spaces, lower case
    score    1 - min(d, len(target)) / len(target),  d = 0 if target in read else edit distance

On rendered text the mean is above .99; pictures scored against other prompts' targets have about .1, which is
the floor of the scale. Writing more text than asked for costs nothing (`target in read`); `“` is an error
where the reader sees `"`."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opd.rewards.inputs import need, pictures, versions


class Ocr:
    def __init__(self):
        need("ocr", "rapidocr", "onnxruntime")
        self.own = threading.local()  # an engine per thread, as one engine serves one call at a time
        formula = "1 - edit distance / length, spaces and case ignored, 1 where the target is contained"
        model = "PP-OCRv6 small, detection and recognition, Apache-2.0, 31 MB"
        self.about = f"{model}: {formula}, 0-1; {versions('rapidocr', 'onnxruntime')}"

    def load(self, device: torch.device) -> None:
        """An engine for each thread that torch may use. ValueError if a known picture is misread."""
        self.threads = ThreadPoolExecutor(torch.get_num_threads())
        sign = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(sign).text((60, 200), "Flow 42", fill="black", font=ImageFont.load_default(90))
        text = self.read(sign)
        if ocr_score("Flow 42", text) < 1:
            said = f"read {text!r} off a sign that says 'Flow 42'"
            raise ValueError(f"{said}; reinstall rapidocr and onnxruntime")

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Scores (B,) in [0, 1]. ValueError for a prompt without a target."""
        targets = [target_of(prompt) for prompt in prompts]
        texts = list(self.threads.map(self.read, pictures(images_BCHW)))
        return torch.tensor(list(map(ocr_score, targets, texts)))

    def prompt_fault(self, text: str, metadata: dict) -> str:
        return target_fault(text)

    def read(self, picture: Image.Image) -> str:
        """All text of the picture, its lines joined without a separator; "" where there is none."""
        if not hasattr(self.own, "engine"):
            self.own.engine = _engine()
        found = self.own.engine(np.array(picture)[:, :, ::-1])  # BGR, as OpenCV has it
        if found.txts is None:
            return ""
        confident = [text for text, score in zip(found.txts, found.scores, strict=True) if score > 0]
        return "".join(confident)


def _engine():
    """rapidocr, silent, without its classifier of upside-down lines (the released code has it off), keeping
    doubtful lines."""
    from rapidocr import ModelType, OCRVersion, RapidOCR

    settings = {
        "Global.log_level": "critical",
        "Global.text_score": 0.0,
        "Global.use_cls": False,
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        # paddleocr's own: a picture below 960 px is searched as it is. rapidocr's enlarges it to 736.
        "Det.limit_type": "max",
        "Det.limit_side_len": 960,
    }
    for part in ("Det", "Rec"):
        settings[f"{part}.ocr_version"] = OCRVersion.PPOCRV6
        settings[f"{part}.model_type"] = ModelType.SMALL
    return RapidOCR(params=settings)


# ---- the formula --------------------------------------------


def target_of(prompt: str) -> str:
    """The text between the first pair of straight double quotes. ValueError if there is none."""
    fault = target_fault(prompt)
    if fault:
        raise ValueError(f"prompt {prompt!r}: {fault}")
    return prompt.split('"')[1]


def target_fault(prompt: str) -> str:
    """Why a prompt has no target, "" if it has one."""
    parts = prompt.split('"')
    if len(parts) < 3:
        return 'it needs its text between straight double quotes, as in a sign that says "Hello"'
    if not parts[1].strip():
        return "there is no text between its first pair of double quotes"
    return ""


def ocr_score(target: str, text: str) -> float:
    """The released formula, for a target and what was read."""
    target = target.replace(" ", "").lower()
    text = text.replace(" ", "").lower()
    if target in text:
        return 1.0
    distance = min(edit_distance(target, text), len(target))
    return 1 - distance / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the fewest characters to insert, delete or replace."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            replaced = previous[j - 1] + (x != y)
            current.append(min(previous[j] + 1, current[j - 1] + 1, replaced))
        previous = current
    return previous[-1]
