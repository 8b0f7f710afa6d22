import pytest

from tests import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world: see tiny.make_world."""
    return tiny.make_world(tmp_path_factory.mktemp("tiny"))
