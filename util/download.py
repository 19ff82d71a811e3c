"""Fetch what is published: weights from the Hugging Face hub, ADM's ImageNet statistics from the MAR repository.

  python -m util.download vae|large|huge|stats|all [--dry_run]

Files go where the published commands look for them, pretrained_models/... and fid_stats/. A download that was cut continues; size and hash
are checked; a file appears under its name only when it is whole. HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from util.cli import make_parser
from util.files import replacing
from util.log import get_logger, run_cli

logger = get_logger()

REPOSITORY = "Epiphqny/TokenBridge"
STATS_URL = "https://github.com/LTH14/mar/raw/main/fid_stats/adm_in256_stats.npz"
SCHEME = "hf://"
PARTS_OF_FOLDER = ("checkpoint-last.pth",), ("model.safetensors", "config.json", "vae.safetensors", "vae.json")      # either, in this order
CHUNK = 1 << 20
ATTEMPTS = 6                        # at one file, each of which continues the one before


@dataclass(frozen=True)
class Wanted:
    """A published file: where it goes, and how it is recognised among the hub repository's files."""

    target: str
    pattern: str


WANTED = {"vae": Wanted("pretrained_models/vae/kl16.ckpt", r"(^|/)kl16\.ckpt$"),
          "large": Wanted("pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth", r"large[^/]*(/[^/]*)?\.pth$"),
          "huge": Wanted("pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth", r"huge[^/]*(/[^/]*)?\.pth$")}
STATS_TARGET = "fid_stats/adm_in256_stats.npz"


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
        files.append(RemoteFile(safe_name(entry.rfilename, f"{SCHEME}{repository}"), entry.size, sha256 or entry.blob_id, info.sha or revision or "main"))
    return files


def fetch(repository: str, remote: RemoteFile) -> Path:
    """The file in huggingface_hub's cache, downloaded (or continued) if need be and checked. ValueError if size or hash are wrong."""
    from huggingface_hub import hf_hub_download
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = Path(hf_hub_download(repository, remote.name, revision=remote.revision, endpoint=os.environ.get("HF_ENDPOINT")))
            break
        except cut_errors():
            if attempt == ATTEMPTS:
                raise
    wrong = problem(path, remote)
    if wrong:
        path.resolve().unlink()                                            # or the cache would hand it out again
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


def unreachable(error: Exception, what: str, where: str) -> OSError | ValueError:
    """The error to show when the hub cannot give a file: what to put where by hand."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    endpoint = os.environ.get("HF_ENDPOINT", "")
    return OSError(f"cannot get {what}" + (f" from HF_ENDPOINT {endpoint}" if endpoint else "") + f" ({type(error).__name__}: {reason}). Without a "
                   f"connection, download it on another machine and put it at {where}")


def cut_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub 0.27 to 1.0 raises where a connection ends in the middle of a file; 2.4 continues by itself."""
    names = {"requests.exceptions": "ChunkedEncodingError", "httpx": "RemoteProtocolError"}
    return tuple(getattr(sys.modules[library], name) for library, name in names.items() if library in sys.modules)


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot reach or find something, in all versions that we allow."""
    from huggingface_hub import errors
    found: list[type[Exception]] = [OSError, errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError]
    for library in ("httpx2", "httpx", "requests"):
        module = sys.modules.get(library)
        found += [getattr(module, name) for name in ("HTTPError", "RequestException", "InvalidURL") if hasattr(module, name)]
    return tuple(found)


def local_path(path: str, flag: str = "") -> str:
    """`path` itself, or for hf://OWNER/REPOSITORY[@REVISION]/PATH the local path of that file or checkpoint folder, fetched and checked.

    ValueError for an address that is none, OSError that says what to do if it cannot be had.
    """
    if not str(path).startswith(SCHEME):
        return path
    named = f"{path} ({flag})" if flag else str(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.*))?", str(path)[len(SCHEME):])
    if not match or ".." in PurePosixPath(str(path)).parts:
        raise ValueError(f"{named} is no address on the hub: hf://OWNER/REPOSITORY/PATH, with @REVISION after the repository if need be")
    repository, revision, inside = match[1], match[2], (match[3] or "").rstrip("/")
    try:
        files = {file.name: file for file in list_files(repository, revision)}
        if inside in files:
            return str(fetch(repository, files[inside]))
        prefix = f"{inside}/" if inside else ""
        for names in PARTS_OF_FOLDER:
            if prefix + names[0] in files:
                return str([fetch(repository, files[prefix + name]) for name in names if prefix + name in files][0].parent)
    except ValueError:
        raise
    except hub_errors() as error:
        raise unreachable(error, named, f"any path, and give that path{f' with {flag}' if flag else ''}") from error
    raise ValueError(f"{named}: no such file, nor a folder with {' or '.join(names[0] for names in PARTS_OF_FOLDER)}; the repository has "
                     f"{', '.join(sorted(files)[:8])}")


# ------------------------------------------------------------------------------------------------------------- statistics

def fetch_url(url: str, target: Path, sha256: str | None = None) -> None:
    """Download `url` to `target`, continuing target.part if it is there. OSError or ValueError if it stays incomplete or is another file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            if have and answer.status != 206:                              # the server sends it from the start
                have = 0
            left = answer.headers.get("Content-Length")
            total = None if left is None else have + int(left)
            with part.open("ab" if have else "wb") as file, tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=target.name) as bar:
                while block := answer.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:                                              # nothing is left to send, or .part is longer than the file
            part.unlink(missing_ok=True)
        raise
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes; run the same command again to continue")
    if sha256 and file_hash(part, sha256) != sha256:
        part.unlink()
        raise ValueError(f"{url} has another hash than --sha256 {sha256[:12]}...; what came was deleted")
    os.replace(part, target)


def check_stats(path: Path) -> None:
    """ValueError (and the file is deleted) unless it holds mu and sigma of 2048 features."""
    from util.fid_stats import load_reference_stats
    try:
        load_reference_stats(path, "stats")
    except ValueError:
        path.unlink()
        raise


# ------------------------------------------------------------------------------------------------------------- the command

def choose(files: Sequence[RemoteFile], name: str, pattern: str, repository: str) -> RemoteFile:
    """The one file that matches; ValueError that lists what there is if none or several do."""
    found = [file for file in files if re.search(pattern, file.name)]
    if len(found) != 1:
        raise ValueError(f"{SCHEME}{repository} has {len(found) or 'no'} files that could be {name}: {', '.join(f.name for f in found or files[:12])}; "
                         "name it with --file")
    return found[0]


def download_weights(names: Sequence[str], args: argparse.Namespace) -> None:
    """Fetch the weights named into --root; what is there and right is left alone."""
    wanted = {name: WANTED[name] for name in names}
    by_hand = "; ".join(f"{name}: {Path(args.root) / w.target}" for name, w in wanted.items())
    try:
        files = list_files(args.repository, args.revision)
        for name, w in wanted.items():
            remote, target = choose(files, name, f"^{re.escape(args.file)}$" if args.file else w.pattern, args.repository), Path(args.root) / w.target
            size = "?" if remote.size is None else f"{remote.size / 1e6:,.1f} MB"
            if target.is_file() and not problem(target, remote):
                print(f"{name}: {target} is there and right ({size})")
            elif args.dry_run:
                print(f"{name}: would fetch {SCHEME}{args.repository}/{remote.name} ({size}) to {target}")
            else:
                print(f"{name}: {SCHEME}{args.repository}/{remote.name} ({size})", flush=True)
                place(fetch(args.repository, remote), target)
                print(f"{name}: wrote {target}, {'hash ' + remote.hash[:12] + '... is right' if remote.hash else 'the hub gives no hash'}")
    except ValueError:
        raise
    except hub_errors() as error:
        raise unreachable(error, f"the files of {args.repository}", f"({by_hand})") from error


def download_stats(args: argparse.Namespace) -> None:
    """Fetch ADM's ImageNet 256 statistics into --root, unless they are there."""
    target = Path(args.root) / STATS_TARGET
    if target.is_file():
        check_stats_there(target, args.sha256)
        print(f"stats: {target} is there and right")
        return
    if args.dry_run:
        print(f"stats: would fetch {args.stats_url} to {target}")
        return
    try:
        fetch_url(args.stats_url, target, args.sha256)
    except ValueError:
        raise
    except OSError as error:
        raise unreachable(error, args.stats_url, str(target)) from error
    check_stats(target)
    print(f"stats: wrote {target}, SHA-256 {file_hash(target, '0' * 64)}")


def check_stats_there(target: Path, sha256: str | None) -> None:
    from util.fid_stats import load_reference_stats
    load_reference_stats(target, "stats; delete it to fetch it again")
    if sha256 and file_hash(target, sha256) != sha256:
        raise ValueError(f"{target} has another hash than --sha256 {sha256[:12]}...; delete it to fetch it again")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("what", nargs="+", choices=[*WANTED, "stats", "all"], help="what to fetch")
    parser.add_argument("--root", default=".", help="folder under which pretrained_models/ and fid_stats/ are made")
    parser.add_argument("--repository", default=REPOSITORY, help="hub repository of the weights")
    parser.add_argument("--revision", default=None, help="its branch, tag or commit")
    parser.add_argument("--file", default="", help="name of the file in the repository, where it cannot be told which one is meant")
    parser.add_argument("--stats_url", default=STATS_URL, help="where adm_in256_stats.npz is")
    parser.add_argument("--sha256", default=None, help="the hash that the statistics must have; none is published")
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched, and how much; write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and fetch. ValueError or OSError, with what to do, for what cannot be had."""
    args = build_parser().parse_args(argv)
    what = [*WANTED, "stats"] if "all" in args.what else list(dict.fromkeys(args.what))
    weights = [name for name in what if name != "stats"]
    if args.file and len(weights) != 1:
        raise ValueError(f"--file names one file, but {len(weights)} are wanted: {', '.join(weights)}")
    if args.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", args.sha256):
        raise ValueError(f"--sha256 must be 64 hexadecimal digits, got {args.sha256!r}")
    if args.sha256 is not None and "stats" not in what:
        raise ValueError("--sha256 is the hash of the statistics, which are not wanted; the hub itself says the hashes of the weights")
    if not args.stats_url.startswith(("http://", "https://")):
        raise ValueError(f"--stats_url must begin with http:// or https://, got {args.stats_url!r}")
    if weights:
        download_weights(weights, args)
    if "stats" in what:
        download_stats(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
