"""What a number means: the facts that every scorer states about itself, printed beside its scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """A scorer's attribute `about`. Its raw scores are those of the tables of papers."""

    model: str
    """Id of the model, or of what a server says that it runs."""
    licence: str
    """Licence of the weights, or "not stated"."""
    size: str
    """Parameters or bytes."""
    definition: str
    """How the score follows from the model's output, and its range."""
    engine: str
    """Library and version, or endpoint, that computed it."""
    divisor: float = 1.0
    """Raw score / divisor is the paper's reward, about in [0, 1]: 26 for PickScore, 5 for DeQA."""
