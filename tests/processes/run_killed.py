"""run_killed.py NUMBER FLAGS...: main_tokenbridge.py that gets SIGKILL in the middle of its NUMBER-th torch.save."""

import io
import os
import signal
import sys
from typing import BinaryIO

import torch

import main_tokenbridge
from util.cli import run_cli

save, left = torch.save, int(sys.argv[1])


def save_half_and_die(content: object, file: BinaryIO) -> None:
    """torch.save up to the last one, of which half of the bytes are written."""
    global left
    left -= 1
    if left > 0:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


torch.save = save_half_and_die
sys.exit(run_cli(lambda: main_tokenbridge.main(sys.argv[2:])))
