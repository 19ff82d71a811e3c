"""Imported by every command before anything else: ctrl-C during the imports, which take seconds, ends it in one line.

It changes nothing where a module of this project is imported by another program.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130  # exit code: 128 + SIGINT


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT while there is nothing to clean up."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT while the command works."""
    sys.unraisablehook = after_interrupt
    raise KeyboardInterrupt


def after_interrupt(ignored: "sys.UnraisableHookArgs") -> None:
    """What destructors complain of is not printed, such as that of a loader interrupted while it starts processes.

    A KeyboardInterrupt that Python ignored, since it was raised within a destructor or a fork, is sent again.
    """
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()


def end_quietly(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT after the line that says so."""
    os._exit(INTERRUPTED)


def is_a_command() -> bool:
    """Whether Python was started with `-m` or with a script of this repository."""
    script, root = os.path.realpath(sys.argv[0]), os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return sys.argv[0] == "-m" or os.path.isfile(script) and os.path.dirname(script) == root


def leave_interrupts_to_the_main_process() -> None:
    """For a loader's workers and the like: ctrl-C reaches all processes, and the main one ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if is_a_command():
    with contextlib.suppress(ValueError):  # raised outside the main thread
        if multiprocessing.parent_process() is None:
            signal.signal(signal.SIGINT, end_at_once)
            os.register_at_fork(after_in_child=leave_interrupts_to_the_main_process)
        else:  # started by spawn or forkserver
            leave_interrupts_to_the_main_process()
