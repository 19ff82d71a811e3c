"""What a stage costs: FLOPs by closed formulas, seconds at the measured rate of this machine, bytes on the disk.

Letters: L tokens, S buffer slots, V visible tokens, M tokens predicted at a step.
"""

import functools
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

from models.config import TokenBridgeConfig
from models.sampling.schedules import unmasking_plan
from models.vae import AutoencoderKL
from tools.bench.counting import count, fake_mode, timed
from training.flops import block_flops, head_flops
from util import dist
from util.checkpoint import versions
from util.cli import ROOT

INCEPTION_FLOPS = 11.4e9  # of one image at 299 x 299: 5.7 G multiply-adds
# Bytes of a download; of a checkpoint at most: weights, EMA and both of AdamW's averages in float32.
DOWNLOAD_BYTES = {"vae": 0.3e9, "large": 16 * 487e6, "huge": 16 * 911e6, "stats": 4e7, "adm_batch": 2.1e9}
DOWNLOAD_BYTES["inception"] = 1e8
PACKAGES = ("torchvision", "torch-fidelity", "timm", "scipy", "pillow")  # that decide figures, besides torch's own
RATE_IMAGES = 16  # images whose tokens pass through the block that is timed


def sampling_flops(config: TokenBridgeConfig, num_iter: int, guided: bool = True) -> float:
    """FLOPs of one image: the published schedule, both passes of the guidance, the last block for M tokens only.

    The first step's unconditional pass is one row for the whole batch and is left out.
    """
    c, total = config, 0.0
    slots, wide, deep, ratio = c.buffer_size, c.encoder_embed_dim, c.decoder_embed_dim, c.mlp_ratio
    everything = slots + c.num_tokens
    for before, after, _ in unmasking_plan(num_iter, c.num_tokens):
        visible, predicted = c.num_tokens - before, before - after
        if not predicted:
            continue
        seen = slots + visible
        encoder = 2 * visible * c.vae_embed_dim * wide + c.encoder_depth * block_flops(seen, wide, ratio)
        last = 4 * everything * deep**2 + predicted * (2 * deep**2 * (2 + 2 * ratio) + 4 * everything * deep)
        decoder = 2 * seen * wide * deep + (c.decoder_depth - 1) * block_flops(everything, deep, ratio) + last
        total += (encoder + decoder) * (2 if guided and visible else 1) + predicted * head_flops(c)
    return total


@functools.cache
def vae_flops(img_size: int = 256, **shape: object) -> tuple[float, float]:
    """FLOPs of the encoder and the decoder for one image, counted on fake tensors. shape: of AutoencoderKL."""
    with fake_mode(), torch.no_grad():
        vae = AutoencoderKL(**shape)
        image = torch.zeros(1, 3, img_size, img_size)
        latent = torch.zeros(1, vae.embed_dim, img_size // vae.stride, img_size // vae.stride)
        return count(lambda: vae.encode(image)).flops, count(lambda: vae.decode(latent)).flops


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage in half precision (transformer) and in float32 (VAE, Inception), and bytes that it writes."""

    half: float = 0.0
    single: float = 0.0
    written: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.half + other.half, self.single + other.single, self.written + other.written)

    def seconds(self, half_rate: float, single_rate: float) -> float:
        """At these rates, FLOP/s of all devices together."""
        return self.half / half_rate + self.single / single_rate


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
