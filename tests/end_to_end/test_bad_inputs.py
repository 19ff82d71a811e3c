"""Every line of tests/bad_inputs.yaml: exit status 2, the words it promises in one line, nothing written, no code run.

The commands run in this process, in a folder with toy data that all share; after each, the folder must be as it was.
"""

import importlib
import os
import pickle
import shlex
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import main_tokenbridge
from tests.helpers import Explosive, snapshot, tiny_vae, write_image_folder
from util.cli import run_cli

SHEET = yaml.safe_load((Path(__file__).parents[1] / "bad_inputs.yaml").read_text())
CASES, LATE = (
    [[base, *case[1:]] for case in SHEET[part] for base in case[0].split()] for part in ("cases", "late")
)  # one command each


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels that decompresses to far more than it weighs."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def write_bad_checkpoints(root: Path) -> None:
    """Files for --resume, most of them changed from that of the folder `run`."""
    last = root / "run" / "checkpoint-last.pth"
    whole = last.read_bytes()
    broken = {"short": whole[:5000], "start": whole[:100], "nothing": b"", "text": b"no checkpoint\n" * 99}
    for name, content in broken.items():
        (root / f"{name}.pth").write_bytes(content)
    (root / "damaged").mkdir()
    (root / "damaged" / "checkpoint-last.pth").write_bytes(whole[: len(whole) * 7 // 10])
    shutil.copytree(root / "run", root / "other_run")
    torch.save({"model": Explosive(root / "ran")}, root / "evil.pth")
    (root / "pickled.pth").write_bytes(pickle.dumps({"model": Explosive(root / "ran")}, protocol=2))
    torch.save([1, 2], root / "list.pth")
    torch.save({"state_dict": {}, "epoch": 3}, root / "other_dict.pth")
    torch.save({k: v for k, v in torch.load(last, weights_only=True).items() if k != "model_ema"}, root / "plain.pth")
    tokens = {"nan": torch.full((1, 1, 64), float("nan")), "shape": torch.zeros(1, 1, 5), "less": None}
    for name, tensor in tokens.items():
        content = torch.load(last, weights_only=True)
        for part in ("model", "model_ema"):
            content[part]["mask_token"] = tensor
            if tensor is None:
                del content[part]["mask_token"]
        torch.save(content, root / f"{name}.pth")
    for name, setting, value in (
        ("deep", "decoder_depth", 10**12),
        ("many", "class_num", 900_000),
        ("text_depth", "encoder_depth", "three"),
    ):
        content = torch.load(last, weights_only=True)
        content["config"]["model"][setting] = value
        torch.save(content, root / f"{name}.pth")
    flip_a_byte(last, root / "flipped.pth")
    for name, tensor in (
        ("expanded", torch.zeros(1).expand(10**6, 10**6)),
        ("sparse", torch.eye(3).to_sparse()),
        ("meta", torch.zeros(1, 1, 64, device="meta")),
    ):
        torch.save({"model": {"mask_token": tensor}}, root / f"{name}.pth")
    torch.save({"model": {"diffloss.net.x": torch.zeros(2)}, "model_ema": {}, "args": {}}, root / "mar.pth")
    diffusers = {"encoder.mid_block.resnets.0.conv1.weight": torch.zeros(2), "encoder.conv_in.weight": torch.zeros(2)}
    save_file(diffusers, root / "diffusion_pytorch_model.safetensors")


def flip_a_byte(path: Path, copy: Path) -> None:
    """A copy of torch.save's file with another bit in the middle of its largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max((part for part in archive.infolist() if "/data/" in part.filename), key=lambda p: p.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    copy.write_bytes(content)


def write_bad_vaes(root: Path) -> None:
    """Files for --vae_path, changed from vae.pth."""
    key = "encoder.conv_in.weight"
    for name, change in {
        "less": lambda weights: weights.pop(key),
        "shape": lambda weights: weights.update({key: weights[key][:4]}),
        "nan": lambda weights: weights[key].fill_(float("nan")),
        "int": lambda weights: weights.update({key: weights[key].long()}),
        "large": lambda weights: weights.update({key: weights[key].double() * 1e300}),
    }.items():
        content = torch.load(root / "vae.pth", weights_only=True)
        change(content["model"])
        torch.save(content, root / f"vae_{name}.pth")
    torch.save({"model": {}, "config": {"width": 3}}, root / "vae_config.pth")
    for name, sizes in (("huge", {"num_res_blocks": 10**9}), ("wide", {"ch": 4096})):
        content = torch.load(root / "vae.pth", weights_only=True)
        content["config"] |= sizes
        torch.save(content, root / f"vae_{name}.pth")
    flip_a_byte(root / "vae.pth", root / "vae_flipped.pth")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy folder: what every base command of the sheet needs, and the bad files."""
    root = tmp_path_factory.mktemp("bad_inputs")
    write_image_folder(root / "data", per_class=2, size=(40, 36))
    for name, seed in (("vae.pth", None), ("other.pth", 1)):
        vae = tiny_vae()
        if seed:
            torch.nn.init.constant_(vae.quant_conv.bias, 0.1)
        torch.save({"model": vae.state_dict(), "config": vae.config}, root / name)
    for name, content in (("broken", b"not a picture"), ("bomb", bomb(20_000))):
        (root / name / "train" / "a").mkdir(parents=True)
        (root / name / "train" / "a" / f"{name}.png").write_bytes(content)
        for i in range(3):
            Image.new("RGB", (40, 40)).save(root / name / "train" / "a" / f"z{i}.png")
    (root / "empty").mkdir()
    (root / "file").write_text("a file, not a folder")
    for folder, arrays in (
        ("npz_pickle", dict(moments=np.array([{}], dtype=object))),
        ("npz_other", dict(moments=np.zeros((8, 2, 2), np.float32), moments_flip=np.zeros((8, 2, 2), np.float32))),
    ):
        (root / folder / "a").mkdir(parents=True)
        np.savez(root / folder / "a" / "x.png.npz", **arrays)
    here = Path.cwd()
    os.chdir(root)
    try:
        main_tokenbridge.main(shlex.split(SHEET["base"]["train"])[1:] + ["--output_dir", "run"])
    finally:
        os.chdir(here)
    write_bad_checkpoints(root)
    write_bad_vaes(root)
    for name, size, colour in (
        ("photo", 40, "red"),
        ("mask", 40, "white"),
        ("small", 20, "white"),
        ("black", 40, "black"),
    ):
        Image.new("RGB", (size, size), colour).save(root / f"{name}.png")
    np.savez(root / "bad_stats.npz", mu=np.zeros(3))
    np.savez(root / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros(3))
    return root


def arguments(base: str, more: str, drop: list[str]) -> tuple[str, list[str]]:
    """(module, argv): the base's arguments without the flags in `drop` and their values, then `more`."""
    module, *flags = shlex.split(SHEET["base"][base])
    for flag in drop:
        at = flags.index(flag)
        del flags[at : at + 2]
    return module, flags + shlex.split(more)


def test_the_sheet_is_long_enough_and_covers_every_command() -> None:
    assert len(CASES) >= 200 and {case[0] for case in CASES} == SHEET["base"].keys()
    assert all(len(case[2] if isinstance(case[2], str) else case[2][0]) > 5 for case in CASES)
    assert len({str(case[:2] + case[3:]) for case in CASES}) == len(CASES)


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[list], None]:
    """refused(case) runs the case's command in the toy folder and checks its exit status and words."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("TOKENBRIDGE_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a refused command went to the network"))

    def run(case: list) -> None:
        base, more, words = case[:3]
        words = [words] if isinstance(words, str) else words
        module, argv = arguments(base, more, case[3] if len(case) > 3 else [])
        command = importlib.import_module(module + ".__main__" * (module in ("tools.bench", "tools.reproduce")))
        try:
            code = run_cli(lambda: command.main(argv))
        except SystemExit as stop:  # argparse
            code = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert code == 2, lines
        assert len(lines) == 1 and all(part in lines[0].partition("error: ")[2] for part in words), lines
        assert not (place / "ran").exists(), "code in a file was run"

    return run


def named(cases: list[list]) -> dict:
    return dict(argvalues=cases, ids=[f"{c[0]} {c[1]}" for c in cases])


@pytest.mark.parametrize("case", **named(CASES))
def test_bad_input_is_refused_before_anything_is_written(
    place: Path, refused: Callable[[list], None], case: list
) -> None:
    before = snapshot(place)
    refused(case)
    assert snapshot(place) == before


@pytest.mark.parametrize("case", **named(LATE))
def test_bad_files_met_while_working(place: Path, refused: Callable[[list], None], case: list) -> None:
    before = snapshot(place)
    refused(case)
    new = snapshot(place)
    assert {name: new[name] for name in before} == before
    assert not [name for name in new.keys() - before.keys() if name.endswith((".pth", ".png"))]
    for folder in ("out", "new"):
        shutil.rmtree(place / folder, ignore_errors=True)
