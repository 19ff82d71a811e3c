"""This machine: how fast it computes, what is free on its disks, and what the report says of it."""

import multiprocessing
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from tools.bench.counting import timed
from training.flops import block_flops
from util import dist
from util.cli import ROOT
from util.seeds import versions

PACKAGES = ("torchvision", "torch-fidelity", "timm", "scipy", "pillow")  # that decide figures, besides torch's own
RATE_IMAGES = 16  # images whose tokens pass through the block that is timed


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one device, measured or assumed."""

    device: str
    half: float
    single: float


def rates_here(device_flag: str, width: int, heads: int, precision: str) -> Rates:
    """FLOP/s of one transformer block at the precision and of one convolution in float32, measured on the device.

    In a process of its own, so that this one keeps no memory of the device.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_rates, device_flag, width, heads, precision).result()


@torch.no_grad()
def _measure_rates(device_flag: str, width: int, heads: int, precision: str) -> Rates:
    from timm.models.vision_transformer import Block

    device = dist.init(device_flag)
    on_cpu = device.type == "cpu"
    images, tokens, channels, side = (1, 320, 32, 64) if on_cpu else (RATE_IMAGES, 320, 256, 128)
    block = Block(width, heads, qkv_bias=True).to(device).eval()
    x = torch.randn(images, tokens, width, device=device)
    convolution = nn.Conv2d(channels, channels, 3, padding=1).to(device)
    pixels = torch.randn(images, channels, side, side, device=device)

    def run_block() -> None:
        with dist.autocast(device, precision):
            for _ in range(1 if on_cpu else 20):
                block(x)

    seconds = timed([run_block, partial(convolution, pixels)], 5, device, warm_up=2)
    half = (1 if on_cpu else 20) * images * block_flops(tokens, width, 4.0) / seconds[0]
    return Rates(dist.device_name(device), half, 18 * channels**2 * side**2 * images / seconds[1])


def full_disks(needed: Iterable[tuple[Path, float]]) -> list[str]:
    """A sentence for each file system that has less free space than the (path, bytes) on it need."""
    by_disk: dict[int, tuple[Path, float]] = {}
    for path, size in needed:
        folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
        number = os.stat(folder).st_dev
        by_disk[number] = folder, by_disk.get(number, (folder, 0.0))[1] + size
    sentences = []
    for folder, size in by_disk.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            sentences.append(f"{folder} has {free / 1e9:.1f} GB of free space, {size / 1e9:.1f} GB are needed")
    return sentences


def describe_machine(device: str) -> dict[str, object]:
    """The card ("cpu": the processor's architecture and cores), the versions of what decides figures, and the code."""
    name, cards = f"{platform.machine()}, {os.cpu_count()} cores", 0
    if device != "cpu":
        name, cards = dist.device_name(dist.pick_device(device)), dist.device_count()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    found = {package: metadata.version(package) for package in PACKAGES}
    return {"device": name, "devices": cards, "commit": commit} | versions() | found
