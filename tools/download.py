"""`python -m tools.download`, see checkpoints/download.py."""

import sys

from checkpoints.download import main
from util.log import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))
