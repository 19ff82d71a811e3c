"""util/files.py: the old content or the new, never half of one."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import REPO
from util import dist, files
from util.cli import own_folder
from util.files import (
    LOCK,
    CannotWrite,
    check_schema,
    file_sha256,
    folder_lock,
    read_json,
    refuse_existing,
    replacing,
    second_name,
    set_aside,
    temporary_name,
    unchanged,
    write_json,
    writing,
)


@pytest.mark.parametrize("sync", [False, True])
def test_the_new_content_takes_the_old_ones_place_at_the_end(tmp_path, sync):
    path = tmp_path / "new" / "a.bin"
    with replacing(path, sync) as file:
        file.write(b"one")
    with replacing(path, sync) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_old_content_and_no_rubbish(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1} and len(list(tmp_path.iterdir())) == 1


def in_another_process(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)


HALF = """
import os, sys
from util.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half"), file.flush()
    print("ready", flush=True)
    sys.stdin.read() if len(sys.argv) > 2 else os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_left_behind_is_removed_and_a_live_ones_file_is_not(tmp_path: Path) -> None:
    killed = in_another_process(HALF, tmp_path / "a.json")
    assert killed.wait(60) == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    (live := tmp_path / f".b.{files._host_digest()}.{os.getppid()}.{'0' * 12}.tmp").touch()
    (elsewhere := tmp_path / f".b.{'0' * 8}.{2**22}.{'0' * 12}.tmp").touch()  # of another machine
    (foreign := tmp_path / ".b.tmp").touch()
    write_json(tmp_path / "a.json", [1])
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", live.name, elsewhere.name, foreign.name}


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each has a file of its own; one of the two contents is there in the end, complete."""
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        one.write(b"one" * 10000)
        two.write(b"two" * 20000)
    assert (tmp_path / "a").read_bytes() == b"one" * 10000 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("what", ["link", "dangling link", "file"])
def test_a_planted_name_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Temporary names cannot be guessed; a name that is there is refused all the same."""
    victim, planted = tmp_path / "victim", tmp_path / ".a.tmp"
    if what != "dangling link":
        victim.write_text("precious")
    planted.write_text("old") if what == "file" else planted.symlink_to(victim)
    monkeypatch.setattr(files, "temporary_name", lambda path: planted)
    with pytest.raises(CannotWrite, match=r"cannot write .*a: File exists"):
        write_json(tmp_path / "a", 1)
    assert not victim.exists() if what == "dangling link" else victim.read_text() == "precious"
    assert os.path.lexists(planted) and not (tmp_path / "a").exists()


def test_names_are_new_each_time_and_long_ones_fit(tmp_path: Path) -> None:
    assert temporary_name(tmp_path / "a") != temporary_name(tmp_path / "a")
    write_json(tmp_path / ("ä" * 125 + ".json"), 1)
    assert len(list(tmp_path.iterdir())) == 1


def save_zip(file: BinaryIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", os.urandom(100_000))


WRITERS: dict[str, Callable[[BinaryIO], object]] = {
    "bytes": lambda file: file.write(bytes(100_000)),
    "few bytes, at the end": lambda file: file.write(b"x"),
    "torch.save": lambda file: torch.save({"w": torch.randn(50_000)}, file),
    "np.savez": lambda file: np.savez(file, a=np.zeros(50_000)),
    "np.save": lambda file: np.save(file, np.zeros(50_000)),
    "zip": save_zip,
    "png": lambda file: Image.effect_noise((200, 200), 50).save(file, "png"),
    "jpeg": lambda file: Image.effect_noise((200, 200), 50).save(file, "jpeg"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """The kernel's own refusal (/dev/full), whatever the library makes of it; the last good file stays."""
    (tmp_path / "a.bin").write_text("good")
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: real("/dev/full" if "tmp" in Path(path).suffix else path, *rest)
    )
    monkeypatch.setattr(files, "_open_new", lambda name, flags: real("/dev/full", os.O_WRONLY))
    with pytest.raises(CannotWrite) as caught, replacing(tmp_path / "a.bin") as file:
        WRITERS[writer](file)
    assert str(caught.value) == f"cannot write {tmp_path / 'a.bin'}: disk full (No space left on device)"
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a.bin").read_text() == "good" and len(list(tmp_path.iterdir())) == 1


def test_other_reasons_and_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"cannot write .*file/a\.json: (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "a.json", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CannotWrite, match="cannot write .*folder: Is a directory"):
        write_json(tmp_path / "folder", 1)
    with pytest.raises(FileNotFoundError, match="source"), replacing(tmp_path / "a"):  # not about the written file
        (tmp_path / "source").read_bytes()
    with pytest.raises(ConnectionError, match="peer"), replacing(tmp_path / "a"):
        raise ConnectionError("peer went away")
    with pytest.raises(CannotWrite, match="cannot write log: disk full"), writing("log"):
        Path("/dev/full").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_second_name_is_the_same_file_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("content")
    (tmp_path / "old").write_text("old")
    second_name(tmp_path / "a", tmp_path / "old")
    second_name(tmp_path / "a", tmp_path / "old")
    assert (tmp_path / "old").samefile(tmp_path / "a")

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    second_name(tmp_path / "a", tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(tmp_path / "a") and (tmp_path / "copy").read_text() == "content"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_there_is_refused(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "a", "--out")
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"a \(--out\) is there already: choose another name, or delete it first"):
        refuse_existing(tmp_path / "a", "--out")


# ------------------------------------------------------------------------------------------------------- locks

LOCKED = """
import sys
from util.files import folder_lock
with folder_lock(sys.argv[1], "--output_dir"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    """A process that holds the lock of `folder` until it is ended."""
    command = [sys.executable, "-c", LOCKED, str(folder)]
    process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_locked_folder_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    """By exit or by kill -9; the message names host and process."""
    for end in (lambda process: process.communicate(timeout=60), lambda process: process.kill()):
        process = holder(tmp_path)
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
    process = holder(tmp_path)
    process.kill()
    process.wait(60)
    code = LOCKED.replace("sys.stdin.read()", "import time; time.sleep(2)")
    several = [in_another_process(code, tmp_path) for _ in range(3)]
    assert sum("ready" in one.communicate(timeout=60)[0] for one in several) == 1


def test_a_lock_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BEAT", 0.01)
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
    monkeypatch.setattr(files, "SILENT", 0.2)
    (tmp_path / LOCK).write_text(json.dumps({"host": "node7 pid:[1]", "pid": 5, "start": "2026-01-01 00:00:00"}))
    who = "process 5 on node7, started 2026-01-01 00:00:00"
    if alive:
        real = time.sleep
        monkeypatch.setattr(files.time, "sleep", lambda seconds: (real(seconds), os.utime(tmp_path / LOCK)))
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


def test_a_file_is_set_aside_under_a_free_name(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "log.jsonl").write_text(text)
        set_aside(tmp_path / "log.jsonl")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log.1.jsonl": "one", "log.2.jsonl": "two"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(CannotWrite, match=LOCK), folder_lock(tmp_path, "--cached_path"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_without_locks_of_the_file_system_the_process_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", unsupported)
    (tmp_path / LOCK).write_text(json.dumps({"host": files._host(), "pid": os.getppid(), "start": "x"}))
    with pytest.raises(ValueError, match=f"process {os.getppid()} "), folder_lock(tmp_path, "--x"):
        pass
    (tmp_path / LOCK).write_text(json.dumps({"host": files._host(), "pid": 2**22 + 1, "start": "x"}))
    with folder_lock(tmp_path, "--x"):
        pass


def test_the_main_process_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dist.on_main(folder_lock(tmp_path, "--x")):
        assert (tmp_path / LOCK).exists()
    monkeypatch.setattr(dist, "is_main", lambda: False)
    with dist.on_main(folder_lock(tmp_path, "--x")):
        assert not (tmp_path / LOCK).exists()


def test_hash_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"two")
    assert file_sha256(tmp_path) == hashlib.sha256(b"aonesub/btwo").hexdigest()
    (tmp_path / "a").rename(tmp_path / "c")
    assert file_sha256(tmp_path) != hashlib.sha256(b"aonesub/btwo").hexdigest()


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a")
    with unchanged(path, None, tmp_path / "absent"):
        path.read_text()
    with pytest.raises(ValueError, match="x was replaced while it was read"), unchanged(path), replacing(path) as file:
        file.write(b"b")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"n": 3, "x": 1, "names": ["a"], "inner": {"y": None}}, None),
        ({"n": True, "x": 1, "names": []}, "n is True, expected a whole number"),
        ({"n": 3, "x": 10**400, "names": []}, "expected a finite number"),
        ({"n": 3, "x": 1, "names": ["a", 5]}, "an entry of names is 5, expected a text"),
        ({"n": 3, "x": 1, "names": [], "inner": {"y": "z"}}, "y is 'z', expected a or null"),
        ({"n": 3, "x": 1}, "it lacks names"),
        ([], r"it is \[\], expected an object"),
    ],
)
def test_schemas(value: object, words: str | None) -> None:
    schema = {"n": int, "x": float, "names": [str], "inner?": {"y": ("a", None)}}
    if words is None:
        check_schema(value, schema)
    else:
        with pytest.raises(ValueError, match=words):
            check_schema(value, schema)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff{}", "no text in UTF-8"),
        (b"[" * 10**5, "nested too deep"),
        (b"[" * 60 + b"]" * 60, "nested too deep"),
        (b"[1" + b"0" * 400 + b"]", "has 401 digits"),
        (b" " * 200, "it has 101 bytes, more than 100"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "x.json", list, **({"largest": 100} if "101" in words else {}))
