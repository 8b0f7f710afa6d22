import os

# Before torch starts: on models this small threads only wait for each other, tenfold where two processes
# share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from opd.report import plots  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world: see tiny.make_world."""
    return tiny.make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def blank_figures():
    """To render the figures of a tiny run takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: b"a picture")
        yield
