"""Ctrl-C, as a terminal sends it to all processes of a command: exit code 130, one line, no process left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main_tokenbridge
from tests.helpers import REPO, Argv, argv_of, save_toy_vae, write_image_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_flags: Argv) -> Path:
    """Many images (names of a few), a VAE and a trained model: enough work for every command."""
    root = tmp_path_factory.mktemp("interrupt")
    write_image_folder(root / "data", per_class=2, size=(96, 80))
    for folder in (root / "data" / "train").iterdir():
        for i in range(3000):
            (folder / f"x{i}.png").symlink_to(folder / "00.png")
    save_toy_vae(root / "vae.pth")
    main_tokenbridge.main(toy_flags(root / "run", max_steps=1))
    return root


MODEL = dict(model="tokenbridge_digits", img_size=32, class_num=2, buffer_size=4, batch_size=4, epochs=10**5)
DATA = dict(data_path="data", vae_path="vae.pth", device="cpu")
TRAIN = MODEL | DATA | dict(output_dir="OUT", num_workers=0, log_freq=1)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 main_tokenbridge.py"
SAMPLE = dict(sample=True, resume="run", vae_path="vae.pth", classes=0, num_images=10**5, device="cpu")
VAE = dict(data_path="data", img_size=32, width=32, batch_size=2, device="cpu", log_freq=1)
RECONSTRUCT = dict(vae_path="vae.pth", image_dir="data/train", img_size=32, images_per_class="all", no_rfid=True)
OUT, TWO = dict(output_dir="OUT"), dict(num_workers=2)
COMMANDS = {  # command, flags, the words after which it is interrupted
    "train": ("main_tokenbridge.py", TRAIN, "step 3/"),
    "train, 2 workers": ("main_tokenbridge.py", TRAIN | TWO, "step 3/"),
    "torchrun": (TORCHRUN, TRAIN | dict(num_workers=1, batch_size=2), "step 3/"),
    "sample": ("main_tokenbridge.py", SAMPLE | OUT, "loaded the"),
    "cache": ("main_cache.py", DATA | dict(img_size=32, cached_path="OUT", batch_size=1) | TWO, "VAE"),
    "vae": ("main_vae.py", VAE | OUT | TWO, "step 3/"),
    "reconstruction": ("reconstruction.py", RECONSTRUCT | dict(device="cpu") | OUT | TWO, "images"),
    "vae_stats": ("-m tools.vae_stats", DATA | dict(img_size=32) | OUT | TWO, "images in 2 classes"),
    "demo": ("-m demo.run", dict(output_dir="OUT", pictures="OUT"), "epoch 0 step"),
    "while importing": ("main_tokenbridge.py", dict(help=True), "numpy"),
}


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c(place: Path, tmp_path: Path, name: str) -> None:
    script, flags, words = COMMANDS[name]
    script = [str(REPO / part) if part.endswith(".py") else part for part in script.split()]
    flags = {key: str(tmp_path / "out") if value == "OUT" else value for key, value in flags.items()}
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *script, *argv_of(**flags)],
            cwd=place,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    memory = Path(f"/proc/{process.pid}/maps")  # shows which libraries are imported already
    while words not in (log if words != "numpy" else memory).read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    before = log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == (1 if name == "torchrun" else 130), log.read_text()
    deadline = time.monotonic() + 10
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)
    new = log.read_text()[len(before) :]
    lines = [line for line in new.splitlines() if line == "interrupted"]
    if name == "torchrun":  # whose own traceback follows
        assert len(lines) == 2 and f'File "{REPO}/' not in new.replace(f"{REPO}/.venv/", ""), new
    else:
        assert len(lines) == 1 and new.splitlines()[-1] == "interrupted" and "Traceback" not in new, new
    assert not list((tmp_path / "out").rglob("*.lock")) and not list((tmp_path / "out").rglob(".*.tmp"))
