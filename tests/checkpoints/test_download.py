"""checkpoints.download against a local server that speaks the hub's routes: whole files in the right places, or an
error that says what to do.
"""

import contextlib
import fcntl
import hashlib
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, utils

from checkpoints import download, transfer
from checkpoints.hub import local_path, safe_name
from tests.helpers import REPO
from tests.hub import COMMIT, Hub
from tests.processes.forked import run_processes
from tools import download as command
from util.cli import run_cli

REPOSITORY = "Epiphqny/TokenBridge"
FILES = {
    "kl16.ckpt": os.urandom(300_000),
    "tokenbridge_large/checkpoint-last.pth": os.urandom(500_000),
    "tokenbridge_huge/checkpoint-last.pth": os.urandom(700_000),
    "README.md": b"# weights\n",
}
KL16, LARGE = (
    Path("pretrained_models/vae/kl16.ckpt"),
    Path("pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth"),
)
STATS, BATCH = Path("fid_stats/adm_in256_stats.npz"), Path("fid_stats/VIRTUAL_imagenet256_labeled.npz")
Run = Callable[..., "Result"]
Refused = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORY, dict(FILES)) as server:
        yield server


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """run(*arguments, **environment) -> what `python -m tools.download` ends with, in tmp_path, with its cache there
    and HF_ENDPOINT the server.
    """
    for name in os.environ:
        if name.startswith("HF_") or "proxy" in name.lower():
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    # read from HF_HOME when the package is imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    for name in ("vae", "stats", "adm_batch"):  # no test goes to the network
        monkeypatch.setitem(
            download.PUBLISHED, name, replace(download.PUBLISHED[name], url=f"{hub.url}/plain/{name}.bin")
        )

    def start(*arguments: str, **environment: str) -> Result:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in environment)  # so is this one
            if hasattr(utils, "reset_sessions"):  # below 1.0 it is read when a session begins
                utils.reset_sessions()
            code = run_cli(lambda: command.main(arguments))
        return Result(code, *capsys.readouterr())

    return start


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Refused:
    """refused(*arguments, words=(), **environment) -> the one line of an error that has the words; nothing is written,
    and numpy's advice to load a file unsafely is not passed on.
    """

    def check(*arguments: str, words: Sequence[str] = (), **environment: str) -> str:
        before = written(tmp_path)
        result = run(*arguments, **environment)
        lines = [line for line in result.stderr.splitlines() if "error: " in line]
        assert result.returncode == 2 and len(lines) == 1, result.stderr
        assert not {part for part in ("Traceback", "pickle", "unsafe") if part in result.stderr}
        assert not [word for word in words if word not in lines[0]], lines[0]
        assert written(tmp_path) == before
        return lines[0]

    return check


def written(folder: Path) -> set[str]:
    """Files outside HF_HOME; a download that was begun is no file yet."""
    files = (path for path in folder.rglob("*") if path.is_file() and "home" not in path.parts)
    return {str(path.relative_to(folder)) for path in files if path.suffix != ".part"}


def fetched(hub: Hub, what: str = "resolve") -> list[str | None]:
    """The Range of each request for a file's content."""
    return [asked for method, path, asked in hub.requests if method == "GET" and what in path]


def test_weights_go_where_the_published_commands_look(run: Run, hub: Hub, tmp_path: Path) -> None:
    result = run("vae", "large", "huge")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"]
    assert (tmp_path / LARGE).read_bytes() == FILES["tokenbridge_large/checkpoint-last.pth"]
    right = f"wrote {KL16}, hash {hashlib.sha256(FILES['kl16.ckpt']).hexdigest()[:12]}... is right"
    assert len(written(tmp_path)) == 3 and right in result.stdout
    assert not (tmp_path / "home" / "hub").exists(), "stored once: not in the cache of huggingface_hub too"
    assert run("vae", "large", "huge").stdout.count("is there and right") == 3 == len(fetched(hub))
    (tmp_path / KL16).write_bytes(FILES["kl16.ckpt"][:1000])  # another file is replaced
    assert run("vae").returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"]


def test_a_cut_connection_is_continued(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.cut = 2
    assert run("large").returncode == 0
    assert (tmp_path / LARGE).read_bytes() == FILES["tokenbridge_large/checkpoint-last.pth"]
    assert fetched(hub) == [None, "bytes=250000-", "bytes=375000-"], "each attempt begins where the last one ended"


def test_wrong_hash_is_refused_and_forgotten(run: Run, refused: Refused, hub: Hub, tmp_path: Path) -> None:
    hub.said["kl16.ckpt"] = "ab" * 32
    named = f"kl16.ckpt of hf://{REPOSITORY} has another hash than the hub says (abababababab...)"
    refused("vae", words=[f"{named}; what came was deleted"])
    hub.said["kl16.ckpt"] = "../../../../victim"
    refused("vae", words=["names a hash '../../../../victim', which is none"])
    hub.said.clear()
    assert run("vae").returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"]


def test_dry_run_says_all_and_writes_nothing(run: Run, hub: Hub, tmp_path: Path) -> None:
    result = run("all", "--dry_run")
    assert result.returncode == 0, result.stderr
    fetches = [f"vae: would fetch hf://{REPOSITORY}/kl16.ckpt (0.3 MB) to {KL16}", "huge: would fetch"]
    fetches += [f"stats: would fetch {hub.url}/plain/stats.bin to fid_stats/", "adm_batch: would fetch"]
    assert all(text in result.stdout for text in fetches)
    assert not written(tmp_path) and not fetched(hub)


@pytest.mark.parametrize("how", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_says_which_file_to_put_where(refused: Refused, how: dict[str, str]) -> None:
    words = ["error: 2 of 2 files could not be fetched: vae (cannot get vae of", f"put it at here/{KL16}"]
    words += [f"cannot get large of {REPOSITORY}", f"put it at here/{LARGE}"]
    assert refused("vae", "large", "--root", "here", words=words, **how).count("another machine") >= 2
    refused("stats", "--stats_url", "http://127.0.0.1:9/x.npz", words=[f"put it at {STATS}"])


def test_a_token_is_sent(run: Run, refused: Refused, hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    refused("vae", words=[f"cannot get vae of {REPOSITORY}"])
    assert run("vae", HF_TOKEN="secret").returncode == 0 and (tmp_path / KL16).is_file()


def test_a_repository_with_other_names(run: Run, refused: Refused, hub: Hub, tmp_path: Path) -> None:
    hub.files = {"weights/a_large.pth": b"1", "weights/b_large.pth": b"2"}
    names = "weights/a_large.pth, weights/b_large.pth"
    refused("large", words=[f"has 2 files that could be large: {names}; name it with --file"])
    assert run("large", "--file", "weights/b_large.pth").returncode == 0 and (tmp_path / LARGE).read_bytes() == b"2"
    refused("vae", words=["has no files that could be vae"])


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "C:/x", "a\\..\\b"])
def test_names_that_lead_out_of_the_folder(hub: Hub, refused: Refused, name: str) -> None:
    with pytest.raises(ValueError, match="points out of its folder"):
        safe_name(name, "here")
    if name.startswith(".."):
        hub.listed = [name]
        refused("vae", words=["is refused, it points out of its folder"])


# ---- hostile and odd answers


@pytest.mark.parametrize(
    "commit", ["../../../../victim", "/victim", "main", "0" * 39, "0" * 41, "A" * 40, "0" * 40 + "\n", None, ""]
)
def test_a_commit_that_is_not_40_hexadecimal_digits_is_refused(
    refused: Refused, hub: Hub, tmp_path: Path, commit: str | None
) -> None:
    """Row 64: the commit of the hub's answer became part of a path, and the text of a header was written there."""
    (tmp_path / "victim").write_text("precious")
    hub.commit = commit
    refused("large", words=["which is not 40 hexadecimal digits; refused"])
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        local_path(f"hf://{REPOSITORY}/kl16.ckpt")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not fetched(hub)


def test_branches_and_tags_are_taken_as_revisions(run: Run, hub: Hub) -> None:
    for revision in ("main", "v1.0", "0" * 40):
        assert Path(local_path(f"hf://{REPOSITORY}@{revision}/kl16.ckpt")).is_file()
        assert any(f"/revision/{revision}" in path for _, path, _ in hub.requests)


def test_headers_lead_nowhere(run: Run, hub: Hub, tmp_path: Path) -> None:
    """Commit and tag in the headers of the file itself, or of one that is not there, are no part of a path."""
    (tmp_path / "victim").write_text("precious")
    hub.etag = "../../../../victim"
    assert run("vae").returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"]
    assert (tmp_path / "victim").read_text() == "precious" and written(tmp_path) == {"victim", str(KL16)}
    local_path(f"hf://{REPOSITORY}/kl16.ckpt")
    assert (tmp_path / "victim").read_text() == "precious"
    blobs = {path.name for path in (tmp_path / "home" / "hub").rglob("blobs/*")}
    assert blobs == {hashlib.sha256(FILES["kl16.ckpt"]).hexdigest()}


def test_a_link_in_the_cache_is_not_followed_out_of_it(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    folder.mkdir(parents=True)
    (tmp_path / "home" / "elsewhere").mkdir()
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / COMMIT).symlink_to(tmp_path / "home" / "elsewhere")
    with pytest.raises(ValueError, match="it leads out of"):
        local_path(f"hf://{REPOSITORY}/kl16.ckpt")
    assert not list((tmp_path / "home" / "elsewhere").iterdir())


ODD_LISTS = {
    "object": b"{}",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "a captive portal": b"<html>log in</html>",
    "truncated": b'{"id": "a", "siblings": [{"rfil',
    "files are a number": b'{"id": "a", "sha": "%s", "siblings": 3}' % (b"0" * 40),
    "files are numbers": b'{"id": "a", "sha": "%s", "siblings": [3]}' % (b"0" * 40),
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("answer", ODD_LISTS)
def test_an_answer_that_is_no_list_of_files(refused: Refused, hub: Hub, answer: str) -> None:
    hub.list = ODD_LISTS[answer]
    refused("large")
    with pytest.raises((ValueError, OSError)) as caught:
        local_path(f"hf://{REPOSITORY}/x", "--resume")
    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """An address that sends these bytes to everyone, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


RAW = {
    "truncated chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc",
        "ended after|IncompleteRead",
    ),
    "bad status": (b"what is this\r\n\r\n", "BadStatusLine"),
    "nothing": (b"", "RemoteDisconnected"),
    "bad length": (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc", "another hash"),
    "endless redirect": (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "HTTPError"),
    "redirect to a file": (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "HTTPError"),
}


@pytest.mark.parametrize("kind", RAW)
def test_broken_answers(refused: Refused, kind: str) -> None:
    answer, words = RAW[kind]
    with raw_server(answer) as url:
        assert re.search(words, refused("stats", "--stats_url", f"{url}/x"))
        refused("large", HF_ENDPOINT=url)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:abc/x", "http://exa mple/x", "http://", "http://[::1/x", "http://user:secret@localhost:abc/x"]
    + ["http://user:secret@127.0.0.1:9/x", "http://us@er:sec@ret@127.0.0.1:9/x", "http://\u2603" + "a" * 70 + ".x/"],
)
def test_addresses_that_are_not_valid(run: Run, refused: Refused, url: str) -> None:
    """One line without a password; HF_ENDPOINT, which a file with an address of its own does not use, is not blamed."""
    own, hubs = refused("stats", "--stats_url", url), refused("large", HF_ENDPOINT=url)
    shown = own + hubs + run("stats", "--stats_url", url, "--dry_run").stdout
    assert "secret" not in shown and "ret@" not in shown
    assert "HF_ENDPOINT" not in own and "HF_ENDPOINT" in hubs


def test_user_and_password_of_an_address_are_used(run: Run, hub: Hub, stats: bytes, tmp_path: Path) -> None:
    url = f"http://user:secret@{hub.url.partition('://')[2]}/plain/stats.npz"
    result = run("stats", "--stats_url", url, "--sha256", hashlib.sha256(stats).hexdigest())
    assert result.returncode == 0 and "secret" not in result.stdout + result.stderr


def test_a_token_stays_with_its_host() -> None:
    request = urllib.request.Request("http://a/x", headers={"Authorization": "Bearer secret", "Range": "bytes=1-"})
    for url, kept in (("http://a/y", True), ("http://b/y", False), ("https://a/y", False), ("http://a:81/y", False)):
        following = transfer._Redirects().redirect_request(request, None, 302, "Found", {}, url)
        assert following.has_header("Authorization") == kept and following.has_header("Range")


def test_a_login_page_instead_of_the_reference_batch(refused: Refused, hub: Hub) -> None:
    hub.files["adm_batch"] = b"<html>log in first</html>"
    refused("adm_batch", words=["it is no archive of arrays"])


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_a_planted_unfinished_download_is_not_written_to(
    refused: Refused, hub: Hub, stats: bytes, tmp_path: Path, what: str
) -> None:
    """Row 67."""
    (tmp_path / "victim").write_text("precious")
    part = tmp_path / f"{STATS}.part"
    part.parent.mkdir()
    make = {"link": lambda: part.symlink_to(tmp_path / "victim"), "folder": part.mkdir, "pipe": lambda: os.mkfifo(part)}
    make[what]()
    refused("stats", "--sha256", hashlib.sha256(stats).hexdigest(), words=[f"cannot write {STATS}.part: "])
    assert (tmp_path / "victim").read_text() == "precious" and not hub.requests


def test_a_root_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    """Row 146: not the connection's fault, nor HF_ENDPOINT's."""
    (tmp_path / "victim").write_text("precious")
    for name in ("stats", "vae"):
        line = refused(name, "--root", "victim", words=["cannot write victim/"])
        assert "connection" not in line and "HF_ENDPOINT" not in line


# ------------------------------------------------------------------------------------------------------- hf://


def test_addresses(run: Run) -> None:
    assert Path(local_path(f"hf://{REPOSITORY}/kl16.ckpt")).read_bytes() == FILES["kl16.ckpt"]
    folder = Path(local_path(f"hf://{REPOSITORY}@main/tokenbridge_large"))
    assert (folder / "checkpoint-last.pth").read_bytes() == FILES["tokenbridge_large/checkpoint-last.pth"]
    words = r"medium \(--resume\): no such file, nor a folder with checkpoint-last.pth or model.safetensors"
    with pytest.raises(ValueError, match=words):
        local_path(f"hf://{REPOSITORY}/medium", "--resume")


@pytest.mark.slow
def test_the_command_in_its_own_process(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME as huggingface_hub reads them when it starts; progress is shown."""
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(REPO),
        "PATH": os.environ["PATH"],
    }
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))  # a terminal of no width shows no bar
    result = subprocess.run(
        [sys.executable, "-m", "tools.download", "vae"],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=100,
    )
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # the terminal is closed: all was read
        while part := os.read(ours, 1 << 16):
            shown += part.decode()
    assert result.returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"], shown
    assert "100%" in shown and not list((tmp_path / "home").rglob("*.ckpt"))


@pytest.mark.parametrize("address", ["hf://", "hf://alone", "hf://a/b/../c", "hf://a b/c", "hf://../x/y"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"\(--vae_path\) is no address on the hub: hf://OWNER/REPOSITORY/PATH"):
        local_path(address, "--vae_path")


def test_paths_stay_as_they_are() -> None:
    assert local_path("OUT/model") == "OUT/model" and local_path("") == ""


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.fixture
def stats(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of statistics in ADM's format (float32, to keep it small); the server has it at /plain/stats.npz."""
    path = tmp_path_factory.mktemp("stats") / "x.npz"
    np.savez_compressed(path, mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    hub.files["stats"] = path.read_bytes()
    return hub.files["stats"]


@pytest.fixture
def pinned(stats: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the small file for the published one: its hash is the one that is known."""
    blob = hashlib.sha1(b"blob %d\0" % len(stats) + stats).hexdigest()
    monkeypatch.setitem(download.PUBLISHED, "stats", replace(download.PUBLISHED["stats"], git_blob=blob))


def test_git_hash_is_gits(tmp_path: Path) -> None:
    """The known hash is that of the git blob in both published repositories."""
    assert download.PUBLISHED["stats"].git_blob == "1da4c17607fe959d54999fd098105649a0c05e15"
    (tmp_path / "x").write_bytes(b"what is up, doc?")
    assert transfer.file_hash(tmp_path / "x", "0" * 40) == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


@pytest.mark.usefixtures("pinned")
def test_statistics(run: Run, refused: Refused, hub: Hub, tmp_path: Path, stats: bytes) -> None:
    hub.cut = 1
    refused("stats", words=["run the same command again to continue"])
    second = run("stats")
    assert second.returncode == 0 and "hash is right" in second.stdout, second.stderr
    assert (tmp_path / STATS).read_bytes() == stats and written(tmp_path) == {str(STATS)}
    assert hub.requests[-1][2] == f"bytes={len(stats) // 2}-"
    assert "is there and right" in run("stats").stdout


def test_another_file_of_statistics_is_refused_unless_named(
    run: Run, refused: Refused, hub: Hub, tmp_path: Path, stats: bytes
) -> None:
    """Also from an address of one's own the published file is expected; --sha256 names another."""
    own, sha256 = ["stats", "--stats_url", f"{hub.url}/plain/stats.npz"], hashlib.sha256(stats).hexdigest()
    refused(*own, words=["instead of 1da4c17607fe959d54999fd098105649a0c05e15; --sha256 names", sha256])
    refused(*own, "--sha256", "0" * 64, words=[f"SHA-256 {sha256} instead of {'0' * 64}"])
    assert run(*own, "--sha256", sha256).returncode == 0 and (tmp_path / STATS).read_bytes() == stats
    refused("stats", words=["delete it to fetch it again"])
    (tmp_path / STATS).unlink()
    hub.files["stats"] = page = b"<html>log in first</html>"
    words = ["is not a file of FID statistics", "what came was deleted"]
    refused("stats", "--sha256", hashlib.sha256(page).hexdigest(), words=words)


# ------------------------------------------------------------------------------------------------ ADM's reference batch


def reference_batch(path: Path, size: int = 256, count: int = 5, **more: np.ndarray) -> bytes:
    """The format of VIRTUAL_imagenet256_labeled.npz with few images, its statistics of nothing."""
    arrays = {
        "mu": np.zeros(2048, np.float32),
        "sigma": np.eye(2048, dtype=np.float32),
        "mu_s": np.zeros(2023, np.float32),
        "sigma_s": np.eye(2023, dtype=np.float32),
        "arr_0": np.zeros((count, size, size, 3), np.uint8),
        "arr_1": np.arange(count),
    } | more
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path.read_bytes()


def test_the_reference_batch(
    run: Run, refused: Refused, hub: Hub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("batch") / "b.npz"
    hub.files["adm_batch"] = content = reference_batch(source)
    result = run("adm_batch")
    assert result.returncode == 0 and (tmp_path / BATCH).read_bytes() == content, result.stderr
    assert f"SHA-256 {hashlib.sha256(content).hexdigest()}" in result.stdout
    assert "is there and right" in run("adm_batch").stdout
    (tmp_path / BATCH).unlink()
    for changes, words in (
        ({"size": 64}, "images of 256 pixels"),
        ({"mu_s": None, "sigma_s": None}, "expected mu_s"),
        ({"arr_0": None}, "no array arr_0"),
    ):
        hub.files["adm_batch"] = reference_batch(source, **changes)
        refused("adm_batch", "--adm_batch_url", f"{hub.url}/plain/adm_batch.npz", words=[words])


# ---------------------------------------------------------------------------------------- what can be had, and the rest


@pytest.mark.usefixtures("pinned")
def test_all_fetches_what_can_be_had_and_reports_the_rest(run: Run, hub: Hub, tmp_path: Path) -> None:
    del hub.files["tokenbridge_large/checkpoint-last.pth"]
    result = run("all")  # the server has no reference batch either
    assert result.returncode == 2 and "large: not fetched: " in result.stdout
    assert written(tmp_path) == {str(KL16), str(LARGE).replace("large", "huge"), str(STATS)}
    words = f"2 of 5 files could not be fetched: large (hf://{REPOSITORY} has no files that could be large"
    assert all(part in result.stderr.splitlines()[-1] for part in (f"error: {words}", "adm_batch ("))
    hub.name = "moved/away"  # the hub lacks all; what is there is no failure
    result = run("all")
    assert result.returncode == 2 and "2 of 5" in result.stderr
    assert f"vae: {KL16} is there, and could not be compared" in result.stdout


def test_the_vae_has_a_second_address(
    run: Run, refused: Refused, hub: Hub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("vae") / "kl16.ckpt"
    torch.save({"model": {"quant_conv.weight": torch.zeros(3)}}, path)
    del hub.files["kl16.ckpt"]
    hub.files["vae"] = b"<html>log in first</html>"
    refused("vae", words=["has no files that could be vae", "nor from its second address"])
    hub.files["vae"] = path.read_bytes()
    assert f"would fetch {hub.url}/plain/vae.bin to {KL16}" in run("vae", "--dry_run").stdout and not written(tmp_path)
    result = run("vae")
    assert result.returncode == 0 and "no hash is published, SHA-256" in result.stdout
    assert (tmp_path / KL16).read_bytes() == path.read_bytes()
    (tmp_path / KL16).unlink()
    assert "plain" not in refused("vae", "--repository", "somebody/else")  # whose VAE would be another one


# ------------------------------------------------------------------------------------------------------- on demand


def test_paths_of_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, name in (
        (KL16, "vae"),
        (f"./{KL16}", "vae"),
        (tmp_path / KL16, "vae"),
        (LARGE, "large"),
        (LARGE.parent, "large"),
        (STATS, "stats"),
        (BATCH, "adm_batch"),
        ("kl16.ckpt", None),
        ("", None),
        ("hf://a/b/pretrained_models/vae/kl16.ckpt", None),
        ("/elsewhere" / KL16, None),
    ):
        assert download.published_name(path) == name, path


@pytest.mark.usefixtures("pinned")
def test_provide_fetches_what_is_missing_once(run: Run, hub: Hub, tmp_path: Path) -> None:
    words = rf"no {LARGE} \(--resume\), and --no_download is given: python -m tools.download large fetches it"
    with pytest.raises(FileNotFoundError, match=words):
        download.provide(LARGE.parent, "--resume", no_download=True)
    assert not hub.requests and not written(tmp_path)
    for path, flag in ((LARGE.parent, "--resume"), (KL16, "--vae_path"), (STATS, "--fid_stats"), ("x", "--fid_stats")):
        download.provide(path, flag)
    assert written(tmp_path) == {str(LARGE), str(KL16), str(STATS)}
    hub.requests.clear()
    (tmp_path / KL16).write_bytes(b"my own")  # what is there is taken as it is
    for no_download in (False, True):
        download.provide(KL16, "--vae_path", no_download)
        download.provide(LARGE.parent, "--resume", no_download)
    assert not hub.requests and (tmp_path / KL16).read_bytes() == b"my own"
    with pytest.raises(OSError, match=rf"cannot get .*/plain/adm_batch\.bin .* put it at {BATCH}"):
        download.provide(BATCH, "--pr_reference")


PROVIDE = """
import os, sys
from dataclasses import replace
from util.cli import run_cli
from util import dist
from checkpoints import download
from huggingface_hub import constants
dist.init("cpu")
os.chdir(sys.argv[1])
constants.HF_HUB_CACHE = os.path.join(sys.argv[1], "home", "hub")  # read from HF_HOME when the package is imported
download.PUBLISHED["vae"] = replace(download.PUBLISHED["vae"], url=os.environ["HF_ENDPOINT"] + "/plain/none.bin")
try:
    download.provide("pretrained_models/vae/kl16.ckpt", "--vae_path")
    print(f"size {os.path.getsize('pretrained_models/vae/kl16.ckpt')}\\n", end="", flush=True)
except (ValueError, OSError) as error:
    print(f"refused {'put it at pretrained_models' in str(error)}\\n", end="", flush=True)
dist.shutdown()
"""


@pytest.mark.parametrize("there", [True, False])
def test_one_process_downloads_and_the_others_wait(hub: Hub, tmp_path: Path, there: bool) -> None:
    """Two processes: the file is fetched once, both go on when it is complete; a failure stops both."""
    (tmp_path / "provide.py").write_text(PROVIDE)
    if not there:
        del hub.files["kl16.ckpt"]
    result = run_processes([tmp_path / "provide.py", tmp_path], nproc=2, env={"HF_ENDPOINT": hub.url})
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("size 300000" if there else "refused True") == 2
    assert len(fetched(hub) + fetched(hub, "plain")) == 1
