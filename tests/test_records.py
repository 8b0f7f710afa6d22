"""python -m opd.evaluation --records and --pictures: make once, score often, resume, any number of ranks."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opd.evaluation import evaluate, score
from opd.evaluation.records import Record, RecordFolder
from opd.evaluation.statistics import MEASURES
from opd.formats.pictures import read_image, to_tensor
from opd.model import Model, Sampling
from tests import forked

HERE = "tests.test_records"
ASKED = "FLOW_OPD_TEST_ASKED"  # names a file in which the scorers note what they were asked


def note(name, prompts):
    if ASKED in os.environ:
        with open(os.environ[ASKED], "a") as file:
            file.write(f"{name} {len(prompts)}\n")


def bright(images, prompts, metadata):
    note("bright", prompts)
    return images.mean((1, 2, 3))


def reddish(images, prompts, metadata):
    note("reddish", prompts)
    return images[:, 0].mean((1, 2))


def kills(images, prompts, metadata):
    note("kills", prompts)
    asked = Path(os.environ[ASKED]).read_text().count("kills")
    if asked == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))


def flags(world, folder, *more):
    red = [f"red={world / 'red.txt'}", f"blue={world / 'blue.txt'}"]
    model = ["--model", str(world / "pipeline"), "--adapters", f"red={world / 'red'}", "--dtype", "float32"]
    sampling = ["--count", "6", "--per-prompt", "2", "--steps", "2", "--batch", "2"]
    tasks = ["--prompts", *red, "--heldout"]
    rewards = ["--rewards", f"red={HERE}:bright", f"blue={HERE}:bright", "--records", str(folder)]
    return [*model, *sampling, *tasks, *rewards, *more]


def asked(file):
    """Scorer -> pictures that it was asked about, without the trial on grey ones."""
    counts = Counter()
    for name, number in map(str.split, file.read_text().splitlines()):
        counts[name] += int(number)
    return counts


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "made"
    evaluate.main(flags(world, folder))
    return folder


def read_picture(file):
    return to_tensor(read_image(file))


def lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_every_picture_has_a_line_that_says_how_to_make_it(world, folder):
    rows = lines(folder)
    assert len(rows) == 2 * 2 * 6  # rows, tasks, pictures
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    for row in rows:
        pixels = read_picture(folder / row["file"])
        assert row["scores"] == {f"{HERE}:bright": pytest.approx(pixels.mean().item(), abs=1e-6)}
        assert row["split"] == "train" and row["seed"] == 0 and row["reasons"] == {}
        assert row["settings"]["steps"] == 2 and row["settings"]["guidance"] == 1.0
    [red] = [row for row in rows if row["file"] == "red/train/red/000003.png"]
    assert red["settings"]["source"] == str(world / "red") and len(red["settings"]["sha256"]) == 64
    prompts = [row["prompt"] for row in rows if row["file"].startswith("red/train/red")]
    assert len(set(prompts)) == 3 and all(prompts.count(prompt) == 2 for prompt in prompts)
    assert sorted(file.suffix for file in folder.rglob("*.*")) == [".jsonl"] + [".png"] * 24


def test_other_scorers_are_asked_and_nothing_is_made_again(world, folder, tmp_path, monkeypatch):
    """With --records (the same command with one more scorer) and with --pictures: three scorers in all, and
    not one is asked twice."""
    again = shutil.copytree(folder, tmp_path / "again")
    times = {file: file.stat().st_mtime_ns for file in again.rglob("*.png")}
    monkeypatch.setattr(Model, "images", lambda *_: pytest.fail("a picture was made again"))
    monkeypatch.setattr(evaluate.Model, "plan", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setenv(ASKED, str(tmp_path / "asked"))
    evaluate.main(flags(world, again, "--scorers", f"{HERE}:reddish"))
    out = tmp_path / "scores.json"
    rewards = ["--rewards", f"red={HERE}:bright,{HERE}:reddish", f"blue={HERE}:bright"]
    more = ["--scorers", "jpeg_compressibility", "--out", str(out)]
    evaluate.main(["--pictures", str(again), *rewards, *more])
    assert {file: file.stat().st_mtime_ns for file in again.rglob("*.png")} == times
    tried = 2 * 1  # --pictures tries each scorer on two grey pictures per task that it has
    assert asked(tmp_path / "asked") == {"reddish": 24 + tried, "bright": 2 * tried}
    for row in lines(again):
        pixels = read_picture(again / row["file"])
        assert row["scores"][f"{HERE}:reddish"] == pytest.approx(pixels[0].mean().item(), abs=1e-6)
        assert row["scores"]["jpeg_compressibility"] < 0
    written = json.loads(out.read_text())
    scorers = {cell["scorer"] for cell in written["cells"] if cell["task"] == "red"}
    assert scorers == {f"{HERE}:bright", f"{HERE}:reddish", "jpeg_compressibility", *MEASURES}
    assert written["guidance"] == {"base": 1.0, "red": 1.0}


def test_a_batch_that_grew_keeps_what_is_known_of_it(world, tmp_path, monkeypatch):
    """Three pictures of a batch of four: they are not made again, and only the new scorer is asked."""
    folder = tmp_path / "grown"
    given = flags(world, folder, "--per-prompt", "1", "--batch", "4", "--no-base")
    evaluate.main([*given, "--count", "3"])
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}
    monkeypatch.setenv(ASKED, str(tmp_path / "asked"))
    evaluate.main([*given, "--count", "6", "--rewards", f"red={HERE}:reddish", f"blue={HERE}:reddish"])
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert asked(tmp_path / "asked") == {"reddish": 2 * 6 + 2 * 2}  # the trial is on two pictures per task
    rows = lines(folder)
    assert len(rows) == 2 * 6
    for row in rows:
        pixels = read_picture(folder / row["file"])
        expected = {f"{HERE}:reddish": pytest.approx(pixels[0].mean().item(), abs=1e-6)}
        if row["index"] < 3:
            expected[f"{HERE}:bright"] = pytest.approx(pixels.mean().item(), abs=1e-6)
        assert row["scores"] == expected


def test_killed_and_started_again_it_ends_with_the_same_records(world, folder, tmp_path):
    """The process dies in the fifth batch, the fourth's line is cut, as if in the middle of a write. What was
    finished is not made again."""
    resumed = tmp_path / "resumed"
    more = ["--rewards", f"red={HERE}:kills", f"blue={HERE}:bright"]
    asked_for = {ASKED: str(tmp_path / "asked")}
    given = flags(world, resumed, *more)
    killed = forked.main("opd.evaluation.evaluate", tmp_path / "log", given, **asked_for)
    assert killed.ended() == -signal.SIGKILL
    (resumed / ".000004.png.x.tmp").mkdir()
    (resumed / ".000004.png.x.tmp/000004.png").write_bytes(b"half")
    [part] = resumed.glob("records.part-*")
    part.write_text(part.read_text()[:-20])
    finished = len(part.read_text().splitlines()) - 1
    assert finished > 0 and not (resumed / "records.jsonl").exists()
    kept = {resumed / json.loads(line)["file"] for line in part.read_text().splitlines()[:finished]}
    times = {file: file.stat().st_mtime_ns for file in kept}
    evaluate.main(flags(world, resumed, *more[:1], f"red={HERE}:bright", f"blue={HERE}:bright"))
    same = [file for file in kept if file.stat().st_mtime_ns == times[file]]
    assert len(same) == finished
    assert sorted(file.name for file in resumed.glob("*")) == ["base", "records.jsonl", "red"]
    for row, other in zip(lines(resumed), lines(folder), strict=True):
        row["scores"].pop(f"{HERE}:kills", None)
        assert row == other
        assert (resumed / row["file"]).read_bytes() == (folder / row["file"]).read_bytes()


def test_two_ranks_write_the_same_records_and_the_same_table(world, folder, tmp_path):
    given = flags(world, tmp_path / "two", "--out", str(tmp_path / "two.json"))
    forked.finished(forked.ranks(tmp_path / "logs", 2, given, "opd.evaluation.evaluate"))
    assert (tmp_path / "two/records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()
    for file in folder.rglob("*.png"):
        other = tmp_path / "two" / file.relative_to(folder)
        assert other.read_bytes() == file.read_bytes()
    evaluate.main(flags(world, folder, "--out", str(tmp_path / "one.json")))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["cells"] == two["cells"] and one["scores"] == two["scores"]


def test_ranks_run_one_transformer_at_a_time_and_no_batch_counts_twice(monkeypatch):
    """Three batches of the student's transformer, one of a teacher's own, one that is read."""
    monkeypatch.setattr(score.ranks, "world", lambda: 2)
    adapters = ["base", "big", "red", None, "student"]
    batches = [score.Batch([], adapter and score.Row(adapter, Sampling(1, 0, 1.0))) for adapter in adapters]
    for rank, turns in enumerate([[(0, 1), (4, 1), (1, 1), (3, 1)], [(2, 1), (4, 0), (1, 0), (3, 0)]]):
        monkeypatch.setattr(score.ranks, "rank", lambda rank=rank: rank)
        expected = [(batches[place], bool(counts)) for place, counts in turns]
        assert list(score.dealt(batches, {"big"})) == expected


def test_pictures_made_otherwise_are_not_mixed(world, folder):
    before = (folder / "records.jsonl").read_bytes()
    changes = {"guidance 1.0 -> 2.0": ("--guidance", "2"), "seed 0 -> 1": ("--seed", "1")}
    for message, change in (changes | {"sha256": ("--adapters", f"red={world / 'blue'}")}).items():
        with pytest.raises(SystemExit, match=f"made otherwise.*{message}") as stop:
            evaluate.main(flags(world, folder, *change))
        assert "--records" in stop.value.code and (folder / "records.jsonl").read_bytes() == before


def test_another_base_at_the_same_place_is_noticed(world, folder, tmp_path):
    """And a folder that does not say which base it was goes on."""
    shutil.copytree(folder, tmp_path / "made")
    shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    moved = [
        word.replace(str(world / "pipeline"), str(tmp_path / "pipeline"))
        for word in flags(world, tmp_path / "made")
    ]
    rows = lines(tmp_path / "made")
    for row in rows:
        row["settings"]["model"] = str(tmp_path / "pipeline")
    (tmp_path / "made/records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [file] = (tmp_path / "pipeline/transformer").glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(SystemExit, match="made otherwise: base sha256 "):
        evaluate.main(moved)
    for row in rows:
        del row["settings"]["base sha256"]
    (tmp_path / "made/records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(moved)


def wanted(images, prompts, metadata):
    return torch.tensor([float(row["want"]) for row in metadata])


def test_a_prompts_other_fields_are_those_of_today(world, tmp_path, monkeypatch):
    """Where they changed, scores are given anew, and no picture is made again."""
    file, records = tmp_path / "red.jsonl", tmp_path / "records"
    given = [
        *flags(world, records)[:6],
        "--prompts",
        f"red={file}",
        "--heldout",
        "--steps",
        "2",
        "--count",
        "2",
    ]
    given += ["--rewards", f"red={HERE}:wanted", "--records", str(records)]
    prompts = [{"prompt": f"a {number}", "want": number, "tag": None} for number in (1, 2)]
    for changed in (2, 7):
        prompts[1]["want"] = changed
        file.write_text("\n".join(map(json.dumps, prompts)))
        evaluate.main(given)
        assert Counter(row["scores"][f"{HERE}:wanted"] for row in lines(records)) == {1: 2, changed: 2}
        assert {row["tag"] for row in lines(records)} == {""}
        monkeypatch.setattr(Model, "images", lambda *_: pytest.fail("a picture was made again"))


def paint(file: Path, value: int, side: int = 8):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(file)


def score_pictures(folder, *more):
    evaluate.main(["--pictures", str(folder), "--scorers", f"{HERE}:bright", *more])
    return lines(folder)


def test_a_folder_with_a_metadata_file_and_pictures_of_several_sizes(tmp_path, capsys):
    names = ["a.png", "b.png", "deeper/c.png", "deeper/d.png"]
    for number, name in enumerate(names):
        paint(tmp_path / name, 51 * number, side=8 * (number + 1))
    rows = [{"file_name": name, "prompt": f"p{name}", "task": "own", "note": 1} for name in names]
    rows[3] |= {"tag": "counting", "prompt": rows[2]["prompt"]}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = score_pictures(tmp_path)
    assert [row["scores"][f"{HERE}:bright"] for row in found] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [(row["task"], row["tag"]) for row in found] == [("own", "")] * 3 + [("own", "counting")]
    assert found[0]["metadata"] == {"note": 1} and found[3]["metadata"] == {"note": 1, "tag": "counting"}
    printed = capsys.readouterr().out
    assert "4 pictures of" in printed and "mean of tags" in printed

    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    assert score_pictures(tmp_path) == found  # what records.jsonl knows stays there
    assert "1 pictures of" in capsys.readouterr().out
    paint(tmp_path / "a.png", 255)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0] | {"prompt": "another"}))
    first, *others = score_pictures(tmp_path)
    assert first["scores"][f"{HERE}:bright"] == pytest.approx(1.0) and first["prompt"] == "another"
    assert others == found[1:]


ONE = {"file_name": "a.png", "prompt": "p"}
WRONG_FOLDERS = [
    (None, "holds no metadata.jsonl; give one line"),
    (ONE | {"file_name": "b.png"}, "1 images that do not exist, first: '.*b.png'"),
    (ONE | {"file_name": "bad.png"}, "image '.*bad.png': cannot be read"),
    (ONE | {"prompt": " "}, "metadata.jsonl:1: no prompt on this line"),
]


@pytest.mark.parametrize("row, message", WRONG_FOLDERS)
def test_a_folder_that_is_wrong_is_named(tmp_path, row, message):
    paint(tmp_path / "a.png", 0)
    (tmp_path / "bad.png").write_text("no picture")
    if row:
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        score_pictures(tmp_path)


def test_the_newest_line_of_a_picture_counts(tmp_path):
    place = dict(file="a", row="r", split="s", task="t", tag="", prompt="p")
    old = Record(**place, metadata={}, index=0, seed=0, settings={})
    folder = RecordFolder(tmp_path)
    folder.append([old])
    folder.append([old.scored("x", None, "why")])
    folder.append([old.scored("x", None, "why").scored("x", 1.0, "")])
    assert folder.merge() == {"a": old.scored("x", 1.0, "")} == RecordFolder(tmp_path).merge()
    with pytest.raises(ValueError, match="is not finite; try --dtype float32"):
        folder.keep([old], torch.full((1, 3, 8, 8), torch.nan))
