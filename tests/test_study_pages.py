"""What the study's pages show: tables and plots, from results written here and from the committed ones."""

import re
from xml.etree import ElementTree

import pytest

from opd.mini.study import pages as study_pages
from opd.mini.study import plots as study_plots
from opd.mini.study import run as study
from opd.mini.study import runs
from opd.mini.study import tables as study_tables
from opd.report import svg

COMMITTED = study_tables.load(study.RESULTS)


@pytest.mark.parametrize("page", study_pages.PAGES, ids=lambda page: page.name)
def test_the_committed_tables_are_those_of_the_committed_results(page):
    text = page.read_text()
    assert study_pages.with_tables(text, study_pages.PAGES[page], COMMITTED) == text
    assert len(study_pages.PAGES[page]) == text.count("<!-- table ")


@pytest.mark.parametrize("file", study_plots.PLOTS, ids=lambda file: file.name)
def test_the_committed_plots_are_those_of_the_committed_results(file):
    assert study_plots.PLOTS[file](COMMITTED) == file.read_text()
    root = ElementTree.fromstring(file.read_text())
    marks = root.findall("{*}circle")
    if file.name == "closed.svg":
        marks = root.findall("{*}rect")[1:]
    assert root.tag.endswith("svg") and len(marks) > 3


def test_spread_and_table_by_hand():
    results = []
    for seed, compose in enumerate((0.3, 0.4, 0.5)):
        scores = {"compose": compose, "text": 0.9, "quality": 0.8}
        results.append({"recipe": "full", "seed": seed, "held_out": scores})
    *_, row = study_tables.table("other teachers", results).strip().split("\n")
    assert row.endswith("| 3 | .400 ± .100 | .900 ± .000 | .800 ± .000 | .700 ± .033 |  |  |")
    assert study_tables.spread([0.25]) == ".250" and study_tables.spread([-0.25, -0.25]) == "-.250 ± .000"
    assert study_tables.short(1.0) == "1.000" and study_tables.spread([]) == ""
    with pytest.raises(ValueError, match="has no lines <!-- table missing -->"):
        study_pages.with_table("text", "missing", row)


def test_a_table_with_teachers_beside_students_shows_the_gap_of_these_alone():
    scores = {"text": 0.7}
    student = {"recipe": "full", "held_out": scores, "gap_closed": {"fixed": 0.625, "visited": 0.5}}
    teacher = {"recipe": "full-teacher", "held_out": {"base": scores}}
    _, _, first, second = study_tables.table("other teachers", [student, teacher]).strip().split("\n")
    assert second.endswith("| 1 |  | .700 |  |  | .625 | .500 |")
    assert first.endswith("| 1 |  | .700 |  |  |  |  |")


def rival(name, seed, compose, text, qualities, **more):
    """A result with the quality of the three tasks' pictures."""
    held_out = {"compose": compose, "text": text, "quality": qualities[2]}
    quality_of = dict(zip(runs.TASKS, qualities, strict=True))
    return {"recipe": name, "seed": seed, "held_out": held_out, "quality_of": quality_of} | more


def test_the_quality_of_all_is_that_of_every_tasks_pictures():
    apart = {"diversity": {"quality": 0.125}, "variety": {"compose": 0.25, "text": 0.125, "quality": 0.5}}
    result = rival("mix", 0, 0.3, 0.9, (0.6, 0.4, 0.8), **apart)
    *_, row = study_tables.table("rivals", [result]).strip().split("\n")
    assert row == "| GRPO-mix | 1 | .300 | .900 | .800 | .600 | .400 | .600 | .600 | .125 | .188 |"


def test_a_question_is_answered_seed_by_seed_against_the_first_row():
    results = [
        rival("asked", 0, 0.3, 0.9, (0.6, 0.6, 0.6)),
        rival("asked", 1, 0.6, 0.9, (0.9, 0.9, 0.9)),
        rival("ode", 0, 0.6, 0.9, (0.6, 0.6, 0.6)),
        rival("ode", 1, 0.6, 0.9, (0.6, 0.6, 0.6)),
        rival("ode", 2, 0.6, 0.9, (0.6, 0.6, 0.6)),
    ]
    _, _, first, row = study_tables.table("questions", results).strip().split("\n")
    assert first.endswith("| .700 ± .141 | .000 ± .000 |")
    assert row.endswith("| 3 | .600 ± .000 | .900 ± .000 | .600 ± .000 | .700 ± .000 | .000 ± .141 |")


def test_an_anchor_is_compared_seed_by_seed_with_none():
    results = [
        rival("anchor-0", 0, 0.3, 0.9, (0.6, 0.6, 0.6)),
        rival("anchor-0", 1, 0.5, 0.9, (0.7, 0.7, 0.7)),
        rival("anchor-2", 0, 0.1, 0.7, (0.9, 1.0, 0.8), diversity={"quality": 0.125}),
        rival("anchor-2", 1, 0.3, 0.7, (0.9, 1.0, 0.8)),
    ]
    lines = study_tables.table("anchors", results).split("\n")
    assert lines[2].endswith("|  | .000 ± .000 | .000 ± .000 |")
    assert lines[3].endswith("| .900 ± .000 | .600 ± .047 | .125 | -.200 ± .000 | .250 ± .071 |")


def test_the_table_of_signs_takes_each_number_from_its_cell():
    cells = []
    for number, row in enumerate(("base", "teacher")):
        for split, scorer, mean in (
            ("held-out", "ocr", 0.25),
            ("train", "ocr", 0.5),
            ("held-out", "diversity", 0),
        ):
            place = {"row": row, "split": split, "scorer": scorer}
            cells.append(place | {"mean": mean + number / 10, "error": 0.01, "best": 0.75})
    *_, base, teacher = study_tables.signs(cells).strip().split("\n")
    assert base == "| base | .250 ± .010 | .750 | .500 ± .010 | .000 ± .010 |"
    assert teacher == "| text teacher | .350 ± .010 | .750 | .600 ± .010 | .100 ± .010 |"


def test_the_plot_of_anchors_has_a_mark_per_recipe_and_a_cross_as_wide_as_its_spread():
    results = [rival("anchor-0", seed, 0.2 + seed / 5, 0.9, (0.5, 0.5, 0.5)) for seed in (0, 1)]
    results.append(rival("anchor-late", 0, 0.3, 0.9, (0.9, 0.9, 0.9)))
    (mark,) = study_plots.marks({"anchor-0": "0"}, results)
    assert mark == svg.Mark(pytest.approx(0.6), 0.5, "0", pytest.approx(0.1 / 2**0.5), 0.0)
    root = ElementTree.fromstring(study_plots.trade(results))
    first, second = root.findall("{*}circle")
    assert float(first.get("cx")) == float(second.get("cx"))
    assert float(first.get("cy")) > float(second.get("cy"))  # down is less
    across = root.findall("{*}line[@opacity='0.5']")[0]
    width = float(across.get("x2")) - float(across.get("x1"))
    assert width == pytest.approx(svg.WIDTH - 2 * svg.LEFT - 20)  # the only spread spans the frame


def test_the_student_is_drawn_after_what_its_teachers_took():
    def watching(samples, seconds, value):
        point = {"step": 1, "samples": samples, "seconds": seconds}
        return {"curve": [point | dict.fromkeys(runs.TASKS, value)]}

    teachers = [rival(name, 0, 0, 0, (0, 0, 0), **watching(100, 10, 0.1)) for name in runs.TEACHERS]
    students = [
        rival("student", 0, 0, 0, (0, 0, 0), **watching(7, 4, 0.5)),
        rival("student", 1, 0, 0, (0, 0, 0), **watching(7, 6, 0.7)),
    ]
    assert study_plots.watched("student", "seconds", students, 30.0) == [
        svg.Mark(35.0, pytest.approx(0.6), "", 0.0, pytest.approx(0.2 / 2**0.5))
    ]
    later = [rival(name, 0, 0, 0, (0, 0, 0), **watching(40, 2, 0.8)) for name in ("anchor-late", "rewarded")]
    for plot, student, last in (
        (study_plots.over_seconds, "35", "34"),
        (study_plots.over_images, "307", "380"),
    ):
        root = ElementTree.fromstring(plot([*teachers, *students, *later]))
        assert {student, last} <= {text.text for text in root.findall("{*}text")}


def test_the_heat_map_has_a_cell_per_teacher_and_level_the_darker_the_more_is_closed():
    levels = {"1.000": 0.25, "0.500": 0.75}
    first = rival("student", 0, 0, 0, (0, 0, 0), kl_closed=dict.fromkeys(runs.TASKS, levels))
    second = rival(
        "student", 1, 0, 0, (0, 0, 0), kl_closed=dict.fromkeys(runs.TASKS, levels | {"1.000": 0.5})
    )
    root = ElementTree.fromstring(study_plots.closed([first, second]))
    words = [text.text for text in root.findall("{*}text")]
    assert words.count("0.38") == words.count("0.75") == 3 and "1.00" in words and "compose" in words
    shades = [float(re.search(r"(\d+)%\)", cell.get("fill"))[1]) for cell in root.findall("{*}rect")[1:]]
    assert len(shades) == 6 and shades[0] > shades[1]
    assert len(ElementTree.fromstring(study_plots.closed([])).findall("{*}rect")) == 1


def test_a_plot_of_no_results_is_an_empty_frame():
    root = ElementTree.fromstring(study_plots.over_images([]))
    assert root.findall("{*}circle") == [] and len(root.findall("{*}text")) > 3


def curved(name, seed, points, task):
    """A result with a curve of one task: (samples, score)."""
    curve = [{"samples": samples, task: score} for samples, score in points]
    return {"recipe": name, "seed": seed, "curve": curve}


def test_pace_reads_the_mix_where_it_has_seen_as_many_pictures_of_the_task():
    """3,000 pictures of compose are three fifths of the mix's 5,000, half way between two points."""
    teacher = curved("equal-compose", 0, [(1000, 0.1), (3000, 0.5)], "compose")
    mix = curved("mix-all", 0, [(4000, 0.2), (6000, 0.4), (9000, 0.6)], "compose")
    alone = curved("equal-compose", 1, [(3000, 0.9)], "compose")
    (_, _, row) = study_tables.table("pace", [teacher, mix, alone]).strip().split("\n")
    assert row == "| compose | 3000 | 1 | .500 | .300 | .600 |"
    assert study_tables.score_after(mix["curve"], "compose", 100) == 0.2


def test_claims_compare_seed_by_seed_and_the_teachers_each_on_its_own_task():
    def apart(number):
        return {"variety": {"compose": number, "text": number}}

    def of_seed(seed):
        return [
            rival("equal-compose", seed, 0.5, 0.6, (0.5, 0.5, 0.5)),
            rival("equal-text", seed, 0.1, 0.9, (0.5, 0.5, 0.5)),
            rival("all-quality", seed, 0.0, 0.4, (0.9, 1.0, 0.8)),
            rival("mix-all", seed, 0.4, 0.8, (0.8, 0.8, 0.8), **apart(0.125)),
            rival("student", seed, 0.5 + seed / 10, 0.9, (0.7, 0.8, 0.9), **apart(0.25)),
        ]

    base = rival("base", 0, 0.25, 0.5, (0.5, 0.5, 0.5), **apart(0.25))
    measured = ("held_out", "quality_of", "variety")
    base = {"recipe": "base", "seed": 0} | {what: {"base": base[what]} for what in measured}
    lines = study_tables.claims([base, *of_seed(0), *of_seed(1)], [base, *of_seed(3)]).split("\n")
    assert lines[0] == "|  | seed 0 | seed 1 | mean of these | seed 3, other prompts |"
    assert "| compose teacher above the base, compose | .250 | .250 | .250 ± .000 | .250 |" in lines
    assert "| quality teacher above the base, quality of all | .400 | .400 | .400 ± .000 | .400 |" in lines
    assert "| student above the compose teacher, compose | .000 | .100 | .050 ± .071 | .300 |" in lines
    assert (
        "| student above the mix rewarded for everything, mean | .067 | .100 | .083 ± .024 | .167 |" in lines
    )
    assert (
        "| the teachers, each on its own task, above that mix | .100 | .100 | .100 ± .000 | .100 |" in lines
    )
    assert "| student above the usual mix, mean of three |  |  |  |  |" in lines
    assert "| that mix above the base, variety | -.125 | -.125 | -.125 ± .000 | -.125 |" in lines


def test_the_seconds_to_the_teachers_level_count_what_a_run_starts_and_learns_from():
    def watching(name, *points):
        curve = []
        for seconds, scores in points:
            curve.append({"seconds": seconds} | dict(zip(runs.TASKS, scores, strict=True)))
        return rival(name, 0, 0, 0, (0, 0, 0), curve=curve)

    results = [
        watching("equal-compose", (50, (0.3, 0.5, 0.5)), (100, (0.5, 0.5, 0.5))),
        watching("equal-text", (40, (0.1, 0.9, 0.5))),
        watching("all-quality", (30, (0.0, 0.4, 0.8))),
        watching("student", (5, (0.48, 0.86, 0.9)), (9, (0.48, 0.88, 0.78)), (15, (0.6, 0.95, 0.9))),
        watching("anchor-late", (7, (0.4, 0.9, 0.9))),
        watching("rewarded", (4, (0.5, 0.9, 0.8))),
        watching("mix-all", (200, (0.46, 1.0, 1.0)), (400, (0.6, 1.0, 0.7))),
    ]
    heading, _, *rows = study_tables.level(runs.TABLES["level"], results).strip().split("\n")
    assert heading == "|  | seed 0 |"
    assert [row.split(" | ")[-1].strip("| ") for row in rows] == [
        "170",
        "179 (9)",
        "181 (4)",
        "",
        "not in 400 (400)",
    ]
    fewer = [result for result in results if result["recipe"] != "anchor-late"]
    *_, rewarded, _, _ = study_tables.level(runs.TABLES["level"], fewer).strip().split("\n")
    assert rewarded.endswith(" |  |")
    assert "seed" not in study_tables.level(runs.TABLES["level"], results[1:])  # a teacher's aim is missing
