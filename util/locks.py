"""Locks of output folders: two runs that write to one folder would mix their files."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from util.files import NOFOLLOW, host_name, is_alive, temporary_name, writing
from util.json_reader import parse_json

LOCK = ".tokenbridge.lock"
BEAT, SILENT = 15.0, 75.0  # seconds, see `folder_lock`

_held: set[Path] = set()  # folders that this process has locked


@contextlib.contextmanager
def folder_lock(folder: str | Path, flag: str) -> Iterator[None]:
    """Only one process writes to `folder` (which exists). ValueError that names the other one's host and process.

    FOLDER/.tokenbridge.lock says who holds the lock (host, pid, start), and is touched every BEAT seconds. That of a
    process of this machine which no longer runs is taken over at once. That of another machine, which cannot be asked,
    is watched: refused when it is touched, taken over after SILENT seconds, so that a job that is requeued elsewhere
    continues. One process of a run takes it: `with dist.on_main(folder_lock(...))`.
    """
    path = Path(folder).resolve() / LOCK
    if path in _held:
        raise ValueError(f"{folder} ({flag}) is in use by this process ({os.getpid()}) already")
    number = _take_lock(path, f"{folder} ({flag})")
    _held.add(path)
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(number, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        _held.discard(path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(number)  # after unlink: until then no other process takes it


def _touch(number: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(number)


def _take_lock(path: Path, named: str) -> int:
    """The open and locked file at `path`, with this process in it."""
    while True:
        number, new = _open_lock(path)
        if number is None:
            continue
        try:
            own = _is_own(number, new, path, named)
        except BaseException:
            os.close(number)
            raise
        if not own:
            os.close(number)
            continue
        me = {"host": host_name(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
        with writing(path):
            os.ftruncate(number, 0)
            os.pwrite(number, json.dumps(me).encode(), 0)
        return number


def _open_lock(path: Path) -> tuple[int | None, bool]:
    """The file at `path`, open (None if its holder removes it just now), and whether it was made here."""
    flags = os.O_RDWR | NOFOLLOW
    with writing(path):
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags), False
    return None, False


def _is_own(number: int, new: bool, path: Path, named: str) -> bool:
    """Whether the open file is this process's lock; if not, try again. ValueError if another process holds it.

    Where the file system has locks, the kernel's decides who takes over the file of a dead process. Elsewhere the file
    is moved away and made again, of which only one host can do either.
    """
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel when this process ends
        locked: bool | None = True
    except OSError as error:  # None: this file system has no locks
        locked = False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    try:
        if not (new and locked is not False):
            _refuse_if_held(number, locked, path, named)
        if not os.path.samestat(os.fstat(number), os.stat(path)):
            return False
        if not new and locked is None:
            _move_away(number, path)
            return False
    except FileNotFoundError:  # its holder removed it meanwhile
        return False
    return True


def _refuse_if_held(number: int, locked: bool | None, path: Path, named: str) -> None:
    """ValueError if another process holds the open file; locked: whether this one has the kernel's lock of it."""
    before = os.fstat(number)
    try:
        holder = parse_json(os.pread(number, 4096, 0))
        host, pid, start = str(holder["host"]), int(holder["pid"]), str(holder["start"])
    except (ValueError, TypeError, KeyError):  # just made, or a kill came before it was written
        host, pid, start = host_name(), 0, "just now"
    held = locked is False or locked is None and pid not in (0, os.getpid()) and host == host_name() and is_alive(pid)
    who = f"process {pid} on {host.split()[0]}, started {start}" if pid else "a process that started just now"
    if not held and (host != host_name() or not pid and locked is None):
        words = "%s was locked by %s, which cannot be asked: taken over unless it shows itself within %g seconds"
        logging.getLogger("tokenbridge").warning(words, named, who, SILENT)
        held = _is_touched(path, before)
    if held:
        advice = f"wait for it, or choose another folder. If it no longer runs, delete {path}"
        raise ValueError(f"{named} is in use by {who}: two runs would mix their files; {advice}")


def _move_away(number: int, path: Path) -> None:
    """Remove the open lock of a dead process; the one that another process made there meanwhile stays."""
    away = temporary_name(path)
    os.rename(path, away)
    if not os.path.samestat(os.fstat(number), os.stat(away)):
        with contextlib.suppress(OSError):
            os.link(away, path)
    os.unlink(away)


def _is_touched(path: Path, before: os.stat_result) -> bool:
    """Whether somebody writes to the file or touches it within SILENT seconds, counted from `before`.

    Network file systems keep a file's time for less than that. The file is not opened: closing it would release this
    process's lock.
    """
    end = time.monotonic() + SILENT
    while time.monotonic() < end:
        time.sleep(min(SILENT / 30, 2))
        now = os.stat(path)
        if any(getattr(now, key) != getattr(before, key) for key in ("st_ino", "st_mtime_ns", "st_size")):
            return True
    return False
