"""Prompts become conditions before they are needed: encoded in windows, kept in memory. Source pictures are
encoded with their prompt, once, and never at a state."""

from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from opd import ranks
from opd.data import Asked, Edit
from opd.errors import require
from opd.families import Condition
from opd.files import reading
from opd.formats.pictures import fitted_sizes, read_image, sizes, to_tensor

WINDOW = 2048
"""Prompts that are encoded ahead at once: 3.4 GB of memory with SD3.5's encoders."""
BATCH = 32
"""Prompts per pass of the encoders."""


class Conditioning:
    """`conditioning(prompts)` -> a Condition per prompt on `device`. `prepare` encodes prompts that stay;
    `follow` and `ahead` encode those of a run window by window.

    What a prompt's condition is depends on its window alone, not on the step at which a run began: a run that
    resumes encodes the same batches, to the same bits.
    """

    def __init__(
        self, family: ModuleType, folder: Path, dtype: torch.dtype, device: torch.device, t5: bool = True
    ):
        self.family, self.folder, self.dtype, self.device, self.t5 = family, folder, dtype, device, t5
        self.kept: dict[Asked, Condition] = {}
        """What `prepare` was asked for, on the CPU."""
        self.window: dict[Asked, Condition] = {}
        """The prompts of the steps at hand, on the CPU."""
        self.windows: list[tuple[int, list[Asked]]] = []
        """Of a run: the step that each begins with, and its prompts."""
        self.current = -1
        """Which of them is encoded."""
        self.moved: dict[Asked, Condition] = {}
        """Conditions of the last micro-batch, on the device: its states and teachers ask for them again."""
        self.shape_of: dict[Asked, str] = {}
        """What `shape` has found."""

    # ---- source pictures, by their files' headers ----

    def check(self, prompts: list[Asked]) -> None:
        """ValueError for a prompt whose source pictures, or want of any, this pipeline cannot take."""
        new = [asked for asked in dict.fromkeys(prompts) if asked not in self.shape_of]
        resized = [asked for asked in new if self.shape(asked) != sizes(asked)]
        if resized:
            first = f"{sizes(resized[0])} -> {self.shape(resized[0])}"
            ranks.say(f"source pictures are resized as the pipeline does, width x height such as {first}")

    def edits(self) -> bool:
        """Whether a prompt that was checked has a source picture."""
        return any(isinstance(asked, Edit) for asked in self.shape_of)

    def shape(self, asked: Asked) -> str:
        """Of a prompt's source pictures as the transformer sees them, "" without any. Raises as `check`."""
        if asked not in self.shape_of:
            self.shape_of[asked] = fitted_sizes(self.family, self.folder, asked)
        return self.shape_of[asked]

    # ---- encoding ahead ----

    def prepare(self, prompts: list[Asked]) -> None:
        """Encode what is lacking of `prompts`, and keep it for good."""
        self.kept |= self.encode([prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept])

    def follow(self, steps: list[list[Asked]]) -> None:
        """Cut the prompts of every step of a run into windows."""
        self.windows, self.current, self.window = [], -1, {}
        gathered: dict[Asked, None] = {}
        for step, prompts in enumerate(steps):
            more = gathered | dict.fromkeys(prompts)
            if len(more) > WINDOW or not self.windows:
                more = dict.fromkeys(prompts)
                self.windows.append((step, []))
            gathered = more
            self.windows[-1] = (self.windows[-1][0], list(gathered))

    def ahead(self, step: int) -> None:
        """Before a step: encode its window, if it is not at hand."""
        begun = [number for number, (first, _) in enumerate(self.windows) if first <= step]
        if not begun or begun[-1] == self.current:
            return
        self.current = begun[-1]
        prompts = self.windows[self.current][1]
        self.window = {}  # freed before the next one is made
        self.window = self.encode([prompt for prompt in prompts if prompt not in self.kept])

    def encode(self, prompts: list[Asked]) -> dict[Asked, Condition]:
        """Conditions on the CPU. The encoders are here for that alone. ValueError for NaN or infinity."""
        if not prompts:
            return {}
        with reading(f"text encoders of {self.folder}"):
            text = self.family.load_text(self.folder, self.dtype, self.device, self.t5)
        edits = [asked for asked in prompts if isinstance(asked, Edit)]
        texts = [asked for asked in prompts if not isinstance(asked, Edit)]
        if edits and self.family.EDITING.read is None:
            texts = list(dict.fromkeys([*texts, *(edit.text for edit in edits)]))
        encoded = self.encode_texts(text, texts)
        if edits:
            encoded |= self.encode_edits(text, edits, encoded)
        del text
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {asked: encoded[asked] for asked in prompts}

    def encode_texts(self, text, prompts: list[str]) -> dict[Asked, Condition]:
        encoded = {}
        pieces = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        for piece in self.progress(pieces, "encode prompts"):
            conditions = self.family.encode_prompts(text, piece, self.device)
            for prompt, condition in zip(piece, conditions, strict=True):
                encoded[prompt] = self.on_cpu("text encoders", prompt, condition)
        return encoded

    @torch.no_grad()
    def encode_edits(self, text, edits: list[Edit], texts: dict[Asked, Condition]) -> dict[Asked, Condition]:
        """Of prompts with source pictures, whose words are in `texts` if they are encoded alone; edits of the
        same words then share them."""
        editing = self.family.EDITING
        with reading(f"VAE of {self.folder}"):
            vae = self.family.load_vae(self.folder).to(self.device)
        encoded = {}
        for asked in self.progress(edits, "encode source pictures"):
            pictures = [read_image(Path(picture)) for picture in asked.pictures]
            if editing.read is None:
                condition = texts[asked.text]
            else:
                seen = editing.read(text, asked.text, pictures, self.device)
                condition = self.on_cpu("text encoders", asked.text, seen)
            latents = {}
            for number, picture in enumerate(pictures):
                fitted_13HW = to_tensor(editing.fit(self.folder, picture))[None].to(self.device)
                (latent_CHW,) = self.family.encode_images(vae, fitted_13HW)
                latents[f"picture{number}"] = latent_CHW.to(condition["embeds"].dtype)
            encoded[asked] = condition | self.on_cpu("VAE", asked.text, latents)
        return encoded

    def on_cpu(self, made_by: str, prompt: str, condition: Condition) -> Condition:
        # Copies: a view would keep the whole batch alive.
        copied = {name: tensor.cpu().clone() for name, tensor in condition.items()}
        finite = all(bool(tensor.isfinite().all()) for tensor in copied.values())
        wrong = f"{made_by} of {self.folder}: NaN or infinite numbers for {prompt[:60]!r}"
        require(finite, f"{wrong}; get their weights anew, or use --dtype float32")
        return copied

    def progress(self, pieces: list, what: str) -> tqdm:
        return tqdm(pieces, desc=what, disable=ranks.rank() != 0 or len(pieces) < 4)

    # ---- reading ----

    def __call__(self, prompts: list[Asked]) -> list[Condition]:
        """A prompt that occurs several times is moved to the device once and shared. One that nobody has
        prepared is encoded now."""
        if any(prompt not in self.moved for prompt in prompts):
            known = self.kept | self.window
            lacking = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
            if lacking:
                self.prepare(lacking)
                known = self.kept | self.window
            self.moved = {}
            for prompt in dict.fromkeys(prompts):
                on_cpu = known[prompt].items()
                self.moved[prompt] = {k: tensor.to(self.device, non_blocking=True) for k, tensor in on_cpu}
        return [self.moved[prompt] for prompt in prompts]
