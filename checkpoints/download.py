"""The published files: weights from the hub, ADM's ImageNet statistics and its reference batch, with their hashes.

Size and hash are checked; a file appears under its name only when it is complete.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints.hub import SCHEME, RemoteFile, fetch_to, list_files, problem
from checkpoints.transfer import NotListed, Unavailable, by_hand, fetch_url, file_hash, without_password
from util import dist
from util.checkpoint import LAST, SAFE, read_file
from util.files import file_sha256
from util.log import get_logger
from util.options import ArgumentError, option

logger = get_logger()

REPOSITORY = "Epiphqny/TokenBridge"


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
