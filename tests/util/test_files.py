"""util/files.py: the old content or the new, never half of one."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import REPO
from util import files
from util.files import (
    CannotWrite,
    append_json,
    file_sha256,
    refuse_existing,
    replacing,
    second_name,
    set_aside,
    temporary_name,
    unchanged,
    write_json,
    writing,
)
from util.json_reader import read_lines


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
    (live := tmp_path / f".b.{files.host_digest()}.{os.getppid()}.{'0' * 12}.tmp").touch()
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


def test_a_line_is_appended_also_behind_an_incomplete_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_json(path, {"a": 1})
    append_json(path, {"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a": 1}\n{"a"')
    append_json(path, {"a": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]


def test_what_is_there_is_refused(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "a", "--out")
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"a \(--out\) is there already: choose another name, or delete it first"):
        refuse_existing(tmp_path / "a", "--out")


def test_a_file_is_set_aside_under_a_free_name(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "log.jsonl").write_text(text)
        set_aside(tmp_path / "log.jsonl")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log.1.jsonl": "one", "log.2.jsonl": "two"}


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
