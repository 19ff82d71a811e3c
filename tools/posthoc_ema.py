"""`python -m tools.posthoc_ema`, see training/posthoc_ema.py."""

import sys

from training.posthoc_ema import main
from util.log import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))
