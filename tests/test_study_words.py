"""What the study's pages say in words: every number of three digits comes from the committed results."""

import re

import pytest

from opd import study, study_pages, study_tables
from opd.mini.runs import TASKS
from opd.study_tables import mean_of_tasks, mean_of_three, own_score, quality_of_all

RESULTS, OTHERS = study_tables.load(study.RESULTS), study_tables.load(study_tables.OTHER)
SEEDS = study_tables.by_seed(RESULTS)
PAGES = {page.name: page for page in study_pages.PAGES}
BETA = "with beta .002:"


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
    """The same of what a run has above another of its seed, or below it."""
    return study_tables.above(own(name), below, RESULTS, score).lstrip("-")


def mean(text: str) -> str:
    return text.partition(" ±")[0]


def leads(name: str, below: str) -> list[str]:
    """Seed by seed, the seed of the other prompts last."""
    sources = [*SEEDS.values(), *study_tables.by_seed(OTHERS).values()]
    found = [study_tables.lead(name, below, mean_of_three, source) for source in sources]
    return [study_tables.spread(values) for values in found if values]


def listed(name: str, below: str) -> str:
    """ ".018, .063 and .066": the three seeds' leads."""
    first, second, third, *_ = leads(name, below)
    return f"{first}, {second} and {third}"


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


def quality(name: str) -> str:
    return mean(lead(name, "anchor-0", quality_of_all))


def cost(name: str) -> str:
    return lead(name, "anchor-0", mean_of_tasks)


def sentences() -> dict[str, list[str]]:
    """Page -> the other places with numbers of three digits."""
    base = SEEDS[0]["base"]
    forgot = SEEDS[1]["anchor-late"]["held_out"]["compose"], SEEDS[1]["rewarded-fast"]["held_out"]["compose"]
    other = leads("rewarded", "mix-all")[-1]
    late = sorted(mean(level(name)) for name in ("anchor-late", "anchor-late-4", "anchor-earlier"))
    signs = study_tables.table("signs", RESULTS).split("\n")
    return {
        "RESULTS.md": [
            f"in the mean by {lead('rewarded', 'mix-all')}",
            f"the student is above the usual mix in every seed, by {lead('student', 'mix')}",
            f"above the usual mix by {lead('rewarded', 'mix')} and no less than .05",
            f"above the student in every seed, by {lead('rewarded', 'student')}",
            f"({study_tables.short(forgot[0])} to {study_tables.short(forgot[1])} in seed 1",
            f"on other prompts, has {other} above its mix",
            f"from {study_tables.short(base['diversity']['quality'])} to .07 in the quality teacher",
            f".5 brings the quality of all pictures {quality('anchor-0.5')} and costs the mean of compose and"
            f" text {cost('anchor-0.5')}, 2 brings {quality('anchor-2')} and costs {mean(cost('anchor-2'))}",
            f"as .5 does, {quality('anchor-late')} (",
            f"and costs {cost('anchor-late')}, less in every seed",
            f"it brings more ({quality('anchor-earlier')}, {quality('anchor-late-4')}) and costs more"
            f" ({mean(cost('anchor-earlier'))}, {mean(cost('anchor-late-4'))})",
            f"does not tell them apart ({late[0]} to {late[-1]})",
            f"instead of {mean(lead('unfolded', 'asked'))})",
            f"level in score, {level('student')} against {level('mix-all')}, or {level('mix-folded')} where",
            f"one after the other: {level('rewarded')}",
            f"from the base ({study_tables.short(own_score('text')(base))}), at guidance 1",
            BETA,
        ],
        "README.md": [
            f"The usual mix, by {listed('student', 'mix')} by seed.",
            f"it is {listed('rewarded', 'mix-all')} above the mix by seed, {other} on the other",
            f"and {listed('rewarded', 'mix')} above the usual mix.",
            f"for {mean(cost('anchor-0.5'))} of compose and text",
            f"for {mean(cost('anchor-2'))})",
            f"for {mean(cost('anchor-late'))}.",
            f"{signs[2].split()[3]} to {signs[3].split()[4]} on strings held out",
        ],
    }


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_its_runs_lead_and_says_in_which_direction(name):
    found = lead(name, "asked")
    assert ANSWERS[name].format(found) in words("RESULTS.md")
    below = study_tables.above(own(name), "asked", RESULTS, mean_of_three).startswith("-")
    assert below != ("above" in ANSWERS[name])


@pytest.mark.parametrize("page", PAGES)
def test_no_number_in_words_is_without_a_result(page):
    rest = words(page)
    places = sentences()[page]
    if page == "RESULTS.md":
        places = places + [ANSWERS[name].format(lead(name, "asked")) for name in ANSWERS]
    for place in places:
        assert rest.count(place) == 1, place
    for place in places:
        rest = rest.replace(place, "")
    assert not re.findall(r".{40}(?<![\w.])\.\d{3}.{20}", rest)


def test_words_leave_tables_out_and_a_lead_is_by_seed():
    assert "| --- |" not in words("README.md") and "<!--" not in words("README.md")
    assert "| --- |" in PAGES["README.md"].read_text()
    differences = [
        mean_of_three(SEEDS[seed]["kl"]) - mean_of_three(SEEDS[seed]["asked"]) for seed in (0, 1, 2)
    ]
    assert lead("kl", "asked").startswith(f"{-sum(differences) / 3:.3f}"[1:]) and min(differences) < 0
    assert set(SEEDS[0]["kl"]["held_out"]) == set(TASKS)
