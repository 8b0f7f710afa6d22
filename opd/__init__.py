"""On-policy distillation of flow-matching image models."""

from diffusers.utils import logging as _diffusers
from transformers.utils import logging as _transformers

# Their bars for loading a handful of files would bury ours.
_diffusers.disable_progress_bar()
_transformers.disable_progress_bar()
_transformers.set_verbosity_error()
