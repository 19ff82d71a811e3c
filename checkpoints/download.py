"""Published files: weights from the Hugging Face hub, ADM's ImageNet statistics and its reference batch.

huggingface_hub lists what the hub has; HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean there. Files are fetched
by `fetch_url`: hf_hub_download makes paths of the server's headers, and pooch cannot resume an interrupted download,
and the reference batch has 2 GB. Size and hash are checked; a file appears under its name only when it is complete.
"""

import base64
import fcntl
import hashlib
import http.client
import os
import re
import stat
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from util import dist
from util.checkpoint import LAST, SAFE, read_file
from util.files import NOFOLLOW, CannotWrite, file_sha256, second_name, temporary_name, writing
from util.log import first_line, get_logger
from util.options import ArgumentError, option

logger = get_logger()

REPOSITORY = "Epiphqny/TokenBridge"
SCHEME = "hf://"
PARTS_OF_FOLDER = (LAST,), (SAFE, "config.json", "vae.safetensors", "vae.json")  # either, in this order
CHUNK = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ATTEMPTS = 6  # at one file of the hub, each of which resumes the one before


@dataclass(frozen=True)
class Published:
    """A published file: where the commands look for it, and where it can be had.

    pattern: how it is recognised among the files of the hub's repository, "" if it is not there. url: its own address;
    of the VAE, a second one. git_blob: git's hash of its content, where one is known.
    """

    target: str
    pattern: str = ""
    url: str = ""
    git_blob: str | None = None


PUBLISHED = {
    "vae": Published(
        "pretrained_models/vae/kl16.ckpt",
        r"(^|/)kl16\.ckpt$",
        "https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
    ),
    "large": Published(f"pretrained_models/tokenbridge/tokenbridge_large/{LAST}", r"large[^/]*(/[^/]*)?\.pth$"),
    "huge": Published(f"pretrained_models/tokenbridge/tokenbridge_huge/{LAST}", r"huge[^/]*(/[^/]*)?\.pth$"),
    "stats": Published(
        "fid_stats/adm_in256_stats.npz",
        url="https://github.com/LTH14/mar/raw/main/fid_stats/adm_in256_stats.npz",
        git_blob="1da4c17607fe959d54999fd098105649a0c05e15",
    ),
    "adm_batch": Published(
        "fid_stats/VIRTUAL_imagenet256_labeled.npz",
        url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
        "ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
    ),
}
ADDRESSES = tuple(name for name, file in PUBLISHED.items() if file.url)
PUBLISHED_SIZE = 256  # pixels of the images that the published files are about
PRECISION_RECALL_HINT = (
    "precision, recall and KID need images or their features: python -m tools.download adm_batch fetches ADM's "
    f"reference batch, --pr_reference {PUBLISHED['adm_batch'].target} takes it"
)
Check = Callable[[str, Path], None]  # name in PUBLISHED, file; ValueError if it is another file


@dataclass(frozen=True)
class DownloadOptions:
    """Where published files come from and go to. ArgumentError for values that cannot be meant."""

    root: str = option(".", "folder under which pretrained_models/ and fid_stats/ are made")
    repository: str = option(REPOSITORY, "hub repository of the weights")
    revision: str | None = option(None, "its branch, tag or commit")
    file: str = option("", "name of the file in the repository, where the name does not say which one is meant")
    vae_url: str | None = option(None, "where the VAE is if the hub lacks it")
    stats_url: str | None = option(None, "where adm_in256_stats.npz is")
    adm_batch_url: str | None = option(None, "where VIRTUAL_imagenet256_labeled.npz is")
    sha256: str | None = option(None, "SHA-256 of other statistics than the published ones, whose hash is known here")
    dry_run: bool = option(False, "say what would be fetched, and how much; write nothing")

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ArgumentError("sha256", f"sha256 must be 64 hexadecimal digits, got {self.sha256!r}")
        for name in (f"{name}_url" for name in ADDRESSES):
            url = getattr(self, name)
            if url is not None and not url.startswith(("http://", "https://")):
                raise ArgumentError(
                    name, f"{name} must begin with http:// or https://, got {without_password(repr(url))}"
                )

    def target(self, name: str) -> Path:
        """Where the file of that name in PUBLISHED goes."""
        return Path(self.root) / PUBLISHED[name].target

    def url(self, name: str) -> str:
        """Its own address, "" if it has none."""
        return getattr(self, f"{name}_url", None) or PUBLISHED[name].url

    def check_names(self, names: Sequence[str]) -> None:
        """ArgumentError if an option does not go with the files that are wanted."""
        weights = [name for name in names if PUBLISHED[name].pattern]
        if self.file and len(weights) != 1:
            message = f"file names one file, but {len(weights)} are wanted: {', '.join(weights)}"
            raise ArgumentError("file", message)
        if self.sha256 is not None and "stats" not in names:
            reason = "which are not wanted; the hub itself says the hashes of the weights"
            raise ArgumentError("sha256", f"sha256 is the hash of the statistics, {reason}")


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


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository at one commit. hash: SHA-256 of a large file, git's blob SHA-1 of a small one."""

    name: str
    size: int | None
    hash: str | None
    revision: str


def file_hash(path: str | Path, like: str) -> str:
    """The hash of a file in the kind of `like`: 64 hexadecimal digits are SHA-256, 40 git's SHA-1 of a blob."""
    if len(like) != 40:
        return file_sha256(path)
    digest = hashlib.sha1(f"blob {Path(path).stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def problem(path: Path, remote: RemoteFile) -> str | None:
    """What is wrong with a local copy, None if size and hash are the hub's."""
    if remote.size is not None and path.stat().st_size != remote.size:
        return f"has {path.stat().st_size:,} bytes, the hub says {remote.size:,}"
    if remote.hash and file_hash(path, remote.hash) != remote.hash:
        return f"has another hash than the hub says ({remote.hash[:12]}...)"
    return None


def safe_name(name: str, source: str) -> str:
    """A file name of a remote list; ValueError if following it could leave the folder that it belongs to."""
    parts = PurePosixPath(name).parts
    odd = not name.isprintable() or name.startswith("/") or "\\" in name
    if odd or not parts or ".." in parts or ":" in parts[0]:
        raise ValueError(f"{source}: the file name {name!r} is refused, it points out of its folder")
    return name


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot reach or find something, in all versions that we allow."""
    kinds = [OSError, errors.HFValidationError, errors.HfHubHTTPError]
    modules = [sys.modules[name] for name in ("httpx2", "httpx", "requests") if name in sys.modules]
    names = ("HTTPError", "RequestException", "InvalidURL")
    return (*kinds, *(getattr(module, name) for module in modules for name in names if hasattr(module, name)))


def list_files(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """All files of a hub repository with size and hash, at the commit that `revision` means now.

    ValueError for a repository name that cannot be one, or names and hashes that must not become paths; Unavailable
    if the hub does not answer, or with something else than a list of files.
    """
    where, named = os.environ.get("HF_ENDPOINT"), f"{SCHEME}{repository}"
    try:
        info = HfApi(endpoint=where).model_info(repository, revision=revision, files_metadata=True)
        listed = [(str(entry.rfilename), entry.size, _listed_hash(entry)) for entry in info.siblings or []]
        commit = str(info.sha)
    except errors.HFValidationError as error:
        raise ValueError(f"{named} is no repository of the hub: {first_line(error)}") from error
    except hub_errors() as error:
        raise unavailable(error) from error
    except Exception as error:  # an answer that is none of the hub's
        why = f"the answer is not the hub's list of files ({type(error).__name__})"
        raise Unavailable(f"{why}; is a login page or proxy in between?") from error
    if not COMMIT.fullmatch(commit):
        raise ValueError(
            f"{named}: the hub names a commit {commit[:60]!r}, which is not 40 hexadecimal digits; refused"
        )
    wrong = next((value for _, _, value in listed if value is not None and not HASH.fullmatch(value)), None)
    if wrong is not None:
        raise ValueError(f"{named}: the hub names a hash {wrong[:60]!r}, which is none; refused")
    return [RemoteFile(safe_name(name, named), size, value, commit) for name, size, value in listed]


def _listed_hash(entry: object) -> str | None:
    """The SHA-256 of a large file, the git hash of a small one, None where the hub says neither."""
    lfs = entry.lfs or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    value = sha256 or entry.blob_id
    return None if value is None else str(value)


def fetch(repository: str, remote: RemoteFile) -> Path:
    """The file in the cache of huggingface_hub (its layout), downloaded or resumed if need be, and checked.

    Nothing that the server says becomes part of a path unchecked: the commit and the hash are hexadecimal, the name
    stays inside its folder. ValueError if size or hash are wrong, OSError if the file cannot be had.
    """
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    named = inside(folder / "snapshots" / remote.revision / remote.name, folder / "snapshots")
    unnamed = hashlib.sha256(f"{remote.revision}/{remote.name}".encode()).hexdigest()
    blob = inside(folder / "blobs" / (remote.hash or unnamed), folder / "blobs")
    if not blob.is_file() or problem(blob, remote):
        fetch_to(blob, repository, remote)
    if not (named.exists() and named.samefile(blob)):
        link_to(blob, named)
    return named


def fetch_to(target: Path, repository: str, remote: RemoteFile) -> None:
    """Download a hub's file to `target`. ValueError if size or hash are wrong."""
    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(repository, remote.name, revision=remote.revision, endpoint=endpoint)

    def check(part: Path) -> None:
        if wrong := problem(part, remote):
            raise ValueError(f"{remote.name} of {SCHEME}{repository} {wrong}")

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch_url(url, target, check, build_hf_headers())
        except Incomplete:
            if attempt == ATTEMPTS:
                raise
    return None


def link_to(blob: Path, named: Path) -> None:
    """Let `named` be a symbolic link to `blob`, as huggingface_hub has it; a hard link or copy where there are none."""
    temporary = temporary_name(named)
    with writing(named):
        named.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(os.path.relpath(blob, named.parent), temporary)
        except OSError:
            return second_name(blob, named)
        os.replace(temporary, named)


def inside(path: Path, folder: Path) -> Path:
    """`path`; ValueError if it is outside `folder`, links followed (of the path's folder, as files are replaced)."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is refused, it leads out of {folder}")
    return path


def local_path(path: str, flag: str = "") -> str:
    """`path`, or for hf://OWNER/REPOSITORY[@REVISION]/PATH the local path of that file or checkpoint folder, fetched.

    ValueError for an address that is none, OSError that says what to do if it cannot be had.
    """
    if not str(path).startswith(SCHEME):
        return path
    named = f"{path} ({flag})" if flag else str(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.*))?", str(path)[len(SCHEME) :])
    if not match or ".." in PurePosixPath(str(path)).parts:
        form = "hf://OWNER/REPOSITORY/PATH, with @REVISION after the repository if need be"
        raise ValueError(f"{named} is no address on the hub: {form}")
    repository, revision, below = match[1], match[2], (match[3] or "").rstrip("/")
    try:
        files = {file.name: file for file in list_files(repository, revision)}
        if below in files:
            return str(fetch(repository, files[below]))
        prefix = f"{below}/" if below else ""
        for parts in PARTS_OF_FOLDER:
            if prefix + parts[0] in files:
                paths = [fetch(repository, files[prefix + part]) for part in parts if prefix + part in files]
                return str(paths[0].parent)
    except Unavailable as error:
        where = f"any path, and give that path{f' with {flag}' if flag else ''}"
        raise by_hand(error, named, where, hub=True) from error
    kinds = " or ".join(parts[0] for parts in PARTS_OF_FOLDER)
    some = ", ".join(sorted(files)[:8])
    raise ValueError(f"{named}: no such file, nor a folder with {kinds}; the repository has {some}")


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


def check_content(name: str, path: Path, expected: str | None, check: Check | None = None) -> None:
    """ValueError unless the file can be the published one: by its hash, if one is expected, and by its content.

    check: of the statistics and the reference batch.
    """
    found = file_hash(path, expected) if expected else None
    if found != expected:
        kind = "SHA-256" if len(expected) == 64 else "git blob"
        own = f"--sha256 names that of a file of your own (this one's is {file_sha256(path)})"
        raise ValueError(f"{path} has another hash than expected, {kind} {found} instead of {expected}; {own}")
    if name == "vae" and not isinstance(read_file(path, mmap=True).get("model"), dict):
        raise ValueError(f'{path} holds no VAE: it has no weights under "model"')
    if name != "vae" and check is not None:
        check(name, path)


def fetch_address(name: str, options: DownloadOptions, check: Check | None = None) -> None:
    """Fetch a file that has an address of its own, unless it is there."""
    url, target = options.url(name), options.target(name)
    expected = options.sha256 if name == "stats" and options.sha256 else PUBLISHED[name].git_blob
    if target.is_file():
        try:
            check_content(name, target, expected, check)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to fetch it again") from error
        print(f"{name}: {target} is there and right")
        return
    if options.dry_run:
        print(f"{name}: would fetch {without_password(url)} to {target}")
        return
    try:
        fetch_url(url, target, lambda part: check_content(name, part, expected, check))
    except Unavailable as error:
        raise by_hand(error, url, str(target)) from error
    state = "hash is right" if expected else f"no hash is published, SHA-256 {file_sha256(target)}"
    print(f"{name}: wrote {target}, {state}")


class Repository:
    """The list of a hub repository's files, requested once; an error is raised again each time."""

    def __init__(self, options: DownloadOptions):
        self.name, self.revision = options.repository, options.revision
        self.answer: list[RemoteFile] | Exception | None = None

    def choose(self, name: str, pattern: str) -> RemoteFile:
        """The one file that matches; Unavailable if none does, ValueError if several do, both listing what there is."""
        if self.answer is None:
            try:
                self.answer = list_files(self.name, self.revision)
            except (ValueError, OSError) as error:
                self.answer = error
        if isinstance(self.answer, Exception):
            raise self.answer
        found = [file for file in self.answer if re.search(pattern, file.name)]
        if len(found) == 1:
            return found[0]
        some = ", ".join(file.name for file in found or self.answer[:12])
        message = (
            f"{SCHEME}{self.name} has {len(found) or 'no'} files that could be {name}: {some}; name it with --file"
        )
        raise ValueError(message) if found else NotListed(message)


def fetch_from_hub(name: str, repository: Repository, options: DownloadOptions) -> None:
    """Fetch weights from the hub, unless they are there and right. Unavailable if the hub cannot give them."""
    target, source = options.target(name), f"{SCHEME}{repository.name}"
    try:
        remote = repository.choose(name, f"^{re.escape(options.file)}$" if options.file else PUBLISHED[name].pattern)
        size = "?" if remote.size is None else f"{remote.size / 1e6:,.1f} MB"
        if target.is_file() and not problem(target, remote):
            print(f"{name}: {target} is there and right ({size})")
        elif options.dry_run:
            print(f"{name}: would fetch {source}/{remote.name} ({size}) to {target}")
        else:
            print(f"{name}: {source}/{remote.name} ({size})", flush=True)
            fetch_to(target, repository.name, remote)
            state = f"hash {remote.hash[:12]}... is right" if remote.hash else "the hub gives no hash"
            print(f"{name}: wrote {target}, {state}")
    except NotListed:
        raise
    except Unavailable as error:
        raise by_hand(error, f"{name} of {repository.name}", str(target), hub=True) from error


def fetch_published(name: str, repository: Repository, options: DownloadOptions, check: Check | None = None) -> None:
    """Fetch one published file. ValueError or OSError, with what to do, if it cannot be had."""
    if not PUBLISHED[name].pattern:
        return fetch_address(name, options, check)
    try:
        return fetch_from_hub(name, repository, options)
    except Unavailable as absent:
        target, url = options.target(name), options.url(name)
        if target.is_file():
            print(f"{name}: {target} is there, and could not be compared with the hub's ({absent})")
            return None
        another = (options.repository, options.revision, options.file) != (REPOSITORY, None, "")
        if not url or another:  # another repository's VAE is another VAE
            raise
        print(f"{name}: {absent}; trying {without_password(url)}")
        try:
            return fetch_address(name, options)
        except (ValueError, OSError) as error:
            raise OSError(f"{absent}; nor from its second address: {error}") from error


def fetch_all(names: Sequence[str], options: DownloadOptions, check: Check | None = None) -> None:
    """Fetch all of the names that can be had.

    The error of a single one, or an OSError that names all that could not.
    """
    repository, failed = Repository(options), {}
    for name in names:
        try:
            fetch_published(name, repository, options, check)
        except (ValueError, OSError) as error:
            failed[name] = error
            if len(names) > 1:
                print(f"{name}: not fetched: {error}")
    if len(names) == 1 and failed:
        raise failed[names[0]]
    if failed:
        reasons = "; ".join(f"{name} ({error})" for name, error in failed.items())
        raise OSError(f"{len(failed)} of {len(names)} files could not be fetched: {reasons}")


def published_name(path: str | Path) -> str | None:
    """Which published file a path means (the file itself, or the folder of a checkpoint), None if none."""
    paths = {os.path.abspath(path), os.path.abspath(Path(path) / LAST)}
    return next((name for name, file in PUBLISHED.items() if os.path.abspath(file.target) in paths), None)


def provide(path: str | Path, flag: str, no_download: bool = False, check: Check | None = None) -> None:
    """Fetch the published file that `path` means if it is missing; nothing for any other path.

    Every process must call it: rank 0 downloads, then one process of each machine on whose disk the file is still
    missing; the others wait. FileNotFoundError that names the command to fetch it with `no_download`; ValueError or
    OSError on every process if it cannot be had.
    """
    name = published_name(path)
    if name is None:
        return
    target = Path(PUBLISHED[name].target)

    def missing() -> bool:
        return not target.is_file() and not target.with_name(SAFE).is_file()  # a checkpoint's folder may hold either

    if no_download:
        hint = f"no {target} ({flag}), and --no_download is given: python -m tools.download {name} fetches it"
        dist.agree(FileNotFoundError(hint) if missing() else None)
        return
    for downloads in (dist.is_main(), int(os.environ.get("LOCAL_RANK", "0")) == 0):
        error = None
        if downloads and missing():
            logger.info("%s (%s) is missing: fetching it; --no_download refuses instead", target, flag)
            try:
                fetch_all([name], DownloadOptions(), check)
            except (ValueError, OSError) as caught:
                error = caught
        dist.agree(error)
