"""`python -m opd.bench gpu`: what opd/bench/gpu.py measures."""

import sys

from opd.bench import gpu

if __name__ == "__main__":
    if sys.argv[1:2] != ["gpu"]:
        sys.exit("error: usage: python -m opd.bench gpu [--rehearse]")
    sys.exit(gpu.main(sys.argv[2:]))
