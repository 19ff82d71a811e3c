"""`python -m tools.fid_stats`, see evaluation/reference.py."""

import sys

from evaluation.reference import main
from util.log import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))
