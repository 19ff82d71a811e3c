"""main_tokenbridge.py whose rank 1 is killed once, after the first checkpoint and before any restart."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from main_tokenbridge import main
from util.cli import run_cli


def die_at_checkpoint(folder: Path) -> None:
    while not (folder / "checkpoint-last.pth").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(
            target=die_at_checkpoint, args=(Path(sys.argv[sys.argv.index("--output_dir") + 1]),), daemon=True
        ).start()
    sys.exit(run_cli(main))
