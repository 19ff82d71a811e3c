"""dataset/shards.py and dataset/latents.py: what a shard holds, damage, untrusted files, the samples of a cache."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import main_cache
from dataset.image_folder import ImageFolderDataset
from dataset.latents import CachedLatents, ShardedLatents, open_cache
from dataset.loader import GlobalBatchSampler, build_loader
from dataset.record import check_record, read_record
from dataset.shards import RecordSpec, Shard, pack_bits, unpack_bits, write_shard
from models.vae_loading import load_vae
from tests.helpers import CACHE_SHAPE, CACHE_SIZE, GOLDEN, Argv, contents, save_cache_vae

SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")  # 6 + 4 images


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("n", [1, 8, 37])
def test_bits_are_packed_without_loss(bits: int, n: int) -> None:
    indices = np.random.default_rng(bits).integers(2**bits, size=(3, 2, n)).astype(np.int16)
    packed = pack_bits(indices, bits)
    assert packed.dtype == np.uint8 and packed.shape == (3, 2, bits * -(-n // 8))
    assert np.array_equal(unpack_bits(packed, bits, n), indices)


def test_any_reader_of_safetensors_opens_a_shard(shards: Path, cache_data: Path, cache_vae: Path) -> None:
    dataset, vae = ImageFolderDataset(cache_data / "train", CACHE_SIZE, flip=False), load_vae(cache_vae)
    images = torch.stack([dataset.load(i) for i in range(10)])
    with torch.no_grad():
        expected = torch.stack([vae.encode(x).parameters for x in (images, images.flip(-1))], 1)
    parts = [load_file(shards / name) for name in SHARDS]
    assert [len(part["labels"]) for part in parts] == [6, 4]
    assert torch.cat([part["labels"] for part in parts]).tolist() == dataset.labels
    moments = torch.cat([part["moments"] for part in parts])
    assert moments.shape == (10, 2, *CACHE_SHAPE) and moments.dtype == torch.float32
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)
    paths = [name for part in parts for name in bytes(part["paths"].tolist()).rstrip(b"\0").decode().split("\0")]
    assert paths == [f"{c}/{i:02d}.png" for c in ("china", "flower") for i in range(5)]
    assert set(contents(shards)) == {*SHARDS, "cache.json"}


@pytest.mark.parametrize("mode", ["moments", "mean", "indices"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_records_come_back_and_equal_contents_are_equal_files(tmp_path: Path, mode: str, dtype: str) -> None:
    spec = RecordSpec(mode, "uint8" if mode == "indices" else dtype, (2, 3, 3), 2, 5 if mode == "indices" else 0)
    values = torch.arange(3 * 2 * 18).reshape(3, 2, 2, 3, 3) % 32
    for name in "ab":
        arguments = ["a/x.png", "a/y.png", "b/ü.png"], np.array([0, -1, 1]), spec.to_bytes(values)
        write_shard(tmp_path / name, spec, *arguments)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    shard, row = Shard(tmp_path / "a"), np.zeros(spec.nbytes, np.uint8)
    assert shard.spec == spec and shard.paths == arguments[0] and shard.present.tolist() == [True, False, True]
    assert shard.records.shape == (3, 2, spec.nbytes) and shard.wrong_records() == []
    shard.read(2, 1, row)
    assert torch.equal(spec.from_bytes(torch.from_numpy(row)[None])[0].long(), values[2, 1])


def test_shards_of_the_last_version_are_read(tmp_path: Path) -> None:
    """A file of format 1, written by that version: values 0, 1/8, 2/8, ...; its second image could not be read."""
    shutil.copy(GOLDEN / "old_shard.safetensors", tmp_path / SHARDS[0])
    sha256 = "f0269180647bfff0a268d206b4d75f84f687a83d7aebd73f628492dbfaf2210e"
    record = dict(format="shards", complete=True, img_size=32, flips=True, classes=["china", "flower"], images=2)
    entry = {"name": SHARDS[0], "images": 2, "sha256": sha256}
    (tmp_path / "cache.json").write_text(json.dumps(record | {"shards": [entry]}))
    cache = open_cache(tmp_path)
    assert cache.labels == [0, 1] and cache.shards[0].paths == ["china/00.png", "china/01.png", "flower/00.png"]
    assert cache.spec == RecordSpec("moments", "float16", (4, 2, 2), 2)
    expected = torch.arange(96, dtype=torch.float32).reshape(3, 2, 4, 2, 2) / 8
    views = {cache.view_of(seed): cache[1, seed][0] for seed in range(10)}
    assert all(torch.equal(views[view].float(), expected[2, view]) for view in (0, 1))
    assert torch.equal(cache[0][0].float(), expected[0, 0])
    main_cache.main(["--verify", "--cached_path", str(tmp_path)])


def spoil(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["length", "header", "labels", "crc32", "paths", "sources", "moments"])
@pytest.mark.parametrize("end", [False, True])
def test_one_flipped_bit_is_found_by_verify_and_at_read(own_shards: Path, where: str, end: bool) -> None:
    """The first and the last byte of every part of the file."""
    path = own_shards / SHARDS[1]
    start = int.from_bytes(path.read_bytes()[:8], "little") + 8
    header = json.loads(path.read_bytes()[8:start])
    spans = {"length": (0, 8), "header": (8, start)}
    spans |= {k: [start + x for x in v["data_offsets"]] for k, v in header.items() if k != "__metadata__"}
    spoil(path, spans[where][1] - 1 if end else spans[where][0])
    with pytest.raises(ValueError, match=rf"(?s)own.*{SHARDS[1]}"):
        main_cache.main(["--verify", "--cached_path", str(own_shards)])
    with pytest.raises(ValueError, match=rf"shard .*{SHARDS[1]} \(cached_path\) is (damaged|not the one)"):
        open_cache(own_shards).read_batch([(i, seed) for i in range(10) for seed in (0, 1, 2, 3)])
    if where == "moments" and end:
        with pytest.raises(ValueError, match=r"the checksum of flower/04\.png, view 1, is wrong\. Delete this file"):
            for seed in range(10):
                open_cache(own_shards)[9, seed]


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_shard(own_shards: Path, keep: int) -> None:
    path = own_shards / SHARDS[0]
    path.write_bytes(path.read_bytes()[:keep])
    for call in (
        lambda: open_cache(own_shards),
        lambda: main_cache.main(["--verify", "--cached_path", str(own_shards)]),
    ):
        with pytest.raises(ValueError, match=rf"{SHARDS[0]} .*cached_path\) is damaged: it is not a shard as written"):
            call()


def test_a_shard_that_is_truncated_while_in_use(own_shards: Path) -> None:
    cache = open_cache(own_shards)
    (own_shards / SHARDS[1]).write_bytes((own_shards / SHARDS[1]).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} \(cached_path\) is damaged: it changed while in use"):
        cache[9]


def test_a_shard_of_another_cache_or_none_in_its_place(sharded: Argv, own_shards: Path, tmp_path: Path) -> None:
    main_cache.main(sharded(tmp_path / "other", vae_path=save_cache_vae(tmp_path / "other.pth", seed=1)))
    shutil.copy(tmp_path / "other" / SHARDS[0], own_shards / SHARDS[0])
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} \(cached_path\) is not the one that cache\.json lists"):
        open_cache(own_shards)
    (own_shards / SHARDS[0]).unlink()
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} \(cached_path\) is absent though cache\.json lists it"):
        open_cache(own_shards)


@pytest.mark.parametrize(
    ("path", "refused"),
    [("../../etc/cron.d/x", True), ("/etc/passwd", True), ("a/../../b.png", True), ("a/..", True), ("c:\\x", True)]
    + [("a\\..\\b", True), ("a/..b.png", False), ("a/b...png", False), ("a/b c.png", False), ("\\a", True)]
    + [("a/b\\c.png", False), ("C:x/a.png", False)],
)
def test_paths_in_an_index_stay_in_the_data_folder(tmp_path: Path, path: str, refused: bool) -> None:
    spec = RecordSpec("mean", "float32", (1, 2, 2), 1)
    records = spec.to_bytes(torch.ones(2, 1, 1, 2, 2))
    write_shard(tmp_path / "shard", spec, ["ok/a.png", path], np.array([0, 0]), records)
    if refused:
        with pytest.raises(ValueError, match="a path in its index leaves the data folder"):
            Shard(tmp_path / "shard")
    else:
        assert Shard(tmp_path / "shard").paths == ["ok/a.png", path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(complete="yes"), "is not a record of main_cache"),
        (lambda r: r.pop("img_size"), "is not a record of main_cache"),
        (lambda r: r.update(shards=[1]), "is not a record of main_cache"),
        (lambda r: r.update(shards=[]), "holds no finished shards"),
        (lambda r: r.update(classes=["china"]), "has a label 1 but 1 classes"),
        (lambda r: r.update(complete=False), "is not finished: run main_cache.py again"),
    ]
    + [
        (lambda r, name=name: r["shards"][0].update(name=name), "names a shard .* which is no file of this folder")
        for name in ("../secret.safetensors", "/etc/passwd", f"{SHARDS[0]}/../../x", "shard-1.safetensors", "x.pt")
    ],
)
def test_records_that_are_refused(own_shards: Path, change: Callable, words: str) -> None:
    record = json.loads((own_shards / "cache.json").read_text())
    change(record)
    (own_shards / "cache.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=words):
        open_cache(own_shards)


def test_shards_and_npz_give_the_same_samples(shards: Path, npz_tree: Path, cache_data: Path, cache_vae: Path) -> None:
    """To the bit; and images, encoded by the same VAE, the same up to rounding."""
    sharded, npz, vae = open_cache(shards), open_cache(npz_tree), load_vae(cache_vae)
    images = ImageFolderDataset(cache_data / "train", CACHE_SIZE)
    assert isinstance(sharded, ShardedLatents) and isinstance(npz, CachedLatents)
    assert len(sharded) == len(npz) == len(images) == 10 and sharded.labels == npz.labels == images.labels
    assert sharded.classes == npz.classes and sharded.shape == npz.shape == CACHE_SHAPE
    sampler = GlobalBatchSampler(10, 5, 0, 1, seed=3)
    for workers in (0, 2):
        loaders = [
            build_loader(data, sampler, n, False) for data, n in ((sharded, workers), (npz, workers), (images, 0))
        ]
        for a, b, c in zip(*loaders, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[1], c[1])
            with torch.no_grad():
                torch.testing.assert_close(vae.encode(c[0]).parameters, a[0], rtol=0, atol=1e-5)
    assert torch.equal(sharded[4, 1][0], npz[4, 1][0]) and torch.equal(sharded[4][0], npz[4][0])


def test_a_data_set_that_is_sent_to_another_process_maps_its_files_there(shards: Path) -> None:
    cache = open_cache(shards)
    first = cache[7, 3][0]
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 20_000 and torch.equal(copy[7, 3][0], first)


def test_records_are_mapped_and_no_file_stays_open(shards: Path) -> None:
    cache, before = open_cache(shards), len(os.listdir("/proc/self/fd"))
    cache.read_batch([(i, i) for i in range(10)])
    maps = [shard.records for shard in cache.shards]
    cache.read_batch([(i, i) for i in range(10)])
    assert all(shard.records is records for shard, records in zip(cache.shards, maps, strict=True))
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(str(shards / name) in Path("/proc/self/maps").read_text() for name in SHARDS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(fingerprint="0" * 64),
            r"made with another VAE \(vae\.pth\) than vae_path \(fingerprints [0-9a-f]{12} and 000000000000\)",
        ),
        (dict(img_size=32), "was made with img_size 16, this run has img_size 32"),
        (dict(classes=["china", "house"]), "first difference: class 1 is 'flower' here and 'house' there"),
        (
            dict(classes=["china", "flower", "house"]),
            "has 2 classes, the checkpoint was trained with 3; first difference: class 2 is 'none' here",
        ),
        (dict(classes=["china"]), "first difference: class 1 is 'flower' here and 'none' there"),
    ],
)
def test_a_run_that_a_cache_contradicts(shards: Path, changes: dict, words: str) -> None:
    record = read_record(shards)
    good = dict(fingerprint=record["latent_fingerprint"], img_size=CACHE_SIZE, classes=["china", "flower"])
    check_record(shards, record, **good)
    with pytest.raises(ValueError, match=words):
        check_record(shards, record, **(good | changes))


def test_folders_that_are_no_cache(sharded: Argv, own_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent \(cached_path\)"):
        open_cache(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no class folders"):
        open_cache(tmp_path / "empty")
    main_cache.main(sharded(tmp_path / "plain", no_flip=True))
    with pytest.raises(ValueError, match="has no mirrored images: train without them too .no_flip"):
        open_cache(tmp_path / "plain")
    with pytest.raises(ValueError, match="has 2 classes, more than 1 .class_num"):
        open_cache(tmp_path / "plain", flip=False, class_num=1)
    (own_shards / "cache.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no cache.json"):
        open_cache(own_shards)
