"""The study's pages anew, from results alone: tables (tables.py) and plots (plots.py)."""

from opd.errors import require
from opd.files import replace
from opd.mini.study.plots import PLOTS
from opd.mini.study.tables import ROOT, table

# Page -> the tables in it.
PAGES = {
    ROOT / "opd/mini/study/RESULTS.md": (
        "rivals",
        "claims",
        "pace",
        "level",
        "references",
        "controls",
        "anchors",
        "questions",
        "other teachers",
        "signs",
    ),
    ROOT / "README.md": ("rivals",),
}


def write(results: list[dict]) -> None:
    """The committed pages and plots, anew."""
    for page, names in PAGES.items():
        text = with_tables(page.read_text(), names, results)
        replace(page, lambda path, text=text: path.write_text(text))
    for file, plot in PLOTS.items():
        drawing = plot(results)
        replace(file, lambda path, drawing=drawing: path.write_text(drawing))


def with_tables(page: str, names: tuple[str, ...], results: list[dict]) -> str:
    for name in names:
        page = with_table(page, name, table(name, results))
    return page


def with_table(page: str, name: str, table: str) -> str:
    """`page` with another table between `<!-- table NAME -->` and `<!-- end -->`. ValueError where it has no
    place for one."""
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
    before, found, rest = page.partition(begin)
    require(bool(found) and end in rest, f"the page has no lines {begin.strip()} and {end.strip()}")
    _, _, after = rest.partition(end)
    return before + begin + table + end + after
