"""util.download against a local server that speaks the hub's routes: whole files in the right places, or an error that says what to do."""

import contextlib
import fcntl
import hashlib
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from hub import Hub
from huggingface_hub import constants, utils

from util import download
from util.log import run_cli

REPOSITORY = "Epiphqny/TokenBridge"
FILES = {"kl16.ckpt": os.urandom(300_000), "tokenbridge_large/checkpoint-last.pth": os.urandom(500_000),
         "tokenbridge_huge/checkpoint-last.pth": os.urandom(700_000), "README.md": b"# weights\n"}
KL16, LARGE = Path("pretrained_models/vae/kl16.ckpt"), Path("pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth")
Run = Callable[..., "Result"]


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
    """run(*arguments, **environment) -> what `python -m util.download` ends with, in tmp_path, with its cache there and HF_ENDPOINT the server."""
    for name in os.environ:
        if name.startswith("HF_") or "proxy" in name.lower():
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))           # read from HF_HOME when the package is imported
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)

    def start(*arguments: str, **environment: str) -> Result:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in environment)      # so is this one
            if hasattr(utils, "reset_sessions"):                                             # below 1.0 it is read when a session begins
                utils.reset_sessions()
            code = run_cli(lambda: download.main(arguments))
        return Result(code, *capsys.readouterr())
    return start


def written(folder: Path) -> set[str]:
    """Files outside HF_HOME."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "home" not in path.parts}


def test_weights_go_where_the_published_commands_look(run: Run, hub: Hub, tmp_path: Path) -> None:
    result = run("vae", "large", "huge")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"] and (tmp_path / LARGE).read_bytes() == FILES["tokenbridge_large/checkpoint-last.pth"]
    assert len(written(tmp_path)) == 3 and f"wrote {KL16}, hash {hashlib.sha256(FILES['kl16.ckpt']).hexdigest()[:12]}... is right" in result.stdout
    assert os.stat(tmp_path / KL16).st_nlink == 2, "stored once: the cache's file and ours are one"
    got = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    again = run("vae", "large", "huge")
    assert again.stdout.count("is there and right") == 3
    assert [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path] == got, "nothing is fetched twice"


def test_a_cut_connection_is_continued(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.cut = 2
    result = run("large")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / LARGE).read_bytes() == FILES["tokenbridge_large/checkpoint-last.pth"]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and "resolve" in path]
    assert ranges == [None, "bytes=250000-", "bytes=350000-"], "each attempt begins where the last one ended"


def test_wrong_hash_is_refused_and_forgotten(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.said["kl16.ckpt"] = "ab" * 32
    result = run("vae")
    assert result.returncode == 2
    assert f"error: kl16.ckpt of hf://{REPOSITORY} has another hash than the hub says (abababababab...); it was deleted, run" in result.stderr
    assert not written(tmp_path)
    hub.said.clear()
    assert run("vae").returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"]


def test_a_file_that_is_there_but_wrong_is_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / KL16).parent.mkdir(parents=True)
    (tmp_path / KL16).write_bytes(FILES["kl16.ckpt"][:1000])
    assert run("vae").returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"]


def test_dry_run_says_all_and_writes_nothing(run: Run, hub: Hub, tmp_path: Path) -> None:
    result = run("all", "--dry_run")
    assert result.returncode == 0, result.stderr
    for text in (f"vae: would fetch hf://{REPOSITORY}/kl16.ckpt (0.3 MB) to {KL16}", "huge: would fetch", "stats: would fetch https://"):
        assert text in result.stdout
    assert not written(tmp_path) and not any("resolve" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize("how", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_says_which_file_to_put_where(run: Run, tmp_path: Path, how: dict[str, str]) -> None:
    result = run("vae", "large", "--root", "here", **how)
    assert result.returncode == 2 and not written(tmp_path)
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: cannot get the files of {REPOSITORY}") and "another machine" in line
    assert f"vae: here/{KL16}; large: here/{LARGE}" in line
    result = run("stats", "--stats_url", "http://127.0.0.1:9/x.npz")
    assert result.returncode == 2 and "put it at fid_stats/adm_in256_stats.npz" in result.stderr


def test_a_token_is_sent(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    refused = run("vae")
    assert refused.returncode == 2 and "cannot get the files of" in refused.stderr and not written(tmp_path)
    assert run("vae", HF_TOKEN="secret").returncode == 0 and (tmp_path / KL16).is_file()


def test_a_repository_with_other_names(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.files = {"weights/a_large.pth": b"1", "weights/b_large.pth": b"2"}
    result = run("large")
    assert result.returncode == 2 and "has 2 files that could be large: weights/a_large.pth, weights/b_large.pth; name it with --file" in result.stderr
    assert run("large", "--file", "weights/b_large.pth").returncode == 0 and (tmp_path / LARGE).read_bytes() == b"2"
    assert "has no files that could be vae" in run("vae").stderr


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "C:/x", "a\\..\\b"])
def test_names_that_lead_out_of_the_folder(hub: Hub, run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="points out of its folder"):
        download.safe_name(name, "here")
    if name.startswith(".."):
        hub.listed = [name]
        result = run("vae")
        assert result.returncode == 2 and "is refused, it points out of its folder" in result.stderr and not written(tmp_path)


# ------------------------------------------------------------------------------------------------------- hf://

def test_addresses(run: Run) -> None:
    assert Path(download.local_path(f"hf://{REPOSITORY}/kl16.ckpt")).read_bytes() == FILES["kl16.ckpt"]
    folder = Path(download.local_path(f"hf://{REPOSITORY}@main/tokenbridge_large"))
    assert (folder / "checkpoint-last.pth").read_bytes() == FILES["tokenbridge_large/checkpoint-last.pth"]
    with pytest.raises(ValueError, match=r"medium \(--resume\): no such file, nor a folder with checkpoint-last.pth or model.safetensors"):
        download.local_path(f"hf://{REPOSITORY}/medium", "--resume")


@pytest.mark.slow
def test_the_command_in_its_own_process(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME as huggingface_hub reads them when it starts; progress is shown."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPO), "PATH": os.environ["PATH"]}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))          # a terminal of no width shows no bar
    result = subprocess.run([sys.executable, "-m", "util.download", "vae"], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, timeout=100)
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):                                                  # the terminal is closed: all was read
        while part := os.read(ours, 1 << 16):
            shown += part.decode()
    assert result.returncode == 0 and (tmp_path / KL16).read_bytes() == FILES["kl16.ckpt"], shown
    assert "100%" in shown and list((tmp_path / "home" / "hub").glob("models--Epiphqny--TokenBridge/blobs/*"))


@pytest.mark.parametrize("address", ["hf://", "hf://alone", "hf://a/b/../c", "hf://a b/c", "hf://../x/y"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"\(--vae_path\) is no address on the hub: hf://OWNER/REPOSITORY/PATH"):
        download.local_path(address, "--vae_path")


def test_paths_stay_as_they_are() -> None:
    assert download.local_path("OUT/model") == "OUT/model" and download.local_path("") == ""


# ------------------------------------------------------------------------------------------------------- statistics

@pytest.fixture
def stats(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of statistics in ADM's format (float32, to keep it small); the server has it at /plain/stats.npz."""
    path = tmp_path_factory.mktemp("stats") / "x.npz"
    np.savez_compressed(path, mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    hub.files["stats"] = path.read_bytes()
    return hub.files["stats"]


def test_statistics(run: Run, hub: Hub, tmp_path: Path, stats: bytes) -> None:
    url, target = f"{hub.url}/plain/stats.npz", tmp_path / "fid_stats" / "adm_in256_stats.npz"
    hub.cut = 1
    first = run("stats", "--stats_url", url)
    assert first.returncode == 2 and "run the same command again to continue" in first.stderr and not target.exists()
    second = run("stats", "--stats_url", url, "--sha256", hashlib.sha256(stats).hexdigest())
    assert second.returncode == 0, second.stderr
    assert target.read_bytes() == stats and written(tmp_path) == {"fid_stats/adm_in256_stats.npz"}
    assert hub.requests[-1][2] == f"bytes={len(stats) // 2}-"
    assert "is there and right" in run("stats", "--stats_url", url).stdout


def test_wrong_statistics(run: Run, hub: Hub, tmp_path: Path, stats: bytes) -> None:
    url = f"{hub.url}/plain/stats.npz"
    assert "has another hash than --sha256 000000000000..." in run("stats", "--stats_url", url, "--sha256", "0" * 64).stderr
    hub.files["stats"] = b"<html>log in first</html>"
    result = run("stats", "--stats_url", url)
    assert result.returncode == 2 and "is not a file of FID statistics" in result.stderr
    assert not written(tmp_path)
