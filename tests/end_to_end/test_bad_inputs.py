"""Every line of tests/bad_inputs.yaml: exit status 2, the words it promises in one line, nothing written, no code run.

The commands run in this process, in a folder with toy data that all share; after each, the folder must be as it was.
"""

import importlib
import os
import shlex
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import main_tokenbridge
from tests.helpers import Explosive, tiny_vae, write_image_folder
from util.log import run_cli

SHEET = yaml.safe_load((Path(__file__).parents[1] / "bad_inputs.yaml").read_text())


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
    content = torch.load(root / "run" / "checkpoint-last.pth", weights_only=True)
    content["model_ema"]["mask_token"].fill_(float("nan"))
    torch.save(content, root / "nan.pth")
    (root / "short.pth").write_bytes((root / "run" / "checkpoint-last.pth").read_bytes()[:5000])
    torch.save({"model": Explosive(root / "ran")}, root / "evil.pth")
    torch.save([1, 2], root / "list.pth")
    for name, size, colour in (
        ("photo.png", 40, "red"),
        ("mask.png", 40, "white"),
        ("small.png", 20, "white"),
        ("black.png", 40, "black"),
    ):
        Image.new("RGB", (size, size), colour).save(root / name)
    np.savez(root / "bad_stats.npz", mu=np.zeros(3))
    np.savez(root / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros(3))
    return root


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def arguments(base: str, more: str, drop: list[str]) -> tuple[str, list[str]]:
    """(module, argv): the base's arguments without the flags in `drop` and their values, then `more`."""
    module, *flags = shlex.split(SHEET["base"][base])
    for flag in drop:
        at = flags.index(flag)
        del flags[at : at + 2]
    return module, flags + shlex.split(more)


def test_the_sheet_is_long_enough_and_covers_every_command() -> None:
    assert len(SHEET["cases"]) >= 60
    assert {case[0] for case in SHEET["cases"]} >= SHEET["base"].keys() - {"fid_stats", "vae_stats"}
    assert all(len(case[2]) > 5 for case in SHEET["cases"]) and len(
        {tuple(case[:2]) for case in SHEET["cases"]}
    ) == len(SHEET["cases"])


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[list], None]:
    """refused(case) runs the case's command in the toy folder and checks its exit status and words."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("TOKENBRIDGE_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a refused command went to the network"))

    def run(case: list) -> None:
        base, more, words = case[:3]
        if base == "app":
            pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed: make extras")
        module, argv = arguments(base, more, case[3] if len(case) > 3 else [])
        command = importlib.import_module(module + ".__main__" * (module == "tools.bench"))
        try:
            code = run_cli(lambda: command.main(argv))
        except SystemExit as stop:  # argparse
            code = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert code == 2, lines
        assert len(lines) == 1 and words in lines[0], lines
        assert not (place / "ran").exists(), "code in a file was run"

    return run


def named(cases: list[list]) -> dict:
    return dict(argvalues=cases, ids=[f"{c[0]} {c[1]}" for c in cases])


@pytest.mark.parametrize("case", **named(SHEET["cases"]))
def test_bad_input_is_refused_before_anything_is_written(
    place: Path, refused: Callable[[list], None], case: list
) -> None:
    before = snapshot(place)
    refused(case)
    assert snapshot(place) == before


@pytest.mark.parametrize("case", **named(SHEET["late"]))
def test_bad_files_met_while_working(place: Path, refused: Callable[[list], None], case: list) -> None:
    before = snapshot(place)
    refused(case)
    new = snapshot(place)
    assert {name: new[name] for name in before} == before
    assert not [name for name in new.keys() - before.keys() if name.endswith((".pth", ".png"))]
    for folder in ("out", "new"):
        shutil.rmtree(place / folder, ignore_errors=True)
