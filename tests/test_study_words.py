"""What the study's pages say in words: every number of two or three digits comes from the committed results,
or is a setting."""

import math
import re
import statistics

import pytest

from opd.mini.study import pages as study_pages
from opd.mini.study import run as study
from opd.mini.study import tables as study_tables
from opd.mini.study.runs import EQUAL, TASKS, TEACHERS
from opd.mini.study.tables import mean_of_tasks, mean_of_three, own_score, quality_of_all, short

RESULTS, OTHERS = study_tables.load(study.RESULTS), study_tables.load(study_tables.OTHER)
SEEDS = study_tables.by_seed(RESULTS)
PAGES = {page.name: page for page in study_pages.PAGES}
# What stands in the pages that no run found: settings, and bounds, which a test of their own holds.
SETTINGS = {
    "RESULTS.md": [
        "an anchor of .02 above noise level .6",
        "On the tasks it is within .03 of each teacher",
        "is within .05 of its teacher's",
        "less than the .05 that would be a lead",
        "and no less than .05, above",
        "are not .05 above that mix",
        "within .03 of its teacher's last",
        "Neither .1 nor .02 everywhere",
        "with beta .002:",
        "| larger teacher | .948 | | |",
        "| student of the larger teacher | .931 | .353 | .306 |",
        "| the same, 100 steps on all nine states | .948 | .577 | .538 |",
    ],
    "README.md": [],
}


def words(name: str) -> str:
    """A page without its tables, on one line."""
    text = re.sub(r"<!-- table.*?<!-- end -->", "", PAGES[name].read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


def own(name: str) -> list[dict]:
    return [result for result in RESULTS if result["recipe"] == name]


def level(name: str, score=mean_of_three) -> str:
    """ ".758 ± .019" over the seeds."""
    return study_tables.spread([score(result) for result in own(name)])


def lead(name: str, below: str, score=mean_of_three) -> str:
    """The same of what a run has above another of its seed."""
    return study_tables.above(own(name), below, RESULTS, score)


def lag(name: str, above: str, score=mean_of_three) -> str:
    """The same of what a run has below another, without the sign."""
    found = lead(name, above, score)
    assert found.startswith("-"), f"{name} is not below {above}: {found}"
    return found[1:]


def mean(text: str) -> str:
    return text.partition(" ±")[0]


def leads(name: str, below: str, score=mean_of_three) -> list[float]:
    """Seed by seed, the seed of the other prompts last."""
    sources = [*SEEDS.values(), *study_tables.by_seed(OTHERS).values()]
    return sum([study_tables.lead(name, below, score, source) for source in sources], [])


def listed(name: str, below: str) -> str:
    """ ".018, .063 and .066": the three seeds' leads."""
    first, second, third = [short(value) for value in leads(name, below)[: len(SEEDS)]]
    return f"{first}, {second} and {third}"


def two(value: float) -> str:
    """Two digits, without the sign."""
    return f"{abs(value):.2f}".removeprefix("0")


def two_of(name: str, score) -> str:
    """Two digits of the mean over the seeds."""
    return two(statistics.fmean(score(result) for result in own(name)))


def joined(values: list[float]) -> str:
    """ ".07, .51 and .28", of one value that."""
    *others, last = [two(value) for value in values]
    if not others:
        return last
    return f"{', '.join(others)} and {last}"


def signed(values: list[float]) -> str:
    """ "-.01, .01 and .02"."""
    *others, last = [f"{value:.2f}".replace("0.", ".") for value in values]
    return f"{', '.join(others)} and {last}"


def stacked() -> str:
    """What the last of stacked rewards does to text."""
    after = joined([source["stacked"]["held_out"]["text"] for source in SEEDS.values()])
    return f"takes text from {two_of('stacked-text', own_score('text'))} to {after}"


def compose_error(result: dict) -> float:
    return result["errors"]["compose"]


def landscapes_apart(result: dict) -> float:
    return result["diversity"]["quality"]


# What an answer says of a run -> that it has above "asked", seed by seed, or below where it says so.
ANSWERS = {
    "late": "those near the data lose {}",
    "early": "those near the noise {}",
    "middle": "the middle ones {}",
    "anywhere": "three drawn from all levels {}",
    "every-state": "all nine add nothing to five ({} above)",
    "from-base": "the base loses {}",
    "from-sft": "SFT on samples of seed 0's teachers {}",
    "unfolded": "without, {} less",
    "past": "Not beside folding ({} above)",
    "unfolded-past": "half of what it brings ({} below",
    "ode": "Not told apart (ODE {} above)",
    "off-policy": "the teachers' own walks lose {}",
    "kl": "the KL's loses {}",
    "soft": "are not told apart from hard ones ({} below)",
    "by-reward": "the best-scoring teacher of each prompt loses {}",
    "alternate": "one task per step loses {}",
    "pg": "(`pg`) loses {}",
    "pg_state": "whose mean is zero, {}",
    "pg_live": "it is level ({} above)",
    "flow-opd": "with our learning rate, lose {} (Flow-OPD)",
    "diffusion-opd": "{} (DiffusionOPD)",
    "dance-opd": "{} (DanceOPD)",
    "gfd-opd": "{} (GFD-OPD)",
}


def answer(name: str) -> str:
    if "above" in ANSWERS[name]:
        return ANSWERS[name].format(lead(name, "asked"))
    return ANSWERS[name].format(lag(name, "asked"))


def quality(name: str) -> str:
    return mean(lead(name, "anchor-0", quality_of_all))


def cost(name: str) -> str:
    return lag(name, "anchor-0", mean_of_tasks)


def run_error(result: dict) -> float:
    """Of a run's mean of three, about: as if landscapes were all pictures."""
    return math.hypot(*[result["errors"][task] for task in TASKS]) / 3


def closed_below(noise: float) -> list[float]:
    """What seed 0's student without an anchor closes of the tasks' KL at the levels below."""
    shares = SEEDS[0]["anchor-0"]["kl_closed"]
    return [share for task in ("compose", "text") for at, share in shares[task].items() if float(at) < noise]


def behind_after_as_many_pictures(seed: int) -> float:
    """What the mix watches below the student's last, after as many pictures as it and its teachers have."""
    source = SEEDS[seed]
    pictures = sum(source[name]["curve"][-1]["samples"] for name in (*TEACHERS, "student"))
    scores = [study_tables.score_after(source["mix-all"]["curve"], task, pictures) for task in TASKS]
    last = source["student"]["curve"][-1]
    return statistics.fmean(last[task] for task in TASKS) - statistics.fmean(scores)


def without_kl() -> list[str]:
    """What teachers without the KL term lack."""
    teachers = {EQUAL[task]: f"free-{task}" for task in TASKS}
    means = [lag(free, teacher) for teacher, free in teachers.items()]
    text = lag("free-text", "equal-text", own_score("text"))
    return [
        f"(compose {lag('free-compose', 'equal-compose', own_score('compose'))} lower, text {text}, quality"
        f" of all {lag('free-quality', 'all-quality', quality_of_all)})",
        f"(lower by {means[0]}, {means[1]} and {means[2]})",
        f"loses another {lag('free-quality', 'all-quality', own_score('text'))} of text",
    ]


def other_starts() -> list[str]:
    """What the mix makes of them, by seed and learning rate, and of the default student."""
    fast = SEEDS[1]["merge-mix-fast"]
    return [
        f"ends {joined(leads('merge-mix', 'mix-all'))} below the mix alone at that rate",
        f"is level with the mix alone ({signed(leads('merge-mix-faster', 'mix-all'))}) and below what",
        f"by {joined(leads('merge-mix-faster', 'rewarded'))};",
        f"the mix's own rate ends at {short(mean_of_three(fast))} in seed 1",
        f"{joined(leads('sft-mix', 'mix-all'))} below the mix alone at the",
        f"end {joined(leads('student-mix', 'mix-all'))} above the mix alone",
    ]


def results_sentences() -> list[str]:
    """The other places with numbers in RESULTS.md."""
    closed = closed_below(0.6)
    behind = [behind_after_as_many_pictures(seed) for seed in SEEDS]
    learned = ("mix", "mix-all", "mix-folded", "student", "rewarded")
    alike = [landscapes_apart(result) for name in learned for result in own(name)]
    late_quality = leads("anchor-late", "anchor-0", quality_of_all)
    brought = [
        a - b for a, b in zip(late_quality, leads("anchor-0.5", "anchor-0", quality_of_all), strict=True)
    ]
    late = sorted(mean(level(name)) for name in ("anchor-late", "anchor-late-4", "anchor-earlier"))
    start, end = (SEEDS[1][name]["held_out"]["compose"] for name in ("anchor-late", "rewarded-fast"))
    lowest = {name: min(leads(name, "all-quality", quality_of_all)) for name in ("student", "rewarded")}
    return [
        *without_kl(),
        f"in seed 1 it is {two(lowest['student'])} below",
        f"the student is above the usual mix in every seed, by {lead('student', 'mix')}",
        f"in the mean by {lead('rewarded', 'mix-all')}",
        f"above the usual mix by {lead('rewarded', 'mix')}",
        f"the student in every seed, by {lead('rewarded', 'student')}",
        f"is the quality teacher's or {two(lowest['rewarded'])} below it",
        f"({short(start)} to {short(end)} in seed 1",
        f"on other prompts, has {short(leads('rewarded', 'mix-all')[-1])} above its mix",
        f"from {short(landscapes_apart(SEEDS[0]['base']))} to {two_of('all-quality', landscapes_apart)} in",
        f"error is {two_of('anchor-late', compose_error)})",
        f"{two(min(closed))} to {two(max(closed))} of it are closed there",
        f"and to {two(min(alike))} to {two(max(alike))} in the others",
        f"the mix is {two(min(behind))} to {two(max(behind))} lower",
        f"two seeds, {two(min(brought))} less in the third",
        f"a single run's standard error is about {two_of('asked', run_error)}",
        f".5 brings the quality of all pictures {quality('anchor-0.5')} and costs the mean of compose and"
        f" text {cost('anchor-0.5')}, 2 brings {quality('anchor-2')} and costs {mean(cost('anchor-2'))}",
        f"as the late one and brings {lead('anchor-held', 'anchor-0', quality_of_all)}",
        f"as .5 does, {quality('anchor-late')} (",
        f"and costs {cost('anchor-late')}, less in every seed",
        f"it brings more ({quality('anchor-earlier')}, {quality('anchor-late-4')}) and costs more"
        f" ({mean(cost('anchor-earlier'))}, {mean(cost('anchor-late-4'))})",
        stacked(),
        *other_starts(),
        f"does not tell them apart ({late[0]} to {late[-1]})",
        f"instead of {mean(lag('unfolded', 'asked'))})",
        f"level in score, {level('student')} against {level('mix-all')}, or {level('mix-folded')} where",
        f"one after the other: {level('rewarded')}",
        f"from the base ({short(own_score('text')(SEEDS[0]['base']))}), at guidance 1",
    ]


def readme_sentences() -> list[str]:
    """Those in README.md."""
    seesaw = leads("all-quality", "base", own_score("text"))
    tasks = leads("student", "equal-compose", own_score("compose"))
    tasks += leads("student", "equal-text", own_score("text"))
    looks = leads("student", "all-quality", quality_of_all)
    mix, other = leads("student", "mix-all"), leads("rewarded", "mix-all")[-1]
    signs = study_tables.table("signs", RESULTS).split("\n")
    return [
        f"error is {two_of('anchor-late', compose_error)})",
        f"loses {two(max(seesaw))} to {two(min(seesaw))} in text",
        stacked(),
        f"within {two(min(tasks))} of each teacher",
        f"stays {two(max(looks))} to {two(min(looks))} below its teacher's",
        f"The usual mix, by {listed('student', 'mix')} by seed.",
        f"({two(min(mix))} below to {two(max(mix))} above by seed",
        f"it is {listed('rewarded', 'mix-all')} above the mix by seed, {short(other)} on the other",
        f"and {listed('rewarded', 'mix')} above the usual mix.",
        f"without it all pictures have {two_of('anchor-0', quality_of_all)}",
        f"(.5: {two_of('anchor-0.5', quality_of_all)} for {mean(cost('anchor-0.5'))} of compose and text",
        f"2: {two_of('anchor-2', quality_of_all)} for {mean(cost('anchor-2'))})",
        f"(2 below .6) brings {two_of('anchor-late', quality_of_all)} for {mean(cost('anchor-late'))}.",
        f"{signs[2].split()[3]} to {signs[3].split()[4]} on strings held out",
    ]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_its_runs_lead_and_says_in_which_direction(name):
    assert answer(name) in words("RESULTS.md")


def test_bounds_and_directions_in_words_hold_in_every_seed():
    tasks = leads("student", "equal-compose", own_score("compose"))
    tasks += leads("student", "equal-text", own_score("text"))
    assert min(tasks) > -0.03  # "within .03 of each teacher, or above, in every seed"
    looks = leads("student", "all-quality", quality_of_all)
    assert [value > -0.05 for value in looks] == [True, False, True, True]  # "in three of four; in seed 1"
    assert min(leads("rewarded", "mix")) > 0.05  # "no less than .05"
    teachers = leads("specialists", "mix-all")
    assert [round(value, 3) >= 0.05 for value in teachers] == [False, True, False, False]
    for name, above in (("merge-mix", "mix-all"), ("sft-mix", "mix-all"), ("merge-mix-faster", "rewarded")):
        assert max(leads(name, above)) < 0
    for name, below in (("student-mix", "mix-all"), ("rewarded", "student"), ("student", "mix")):
        assert min(leads(name, below)) > 0


@pytest.mark.parametrize("page", PAGES)
def test_no_number_in_words_is_without_a_result(page):
    rest, places = words(page), readme_sentences()
    if page == "RESULTS.md":
        places = results_sentences() + [answer(name) for name in ANSWERS]
    places += SETTINGS[page]
    for place in places:
        assert rest.count(place) == 1, place
    for place in places:
        rest = rest.replace(place, "")
    assert re.findall(r".{40}(?<![\w.])\.\d{2,3}.{20}", rest) == []


def test_words_leave_tables_out_and_a_lead_is_by_seed():
    assert "| --- |" not in words("README.md") and "<!--" not in words("README.md")
    assert "| --- |" in PAGES["README.md"].read_text()
    differences = [
        mean_of_three(SEEDS[seed]["kl"]) - mean_of_three(SEEDS[seed]["asked"]) for seed in (0, 1, 2)
    ]
    assert lag("kl", "asked").startswith(f"{-sum(differences) / 3:.3f}"[1:]) and min(differences) < 0
    assert set(SEEDS[0]["kl"]["held_out"]) == set(TASKS)
