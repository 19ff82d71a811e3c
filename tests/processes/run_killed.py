"""run_killed.py SIGNAL PLACE NUMBER FLAGS...: main_tokenbridge.py that sends itself the signal (KILL, TERM, ...).

PLACE "save": in the middle of its NUMBER-th torch.save; "step": when step NUMBER has begun.
"""

import io
import os
import signal
import sys
from typing import BinaryIO

import torch

import engine_tokenbridge
import main_tokenbridge
from util.cli import run_cli

name, place, number, *arguments = sys.argv[1:]
save, draw_step, left = torch.save, engine_tokenbridge.draw_step, int(number)


def send() -> None:
    os.kill(os.getpid(), signal.Signals[f"SIG{name}"])


def save_half_at_last(content: object, file: BinaryIO) -> None:
    """torch.save up to the last one, of which half of the bytes are written."""
    global left
    left -= 1
    if left > 0:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    send()


def draw(model: torch.nn.Module, settings: object, step: int, device: torch.device) -> object:
    if step == int(number):
        send()
    return draw_step(model, settings, step, device)


if place == "save":
    torch.save = save_half_at_last
else:
    engine_tokenbridge.draw_step = draw
sys.exit(run_cli(lambda: main_tokenbridge.main(arguments)))
