import os

# Before torch starts: on models this small threads only wait for each other, tenfold where two processes
# share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A model stands on a GPU where there is one, and the tests hand it tensors on the CPU. `GPU_TESTS=1 pytest
# tests/test_kernels_fused.py` runs the kernels on it.
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

from opd.families import sd3  # noqa: E402
from opd.formats.latents import write_samples  # noqa: E402
from opd.report import plots  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def base(world):
    """The transformer of the tiny world; who changes it copies it."""
    return sd3.load_transformer(world / "pipeline", torch.float32)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Six latents with captions, to fine-tune on."""
    folder, generator = tmp_path_factory.mktemp("latents"), torch.Generator().manual_seed(0)
    rows = [{"prompt": prompt} for prompt in (*tiny.PROMPTS["red"], "a dot")]
    write_samples(folder, torch.randn(6, 4, 4, 4, generator=generator), rows)
    return folder


@pytest.fixture(scope="session", autouse=True)
def blank_figures():
    """To render the figures of a tiny run takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: b"a picture")
        yield
