"""util/locks.py: one process at a time writes to a folder."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import REPO
from util import dist, locks
from util.cli import own_folder
from util.files import CannotWrite, host_name
from util.locks import LOCK, folder_lock

LOCKED = """
import sys
from util.locks import folder_lock
with folder_lock(sys.argv[1], "--output_dir"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def no_locks(*_: object) -> None:
    """lockf of a file system without locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def start_locked(folder: Path) -> subprocess.Popen:
    """A process that takes the lock of `folder`, says "ready", and holds it until its input is closed."""
    command = [sys.executable, "-c", LOCKED, str(folder)]
    return subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_locked_folder_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    """By exit or by kill -9; the message names host and process."""
    for end in (lambda process: process.communicate(timeout=60), lambda process: process.kill()):
        process = start_locked(tmp_path)
        assert process.stdout.readline() == "ready\n"
        words = rf"\(--output_dir\) is in use by process {process.pid} on \S+, started 20\d\d-.*choose another folder"
        with pytest.raises(ValueError, match=words), folder_lock(tmp_path, "--output_dir"):
            pass
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
        end(process)
        process.wait(60)
        with folder_lock(tmp_path, "--output_dir"):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
            with pytest.raises(ValueError, match="in use by this process"), folder_lock(tmp_path, "--x"):
                pass
        assert not list(tmp_path.iterdir())


def test_only_one_of_many_gets_a_lock_that_a_dead_process_left(tmp_path: Path) -> None:
    process = start_locked(tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait(60)
    several = [start_locked(tmp_path) for _ in range(3)]
    assert sorted(one.stdout.readline() for one in several) == ["", "", "ready\n"]  # all have answered, one holds it
    for one in several:
        one.communicate(timeout=60)


def test_a_lock_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with folder_lock(tmp_path, "--x"):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine_is_refused_if_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], alive: bool
) -> None:
    """Else it is taken over: its machine has failed, or the job was killed and requeued on this one."""
    monkeypatch.setattr(locks, "SILENT", 0.2)
    (tmp_path / LOCK).write_text(json.dumps({"host": "node7 pid:[1]", "pid": 5, "start": "2026-01-01 00:00:00"}))
    who = "process 5 on node7, started 2026-01-01 00:00:00"
    if alive:
        real = time.sleep
        monkeypatch.setattr(locks.time, "sleep", lambda seconds: (real(seconds), os.utime(tmp_path / LOCK)))
        words = rf"in use by {who}.*If it no longer runs, delete .*{LOCK}"
        with pytest.raises(ValueError, match=words), folder_lock(tmp_path, "--cached_path"):
            pass
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == 5
    else:
        with folder_lock(tmp_path, "--cached_path"):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert who in messages[0] and "taken over unless it shows itself within 0.2 seconds" in messages[0]


def test_an_own_folder_is_removed_unless_something_was_written(tmp_path: Path) -> None:
    twice = [own_folder(tmp_path / "a" / "b", "--x") for _ in range(2)]
    with twice[0], pytest.raises(ValueError, match="is in use by this process"), twice[1]:
        pass
    assert not list(tmp_path.iterdir())
    with own_folder(tmp_path / "a" / "b", "--x"):
        (tmp_path / "a" / "b" / "file").touch()
    with own_folder(tmp_path / "a", "--x"):  # was there before
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "file"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(CannotWrite, match=LOCK), folder_lock(tmp_path, "--cached_path"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_without_locks_of_the_file_system_the_process_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    (tmp_path / LOCK).write_text(json.dumps({"host": host_name(), "pid": os.getppid(), "start": "x"}))
    with pytest.raises(ValueError, match=f"process {os.getppid()} "), folder_lock(tmp_path, "--x"):
        pass
    (tmp_path / LOCK).write_text(json.dumps({"host": host_name(), "pid": 2**22 + 1, "start": "x"}))
    with folder_lock(tmp_path, "--x"):
        pass


def test_the_main_process_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dist.on_main(folder_lock(tmp_path, "--x")):
        assert (tmp_path / LOCK).exists()
    monkeypatch.setattr(dist, "is_main", lambda: False)
    with dist.on_main(folder_lock(tmp_path, "--x")):
        assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", ["dead", "empty"])
def test_only_one_host_takes_over_a_dead_lock_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """All find the lock dead before the first of them takes it."""
    context = multiprocessing.get_context("fork")
    barrier, ended, took = context.Barrier(3), context.Event(), context.SimpleQueue()
    look, looks = locks._refuse_if_held, []

    def look_together(*arguments: object) -> None:
        look(*arguments)
        if not looks:
            looks.append(True)
            barrier.wait(30)

    def take() -> None:
        try:
            with folder_lock(tmp_path, "--x"):
                took.put(True)
                ended.wait(30)
        except ValueError:
            took.put(False)

    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    monkeypatch.setattr(locks, "_refuse_if_held", look_together)
    monkeypatch.setattr(locks, "SILENT", 0.2)
    dead = json.dumps({"host": host_name(), "pid": 2**22 + 1, "start": "x"})
    (tmp_path / LOCK).write_text(dead if content == "dead" else "")
    processes = [context.Process(target=take) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(took.get() for _ in processes) == [False, False, True]
    ended.set()
    for process in processes:
        process.join(30)
    assert not list(tmp_path.iterdir())


def test_a_lock_made_meanwhile_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text("dead")
    with path.open() as dead:
        path.unlink()
        path.write_text("alive")
        locks._move_away(dead.fileno(), path)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [(LOCK, "alive")]
