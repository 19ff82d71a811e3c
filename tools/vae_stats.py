"""`python -m tools.vae_stats`, see dataset/latent_statistics.py."""

import sys

from dataset.latent_statistics import main
from util.log import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))
