"""Writing files so that a kill leaves the old content or the new, never half of one."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from util.json_reader import read_json

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
LONGEST_NAME = 200  # bytes of a file's name that its temporary name repeats
TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{12}\.tmp", re.DOTALL)
FULL = (errno.ENOSPC, errno.EDQUOT)


class CannotWrite(OSError):
    """A file that could not be written; the message is one line that names it. `errno` is that of the cause."""

    def __init__(self, path: str | Path, error: OSError):
        super().__init__(f"cannot write {path}: {os_reason(error)}")
        self.path, self.errno = Path(path), error.errno


def os_reason(error: OSError) -> str:
    """Why the system refused something, without the path; "disk full" if that is the reason."""
    why = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return f"disk full ({why})" if error.errno in FULL else why


def plain_reason(error: Exception) -> str:
    """The first line of an error of a file reader; numpy's advice to load a file unsafely is left out."""
    if "pickle" in str(error):
        return "it is no archive of arrays, or holds Python objects, which are never loaded"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_new(name: str, flags: int) -> int:
    return os.open(name, flags | NOFOLLOW, 0o666)


class _File(io.FileIO):
    """A new file, never one that is there nor the target of a link. Keeps the error of a write that failed.

    torch.save and others raise errors of their own after a failed write, which do not say what happened.
    """

    def __init__(self, path: Path):
        self.failure: OSError | None = None
        super().__init__(path, "x", opener=_open_new)

    def write(self, data: object) -> int:
        """As FileIO.write."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise

    def why(self, error: Exception) -> OSError | None:
        """The OSError that kept the content from the disk, None if `error` has another reason."""
        if self.failure is not None:
            return self.failure
        if not isinstance(error, OSError) or isinstance(error, (CannotWrite, ConnectionError, TimeoutError)):
            return None
        if error.errno is not None:
            return error if error.filename in (None, self.name, str(self.name)) else None
        try:  # numpy and Pillow write past Python, and drop the reason: see whether the disk takes anything
            number = os.open(self.name, os.O_WRONLY | os.O_APPEND | NOFOLLOW)
            try:
                os.write(number, bytes(2**16))
            finally:
                os.close(number)
        except OSError as found:
            return found
        return None


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` (its folder is made) when the block ends without an error.

    Until then it has a name of its own beside `path` (`temporary_name`), which is removed if the block fails. What
    killed writers left in the folder is removed when a process first writes there. CannotWrite if the disk is full, or
    the file cannot be written for another reason; `path` stays as it was.
    sync: on the disk (fsync) before it is renamed, for files that must survive a power cut.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_once(path.parent.resolve())
        raw = _File(temporary)
    except OSError as error:
        raise CannotWrite(path, error) from error
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except Exception as error:
        if (reason := raw.why(error)) is not None:
            raise CannotWrite(path, reason) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around writes to an open file at `path`: CannotWrite, which names it, instead of a bare OSError."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(path, error) from error


def temporary_name(path: Path) -> Path:
    """A new name beside `path`: .NAME.HOST.PID.RANDOM.tmp, by which others see whose it is (`remove_leftovers`)."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{host_digest()}.{os.getpid()}.{secrets.token_hex(6)}.tmp")


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove the temporary files in `folder` of processes of this machine that are no longer alive.

    names: files that only this process writes now, whose temporary name was .NAME.tmp in earlier versions.
    """
    try:
        listed = os.listdir(folder)
    except OSError:
        return
    for name in listed:
        match = TEMPORARY.fullmatch(name)
        dead = match and match["host"] == host_digest() and not is_alive(int(match["pid"]))
        if dead or name in [f".{one}.tmp" for one in names]:
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.lstat(folder / name).st_mode):
                    os.unlink(folder / name)


@functools.cache
def _clean_once(folder: Path) -> None:
    remove_leftovers(folder)


def host_name() -> str:
    """This machine, and the namespace in which process numbers mean something (containers may share a host's name)."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def host_digest() -> str:
    """Eight hexadecimal digits of `host_name`, for temporary names."""
    return hashlib.sha256(host_name().encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, OSError):
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk: a rename survives a power cut only after that. Nothing where
    folders cannot be opened.
    """
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(number)


def second_name(path: Path, name: Path) -> None:
    """Let `name` be the file `path` too, atomically: a hard link, or a copy where the file system has none."""
    name.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(name)
    try:
        os.link(path, temporary)
    except OSError:
        with replacing(name, sync=True) as file, path.open("rb") as source:
            while block := source.read(2**22):
                file.write(block)
        return
    try:
        with writing(name):
            os.replace(temporary, name)
        sync_folder(name.parent)
    finally:
        temporary.unlink(missing_ok=True)  # still there if both names were one file before


def set_aside(path: Path) -> Path:
    """Rename a file that is another run's to the first free of NAME.1.EXT, NAME.2.EXT, ...; the new path."""
    aside = next(new for n in range(1, 10**6) if not os.path.lexists(new := path.with_suffix(f".{n}{path.suffix}")))
    os.rename(path, aside)
    return aside


def write_json(path: str | Path, content: object) -> None:
    """`content` as indented JSON, on the disk before it replaces `path`."""
    with replacing(path, sync=True) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def append_json(path: str | Path, content: object) -> None:
    """`content` as the last line of a .jsonl file, also after a line that a full disk or a kill left incomplete."""
    with writing(path), Path(path).open("ab+") as file:
        line = json.dumps(content).encode() + b"\n"
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def refuse_existing(path: str | Path, flag: str, advice: str = "choose another name, or delete it first") -> None:
    """FileExistsError if there is something at `path`: a command writes a file of its own only under a new name."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} ({flag}) is there already: {advice}")


@contextlib.contextmanager
def unchanged(*paths: str | Path | None) -> Iterator[None]:
    """Around reading files and hashing them: ValueError if one was replaced or written to meanwhile."""

    def states() -> dict[str, tuple[int, ...]]:
        found = {str(path): os.stat(path) for path in paths if path and os.path.isfile(path)}
        return {path: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}

    before = states()
    yield
    changed = [path for path, state in states().items() if state != before.get(path)]
    if changed:
        raise ValueError(f"{changed[0]} was replaced while it was read: run the command again when it is complete")


def refuse_others(paths: Iterable[Path], record: Path, flag: str) -> None:
    """ValueError, before any work, for a file that a command would replace and did not write, by `record_own`."""
    try:
        own = read_json(record)
    except (OSError, ValueError):
        own = {}
    for path in paths:
        if os.path.lexists(path) and not (path.is_file() and own.get(path.name) == file_sha256(path)):
            what = "was not written by this command, or changed since, and would be replaced"
            raise ValueError(f"{path} ({flag}) {what}: choose another folder, or move it away")


def record_own(paths: Iterable[Path], record: Path) -> None:
    """Write the hashes of the files to `record`: this command may replace them."""
    write_json(record, {path.name: file_sha256(path) for path in paths if path.is_file()})


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as sha256sum prints it; of a folder, over its files' names and contents."""
    path, digest = Path(path), hashlib.sha256()
    for one in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if one != path:
            digest.update(str(one.relative_to(path)).encode())
        with one.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()
