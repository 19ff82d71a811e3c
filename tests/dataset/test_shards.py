"""dataset/shards.py, dataset/latents.py and main_cache.py --format shards: what a shard holds, kills, full disks, damage, and who may read it."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import main_cache
from dataset import encode as engine_cache
from dataset.latents import CachedLatents, ShardedLatents, check_record, open_cache, read_record
from dataset.loader import GlobalBatchSampler, ImageFolderDataset, build_loader, coin
from dataset.shards import RecordSpec, Shard, pack_bits, unpack_bits
from main_cache import main
from models.vae import load_vae
from tests.end_to_end.test_main_cache import SHAPE, SIZE, save_vae
from tests.end_to_end.test_main_cache import arguments as npz_arguments
from tests.helpers import run_processes, write_image_folder

SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")  # 6 + 4 images; in batches of 2


def arguments(data: Path, vae_path: Path, out: Path, /, **changes: object) -> list[str]:
    return npz_arguments(data, vae_path, out, **(dict(format=None, shard_size=6, batch_size=2) | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("shard_data"), per_class=5, size=(20, 18))


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("shard_vae") / "vae.pth")


@pytest.fixture(scope="module")
def finished(data: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache, float32. Read only."""
    out = tmp_path_factory.mktemp("finished_shards")
    main(arguments(data, vae_path, out, dtype="float32"))
    return out


@pytest.fixture(scope="module")
def tree(data: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as .npz files. Read only."""
    out = tmp_path_factory.mktemp("npz_tree")
    main(npz_arguments(data, vae_path, out, batch_size=2))
    return out


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "own"))


# ------------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("n", [1, 8, 37])
def test_bits_are_packed_without_loss(bits: int, n: int) -> None:
    indices = np.random.default_rng(bits).integers(2**bits, size=(3, 2, n)).astype(np.int16)
    packed = pack_bits(indices, bits)
    assert packed.dtype == np.uint8 and packed.shape == (3, 2, bits * -(-n // 8))
    assert np.array_equal(unpack_bits(packed, bits, n), indices)


def test_any_reader_of_safetensors_opens_a_shard(finished: Path, data: Path, vae_path: Path) -> None:
    dataset, vae = ImageFolderDataset(data / "train", SIZE, flip=False), load_vae(vae_path)
    images = torch.stack([dataset.load(i) for i in range(10)])
    with torch.no_grad():
        expected = torch.stack([vae.encode(x).parameters for x in (images, images.flip(-1))], 1)
    parts = [load_file(finished / name) for name in SHARDS]
    assert [len(part["labels"]) for part in parts] == [6, 4] and torch.cat(
        [part["labels"] for part in parts]
    ).tolist() == dataset.labels
    moments = torch.cat([part["moments"] for part in parts])
    assert moments.shape == (10, 2, *SHAPE) and moments.dtype == torch.float32
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)
    paths = [name for part in parts for name in bytes(part["paths"].tolist()).rstrip(b"\0").decode().split("\0")]
    assert paths == [f"{c}/{i:02d}.png" for c in ("china", "flower") for i in range(5)]
    assert set(files(finished)) == {*SHARDS, "cache.json"}


def test_the_record(finished: Path, vae_path: Path) -> None:
    record, vae = json.loads((finished / "cache.json").read_text()), load_vae(vae_path)
    assert (
        record["format"] == "shards"
        and record["complete"] is True
        and record["images"] == 10
        and record["corrupt"] == 0
    )
    assert (
        record["classes"] == ["china", "flower"]
        and record["img_size"] == SIZE
        and record["dtype"] == "float32"
        and record["mode"] == "moments"
    )
    assert (
        record["latent_fingerprint"] == vae.latent_fingerprint()
        and record["scale_factor"] == 1.5
        and record["vae"] == vae.config
    )
    assert [(s["name"], s["images"]) for s in record["shards"]] == [(SHARDS[0], 6), (SHARDS[1], 4)]


@pytest.mark.parametrize(
    ("changes", "size", "limit"),
    [
        (dict(dtype="float16"), 2 * 1024, 2e-3),
        (dict(dtype="bfloat16"), 2 * 1024, 2e-2),
        (dict(mode="mean"), 2 * 512, 2e-3),
        (dict(no_flip=True), 1024, 2e-3),
        (dict(mode="indices", quant_bits=6), 2 * 192, None),
        (dict(mode="indices", quant_bits=3, quantizer="uniform", quant_max=4), 2 * 96, None),
    ],
)
def test_smaller_records(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, changes: dict, size: int, limit: float | None
) -> None:
    main(arguments(data, vae_path, tmp_path, **changes))
    cache, full = open_cache(tmp_path, flip="no_flip" not in changes), open_cache(finished)
    assert cache.spec.views * cache.spec.nbytes == size and len(cache) == 10 and cache.labels == full.labels
    values, reference = cache[3][0], full[3][0]
    if limit is not None:
        assert values.dtype == getattr(torch, changes.get("dtype", "float16")) and torch.isfinite(values).all()
        assert 0 < (values.float() - reference[: len(values)]).abs().max() < limit * reference.abs().max()
        return
    assert (
        values.dtype == torch.int16
        and cache.shape == (4, 8, 8)
        and cache.record["quantizer"]["bits"] == changes["quant_bits"]
    )
    q, vae = (
        main_cache.build_quantizer(
            changes.get("quantizer", "gaussian"), changes["quant_bits"], -5, changes.get("quant_max", 5)
        ),
        load_vae(vae_path),
    )
    mean, logvar = reference.chunk(2)
    spread = torch.exp(logvar / 2) * 1.5
    # a sample, then a cell
    error = (q.dequantize(values.long()) - vae.scale(mean)).abs() - 6 * spread - torch.diff(q.boundaries).max() * 10 / 6
    assert (error < 0).all() and values.unique().numel() > 2


def test_an_index_cache_is_a_sample_that_depends_on_seed_image_and_view_alone(
    data: Path, vae_path: Path, tmp_path: Path
) -> None:
    for name, changes in (("a", {}), ("b", dict(shard_size=4, batch_size=4)), ("c", dict(seed=1))):
        main(arguments(data, vae_path, tmp_path / name, mode="indices", **changes))
    a, b, c = (open_cache(tmp_path / name) for name in "abc")
    # other batches: last bits only
    assert all((a[i, s][0] != b[i, s][0]).float().mean() < 0.01 for i in range(10) for s in range(4))
    assert any(not torch.equal(a[i][0], c[i][0]) for i in range(10))


def test_crops(data: Path, vae_path: Path, tmp_path: Path) -> None:
    main(arguments(data, vae_path, tmp_path, crops=3, dtype="float32"))
    cache = open_cache(tmp_path)
    assert cache.spec.views == 6 and cache.crops == 3
    views = {cache.view_of(seed) for seed in range(200)}
    assert views == set(range(6)) and cache.view_of(None) == 0
    assert all(cache.view_of(seed) % 2 == coin(seed) for seed in range(50))
    crops = [cache.shards[0].records[2, view].tobytes() for view in range(6)]
    assert len(set(crops)) == 6
    with pytest.raises(ValueError, match="--crops was 3, now 1"):
        main(arguments(data, vae_path, tmp_path, dtype="float32"))


# ------------------------------------------------------------------------------------------------------- kills


def killed_at(point: str, argv: list[str]) -> None:
    """Run main in a forked process that kills itself (SIGKILL) at `point`; fails if it was not killed."""
    child = os.fork()
    if child == 0:
        try:
            plant(point)
            main(argv)
        finally:
            os._exit(1)  # the point was never reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{point}: status {status}"


def plant(point: str) -> None:
    """Make the process kill itself at a point; only ever called in a forked process."""

    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def nth(function: Callable, n: int, instead: Callable) -> Callable:
        calls = []

        def wrapped(*args: object, **kwargs: object) -> object:
            calls.append(1)
            return instead(function, *args, **kwargs) if len(calls) == n else function(*args, **kwargs)

        return wrapped

    def half(function: Callable, descriptor: int, content: bytes, *rest: object) -> None:
        function(descriptor, bytes(content)[: len(content) // 2], *rest)
        die()

    def after(function: Callable, *args: object) -> None:
        function(*args)
        die()

    writer = engine_cache.ShardWriter
    if point == "record written, nothing encoded":
        engine_cache.ShardFiles.plan = die
    elif point == "half of a batch's records written":
        os.pwrite = nth(os.pwrite, 2, half)
    elif point == "records written, not in the journal":
        os.write = nth(os.write, 2, die)
    elif point == "half a line in the journal":
        os.write = nth(os.write, 2, half)
    elif point == "all batches done, no head":
        writer.finish = die
    elif point == "whole, not renamed":
        os.replace = nth(os.replace, 2, die)  # the first is cache.json
    elif point == "renamed, journal still there":
        os.replace = nth(os.replace, 2, after)
    elif point == "every shard there, record not":
        main_cache.write_json = nth(main_cache.write_json, 2, die)
    else:
        raise AssertionError(point)


@pytest.mark.parametrize(
    ("point", "images_left"),
    [
        ("record written, nothing encoded", 10),
        ("half of a batch's records written", 8),
        ("records written, not in the journal", 8),
        ("half a line in the journal", 8),
        ("all batches done, no head", 4),
        ("whole, not renamed", 4),
        ("renamed, journal still there", 4),
        ("every shard there, record not", 0),
    ],
)
def test_after_kill_9_only_what_is_missing_is_encoded_and_every_byte_is_the_same(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, messages: list[str], point: str, images_left: int
) -> None:
    argv = arguments(data, vae_path, tmp_path, dtype="float32")
    killed_at(point, argv)
    assert json.loads((tmp_path / "cache.json").read_text())["complete"] is False
    with pytest.raises(ValueError, match="is not finished: run main_cache.py again"):
        open_cache(tmp_path)
    main(argv)
    assert files(tmp_path) == files(finished)  # cache.json too, and no hidden file
    assert any(f"is complete: {images_left} images encoded, {10 - images_left} were there" in line for line in messages)


@pytest.mark.slow
def test_a_job_killed_alone_is_finished_by_two_processes(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path
) -> None:
    argv = arguments(data, vae_path, tmp_path, dtype="float32")
    killed_at("half of a batch's records written", argv)
    done = run_processes(["main_cache.py", *argv], nproc=2)
    assert done.returncode == 0, done.stderr
    assert "8 images encoded, 2 were there" in done.stderr and files(tmp_path) == files(finished)


def test_what_another_command_left_behind_is_not_continued(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, messages: list[str]
) -> None:
    killed_at("records written, not in the journal", arguments(data, vae_path, tmp_path, dtype="float32"))
    with pytest.raises(ValueError, match="--dtype was float32, now bfloat16"):
        main(arguments(data, vae_path, tmp_path, dtype="bfloat16"))
    main(arguments(data, vae_path, tmp_path, dtype="float32", overwrite=True))
    assert any("10 images encoded, 0 were there" in line for line in messages) and files(tmp_path) == files(finished)
    main(arguments(data, save_vae(tmp_path / "other.pth", seed=1), tmp_path / "third", dtype="float32"))
    assert files(tmp_path / "third")[SHARDS[0]] != files(finished)[SHARDS[0]]


def test_records_that_changed_under_a_killed_job_are_encoded_anew(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, messages: list[str]
) -> None:
    """The journal's checksums are compared with the file, so what a power cut lost is found."""
    argv = arguments(data, vae_path, tmp_path, dtype="float32")
    killed_at("all batches done, no head", argv)
    partial = tmp_path / f".{SHARDS[0]}.partial"
    content = bytearray(partial.read_bytes())
    content[-1] ^= 1
    partial.write_bytes(content)
    main(argv)
    assert any("is complete: 6 images encoded, 4 were there" in line for line in messages) and files(tmp_path) == files(
        finished
    )


# ------------------------------------------------------------------------------------------------------- corrupt images, full disks


def test_corrupt_images_are_listed_and_once_mended_encoded(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, messages: list[str]
) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    for name in ("china/01.png", "flower/04.png"):
        (root / "train" / name).write_bytes(b"not a picture")
    out = tmp_path / "out"
    with pytest.raises(
        ValueError,
        match=r"2 of 10 images are corrupt and listed in .*bad_images\.txt; all others are cached\. First: .*01\.png",
    ):
        main(arguments(root, vae_path, out, dtype="float32"))
    assert (out / "bad_images.txt").read_text() == "china/01.png\nflower/04.png\n" and read_record(out)[
        "complete"
    ] is False
    main(arguments(root, vae_path, out, dtype="float32", on_bad_image="skip"))
    record = read_record(out)
    assert (record["complete"], record["images"], record["corrupt"]) == (True, 8, 2) and (
        out / "bad_images.txt"
    ).exists()
    assert any("is complete: 0 images encoded, 8 were there, 2 corrupt" in line for line in messages)
    cache, whole = open_cache(out), open_cache(finished)
    assert len(cache) == 8 and cache.labels == [0] * 4 + [1] * 4
    assert all(torch.equal(cache[i][0], whole[j][0]) for i, j in enumerate((0, 2, 3, 4, 5, 6, 7, 8)))
    main(["--verify", "--cached_path", str(out)])
    shutil.copy(data / "train" / "china" / "01.png", root / "train" / "china" / "01.png")
    main(arguments(root, vae_path, out, dtype="float32", on_bad_image="skip"))
    assert (out / "bad_images.txt").read_text() == "flower/04.png\n" and files(out)[SHARDS[0]] == files(finished)[
        SHARDS[0]
    ]
    shutil.copy(data / "train" / "flower" / "04.png", root / "train" / "flower" / "04.png")
    main(arguments(root, vae_path, out, dtype="float32", on_bad_image="skip"))
    assert files(out) == files(finished)


@pytest.mark.parametrize("where", ["a shard's start", "a batch"])
def test_a_full_disk_is_a_clear_error_and_finished_shards_stay(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    calls, name = [], {"a shard's start": "posix_fallocate", "a batch": "pwrite"}[where]
    real = getattr(os, name)

    def full(*args: object) -> object:
        calls.append(1)
        if len(calls) > {"posix_fallocate": 1, "pwrite": 5}[name]:  # the second shard; its second batch
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(
            OSError,
            match=r"cannot write to .* \(--cached_path\): No space left on device\. What is finished stays valid.*same command",
        ):
            main(arguments(data, vae_path, tmp_path, dtype="float32"))
    assert files(tmp_path)[SHARDS[0]] == files(finished)[SHARDS[0]] and not (tmp_path / SHARDS[1]).exists()
    assert Shard(tmp_path / SHARDS[0]).wrong_records() == []
    main(arguments(data, vae_path, tmp_path, dtype="float32"))
    assert files(tmp_path) == files(finished)


def test_a_limit_on_file_sizes_is_met_for_real(data: Path, vae_path: Path, tmp_path: Path) -> None:
    """The same with the system's own refusal (EFBIG): a forked process that may write no file larger than 8 KiB."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            main(arguments(data, vae_path, tmp_path, dtype="float32"))
        except OSError as error:
            os._exit(7 if "cannot write to" in str(error) and "--cached_path" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(tmp_path.glob("shard-*")) and not list(tmp_path.glob(".*.partial"))


def test_room_is_asked_for_before_the_work(
    data: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        ValueError,
        match=r"has 0\.0 GiB of free disk space, the missing shards need 0\.0 GiB; free some, .*--dtype float16",
    ):
        main(arguments(data, vae_path, tmp_path))
    assert set(files(tmp_path)) == {"cache.json"}


# ------------------------------------------------------------------------------------------------------- damage


def spoil(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["length", "header", "labels", "checksums", "paths", "first record", "last byte"])
def test_one_flipped_bit_is_found_by_verify_and_at_read(own: Path, where: str) -> None:
    path, shard = own / SHARDS[1], Shard(own / SHARDS[1])
    index = int.from_bytes(path.read_bytes()[:8], "little") + 8
    spoil(
        path,
        {
            "length": 1,
            "header": 60,
            "labels": index,
            "checksums": index + 17,
            "paths": index + 4 * 4 * 3 + 2,
            "first record": shard.head_bytes,
            "last byte": -1,
        }[where],
    )
    with pytest.raises(ValueError, match=rf"(?s)own.*{SHARDS[1]}"):
        main(["--verify", "--cached_path", str(own)])
    with pytest.raises(ValueError, match=rf"shard .*{SHARDS[1]} \(--cached_path\) is (damaged|not the one)"):
        cache = open_cache(own)
        cache.read_batch([(i, seed) for i in range(10) for seed in (0, 1, 2, 3)])
    if where == "last byte":
        with pytest.raises(ValueError, match=r"the checksum of flower/04\.png, view 1, is wrong\. Delete this file"):
            for seed in range(10):
                open_cache(own)[9, seed]


def test_a_deleted_or_damaged_shard_is_encoded_anew(
    own: Path, finished: Path, data: Path, vae_path: Path, messages: list[str]
) -> None:
    (own / SHARDS[0]).unlink()
    spoil(own / SHARDS[1], 70)  # its head: seen without reading all records
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} \(--cached_path\) is absent though cache\.json lists it"):
        open_cache(own)
    main(arguments(data, vae_path, own, dtype="float32"))
    assert files(own) == files(finished) and any("it is encoded anew" in line for line in messages)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_shard_that_was_cut(own: Path, keep: int) -> None:
    path = own / SHARDS[0]
    path.write_bytes(path.read_bytes()[:keep])
    for call in (lambda: open_cache(own), lambda: main(["--verify", "--cached_path", str(own)])):
        with pytest.raises(ValueError, match=rf"{SHARDS[0]} \(--cached_path\) is damaged: it"):
            call()


def test_a_shard_of_another_cache_in_its_place(own: Path, data: Path, tmp_path: Path) -> None:
    main(arguments(data, save_vae(tmp_path / "other.pth", seed=1), tmp_path / "other", dtype="float32"))
    shutil.copy(tmp_path / "other" / SHARDS[0], own / SHARDS[0])
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} \(--cached_path\) is not the one that cache\.json lists"):
        open_cache(own)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "shard-00000.safetensors/../../x", "shard-1.safetensors", "x.pt"]
)
def test_names_in_the_record_stay_in_the_folder(own: Path, name: str) -> None:
    record = json.loads((own / "cache.json").read_text())
    record["shards"][0]["name"] = name
    (own / "cache.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="names a shard .* which is no file of this folder"):
        open_cache(own)


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("../../etc/cron.d/x", True),
        ("/etc/passwd", True),
        ("a/../../b.png", True),
        ("a/..", True),
        ("c:\\x", True),
        ("a\\..\\b", True),
        ("a/..b.png", False),
        ("a/b...png", False),
        ("a/b c.png", False),
    ],
)
def test_paths_in_an_index_stay_in_the_data_folder(tmp_path: Path, path: str, refused: bool) -> None:
    spec = RecordSpec("mean", "float32", (1, 2, 2), 1)
    writer = engine_cache.ShardWriter(tmp_path, 0, engine_cache.make_layout(spec, ["ok/a.png", path]), [0, 0], 2, "key")
    writer.open()
    writer.write(0, spec.to_bytes(torch.ones(2, 1, 1, 2, 2)), np.array([True, True]))
    writer.finish()
    if refused:
        with pytest.raises(ValueError, match="a path in its index leaves the data folder"):
            Shard(writer.path)
    else:
        assert Shard(writer.path).paths == ["ok/a.png", path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(complete="yes"), "is not a record of main_cache"),
        (lambda r: r.pop("img_size"), "is not a record of main_cache"),
        (lambda r: r.update(shards=[1]), "is not a record of main_cache"),
        (lambda r: r.update(shards=[]), "holds no finished shards"),
        (lambda r: r.update(classes=["china"]), "has a label 1 but 1 classes"),
        (lambda r: r.update(complete=False), "is not finished"),
    ],
)
def test_records_that_are_refused(own: Path, change: Callable, words: str) -> None:
    record = json.loads((own / "cache.json").read_text())
    change(record)
    (own / "cache.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=words):
        open_cache(own)


def test_shards_without_a_record(own: Path, data: Path, vae_path: Path) -> None:
    (own / "cache.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no cache.json"):
        open_cache(own)
    with pytest.raises(ValueError, match="holds shards but no cache.json"):
        main(arguments(data, vae_path, own, dtype="float32"))


# ------------------------------------------------------------------------------------------------------- reading


def test_shards_and_npz_give_the_same_samples(finished: Path, tree: Path, data: Path, vae_path: Path) -> None:
    """To the bit; and images, encoded by the same VAE, the same up to rounding."""
    shards, npz, images, vae = (
        open_cache(finished),
        open_cache(tree),
        ImageFolderDataset(data / "train", SIZE),
        load_vae(vae_path),
    )
    assert (
        isinstance(shards, ShardedLatents)
        and isinstance(npz, CachedLatents)
        and len(shards) == len(npz) == len(images) == 10
    )
    assert (
        shards.labels == npz.labels == images.labels
        and shards.classes == npz.classes
        and shards.shape == npz.shape == SHAPE
    )
    sampler = GlobalBatchSampler(10, 5, 0, 1, seed=3)
    for workers in (0, 2):
        for a, b, c in zip(
            build_loader(shards, sampler, workers, False),
            build_loader(npz, sampler, workers, False),
            build_loader(images, sampler, 0, False),
            strict=True,
        ):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[1], c[1])
            with torch.no_grad():
                torch.testing.assert_close(vae.encode(c[0]).parameters, a[0], rtol=0, atol=1e-5)
    assert torch.equal(shards[4, 1][0], npz[4, 1][0]) and torch.equal(shards[4][0], npz[4][0])


def test_npz_samples_stand_in_the_order_of_the_images(tmp_path: Path) -> None:
    """x.png comes before x.png.jpg, but x.png.npz after x.png.jpg.npz."""
    (tmp_path / "a").mkdir()
    for i, name in enumerate(("x.png", "x.png.jpg")):
        np.savez(
            tmp_path / "a" / f"{name}.npz",
            moments=np.full((2, 1, 1), i, np.float32),
            moments_flip=np.zeros((2, 1, 1), np.float32),
        )
    assert [CachedLatents(tmp_path)[i][0][0].item() for i in range(2)] == [0, 1]


def test_a_data_set_that_is_sent_to_another_process_maps_anew(finished: Path) -> None:
    cache = open_cache(finished)
    first = cache[7, 3][0]
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 20_000 and torch.equal(copy[7, 3][0], first)


def test_no_file_is_opened_per_sample(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, opened, real = open_cache(finished), [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: opened.append(self.name) or real(self, *args, **kwargs)
    )
    for _ in range(5):
        cache.read_batch([(i, i) for i in range(10)])
    assert sorted(opened) == list(SHARDS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(fingerprint="0" * 64),
            r"was made with another VAE \(vae\.pth\) than --vae_path \(fingerprints [0-9a-f]{12} and 000000000000\)",
        ),
        (dict(img_size=32), "was made with --img_size 16, this run has --img_size 32"),
        (dict(classes=["china", "house"]), "first difference: class 1 is 'flower' here and 'house' there"),
        (
            dict(classes=["china", "flower", "house"]),
            "has 2 classes, the checkpoint was trained with 3; first difference: class 2 is 'none' here",
        ),
    ],
)
def test_a_run_that_a_cache_contradicts(finished: Path, changes: dict, words: str) -> None:
    record = read_record(finished)
    good = dict(fingerprint=record["latent_fingerprint"], img_size=SIZE, classes=["china", "flower"])
    check_record(finished, record, **good)
    with pytest.raises(ValueError, match=words):
        check_record(finished, record, **(good | changes))


def test_folders_that_are_no_cache(tmp_path: Path, data: Path, vae_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent \(--cached_path\)"):
        open_cache(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no class folders"):
        open_cache(tmp_path)
    for flag in ("--info", "--verify"):
        with pytest.raises(FileNotFoundError, match="--cached_path"):
            main([flag, "--cached_path", str(tmp_path / "absent")])
        with pytest.raises(FileNotFoundError, match="is no cache"):
            main([flag, "--cached_path", str(tmp_path)])
    main(arguments(data, vae_path, tmp_path / "plain", no_flip=True))
    with pytest.raises(
        ValueError, match="was made with --no_flip and has no mirrored images: train with --no_flip too"
    ):
        open_cache(tmp_path / "plain")
    with pytest.raises(ValueError, match="has 2 classes, more than --class_num 1"):
        open_cache(tmp_path / "plain", flip=False, class_num=1)


# ------------------------------------------------------------------------------------------------------- flags, convert, info


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(info=True, verify=True), "--info, --verify and --convert are different things"),
        (dict(crops=0), "--crops must be at least 1"),
        (dict(shard_size=0), "--shard_size must be at least 1"),
        (dict(format="npz", dtype="float16", shard_size=None), "--dtype does not go with --format npz"),
        (dict(format="npz", mode="mean", shard_size=None), "--mode does not go with --format npz"),
        (dict(quant_bits=4), "--quant_bits changes --mode indices only"),
        (dict(mode="indices", dtype="float16"), "--dtype does not go with --mode indices"),
        (dict(mode="indices", quant_bits=13), "--quant_bits must be from 1"),
        (dict(mode="indices", quantizer="lloyd"), "--quantizer lloyd is fitted to latents: give --quantizer_tables"),
        (
            dict(mode="indices", quantizer="lloyd", quantizer_tables="absent.json"),
            r"no quantizer tables at absent\.json \(--quantizer_tables\)",
        ),
    ],
)
def test_flags_that_are_refused(data: Path, vae_path: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        main(arguments(data, vae_path, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_other_images_than_those_that_were_cached(own: Path, data: Path, vae_path: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    (root / "train" / "china" / "03.png").unlink()
    with pytest.raises(ValueError, match="images of --data_path was .*--overwrite"):
        main(arguments(root, vae_path, own, dtype="float32"))
    (root / "train" / "zebra").mkdir()
    with pytest.raises(ValueError, match="class folders of --data_path was"):
        main(arguments(root, vae_path, own, dtype="float32"))


def test_formats_are_not_mixed(tree: Path, own: Path, data: Path, vae_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--format was shards, now npz"):
        main(npz_arguments(data, vae_path, own))
    published = Path(shutil.copytree(tree, tmp_path / "published"))
    with pytest.raises(ValueError, match="--format was npz, now shards"):
        main(arguments(data, vae_path, published))
    (published / "cache.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"holds \.npz latents without a cache\.json.*--format npz, or turn it into shards with --convert",
    ):
        main(arguments(data, vae_path, published))


@pytest.mark.parametrize("with_record", [True, False])
def test_convert_a_tree_as_published(
    tree: Path, finished: Path, vae_path: Path, tmp_path: Path, with_record: bool, messages: list[str]
) -> None:
    old = Path(shutil.copytree(tree, tmp_path / "old"))
    if not with_record:
        (old / "cache.json").unlink()
    flags = ["--device", "cpu", "--num_workers", "0", "--shard_size", "6", "--batch_size", "2"]
    main(["--convert", str(old), str(tmp_path / "new"), *flags, "--dtype", "float32"])
    shards, record = open_cache(tmp_path / "new"), read_record(tmp_path / "new")
    assert (
        files(tmp_path / "new")[SHARDS[0]] == files(finished)[SHARDS[0]] and shards.labels == CachedLatents(old).labels
    )
    assert record["latent_fingerprint"] == (load_vae(vae_path).latent_fingerprint() if with_record else None)
    assert any("will take it on trust" in line for line in messages) is not with_record
    main(["--convert", str(old), str(tmp_path / "new"), *flags, "--dtype", "float32"])  # again: nothing to do
    assert any("is complete: 0 images encoded, 10 were there" in line for line in messages)
    main(
        [
            "--convert",
            str(old),
            str(tmp_path / "named"),
            *flags,
            "--mode",
            "mean",
            "--vae_path",
            str(vae_path),
            "--img_size",
            str(SIZE),
        ]
    )
    assert read_record(tmp_path / "named")["latent_fingerprint"] == load_vae(vae_path).latent_fingerprint()
    torch.testing.assert_close(
        open_cache(tmp_path / "named")[3][0].float(), CachedLatents(old)[3][0][:4], rtol=2e-3, atol=2e-3
    )
    assert files(old) == files(old) and len(files(old)) == 10 + with_record


def test_convert_what_cannot_be(tree: Path, finished: Path, tmp_path: Path) -> None:
    for old, new, more, words in (
        (tmp_path / "absent", tmp_path / "x", [], r"no folder .*absent \(--convert\)"),
        (finished, tmp_path / "x", [], "holds shards already"),
        (tree, tree, [], "NEW must be another folder"),
        (tree, tree / "china", [], "NEW must be another folder"),
        (tree, tmp_path / "x", ["--crops", "2"], "--crops does not go with --convert"),
        (
            tree,
            tmp_path / "x",
            ["--vae_path", str(save_vae(tmp_path / "other.pth", seed=1))],
            "was made with another VAE",
        ),
        (tree, tmp_path / "x", ["--img_size", "64"], "--img_size 64 contradicts"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            main(["--convert", str(old), str(new), "--device", "cpu", "--num_workers", "0", *more])
    old = Path(shutil.copytree(tree, tmp_path / "old"))
    (old / "china" / "03.png.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"1 of 10 images are corrupt .*03\.png\.npz \(--convert\) are cut short"):
        main(["--convert", str(old), str(tmp_path / "x"), "--device", "cpu", "--num_workers", "0"])
    assert (tmp_path / "x" / "bad_images.txt").read_text() == "china/03.png\n"


def test_info_and_verify(finished: Path, tree: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    main(["--info", "--cached_path", str(finished)])
    text = capsys.readouterr().out
    assert (
        ": complete" in text
        and "img_size             16" in text
        and "2, 0.0 MiB, 4205 bytes per image" in text
        and "classes              2" in text
    )
    for cache in (finished, tree):
        main(["--verify", "--cached_path", str(cache)])
        assert "10 images, every checksum is right" in capsys.readouterr().out
    spoilt = Path(shutil.copytree(tree, tmp_path / "tree"))
    (spoilt / "flower" / "00.png.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 problems.*00\.png\.npz is cut short"):
        main(["--verify", "--cached_path", str(spoilt)])
    (spoilt / "cache.json").unlink()
    main(["--info", "--cached_path", str(spoilt)])
    assert "as published" in capsys.readouterr().out
