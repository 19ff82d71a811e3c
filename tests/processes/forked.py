"""Scripts in processes forked from a server that has imported this repository once, instead of once per process."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch
from torch.distributed import TCPStore

from tests.helpers import REPO
from util.log import get_logger

CONTEXT = multiprocessing.get_context("forkserver")
ENTRY_POINTS = ["main_cache", "main_tokenbridge", "main_vae", "reconstruction", "tests.processes.train_scaled"]
PRELOADED = [__name__, *ENTRY_POINTS, "torch._dynamo", "torch.utils.tensorboard"]
GRACE = 60  # seconds in which the other processes end by themselves after one has failed


def run_script(command: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """The script as `python COMMAND` runs it: its own arguments, environment, output files and one thread."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPO)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    get_logger().handlers.clear()
    get_logger()  # of this process's rank
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


def start(command: Sequence[str | Path], out: Path, err: Path, **environment: object) -> BaseProcess:
    """`command`, a script and its arguments, started; it appends to the files `out` and `err`."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    with mock.patch.dict(os.environ, alone):
        forkserver.ensure_running()
        given = os.environ | {name: str(value) for name, value in environment.items()}
    process = CONTEXT.Process(target=run_script, args=([*map(str, command)], given, str(out), str(err)))
    process.start()
    return process


def wait(processes: list[BaseProcess], timeout: float) -> None:
    """Until all have ended, or one has failed and the others had GRACE seconds; what is left then is killed."""
    deadline, failed = time.monotonic() + timeout, False
    while (alive := [p.sentinel for p in processes if p.is_alive()]) and time.monotonic() < deadline:
        connection.wait(alive, deadline - time.monotonic())
        if not failed and any(p.exitcode for p in processes):
            deadline, failed = min(deadline, time.monotonic() + GRACE), True
    late = not failed and any(p.is_alive() for p in processes)
    for process in processes:
        process.kill()
        process.join()
    if late:
        raise TimeoutError(f"not finished after {timeout} s")


def run_processes(
    arguments: Sequence[str | Path], nproc: int, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=nproc ARGUMENTS` without torchrun: in the repository, one thread each; output captured
    as text. The exit code is that of the first rank that failed. TimeoutError after `timeout` seconds.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps it
    together = dict(WORLD_SIZE=nproc, LOCAL_WORLD_SIZE=nproc, MASTER_ADDR="localhost", MASTER_PORT=store.port)
    together |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0) | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        ranks = [start(arguments, out, err, **together, RANK=rank, LOCAL_RANK=rank) for rank in range(nproc)]
        wait(ranks, timeout)
        code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())
