"""Toy training runs for test_resume.py, in processes that can be killed: forked from a server that has imported
everything already.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

import main_tokenbridge
from util.cli import run_cli

CONTEXT = multiprocessing.get_context("forkserver")


def main(flags: list[str], log: str, die_in_save: int | None) -> None:
    """Train in this process, its messages in the file `log`. die_in_save: kill -9 in the middle of the so-manieth
    checkpoint's bytes.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if die_in_save is not None:
        save_half_and_die(die_in_save)
    sys.exit(run_cli(lambda: main_tokenbridge.main(flags)))


def save_half_and_die(number: int) -> None:
    """From the `number`-th torch.save on, half of the bytes are written and then this process gets SIGKILL."""
    import io

    real, count = torch.save, 0

    def save(content: object, file: object) -> None:
        nonlocal count
        count += 1
        if count < number:
            real(content, file)
            return
        whole = io.BytesIO()
        real(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def start(flags: list[str], log: Path, die_in_save: int | None = None) -> multiprocessing.Process:
    """The started process."""
    CONTEXT.set_forkserver_preload(["tests.processes.run_killed"])
    repo = str(Path(__file__).parents[2])  # the server looks for modules there and nowhere else, before Python 3.13
    if repo not in os.environ.get("PYTHONPATH", ""):
        os.environ["PYTHONPATH"] = os.pathsep.join([repo, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = CONTEXT.Process(target=main, args=(flags, str(log), die_in_save))
    process.start()
    return process
