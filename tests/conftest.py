import pytest

from tests import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with `pipeline/`, adapters `red/` and `blue/`, prompt files `red.txt` and `blue.txt`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_pipeline(folder / "pipeline")
    for seed, (name, prompts) in enumerate(tiny.PROMPTS.items(), start=1):
        tiny.save(tiny.random_lora(folder / "pipeline", seed), folder / name)
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return folder
