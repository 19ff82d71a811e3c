"""Published files: weights from the Hugging Face hub, ADM's ImageNet statistics and its reference batch.

huggingface_hub downloads what the hub has; HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean there. Other addresses
are fetched by `fetch_url`, because pooch cannot resume an interrupted download, and the reference batch has 2 GB. Size
and hash are checked; a file appears under its name only when it is complete.
"""

import hashlib
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, errors, hf_hub_download
from tqdm import tqdm

from util import dist
from util.checkpoint import LAST, SAFE, read_file
from util.files import file_sha256
from util.log import get_logger
from util.options import ArgumentError, option

logger = get_logger()

REPOSITORY = "Epiphqny/TokenBridge"
SCHEME = "hf://"
PARTS_OF_FOLDER = (LAST,), (SAFE, "config.json", "vae.safetensors", "vae.json")  # either, in this order
CHUNK = 1 << 20
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
ADDRESSES = {f"{name}_url": file.url for name, file in PUBLISHED.items() if file.url}  # the flags' defaults
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
        for name in ADDRESSES:
            url = getattr(self, name)
            if url is not None and not url.startswith(("http://", "https://")):
                raise ArgumentError(name, f"{name} must begin with http:// or https://, got {url!r}")

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


def unreachable(error: Exception, what: str, where: str) -> Unavailable:
    """The error to show when a server cannot give a file: what to put where by hand."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    endpoint = "" if what.startswith("http") else os.environ.get("HF_ENDPOINT", "")
    source = f"{what} from HF_ENDPOINT {endpoint}" if endpoint else what
    advice = f"Without a connection, download it on another machine and put it at {where}"
    return Unavailable(f"cannot get {source} ({type(error).__name__}: {reason}). {advice}")


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
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{source}: the file name {name!r} is refused, it points out of its folder")
    return name


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot reach or find something, in all versions that we allow."""
    kinds = [OSError, errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError]
    modules = [sys.modules[name] for name in ("httpx2", "httpx", "requests") if name in sys.modules]
    names = ("HTTPError", "RequestException", "InvalidURL")
    return (*kinds, *(getattr(module, name) for module in modules for name in names if hasattr(module, name)))


def interruptions() -> tuple[type[Exception], ...]:
    """What huggingface_hub 0.27 to 1.0 raises when a connection ends within a file; 2.4 resumes by itself."""
    names = {"requests.exceptions": "ChunkedEncodingError", "httpx": "RemoteProtocolError"}
    return tuple(getattr(sys.modules[library], name) for library, name in names.items() if library in sys.modules)


def list_files(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """All files of a hub repository with size and hash, at the commit that `revision` means now."""
    info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repository, revision=revision, files_metadata=True)
    commit, files = info.sha or revision or "main", []
    for entry in info.siblings or []:
        lfs = entry.lfs or {}
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        name = safe_name(entry.rfilename, f"{SCHEME}{repository}")
        files.append(RemoteFile(name, entry.size, sha256 or entry.blob_id, commit))
    return files


def fetch(repository: str, remote: RemoteFile, local_dir: Path | None = None) -> Path:
    """The file in `local_dir`, or in huggingface_hub's cache, downloaded or resumed if need be.

    ValueError if size or hash are wrong; the file is then deleted.
    """
    endpoint = os.environ.get("HF_ENDPOINT")
    download = partial(hf_hub_download, revision=remote.revision, endpoint=endpoint, local_dir=local_dir)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = Path(download(repository, remote.name))
            break
        except interruptions():
            if attempt == ATTEMPTS:
                raise
    wrong = problem(path, remote)
    if wrong:
        path.resolve().unlink()  # or the cache would return it again
        path.unlink(missing_ok=True)
        raise ValueError(f"{remote.name} of {SCHEME}{repository} {wrong}; it was deleted, run the same command again")
    return path


def fetch_to(target: Path, repository: str, remote: RemoteFile) -> None:
    """Download a hub's file to `target`, by way of a folder beside it, which an interrupted download leaves."""
    folder = target.parent / f".{target.name}.download"
    try:
        path = fetch(repository, remote, folder)
    except ValueError:
        shutil.rmtree(folder)
        raise
    os.replace(path, target)
    shutil.rmtree(folder)


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
    repository, revision, inside = match[1], match[2], (match[3] or "").rstrip("/")
    try:
        files = {file.name: file for file in list_files(repository, revision)}
        if inside in files:
            return str(fetch(repository, files[inside]))
        prefix = f"{inside}/" if inside else ""
        for parts in PARTS_OF_FOLDER:
            if prefix + parts[0] in files:
                paths = [fetch(repository, files[prefix + part]) for part in parts if prefix + part in files]
                return str(paths[0].parent)
    except ValueError:
        raise
    except hub_errors() as error:
        raise unreachable(error, named, f"any path, and give that path{f' with {flag}' if flag else ''}") from error
    kinds = " or ".join(parts[0] for parts in PARTS_OF_FOLDER)
    some = ", ".join(sorted(files)[:8])
    raise ValueError(f"{named}: no such file, nor a folder with {kinds}; the repository has {some}")


def fetch_url(url: str, target: Path, check: Callable[[Path], None]) -> None:
    """Download `url` to `target`, resuming target.part if it is there.

    check(part) raises ValueError for another file, which is deleted. OSError if the download stays incomplete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            start = start if answer.status == 206 else 0  # else the server sends the file from its beginning
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=target.name)
            with part.open("ab" if start else "wb") as file, bar:
                while block := answer.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send, or .part is longer than the file
            part.unlink(missing_ok=True)
        raise
    size = part.stat().st_size
    if total is not None and size != total:
        advice = "run the same command again to continue"
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes; {advice}")
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}; what came was deleted") from error
    os.replace(part, target)


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
        print(f"{name}: would fetch {url} to {target}")
        return
    try:
        fetch_url(url, target, lambda part: check_content(name, part, expected, check))
    except OSError as error:
        raise unreachable(error, url, str(target)) from error
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
            except hub_errors() as error:
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
        raise ValueError(message) if found else Unavailable(message)


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
    except (ValueError, Unavailable):
        raise
    except hub_errors() as error:
        raise unreachable(error, f"{name} of {repository.name}", str(target)) from error


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
        print(f"{name}: {absent}; trying {url}")
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
