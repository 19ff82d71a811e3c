"""The Hugging Face hub: its lists of files, and `hf://` addresses (`local_path`) as files in its cache.

HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean for huggingface_hub, which lists what the hub has. Files are
fetched by `transfer.fetch_url`: hf_hub_download makes paths of the server's headers.
"""

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from checkpoints.transfer import Incomplete, Unavailable, by_hand, fetch_url, file_hash, unavailable
from util.checkpoint import LAST, SAFE
from util.files import second_name, temporary_name, writing
from util.log import first_line

SCHEME = "hf://"
PARTS_OF_FOLDER = (LAST,), (SAFE, "config.json", "vae.safetensors", "vae.json")  # either, in this order
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ATTEMPTS = 6  # at one file of the hub, each of which resumes the one before


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository at one commit. hash: SHA-256 of a large file, git's blob SHA-1 of a small one."""

    name: str
    size: int | None
    hash: str | None
    revision: str


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
