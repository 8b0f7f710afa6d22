"""Pages of runs that lie on the disk.

python -m opd.report runs/mini            # write its report.html anew
python -m opd.report runs/mini runs/seed1 # two runs side by side: runs/seed1/compare.html
"""

import sys
from pathlib import Path

from opd import errors
from opd.report.compare import write_comparison
from opd.report.page import write_page


def main(arguments: list[str] | None = None) -> None:
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    usage = "usage: python -m opd.report RUN [OTHER_RUN]"
    for folder in folders:
        if not (folder / "config.json").is_file():
            sys.exit(f"error: {folder} holds no config.json; {usage}")
    if len({folder.resolve() for folder in folders}) != len(folders) or len(folders) not in (1, 2):
        sys.exit(f"error: {usage}")
    with errors.in_one_line(ValueError, OSError):
        print(write_page(*folders) if len(folders) == 1 else write_comparison(*folders))


if __name__ == "__main__":
    main()
