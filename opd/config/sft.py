"""Stage sft: its settings."""

from dataclasses import dataclass
from typing import Annotated

from opd.cli import BelowOne, Given
from opd.config.shared import RunConfig


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Stage sft: flow matching on images with captions."""

    stage = "sft"
    first = ("model", "data", "prompts_per_step", "iterations", "lr", "out")

    full: bool = False
    """Train all weights of the transformer instead of a LoRA."""
    data: Annotated[str, Given("a directory with metadata.jsonl and images or latents")] = ""
    """Directory with metadata.jsonl and images, or with metadata.jsonl and latents.safetensors."""
    caption_dropout: Annotated[float, BelowOne] = 0.1
    """Share of captions replaced by "", so that guidance has something to push away from."""
