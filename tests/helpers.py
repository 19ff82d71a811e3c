"""What several test files share: the golden arrays, tiny models, real pictures, torchrun.

What is slow to make is a session fixture (tests/conftest.py), to be read and never changed.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import MODELS
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tools.bench.counting import no_fake_gpu
from training.sharding import cannot_shard

REPO = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

torch.set_num_threads(1)

# The toy trainings' model is the demo's, one block deep: half of the time goes into each of them.
DIGITS_MODEL = MODELS["tokenbridge_digits"]
SMALLER = dict(encoder_embed_dim=64, decoder_embed_dim=64, encoder_depth=1, decoder_depth=1, channel_depth=1)
MODELS["tokenbridge_digits"] = functools.partial(DIGITS_MODEL, **SMALLER)


# ------------------------------------------------------------------------------------------------------- golden arrays


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def golden_json(name: str) -> dict:
    """tests/golden/<name>.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_weight(key: str, shape: Sequence[int]) -> np.ndarray:
    """The weight that the golden rule gives a parameter: float64, from its state-dict key and shape alone
    (tests/golden/README.md).
    """
    shape = tuple(shape)
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) == 1:
        return 1 + 0.1 * noise if key.endswith(".weight") else 0.05 * noise
    if ("emb" in key and not key.startswith("decoder_embed.")) or key in ("fake_latent", "mask_token"):
        return 0.2 * noise
    noise /= np.sqrt(np.prod(shape[1:]))  # in place: the weights of large models take seconds
    return noise


def fill_golden(module: nn.Module) -> nn.Module:
    """Set every parameter (no buffer) of the module by the golden rule, in place; returns the module."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(golden_weight(key, parameter.shape)))
    return module


# ------------------------------------------------------------------------------------------------------- small models


def tiny_config(**changes: object) -> dict:
    """Constructor arguments of the golden tiny model: 4x4 tokens of 16 channels, 16 levels, 10 classes, dropout and
    label drop 0.
    """
    return golden_json("train_tiny")["config"] | dict(attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0) | changes


def tiny_model(**changes: object) -> TokenBridge:
    """The golden tiny model in eval mode, filled by the golden rule."""
    return fill_golden(TokenBridge(**tiny_config(**changes))).eval()


def tiny_vae(**changes: object) -> AutoencoderKL:
    """A VAE whose latents fit the tiny model (64 px <-> 16 channels at 4x4), weights drawn from seed 0, eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(embed_dim=16, ch_mult=(1, 1, 2, 2, 2), ch=8, num_res_blocks=1, norm_groups=4)
        return AutoencoderKL(**sizes | changes).eval()


def tiny_batch(batch: int = 4, channels: int = 16, grid: int = 4, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) ~ N(0, 1) and labels (B,), always the same."""
    rng = np.random.default_rng(5)
    latents = rng.standard_normal((batch, channels, grid, grid)).astype(np.float32)
    return torch.from_numpy(latents), torch.from_numpy(rng.integers(classes, size=batch))


# ------------------------------------------------------------------------------------------------------- real pictures


@functools.cache
def photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs (china.jpg, flower.jpg), uint8 (427, 640, 3). Read only: shared by all tests."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(image, dtype=np.uint8) for image in load_sample_images().images]


def write_image_folder(root: Path, per_class: int = 6, size: tuple[int, int] = (96, 80), split: str = "train") -> Path:
    """root/<split>/{china,flower}/NN.png, crops (width, height) of the photographs; returns root."""
    width, height = size
    for name, photo in zip(("china", "flower"), photographs(), strict=True):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(name))
        for i in range(per_class):
            top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
            Image.fromarray(photo[top : top + height, left : left + width]).save(folder / f"{i:02d}.png")
    return root


# ---- command lines, caches


Argv = Callable[..., list[str]]  # (folder, flag=value, ...) -> a command line


def argv_of(**flags: object) -> list[str]:
    """--name value for each flag; True stands for a bare --name, None leaves the flag out, a list has several
    values.
    """
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        argv += [] if value is None else [f"--{name}", *(() if value is True else map(str, values))]
    return argv


def save_toy_vae(path: Path) -> Path:
    """The file of a VAE whose latents fit the toy training: 32 px <-> 4 channels at 4x4."""
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    torch.save({"model": vae.state_dict(), "config": vae.config}, path)
    return path


def assert_same(a: object, b: object) -> None:
    """Equal bit for bit, through nested dicts, lists and tuples of tensors."""
    assert type(a) is type(b) or isinstance(a, dict) and isinstance(b, dict)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def log_of(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """The lines of a run's log without what depends on the clock and the machine."""
    measured = ("time", "images_per_s", "tflops", "mfu", "data_wait", "memory_gib")
    lines = map(json.loads, (folder / name).read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


CACHE_SIZE, CACHE_SHAPE = 16, (8, 8, 8)  # pixels; moments of 4 channels at stride 2


def save_cache_vae(path: Path, seed: int = 0, with_config: bool = True) -> Path:
    """A tiny VAE file (32 wide, stride 2, 4 channels) with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(embed_dim=4, ch_mult=(1, 1), ch=32, num_res_blocks=1, attention=False, scale_factor=1.5)
    torch.save({"model": vae.state_dict()} | ({"config": vae.config} if with_config else {}), path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


# ---- log, processes, operations


def torchrun(
    arguments: Sequence[str | Path], nproc: int, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=nproc ARGUMENTS` on a free port, in the repository, one thread each; output captured
    as text.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""} | (env or {})
    how = dict(cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout)
    return subprocess.run([*launcher, *map(str, arguments)], **how)


@contextlib.contextmanager
def fake_gpu(allow_non_fake_inputs: bool = False) -> Iterator[None]:
    """Within the block tensors on "cuda" have shapes and no numbers; skips the test where this torch cannot make
    them.
    """
    if no_fake_gpu():
        pytest.skip(no_fake_gpu())
    with FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs):
        yield


def skip_unless_shardable() -> None:
    """Skips the test where this torch cannot shard on a CPU."""
    if reason := cannot_shard(torch.device("cpu")):
        pytest.skip(reason)


class RecordOps(TorchDispatchMode):
    """Within the block: `names` of the aten operations in order, and of each tensor they made its `devices` entry and
    `largest` size; not of tensors without elements (torch 2.11 makes one on the CPU for each checkpointed function).
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: list[tuple[str, str]] = []  # (operation, device type of a result)
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.append(name)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel():
                self.devices.append((name, tensor.device.type))
                self.largest = max(self.largest, tensor.numel())
        return out


class Explosive:
    """Its pickle runs code: unpickling it makes the file `path`. For tests that loading refuses code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))
