import os

# Before torch starts: on models this small threads only wait for each other, tenfold where two processes
# share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests import tiny  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world: see tiny.make_world."""
    return tiny.make_world(tmp_path_factory.mktemp("tiny"))
