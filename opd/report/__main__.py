"""Write the page of a run anew: python -m opd.report runs/mini"""

import sys
from pathlib import Path

from opd import errors
from opd.report.page import write_page


def main(arguments: list[str] | None = None) -> None:
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if len(folders) != 1 or not (folders[0] / "config.json").is_file():
        sys.exit("error: usage: python -m opd.report RUN, a folder with a config.json")
    with errors.in_one_line(ValueError):
        print(write_page(*folders))


if __name__ == "__main__":
    main()
