"""Fixtures of all tests; the plain functions are in tests/helpers.py."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import main_cache
from tests.helpers import CACHE_SIZE, Argv, argv_of, save_cache_vae, save_toy_vae, write_image_folder

# tiny models gain nothing from more, and lose much where the cores are shared; the same sums on any machine
torch.set_num_threads(1)
for module in (torch.utils.data._utils, torch.utils.data._utils.worker):
    module.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds that a loader waits for a process that failed; torch's are 5


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/{china,flower}/00..05.png, 96x80 crops of photographs. Read only: shared by all tests."""
    return write_image_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def cache_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of 20x18 in two classes. Read only."""
    return write_image_folder(tmp_path_factory.mktemp("cache_data"), per_class=5, size=(20, 18))


@pytest.fixture(scope="session")
def cache_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE's file. Read only."""
    return save_cache_vae(tmp_path_factory.mktemp("cache_vae") / "vae.pth")


@pytest.fixture(scope="session")
def npz(cache_data: Path, cache_vae: Path) -> Argv:
    """npz(OUT, flag=value, ...): arguments of main_cache.py for a tree of .npz files in batches of 4."""
    flags = dict(data_path=cache_data, vae_path=cache_vae, img_size=CACHE_SIZE, device="cpu", num_workers=0)
    flags |= dict(format="npz", batch_size=4)
    return lambda out, **changes: argv_of(**(flags | dict(cached_path=out) | changes))


@pytest.fixture(scope="session")
def sharded(npz: Argv) -> Argv:
    """sharded(OUT, flag=value, ...): the same for shards of 6 images, float32, in batches of 2."""
    flags = dict(format=None, shard_size=6, batch_size=2, dtype="float32")
    return lambda out, **changes: npz(out, **(flags | changes))


@pytest.fixture(scope="session")
def shards(sharded: Argv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of two shards, 6 + 4 images. Read only."""
    out = tmp_path_factory.mktemp("shards")
    main_cache.main(sharded(out))
    return out


@pytest.fixture(scope="session")
def npz_tree(npz: Argv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of .npz files, in the same batches. Read only."""
    out = tmp_path_factory.mktemp("npz_tree")
    main_cache.main(npz(out, batch_size=2))
    return out


@pytest.fixture
def own_images(image_root: Path, tmp_path: Path) -> Path:
    """A copy of image_root's train folder that a test may change."""
    return Path(shutil.copytree(image_root / "train", tmp_path / "train"))


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the cache of shards that a test may change."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


@pytest.fixture(scope="session")
def toy_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the VAE of `toy_flags`. Read only: shared by all tests."""
    return save_toy_vae(tmp_path_factory.mktemp("toy_vae") / "vae.pth")


@pytest.fixture(scope="session")
def toy_flags(toy_vae: Path, image_root: Path) -> Argv:
    """toy_flags(output_dir, name=value, ...): a training of 12 images, 3 steps per epoch, head in several groups."""
    model = dict(model="tokenbridge_digits", img_size=32, class_num=2, buffer_size=4, vae_path=toy_vae)
    training = dict(data_path=image_root, batch_size=4, warmup_epochs=0, lr=1e-3, ema_rate=0.9, seed=3, head_chunk=16)
    return lambda output, **changes: argv_of(
        **(model | training | dict(num_workers=0, device="cpu", output_dir=output) | changes)
    )


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The lines that the project's logger writes during the test, INFO and above (it does not propagate, so caplog
    misses them).
    """
    logger, handler = logging.getLogger("tokenbridge"), _Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)
