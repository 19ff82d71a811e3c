"""Files over HTTP: resumable, under their name only when complete and checked; errors in one line without passwords."""

import base64
import fcntl
import hashlib
import http.client
import os
import re
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from util.files import NOFOLLOW, CannotWrite, file_sha256, writing
from util.log import first_line

CHUNK = 1 << 20


class Unavailable(OSError):
    """The server cannot be reached, or does not have the file."""


class NotListed(Unavailable):
    """The server does not have the file."""


class Incomplete(Unavailable):
    """The connection ended before the file did; another attempt resumes it."""


def without_password(text: str) -> str:
    """A text whose URLs have no user and password."""
    return re.sub(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s?#]*@", r"\1", text)


def unavailable(error: Exception) -> Unavailable:
    """Why a server did not give something, in one line."""
    if isinstance(error, http.client.InvalidURL):  # its text may repeat a password
        return Unavailable("the address is not valid")
    return Unavailable(without_password(f"{type(error).__name__}: {first_line(error)}"))


def by_hand(error: Exception, what: str, where: str, hub: bool = False) -> Unavailable:
    """The error to show in the end: what to put where by hand. hub: the hub was asked, where HF_ENDPOINT says."""
    endpoint = os.environ.get("HF_ENDPOINT", "") if hub else ""
    asked = f" from HF_ENDPOINT {endpoint}" if endpoint else ""
    advice = f"Without a connection, download it on another machine and put it at {where}"
    return Unavailable(without_password(f"cannot get {what}{asked} ({first_line(error)}). {advice}"))


def file_hash(path: str | Path, like: str) -> str:
    """The hash of a file in the kind of `like`: 64 hexadecimal digits are SHA-256, 40 git's SHA-1 of a blob."""
    if len(like) != 40:
        return file_sha256(path)
    digest = hashlib.sha1(f"blob {Path(path).stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; what identifies the user is not sent to another host."""

    def redirect_request(
        self,
        request: urllib.request.Request,
        file: BinaryIO,
        code: int,
        message: str,
        headers: http.client.HTTPMessage,
        url: str,
    ) -> urllib.request.Request | None:
        following = super().redirect_request(request, file, code, message, headers, url)
        if following is not None and urllib.parse.urlsplit(url)[:2] != urllib.parse.urlsplit(request.full_url)[:2]:
            following.remove_header("Authorization")
        return following


def open_url(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """The answer to GET. user:password in the URL is sent as HTTP's basic authentication."""
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    if user:
        credentials = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        headers = {"Authorization": f"Basic {credentials}"} | headers
        url = parts._replace(netloc=host).geturl()
    if not host or re.search(r"[\s\0-\x1f]", url):
        raise http.client.InvalidURL("the address is not valid")
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(_Redirects).open(request, timeout=30)


def open_part(path: Path) -> BinaryIO:
    """The unfinished download at `path`, to be continued by this process alone. CannotWrite for a link and the like."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW | os.O_NONBLOCK, 0o666), "r+b")
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CannotWrite(path, OSError("it is not a regular file"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise CannotWrite(path, OSError("another process is downloading it; wait for it")) from None
        except OSError:  # a file system without locks
            pass
    except CannotWrite:
        file.close()
        raise
    return file


def fetch_url(url: str, target: Path, check: Callable[[Path], None], headers: dict[str, str] | None = None) -> None:
    """Download `url` to `target`, resuming target.part if it is there; check(part) raises ValueError for another file,
    which is deleted.

    Unavailable if the server does not give it, Incomplete if the connection ends too early; CannotWrite.
    """
    part = target.with_name(target.name + ".part")
    with open_part(part) as file:
        try:
            receive(url, file, headers or {}, target)
        except Exception as error:
            nothing_left = isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 416
            if nothing_left or not os.fstat(file.fileno()).st_size:  # 416: or .part is longer than the file
                part.unlink(missing_ok=True)
            raise
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{without_password(url)}: {error}; what came was deleted") from error
    with writing(target):
        os.replace(part, target)


def receive(url: str, file: BinaryIO, headers: dict[str, str], target: Path) -> None:
    """Append what `file` lacks of `url`. Unavailable, Incomplete or CannotWrite (of `target`)."""
    have, total = os.fstat(file.fileno()).st_size, None
    range_header = {"Range": f"bytes={have}-"} if have else {}
    try:
        with open_url(url, headers | range_header) as answer:
            if have and answer.status != 206:  # the server sends it from the start
                have = 0
            left = answer.headers.get("Content-Length") or ""
            total = have + int(left) if left.isdecimal() else None
            file.seek(have), file.truncate()
            copy_blocks(answer, file, total, have, target)
    except CannotWrite:
        raise
    except (http.client.IncompleteRead, ConnectionError, TimeoutError) as error:
        if file.tell() > have:
            raise incomplete(file.tell(), total) from error
        raise unavailable(error) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise unavailable(error) from error
    if total is not None and file.tell() != total:
        raise incomplete(file.tell(), total)


def incomplete(have: int, total: int | None) -> Incomplete:
    """The error for a download that ended too early."""
    of = "" if total is None else f" of {total:,}"
    return Incomplete(f"the connection ended after {have:,}{of} bytes; run the same command again to continue")


def copy_blocks(answer: http.client.HTTPResponse, file: BinaryIO, total: int | None, have: int, target: Path) -> None:
    """The answer's content to the file, with a progress bar. CannotWrite for the file's errors."""
    with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=target.name) as bar:
        try:
            while block := answer.read(CHUNK):
                with writing(target):
                    file.write(block)
                bar.update(len(block))
        finally:
            with writing(target):
                file.flush()
