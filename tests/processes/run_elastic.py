"""main_tokenbridge.py whose rank 1 is killed once: at the first step that finds a checkpoint, before any restart."""

import os
import signal
import sys
from pathlib import Path

import engine_tokenbridge
from main_tokenbridge import main
from util.checkpoint import LAST
from util.cli import run_cli

last, draw_step = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / LAST, engine_tokenbridge.draw_step


def draw(*arguments: object) -> object:
    if last.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return draw_step(*arguments)


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        engine_tokenbridge.draw_step = draw
    sys.exit(run_cli(main))
