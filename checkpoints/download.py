"""Fetch what is published: weights from the Hugging Face hub, ADM's ImageNet statistics and its reference batch.

  python -m tools.download vae|large|huge|stats|adm_batch|all [--dry_run]

Files go where the published commands look for them, pretrained_models/... and fid_stats/. What cannot be fetched does
not stop the rest: it is reported at the end, with exit status 2. Downloads resume; size and hash are checked; a file
appears under its name only when it is complete. HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean to
huggingface_hub.

stats are ADM's mu and sigma, for FID. adm_batch is ADM's reference batch (2 GB): the same kind of statistics, those of
sFID, and 10,000 images, which precision and recall need.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from util import dist
from util.cli import make_parser
from util.files import replacing
from util.log import get_logger, run_cli

logger = get_logger()

REPOSITORY = "Epiphqny/TokenBridge"
SCHEME = "hf://"
# either, in this order
PARTS_OF_FOLDER = ("checkpoint-last.pth",), ("model.safetensors", "config.json", "vae.safetensors", "vae.json")
CHUNK = 1 << 20
ATTEMPTS = 6  # at one file, each of which continues the one before


@dataclass(frozen=True)
class Published:
    """A published file: where the commands look for it, and where it can be had.

    pattern: how it is recognised among the files of the hub's repository, "" if it is not there. url: its own address;
    of the VAE, where to turn if the hub lacks it. git_blob: git's hash of its content, where one is known.
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
    "large": Published(
        "pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth", r"large[^/]*(/[^/]*)?\.pth$"
    ),
    "huge": Published(
        "pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth", r"huge[^/]*(/[^/]*)?\.pth$"
    ),
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
PUBLISHED_SIZE = 256  # pixels of the images that the published files are about
PRECISION_RECALL_HINT = (
    "precision, recall and KID need images or their features: python -m tools.download adm_batch fetches ADM's "
    f"reference batch, --pr_reference {PUBLISHED['adm_batch'].target} takes it"
)


class Unavailable(OSError):
    """The server cannot be reached, or does not have the file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository at one commit. hash: SHA-256 of a large file, git's blob SHA-1 of a small one."""

    name: str
    size: int | None
    hash: str | None
    revision: str


# ------------------------------------------------------------------------------------------------------------- checks


def file_hash(path: str | Path, like: str) -> str:
    """The hash of a file in the kind of `like`: 64 hexadecimal digits are SHA-256, 40 git's SHA-1 of a blob."""
    digest = hashlib.sha256()
    if len(like) == 40:
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


# ------------------------------------------------------------------------------------------------------------- the hub


def list_files(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """All files of a hub repository with size and hash, at the commit that `revision` means now."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repository, revision=revision, files_metadata=True)
    files = []
    for entry in info.siblings or []:
        lfs = entry.lfs or {}
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        files.append(
            RemoteFile(
                safe_name(entry.rfilename, f"{SCHEME}{repository}"),
                entry.size,
                sha256 or entry.blob_id,
                info.sha or revision or "main",
            )
        )
    return files


def fetch(repository: str, remote: RemoteFile) -> Path:
    """The file in huggingface_hub's cache, downloaded (or continued) if need be and checked. ValueError if size or hash are wrong."""
    from huggingface_hub import hf_hub_download

    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = Path(
                hf_hub_download(
                    repository, remote.name, revision=remote.revision, endpoint=os.environ.get("HF_ENDPOINT")
                )
            )
            break
        except cut_errors():
            if attempt == ATTEMPTS:
                raise
    wrong = problem(path, remote)
    if wrong:
        path.resolve().unlink()  # or the cache would hand it out again
        path.unlink(missing_ok=True)
        raise ValueError(f"{remote.name} of {SCHEME}{repository} {wrong}; it was deleted, run the same command again")
    return path


def place(cached: Path, target: Path) -> None:
    """Make `target` the file `cached`, at once or not at all; a hard link where that is possible, so that the weights are stored once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(cached.resolve(), temporary)
    except OSError:
        with replacing(target, sync=True) as file, cached.open("rb") as source:
            shutil.copyfileobj(source, file, CHUNK)
        return
    os.replace(temporary, target)


def unreachable(error: Exception, what: str, where: str) -> Unavailable:
    """The error to show when a server cannot give a file: what to put where by hand."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    endpoint = "" if what.startswith("http") else os.environ.get("HF_ENDPOINT", "")
    return Unavailable(
        f"cannot get {what}"
        + (f" from HF_ENDPOINT {endpoint}" if endpoint else "")
        + f" ({type(error).__name__}: {reason}). Without a "
        f"connection, download it on another machine and put it at {where}"
    )


def cut_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub 0.27 to 1.0 raises where a connection ends in the middle of a file; 2.4 continues by itself."""
    names = {"requests.exceptions": "ChunkedEncodingError", "httpx": "RemoteProtocolError"}
    return tuple(getattr(sys.modules[library], name) for library, name in names.items() if library in sys.modules)


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot reach or find something, in all versions that we allow."""
    from huggingface_hub import errors

    found: list[type[Exception]] = [
        OSError,
        errors.HFValidationError,
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
    ]
    for library in ("httpx2", "httpx", "requests"):
        module = sys.modules.get(library)
        found += [
            getattr(module, name) for name in ("HTTPError", "RequestException", "InvalidURL") if hasattr(module, name)
        ]
    return tuple(found)


def local_path(path: str, flag: str = "") -> str:
    """`path` itself, or for hf://OWNER/REPOSITORY[@REVISION]/PATH the local path of that file or checkpoint folder, fetched and checked.

    ValueError for an address that is none, OSError that says what to do if it cannot be had.
    """
    if not str(path).startswith(SCHEME):
        return path
    named = f"{path} ({flag})" if flag else str(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.*))?", str(path)[len(SCHEME) :])
    if not match or ".." in PurePosixPath(str(path)).parts:
        raise ValueError(
            f"{named} is no address on the hub: hf://OWNER/REPOSITORY/PATH, with @REVISION after the repository if need be"
        )
    repository, revision, inside = match[1], match[2], (match[3] or "").rstrip("/")
    try:
        files = {file.name: file for file in list_files(repository, revision)}
        if inside in files:
            return str(fetch(repository, files[inside]))
        prefix = f"{inside}/" if inside else ""
        for names in PARTS_OF_FOLDER:
            if prefix + names[0] in files:
                return str(
                    [fetch(repository, files[prefix + name]) for name in names if prefix + name in files][0].parent
                )
    except ValueError:
        raise
    except hub_errors() as error:
        raise unreachable(error, named, f"any path, and give that path{f' with {flag}' if flag else ''}") from error
    raise ValueError(
        f"{named}: no such file, nor a folder with {' or '.join(names[0] for names in PARTS_OF_FOLDER)}; the repository has "
        f"{', '.join(sorted(files)[:8])}"
    )


# ------------------------------------------------------------------------------------------------------ other addresses


def fetch_url(url: str, target: Path, check: Callable[[Path], None]) -> None:
    """Download `url` to `target`, resuming target.part if it is there; check(part) raises ValueError for another file,
    which is deleted.

    OSError if the download stays incomplete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            if have and answer.status != 206:  # the server sends it from the start
                have = 0
            left = answer.headers.get("Content-Length")
            total = None if left is None else have + int(left)
            with (
                part.open("ab" if have else "wb") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=target.name) as bar,
            ):
                while block := answer.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send, or .part is longer than the file
            part.unlink(missing_ok=True)
        raise
    if total is not None and part.stat().st_size != total:
        raise OSError(
            f"the connection ended after {part.stat().st_size:,} of {total:,} bytes; run the same command again to continue"
        )
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}; what came was deleted") from error
    os.replace(part, target)


def check_content(name: str, path: Path, expected: str | None) -> None:
    """ValueError unless the file at `path` can be the published one: by its hash, where one is expected, and by what it
    holds.
    """
    if expected and file_hash(path, expected) != expected:
        kind = "SHA-256" if len(expected) == 64 else "git blob"
        raise ValueError(
            f"{path} has another hash than expected, {kind} {file_hash(path, expected)} instead of {expected}; "
            f"--sha256 names that of a file of your own (this one's is {file_hash(path, '0' * 64)})"
        )
    if name == "vae":
        from util.checkpoint import read_file

        if not isinstance(read_file(path, mmap=True).get("model"), dict):
            raise ValueError(f'{path} holds no VAE: it has no weights under "model"')
        return
    from evaluation.reference import load_reference_stats, npz_shape  # imports torch-fidelity

    reference = load_reference_stats(path, name)
    if name == "adm_batch" and (npz_shape(path, name)[1] != PUBLISHED_SIZE or reference.spatial is None):
        raise ValueError(
            f"{path} is not ADM's reference batch: expected mu_s, sigma_s and images of {PUBLISHED_SIZE} pixels"
        )


def fetch_address(name: str, url: str, args: argparse.Namespace) -> None:
    """Fetch a file that has an address of its own into --root, unless it is there."""
    target = Path(args.root) / PUBLISHED[name].target
    expected = args.sha256 if name == "stats" and args.sha256 else PUBLISHED[name].git_blob
    if target.is_file():
        try:
            check_content(name, target, expected)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to fetch it again") from error
        print(f"{name}: {target} is there and right")
        return
    if args.dry_run:
        print(f"{name}: would fetch {url} to {target}")
        return
    try:
        fetch_url(url, target, lambda part: check_content(name, part, expected))
    except OSError as error:
        raise unreachable(error, url, str(target)) from error
    print(
        f"{name}: wrote {target}, "
        + ("hash is right" if expected else f"no hash is published, SHA-256 {file_hash(target, '0' * 64)}")
    )


# ------------------------------------------------------------------------------------------------------------- the command


def choose(files: Sequence[RemoteFile], name: str, pattern: str, repository: str) -> RemoteFile:
    """The one file that matches; Unavailable if none does, ValueError if several do, both listing what there is."""
    found = [file for file in files if re.search(pattern, file.name)]
    if len(found) == 1:
        return found[0]
    message = (
        f"{SCHEME}{repository} has {len(found) or 'no'} files that could be {name}: "
        f"{', '.join(f.name for f in found or files[:12])}; name it with --file"
    )
    raise ValueError(message) if found else Unavailable(message)


@dataclass
class HubRepository:
    """The list of a repository's files, asked for once; so is the reason why there is none."""

    name: str
    revision: str | None
    _answer: list[RemoteFile] | Exception | None = field(default=None, repr=False)

    def files(self) -> list[RemoteFile]:
        if self._answer is None:
            try:
                self._answer = list_files(self.name, self.revision)
            except hub_errors() as error:
                self._answer = error
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def fetch_from_hub(name: str, repository: HubRepository, args: argparse.Namespace) -> None:
    """Fetch weights from the hub into --root, unless they are there and right.

    Unavailable if the hub cannot give them.
    """
    target, pattern = (
        Path(args.root) / PUBLISHED[name].target,
        f"^{re.escape(args.file)}$" if args.file else PUBLISHED[name].pattern,
    )
    try:
        remote = choose(repository.files(), name, pattern, args.repository)
        size = "?" if remote.size is None else f"{remote.size / 1e6:,.1f} MB"
        if target.is_file() and not problem(target, remote):
            print(f"{name}: {target} is there and right ({size})")
        elif args.dry_run:
            print(f"{name}: would fetch {SCHEME}{args.repository}/{remote.name} ({size}) to {target}")
        else:
            print(f"{name}: {SCHEME}{args.repository}/{remote.name} ({size})", flush=True)
            place(fetch(args.repository, remote), target)
            print(
                f"{name}: wrote {target}, "
                + (f"hash {remote.hash[:12]}... is right" if remote.hash else "the hub gives no hash")
            )
    except (ValueError, Unavailable):
        raise
    except hub_errors() as error:
        raise unreachable(error, f"{name} of {args.repository}", str(target)) from error


def fetch_published(name: str, repository: HubRepository, args: argparse.Namespace) -> None:
    """Fetch one published file. ValueError or OSError, with what to do, if it cannot be had."""
    url = getattr(args, f"{name}_url", "")
    if not PUBLISHED[name].pattern:
        return fetch_address(name, url, args)
    try:
        return fetch_from_hub(name, repository, args)
    except Unavailable as absent:
        if (target := Path(args.root) / PUBLISHED[name].target).is_file():
            print(f"{name}: {target} is there, and could not be compared with the hub's ({absent})")
            return None
        another = (args.repository, args.revision, args.file) != (REPOSITORY, None, "")
        if not url or another:  # another repository's VAE is another VAE
            raise
        print(f"{name}: {absent}; trying {url}")
        try:
            return fetch_address(name, url, args)
        except (ValueError, OSError) as error:
            raise OSError(f"{absent}; nor from its second address: {error}") from error


def fetch_all(names: Sequence[str], args: argparse.Namespace) -> None:
    """Fetch all of the names that can be had.

    The error of a single one, or an OSError that names all that could not.
    """
    repository, failed = HubRepository(args.repository, args.revision), {}
    for name in names:
        try:
            fetch_published(name, repository, args)
        except (ValueError, OSError) as error:
            failed[name] = error
            if len(names) > 1:
                print(f"{name}: not fetched: {error}")
    if len(names) == 1 and failed:
        raise failed[names[0]]
    if failed:
        raise OSError(
            f"{len(failed)} of {len(names)} files could not be fetched: "
            + "; ".join(f"{name} ({error})" for name, error in failed.items())
        )


# ------------------------------------------------------------------------------------------------------------ on demand


def published_name(path: str | Path) -> str | None:
    """Which published file a path of the command line means (the file itself, or the folder of a checkpoint), None if
    none.
    """
    paths = {os.path.abspath(path), os.path.abspath(Path(path) / PARTS_OF_FOLDER[0][0])}
    return next((name for name, file in PUBLISHED.items() if os.path.abspath(file.target) in paths), None)


def provide(path: str | Path, flag: str, no_download: bool = False) -> None:
    """Fetch the published file that `path` means if it is not there; nothing for any other path. Every process must
    call it.

    Rank 0 downloads, then one process of each machine on whose disk the file is still missing; the others wait.
    FileNotFoundError that names the command to fetch it with `no_download`; ValueError or OSError on every process if
    it cannot be had.
    """
    name = published_name(path)
    if name is None:
        return
    target = Path(PUBLISHED[name].target)
    exported = target.with_name(PARTS_OF_FOLDER[1][0])  # a checkpoint's folder may hold this instead

    def missing() -> bool:
        return not target.is_file() and not exported.is_file()

    if no_download:
        hint = f"no {target} ({flag}), and --no_download is given: python -m tools.download {name} fetches it"
        return dist.agree(FileNotFoundError(hint) if missing() else None)
    for downloads in (dist.is_main(), int(os.environ.get("LOCAL_RANK", "0")) == 0):
        error = None
        if downloads and missing():
            logger.info("%s (%s) is not there: fetching it; --no_download refuses instead", target, flag)
            try:
                fetch_all([name], build_parser().parse_args([name]))
            except (ValueError, OSError) as caught:
                error = caught
        dist.agree(error)
    return None


# ------------------------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("what", nargs="+", choices=[*PUBLISHED, "all"], help="what to fetch")
    parser.add_argument("--root", default=".", help="folder under which pretrained_models/ and fid_stats/ are made")
    parser.add_argument("--repository", default=REPOSITORY, help="hub repository of the weights")
    parser.add_argument("--revision", default=None, help="its branch, tag or commit")
    parser.add_argument(
        "--file", default="", help="name of the file in the repository, where the name does not say which one is meant"
    )
    parser.add_argument("--vae_url", default=PUBLISHED["vae"].url, help="where the VAE is if the hub lacks it")
    parser.add_argument("--stats_url", default=PUBLISHED["stats"].url, help="where adm_in256_stats.npz is")
    parser.add_argument(
        "--adm_batch_url", default=PUBLISHED["adm_batch"].url, help="where VIRTUAL_imagenet256_labeled.npz is"
    )
    parser.add_argument(
        "--sha256", default=None, help="SHA-256 of other statistics than the published ones, whose hash is known here"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched, and how much; write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and fetch. ValueError or OSError, with what to do, for what cannot be had."""
    args = build_parser().parse_args(argv)
    what = [*PUBLISHED] if "all" in args.what else list(dict.fromkeys(args.what))
    weights = [name for name in what if PUBLISHED[name].pattern]
    if args.file and len(weights) != 1:
        raise ValueError(f"--file names one file, but {len(weights)} are wanted: {', '.join(weights)}")
    if args.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", args.sha256):
        raise ValueError(f"--sha256 must be 64 hexadecimal digits, got {args.sha256!r}")
    if args.sha256 is not None and "stats" not in what:
        raise ValueError(
            "--sha256 is the hash of the statistics, which are not wanted; the hub itself says the hashes of the weights"
        )
    for name in ("vae_url", "stats_url", "adm_batch_url"):
        if not getattr(args, name).startswith(("http://", "https://")):
            raise ValueError(f"--{name} must begin with http:// or https://, got {getattr(args, name)!r}")
    fetch_all(what, args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
