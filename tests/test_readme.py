"""README's commands for a user's own LoRAs, prompts and reward, on tiny files under the same names; the
guide's names of functions."""

import importlib
import re
import shlex
import shutil
from operator import attrgetter
from pathlib import Path

import pytest

from opd.files import read_json
from tests import forked

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What makes them small; everything else is README's and the presets'.
SMALL = "--model pipeline --resolution 8 --dtype float32 --micro-batch 4 --no-checkpointing --iterations 2"
SMALL += " --prompts-per-step 2 --group 2 --steps 4 --save-every 2 --sample-every 2 --eval-steps 2"
REWARD = "def reward(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder with the files that README names."""
    shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    for name in ("loras", "prompts", "owner"):
        (tmp_path / name).mkdir()
    shutil.copy(world / "red/pytorch_lora_weights.safetensors", tmp_path / "loras/anime.safetensors")
    shutil.copytree(world / "blue", tmp_path / "owner/text-lora")
    for name in ("anime", "text", "any", "mine"):
        shutil.copy(world / "red.txt", tmp_path / f"prompts/{name}.txt")
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(start: str) -> list[str]:
    """The words of the command of README that begins so, after `python FILE`."""
    assert README.count(f"    {start}") == 1, start
    text = README[README.index(f"    {start}") :].replace("\\\n", " ")
    return shlex.split(text.split("\n")[0], comments=True)[2:]


def run(place: Path, module: str, words: list[str], small: str) -> str:
    done = forked.main(module, place / "log", [*words, *small.split()], CWD=str(place))
    assert done.ended() == 0, done.printed()[-3000:]
    return done.printed()


def test_two_loras_become_one(place):
    printed = run(place, "train", command("python train.py sd35-24gb \\"), SMALL)
    assert "--mix geneval=3 ocr=1 pickscore=1 -> nothing" in printed
    assert "--anchor-weight 0.02 -> 0.0" in printed
    assert "step 0: distance to the teachers in percent of the base's" in printed
    run(place, "sample", command("python sample.py --model"), "--model pipeline --steps 2 --resolution 8")
    assert (place / "runs/mine/pictures/grid.png").is_file()
    assert len(forked.rows(place / "runs/mine")) == 2


def test_a_model_learns_its_own_guidance(place):
    run(place, "train", command("python train.py guidance-distil"), SMALL)
    assert all(loss > 0 for loss in forked.losses(place / "runs/unguided"))
    assert read_json(place / "runs/unguided/student/deployment.json")["guidance"] == 1.0


def test_a_teacher_grows_from_a_reward_in_a_file(place):
    run(place, "train", command("python train.py sd35-grpo-pickscore --prompts"), SMALL)
    assert all("mine" in row["reward"] for row in forked.rows(place / "runs/teacher"))


def test_own_loras_come_early():
    """Fewer than 500 words stand before the first command for them, and 1,000 are read to the end."""
    assert len(README.split()) <= 1000 and README.count("\n") <= 110
    assert len(README[: README.index("python train.py sd35-24gb \\")].split()) < 500


def test_the_guide_says_where_each_equation_is():
    """By names that exist: `module.function` of the package, or its files."""
    guide = (ROOT / "opd/GUIDE.md").read_text()
    table = guide.partition("Where each equation is:")[2].split("\n\n")[1]
    names = re.findall(r"`([\w./]+)`", table)
    dotted = [name for name in names if "." in name and "/" not in name]
    assert len(dotted) > 15
    for name in dotted:
        module = importlib.import_module(f"opd.{name.partition('.')[0]}")
        attrgetter(name.partition(".")[2])(module)
    assert all((ROOT / name).is_file() for name in names if "/" in name)
