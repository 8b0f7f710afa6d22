"""Generated prompts: GenEval's schema and wording, quoted targets, splits that share nothing, the command."""

import json
from collections import Counter

import pytest

from opd.formats.prompts import load_prompts
from opd.rewards import prompts
from opd.rewards.geneval import TAGS, metadata_fault
from opd.rewards.ocr import target_fault, target_of

EVEN = dict.fromkeys(TAGS, 1)


def geneval(count=600, seed=0, split="train", mix=EVEN):
    return prompts.geneval_prompts(count, seed, split, mix, set())


def ocr(count, seed, split):
    return prompts.ocr_prompts(count, seed, split, set())


def test_all_six_tags_in_the_field_schema_and_in_the_ratio_asked_for():
    rows = geneval()
    assert Counter(row["tag"] for row in rows) == dict.fromkeys(TAGS, 100)
    assert all(metadata_fault(row) == "" and row["prompt"].startswith("a photo of ") for row in rows)
    assert rows == geneval() != geneval(seed=1)
    mixed = geneval(120, mix={"position": 7, "counting": 5})
    assert Counter(row["tag"] for row in mixed) == {"position": 70, "counting": 50}


@pytest.mark.parametrize("tag", TAGS)
def test_a_prompt_says_what_its_clauses_ask_for(tag):
    for row in geneval(60, mix={tag: 1}):
        text = row["prompt"]
        clauses = row["include"]
        for clause in clauses:
            assert clause["class"] in text
            assert clause.get("color", "") in text
        if tag == "counting":
            (clause,) = clauses
            number = ("two", "three", "four")[clause["count"] - 2]
            assert f" {number} {clause['class']}" in text
            assert row["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]
        if tag == "position":
            relation, target = clauses[1]["position"]
            before, after = text.split(f" {relation} ")
            assert target == 0 and clauses[1]["class"] in before and clauses[0]["class"] in after
        if tag in ("two_object", "position", "color_attr"):
            assert clauses[0]["class"] != clauses[1]["class"]


def test_splits_are_disjoint_even_when_objects_change_places():
    train = {prompts.scene_key(row) for seed in (0, 1) for row in geneval(600, seed)}
    test = {prompts.scene_key(row) for row in geneval(300, 7, "test")}
    assert len(train) > 600 and len(test) > 120 and not train & test
    dog, cat = ({"class": name, "count": 1} for name in ("dog", "cat"))
    one, other = ({"tag": "two_object", "include": pair} for pair in ([dog, cat], [cat, dog]))
    assert prompts.scene_key(one) == prompts.scene_key(other)


def test_ocr_prompts_have_targets_of_the_usual_length_and_share_none():
    train = ocr(1000, 0, "train")
    test = ocr(300, 0, "test")
    assert not any(target_fault(text) for text in train + test)
    lengths = sorted(len(target_of(text)) for text in train)
    assert 3 <= lengths[0] and 12 <= lengths[500] <= 20 and lengths[-1] <= 40
    assert len({prompts.text_key(text) for text in train}) == 1000
    assert not {prompts.text_key(text) for text in train} & {prompts.text_key(text) for text in test}


def test_the_command_writes_what_the_trainer_reads(tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    prompts.main(["geneval", "--count", "30", "--seed", "5", "--out", str(file)])
    assert "30 prompts, 30 of them different" in capsys.readouterr().out
    read = load_prompts(str(file), "geneval", None)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [prompt.text for prompt in read] == [row["prompt"] for row in rows]
    assert read[0].metadata.keys() >= {"tag", "include"} and rows == geneval(30, 5)
    signs = tmp_path / "test.txt"
    prompts.main(["ocr", "--count", "20", "--split", "test", "--out", str(signs)])
    read = load_prompts(str(signs), "ocr", None)
    assert [prompt.text for prompt in read] == ocr(20, 0, "test")


def test_without_leaves_out_what_is_evaluated_on(tmp_path):
    rows = geneval(100, mix={"position": 1})
    file = tmp_path / "official.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "rest.jsonl"
    command = ["geneval", "--count", "100", "--mix", "position=1", "--out", str(out)]
    prompts.main([*command, "--without", str(file)])
    rest = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rest) == 100
    assert not {prompts.scene_key(row) for row in rest} & {prompts.scene_key(row) for row in rows}


WRONG = [
    ("geneval --out x.txt", "geneval prompts are a .jsonl file"),
    ("ocr --count 0 --out x.txt", "--count is 0"),
    ("geneval --mix colour=1 --out x.jsonl", "--mix {'colour': 1}: give a share to some of"),
    ("ocr --without no.txt --out x.txt", "no file 'no.txt'"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_requests_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        prompts.main(arguments.split())
    assert not list(tmp_path.iterdir())
