"""main_cache.py: what it writes in both formats, kills, full disks, running it again, refusals, convert, verify."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset import cache as cache_module
from dataset import shards as shards_module
from dataset.cache_files import ShardFiles
from dataset.encode import check_room
from dataset.image_folder import ImageFolderDataset
from dataset.latents import CachedLatents, open_cache
from dataset.npz import read_views
from dataset.record import read_record
from dataset.shards import Shard
from main_cache import main
from models.quantizer_tables import build_quantizer
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from tests.helpers import CACHE_SHAPE, CACHE_SIZE, REPO, Argv, contents, save_cache_vae
from tests.processes.forked import run_processes
from util.cli import run_cli
from util.files import host_digest
from util.locks import LOCK
from util.seeds import coin

SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")  # 6 + 4 images
ON_CPU = ["--device", "cpu", "--num_workers", "0"]


@pytest.fixture(scope="session")
def finished(npz: Argv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of .npz files in batches of 4. Read only."""
    out = tmp_path_factory.mktemp("finished_cache")
    main(npz(out))
    return out


@pytest.fixture
def own_data(cache_data: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may change."""
    return Path(shutil.copytree(cache_data, tmp_path / "data"))


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.npz")}


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return {key: found[key] for key in found.files}


def assert_same_latents(folder: Path, reference: Path, exact: bool = False) -> None:
    """The .npz files of both have the same names and values."""
    assert stamps(folder).keys() == stamps(reference).keys()
    for name in stamps(reference):
        assert read_views(folder / name)[0].shape == CACHE_SHAPE
        for key, value in arrays(reference / name).items():
            np.testing.assert_allclose(arrays(folder / name)[key], value, rtol=0, atol=0 if exact else 1e-5)


def moments(vae_path: Path, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return load_vae(vae_path).encode(images).parameters.numpy()


def says(messages: list[str], text: str) -> bool:
    return any(text in line for line in messages)


def test_every_image_has_a_file_with_its_moments_and_those_of_its_mirror_image(
    finished: Path, cache_data: Path, cache_vae: Path
) -> None:
    dataset = ImageFolderDataset(cache_data / "train", CACHE_SIZE, flip=False)
    images = torch.stack([dataset.load(i) for i in range(len(dataset))])
    plain, mirrored = moments(cache_vae, images), moments(cache_vae, images.flip(-1))
    names = {f"{path}.npz": i for i, path in enumerate(dataset.folder.paths)}
    assert "china/00.png.npz" in names and len(names) == 10
    assert set(contents(finished)) == set(names) | {"cache.json"}  # nothing more, nothing temporary
    for name, i in names.items():
        found = arrays(finished / name)
        stamp = found.pop("source")
        assert stamp[0] == (cache_data / "train" / name.removesuffix(".npz")).stat().st_size
        assert found.keys() == {"moments", "moments_flip"}
        assert all(a.dtype == np.float32 and a.shape == CACHE_SHAPE for a in found.values())
        np.testing.assert_allclose(found["moments"], plain[i], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["moments_flip"], mirrored[i], rtol=0, atol=1e-5)
        assert np.abs(plain[i] - mirrored[i]).max() > 1e-2  # the two differ, so the test can tell them apart
        assert np.abs(mirrored[i] - plain[i][..., ::-1]).max() > 1e-3  # the flip is of the image, not of the latents


@pytest.mark.parametrize("kind", ["shards", "npz"])
def test_the_record(finished: Path, shards: Path, cache_vae: Path, kind: str) -> None:
    record, vae = json.loads((dict(shards=shards, npz=finished)[kind] / "cache.json").read_text()), load_vae(cache_vae)
    expected = dict(format=kind, complete=True, images=10, corrupt=0, classes=["china", "flower"], img_size=CACHE_SIZE)
    expected |= dict(dtype="float32", mode="moments", precision="fp32", vae=vae.config, scale_factor=1.5)
    expected["latent_fingerprint"] = vae.latent_fingerprint()
    expected["vae_sha256"] = hashlib.sha256(cache_vae.read_bytes()).hexdigest()
    assert {key: record[key] for key in expected} == expected
    if kind == "shards":
        assert [(s["name"], s["images"]) for s in record["shards"]] == [(SHARDS[0], 6), (SHARDS[1], 4)]


def test_training_reads_it(finished: Path, cache_data: Path) -> None:
    latents = CachedLatents(finished, class_num=2)
    images = ImageFolderDataset(cache_data / "train", CACHE_SIZE)
    assert len(latents) == 10 and latents.shape == CACHE_SHAPE
    assert latents.classes == images.classes == ["china", "flower"] and latents.labels == images.labels
    assert latents.folder.paths == [f"{path}.npz" for path in images.folder.paths]
    assert torch.equal(latents[3][0], torch.from_numpy(arrays(finished / "china" / "03.png.npz")["moments"]))


def test_a_class_without_readable_images_keeps_its_number_and_names_keep_their_extension(
    npz: Argv, own_data: Path, tmp_path: Path
) -> None:
    """An empty folder has none: the classes of images and cache are equal."""
    china = own_data / "train" / "china"
    for name in ("aaa", "empty"):
        (own_data / "train" / name).mkdir()
    (own_data / "train" / "aaa" / "bad.png").touch()
    (china / "deep").mkdir()
    for copy in (china / "01.PNG.bmp", china / "deep" / "01.png"):  # sub-folders are listed too
        shutil.copy(china / "01.png", copy)
    main(npz(tmp_path / "out", data_path=own_data, on_bad_image="skip"))
    assert CachedLatents(tmp_path / "out").labels == [1] * 7 + [2] * 5
    images = ImageFolderDataset(own_data / "train", CACHE_SIZE)
    assert images.labels == [0] + [1] * 7 + [2] * 5
    assert images.classes == CachedLatents(tmp_path / "out").classes == ["aaa", "china", "flower"]
    assert all((tmp_path / "out" / "china" / name).is_file() for name in ("01.PNG.bmp.npz", "deep/01.png.npz"))


def test_half_precision_encodes_nearly_the_same(npz: Argv, finished: Path, tmp_path: Path) -> None:
    main(npz(tmp_path, precision="bf16"))
    half, full = (arrays(folder / "flower" / "02.png.npz")["moments"] for folder in (tmp_path, finished))
    assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < 0.05
    with pytest.raises(ValueError, match=r"cache\.json .*precision was bf16, now fp32"):
        main(npz(tmp_path))


def test_loader_workers_change_nothing(npz: Argv, finished: Path, tmp_path: Path) -> None:
    main(npz(tmp_path, num_workers=2))
    assert_same_latents(tmp_path, finished, exact=True)


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
    sharded: Argv, shards: Path, cache_vae: Path, tmp_path: Path, changes: dict, size: int, limit: float | None
) -> None:
    main(sharded(tmp_path, **(dict(dtype=None) | changes)))
    cache, full = open_cache(tmp_path, flip="no_flip" not in changes), open_cache(shards)
    assert cache.spec.views * cache.spec.nbytes == size and len(cache) == 10 and cache.labels == full.labels
    values, reference = cache[3][0], full[3][0]
    if limit is not None:
        assert values.dtype == getattr(torch, changes.get("dtype", "float16")) and torch.isfinite(values).all()
        assert 0 < (values.float() - reference[: len(values)]).abs().max() < limit * reference.abs().max()
        return
    bits, high = changes["quant_bits"], changes.get("quant_max", 5)
    assert values.dtype == torch.int16 and cache.shape == (4, 8, 8) and cache.record["quantizer"]["bits"] == bits
    q, vae = build_quantizer(changes.get("quantizer", "gaussian"), bits, -5, high), load_vae(cache_vae)
    mean, logvar = reference.chunk(2)
    # at most six standard deviations of a sample, then a cell
    largest = 6 * torch.exp(logvar / 2) * 1.5 + torch.diff(q.boundaries).max() * 10 / 6
    assert ((q.dequantize(values.long()) - vae.scale(mean)).abs() < largest).all() and values.unique().numel() > 2


def test_an_index_cache_is_a_sample_that_depends_on_seed_image_and_view_alone(sharded: Argv, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", dict(shard_size=4, batch_size=4)), ("c", dict(seed=1))):
        main(sharded(tmp_path / name, mode="indices", dtype=None, **changes))
    a, b, c = (open_cache(tmp_path / name) for name in "abc")
    # other batches: last bits only
    assert all((a[i, s][0] != b[i, s][0]).float().mean() < 0.01 for i in range(10) for s in range(4))
    assert any(not torch.equal(a[i][0], c[i][0]) for i in range(10))


def test_crops(sharded: Argv, tmp_path: Path) -> None:
    main(sharded(tmp_path, crops=3))
    cache = open_cache(tmp_path)
    assert cache.spec.views == 6 and cache.crops == 3
    assert {cache.view_of(seed) for seed in range(200)} == set(range(6)) and cache.view_of(None) == 0
    assert all(cache.view_of(seed) % 2 == coin(seed) for seed in range(50))
    assert len({cache.shards[0].records[2, view].tobytes() for view in range(6)}) == 6
    with pytest.raises(ValueError, match="crops was 3, now 1"):
        main(sharded(tmp_path))


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(function: Callable, n: int, instead: Callable) -> Callable:
    """`function`, but for its n-th call, which is `instead(*arguments)`."""
    calls = []

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return instead(*args, **kwargs) if len(calls) == n else function(*args, **kwargs)

    return wrapped


def killed_with(module: object, name: str, replacement: object, argv: list[str]) -> None:
    """Run main in a forked process in which module.name is replaced; fails unless it kills itself (SIGKILL)."""
    child = os.fork()
    if child == 0:
        try:
            setattr(module, name, replacement)
            main(argv)
        finally:
            os._exit(1)  # the replacement was never called
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name}: status {status}"


def half_a_shard(tensors: dict, metadata: dict) -> bytes:
    """Leaves half of a shard under its temporary name, then dies."""
    hidden = Path(os.environ["HALF_A_SHARD"])
    hidden.write_bytes(save(tensors, metadata)[:2000])
    die()


save, rename = shards_module.save, os.replace
POINTS = {  # what is replaced in the killed process; how many images are left to encode
    "record written, nothing encoded": (ShardFiles, "plan", die, 10),
    "second batch encoded": (AutoencoderKL, "encode", nth(AutoencoderKL.encode, 4, die), 10),
    "half of the first shard written": (shards_module, "save", half_a_shard, 10),
    "first shard whole, not renamed": (os, "replace", nth(rename, 2, die), 10),  # the first call is for cache.json
    "first shard renamed": (os, "replace", nth(rename, 2, lambda *paths: (rename(*paths), die())), 4),
    "every shard there, record not": (cache_module, "write_json", nth(cache_module.write_json, 2, die), 0),
}


@pytest.mark.parametrize("point", POINTS)
def test_after_kill_9_only_missing_shards_are_encoded_and_every_byte_is_the_same(
    sharded: Argv, shards: Path, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    *replaced, left = POINTS[point]
    monkeypatch.setenv("HALF_A_SHARD", str(tmp_path / f".{SHARDS[0]}.tmp"))
    argv = sharded(tmp_path)
    killed_with(*replaced, argv)
    assert json.loads((tmp_path / "cache.json").read_text())["complete"] is False
    with pytest.raises(ValueError, match="is not finished: run main_cache.py again"):
        open_cache(tmp_path)
    main(argv)
    assert contents(tmp_path) == contents(shards)  # cache.json too, and no hidden file
    assert says(messages, f"is complete: {left} images encoded, {10 - left} were there")


@pytest.mark.slow
def test_a_job_killed_alone_is_finished_by_two_processes(sharded: Argv, shards: Path, tmp_path: Path) -> None:
    argv = sharded(tmp_path)
    killed_with(*POINTS["first shard renamed"][:3], argv)
    done = run_processes(["main_cache.py", *argv], nproc=2)
    assert done.returncode == 0, done.stderr
    assert "4 images encoded, 6 were there" in done.stderr and contents(tmp_path) == contents(shards)


def test_what_another_command_left_behind_is_not_continued(
    sharded: Argv, shards: Path, tmp_path: Path, messages: list[str]
) -> None:
    killed_with(*POINTS["first shard renamed"][:3], sharded(tmp_path))
    (tmp_path / f".{SHARDS[1]}.partial").write_bytes(b"as the last version left it")
    with pytest.raises(ValueError, match="dtype was float32, now bfloat16"):
        main(sharded(tmp_path, dtype="bfloat16"))
    main(sharded(tmp_path, overwrite=True))
    assert says(messages, "10 images encoded, 0 were there") and contents(tmp_path) == contents(shards)
    main(sharded(tmp_path / "third", vae_path=save_cache_vae(tmp_path / "other.pth", seed=1)))
    assert contents(tmp_path / "third")[SHARDS[0]] != contents(shards)[SHARDS[0]]


def test_after_a_kill_the_same_command_finishes_the_tree(npz: Argv, tmp_path: Path, messages: list[str]) -> None:
    killed_with(AutoencoderKL, "encode", nth(AutoencoderKL.encode, 5, die), npz(tmp_path))
    before = stamps(tmp_path)  # of two batches; the second is written while the third is encoded
    assert json.loads((tmp_path / "cache.json").read_text())["complete"] is False and 4 <= len(before) <= 8
    with pytest.raises(ValueError, match=r"cache\.json .*encoder weights"):  # another VAE must not go on with it
        main(npz(tmp_path, vae_path=save_cache_vae(tmp_path / "other.pth", seed=1)))
    main(npz(tmp_path))
    assert says(messages, f"{10 - len(before)} images encoded, {len(before)} were there")
    assert before.items() <= stamps(tmp_path).items() and read_record(tmp_path)["complete"] is True


def test_a_full_disk_is_a_clear_error_and_finished_shards_stay(
    sharded: Argv, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stays = r"What is finished stays valid.*same command"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", nth(os.replace, 3, full))  # cache.json, the first shard, the second
        with pytest.raises(
            OSError,
            match=rf"cannot write \S*{SHARDS[1]}: disk full \(No space left on device\) .*--cached_path\)\. {stays}",
        ):
            main(sharded(tmp_path))
    assert contents(tmp_path).keys() == {"cache.json", SHARDS[0]}
    assert contents(tmp_path)[SHARDS[0]] == contents(shards)[SHARDS[0]]
    assert Shard(tmp_path / SHARDS[0]).wrong_records() == []
    main(sharded(tmp_path))
    assert contents(tmp_path) == contents(shards)


def test_a_limit_on_file_sizes_is_met_for_real(sharded: Argv, tmp_path: Path) -> None:
    """The same with the system's own refusal (EFBIG): a forked process that may write no file larger than 8 KiB."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            main(sharded(tmp_path))
        except OSError as error:
            os._exit(7 if "cannot write" in str(error) and "--cached_path" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert contents(tmp_path).keys() == {"cache.json"}


def test_room_is_checked_before_the_work(tmp_path: Path) -> None:
    check_room(tmp_path, needed=2**30, free=2**30)
    lacks = r"has 1\.0 GiB of free disk space, the missing shards need 3\.0 GiB; free some, .*dtype float16"
    with pytest.raises(ValueError, match=lacks):
        check_room(tmp_path, needed=3 * 2**30, free=2**30)


def test_a_failed_write_leaves_no_half_file(npz: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savez = np.savez

    def disk_full(file: object, **content: np.ndarray) -> None:
        savez(file, moments=content["moments"])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", disk_full)
        with pytest.raises(OSError, match="No space left"):
            main(npz(tmp_path))
    assert set(contents(tmp_path)) == {"cache.json"} and read_record(tmp_path)["complete"] is False


def test_corrupt_images_are_listed_and_once_mended_encoded(
    sharded: Argv, shards: Path, own_data: Path, cache_data: Path, tmp_path: Path, messages: list[str]
) -> None:
    bad, out = ("china/01.png", "flower/04.png"), tmp_path / "out"
    for name in bad:
        (own_data / "train" / name).write_bytes(b"not a picture")
    listed = r"2 of 10 images are corrupt and listed in .*bad_images\.txt; all others are cached\. First: .*01\.png"
    with pytest.raises(ValueError, match=listed):
        main(sharded(out, data_path=own_data))
    assert (out / "bad_images.txt").read_text() == "china/01.png\nflower/04.png\n"
    assert read_record(out)["complete"] is False
    skip = sharded(out, data_path=own_data, on_bad_image="skip")
    main(skip)
    record = read_record(out)
    assert (record["complete"], record["images"], record["corrupt"]) == (True, 8, 2)
    assert (out / "bad_images.txt").exists()
    assert says(messages, "is complete: 0 images encoded, 8 were there, 2 corrupt")
    cache, whole = open_cache(out), open_cache(shards)
    assert len(cache) == 8 and cache.labels == [0] * 4 + [1] * 4
    assert all(torch.equal(cache[i][0], whole[j][0]) for i, j in enumerate((0, 2, 3, 4, 5, 6, 7, 8)))
    main(["--verify", "--cached_path", str(out)])
    for name, shard, rest in zip(bad, SHARDS, ("flower/04.png\n", None), strict=True):
        shutil.copy2(cache_data / "train" / name, own_data / "train" / name)
        main(skip)
        assert contents(out)[shard] == contents(shards)[shard]
        assert rest is None or (out / "bad_images.txt").read_text() == rest
    assert contents(out) == contents(shards)


def test_corrupt_images_in_a_tree(npz: Argv, own_data: Path, tmp_path: Path, messages: list[str]) -> None:
    for name in ("01.png", "04.png"):
        (own_data / "train" / "china" / name).write_bytes(b"not a picture")
    out = tmp_path / "out"
    cannot = r"2 of 10 images are corrupt .*bad_images\.txt; .*china.01\.png cannot be read .*.--on_bad_image"
    with pytest.raises(ValueError, match=cannot):
        main(npz(out, data_path=own_data))
    assert read_record(out)["complete"] is False and len(stamps(out)) == 8
    main(npz(out, data_path=own_data, on_bad_image="skip"))
    assert sum("corrupt image" in line for line in messages) == 4 and says(messages, "2 corrupt")
    assert (out / "bad_images.txt").read_text() == "china/01.png\nchina/04.png\n"
    assert sorted(p.name for p in (out / "china").iterdir()) == ["00.png.npz", "02.png.npz", "03.png.npz"]
    record = read_record(out)
    assert (record["images"], record["corrupt"], record["complete"]) == (8, 2, True)
    for path in (own_data / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"--data_path\): not one of its 10 images can be read"):
        main(npz(tmp_path / "none", data_path=own_data, on_bad_image="skip"))


def test_latents_that_are_not_finite_are_never_written(npz: Argv, cache_vae: Path, tmp_path: Path) -> None:
    content = torch.load(cache_vae, weights_only=True)
    for key in ("encoder.conv_out.weight", "quant_conv.weight"):
        content["model"][key] *= 1e30  # finite weights whose product is not
    torch.save(content, tmp_path / "huge.pth")
    with pytest.raises(ValueError, match="NaN or infinite in fp32 .--precision"):
        main(npz(tmp_path / "out", vae_path=tmp_path / "huge.pth"))
    assert not stamps(tmp_path / "out")


def test_complete_files_are_kept_and_all_others_mended(
    npz: Argv, finished: Path, tmp_path: Path, messages: list[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    whole = (out / "china" / "00.png.npz").read_bytes()
    flipped = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]  # one bit of the data: a wrong checksum
    for name, content in (("china/00", whole[:-100]), ("china/01", b""), ("china/03", flipped)):
        (out / f"{name}.png.npz").write_bytes(content)
    (out / "china" / "02.png.npz").unlink()
    np.savez(out / "china" / "04.png.npz", moments=np.zeros(CACHE_SHAPE, np.float32))  # no moments_flip
    for name, array in (("00", np.zeros((8, 4, 4), np.float32)), ("01", np.full(CACHE_SHAPE, np.nan, np.float32))):
        np.savez(out / "flower" / f"{name}.png.npz", moments=array, moments_flip=array)
    (out / "flower" / f".02.png.npz.{host_digest()}.{2**22}.{'0' * 12}.tmp").write_bytes(b"left by a kill")
    (out / "flower" / "02.png.npz").unlink()
    kept = {name: stamps(out)[name] for name in ("flower/03.png.npz", "flower/04.png.npz")}
    main(npz(out))
    assert {name: stamps(out)[name] for name in kept} == kept
    assert says(messages, "8 images encoded, 2 were there, 0 corrupt")
    assert contents(out).keys() == contents(finished).keys()
    assert_same_latents(out, finished)


@pytest.mark.parametrize("overwrite", [True, False])
def test_only_own_files_are_replaced(sharded: Argv, own_shards: Path, shards: Path, overwrite: bool) -> None:
    """Rows 7 and 50: shards of others stay; where one of ours would replace a foreign file, it is refused before."""
    again = {"overwrite": True} if overwrite else {}
    foreign = ["shard-00001-of-00004.safetensors", "shard-of-my-llm.safetensors", ".shard-notes.safetensors.old"]
    for name in foreign:
        (own_shards / name).write_bytes(b"precious")
    main(sharded(own_shards, **again))
    assert all((own_shards / name).read_bytes() == b"precious" for name in foreign)
    assert contents(own_shards).items() >= contents(shards).items()
    (own_shards / "shard-00077.safetensors").write_bytes(b"precious")
    before = contents(own_shards)
    with pytest.raises(ValueError, match=r"shard-00077.*is no shard of main_cache\.py, which would replace it"):
        main(sharded(own_shards, **again))
    assert contents(own_shards) == before


def test_overwrite_deletes_no_latents_of_unknown_origin(npz: Argv, npz_tree: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(npz_tree, tmp_path / "tree"))
    (out / "cache.json").unlink()
    before = contents(out)
    with pytest.raises(ValueError, match=r"holds 10 latents \(.*\.npz, \.\.\.\) but no cache\.json .*do so yourself"):
        main(npz(out, overwrite=True))
    assert contents(out) == before


def test_a_foreign_cache_json_is_refused(sharded: Argv, tmp_path: Path) -> None:
    for text in ('{"npm": 1}', "[1]"):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(ValueError, match=r"cache\.json \(--cached_path\) is not a record of main_cache\.py"):
            main(sharded(tmp_path, overwrite=True))
        assert (tmp_path / "cache.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_another_process_writes_to_is_refused(sharded: Argv, tmp_path: Path) -> None:
    code = f"import sys; from util.locks import folder_lock\nwith folder_lock({str(tmp_path)!r}, '--cached_path'):\n"
    code += " print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    other = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(ValueError, match=rf"--cached_path\) is in use by process {other.pid} on "):
        main(sharded(tmp_path, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    other.kill()
    other.wait(60)
    main(sharded(tmp_path))
    assert read_record(tmp_path)["complete"] and not (tmp_path / LOCK).exists()


def test_a_deleted_or_damaged_shard_is_encoded_again(
    sharded: Argv, own_shards: Path, shards: Path, messages: list[str]
) -> None:
    (own_shards / SHARDS[0]).unlink()
    content = (own_shards / SHARDS[1]).read_bytes()
    (own_shards / SHARDS[1]).write_bytes(content[:9] + b"?" + content[10:])  # its header
    main(sharded(own_shards))
    assert contents(own_shards) == contents(shards) and says(messages, "it is encoded again")


def test_another_vae_or_size_is_refused_and_overwrite_replaces(
    npz: Argv, finished: Path, cache_data: Path, tmp_path: Path
) -> None:
    out, other = Path(shutil.copytree(finished, tmp_path / "out")), save_cache_vae(tmp_path / "other.pth", seed=1)
    before = contents(out)
    where = r"cache\.json \(--cached_path\)"
    with pytest.raises(ValueError, match=rf"{where}.*vae_path \(encoder weights\) was .*--overwrite"):
        main(npz(out, vae_path=other))
    with pytest.raises(ValueError, match=rf"{where}.*img_size was 16, now 32"):
        main(npz(out, img_size=32))
    (out / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{where} is not a record of main_cache"):
        main(npz(out))
    (out / "cache.json").write_bytes(before["cache.json"])
    assert contents(out) == before
    main(npz(out, vae_path=other, overwrite=True))
    assert read_record(out)["latent_fingerprint"] == load_vae(other).latent_fingerprint()
    image = ImageFolderDataset(cache_data / "train", CACHE_SIZE).load(0)[None]
    found = arrays(out / "china" / "00.png.npz")["moments"]
    np.testing.assert_allclose(found, moments(other, image)[0], rtol=0, atol=1e-5)


def test_a_copy_of_the_vae_with_another_decoder_is_no_contradiction(
    npz: Argv, finished: Path, cache_vae: Path, tmp_path: Path
) -> None:
    out, content = Path(shutil.copytree(finished, tmp_path / "out")), torch.load(cache_vae, weights_only=True)
    content["model"]["decoder.conv_out.bias"] += 1
    torch.save(content, tmp_path / "decoder.pth")
    before = stamps(out)
    main(npz(out, vae_path=tmp_path / "decoder.pth"))
    assert stamps(out) == before


def test_published_caches_without_a_record_are_kept_with_a_warning(
    npz: Argv, finished: Path, tmp_path: Path, messages: list[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "cache.json").unlink()
    np.savez(out / "flower" / "gone.png.npz", **arrays(out / "flower" / "00.png.npz"))
    before = stamps(out)
    main(npz(out))
    assert stamps(out) == before and (out / "cache.json").is_file()
    assert says(messages, "no cache.json") and says(messages, "1 latents of other images")


def test_other_images_than_those_that_were_cached(sharded: Argv, own_shards: Path, own_data: Path) -> None:
    (own_data / "train" / "china" / "03.png").unlink()
    with pytest.raises(ValueError, match="images of data_path was .*--overwrite"):
        main(sharded(own_shards, data_path=own_data))
    shutil.copytree(own_data / "train" / "china", own_data / "train" / "zebra")
    with pytest.raises(ValueError, match="class folders of data_path was"):
        main(sharded(own_shards, data_path=own_data))


@pytest.mark.parametrize("form", ["shards", "npz"])
def test_images_that_changed_are_encoded_again(
    sharded: Argv, npz: Argv, own_data: Path, tmp_path: Path, messages: list[str], form: str
) -> None:
    """Also if size or time stay the same; a copy with another time is the same image. One is now unreadable."""
    argv = (sharded if form == "shards" else npz)(tmp_path / "out", data_path=own_data, on_bad_image="skip")
    train, verify = (
        own_data / "train",
        ["--verify", "--cached_path", str(tmp_path / "out"), "--data_path", str(own_data)],
    )
    main(argv)
    main(verify)
    files = [train / "china" / f"{i:02d}.png" for i in range(5)]
    for file in files[1:3]:
        os.utime(file, ns=(0, 0))
    main(argv)
    assert says(messages, "0 images encoded, 10 were there, 0 corrupt") and not says(messages, "had changed")
    main(verify)
    status = files[3].stat()
    shutil.copy(train / "flower" / "00.png", files[0])
    files[3].write_bytes(files[3].read_bytes()[:-1] + b"?")  # the same size, another time
    files[4].write_bytes(b"no picture")
    os.utime(files[4], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=r"3 problems.*00\.png changed since it was cached; .*03\.png changed"):
        main(verify)
    main(argv)
    assert says(messages, "1 corrupt; 3 images had changed") or says(messages, "1 corrupt; 2 images had changed")
    main(npz(tmp_path / "new", data_path=own_data, on_bad_image="skip"))
    old, new = open_cache(tmp_path / "out"), open_cache(tmp_path / "new")
    assert old.labels == new.labels and len(old) == 9
    assert all(torch.equal(old[i][0], new[i][0]) for i in range(9))
    main(verify)


def test_latents_without_a_stamp_are_kept_with_a_warning(
    npz: Argv, own_data: Path, tmp_path: Path, messages: list[str]
) -> None:
    """Trees of the published scripts, and of earlier versions."""
    main(npz(tmp_path / "out", data_path=own_data))
    for path in (tmp_path / "out").rglob("*.npz"):
        np.savez(path, **{key: value.astype(np.float16) for key, value in arrays(path).items() if key != "source"})
    main(npz(tmp_path / "out", data_path=own_data))
    assert says(messages, "0 images encoded, 10 were there") and len(CachedLatents(tmp_path / "out")) == 10
    main(["--verify", "--cached_path", str(tmp_path / "out"), "--data_path", str(own_data)])
    assert says(messages, "of 10 images no size and time is recorded")


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("npz", lambda c: [p.unlink() for p in sorted(c.rglob("*.npz"))[:5]], "holds 5 .npz files, cache.json says 10"),
        ("npz", lambda c: (c / "flower" / "04.png.npz").rename(c / "flower" / "05.png.npz"), "are of other images"),
        ("npz", lambda c: (c / "flower").rename(c / "house"), "classes that differ: flower, house"),
        ("npz", lambda c: [p.unlink() for p in c.rglob("*.npz")], "holds 0 .npz files, cache.json says 10"),
        ("shards", lambda c: edit(c, "format", None), "holds 0 .npz files, cache.json says 10"),
        ("shards", lambda c: edit(c, "images", 11), "says 11 images, the shards hold 10"),
        ("shards", lambda c: edit(c, "classes", ["flower", "china"]), "6 labels are not those of cache.json"),
        ("shards", lambda c: edit(c, "image_list", "0" * 64), "the shards hold other images than"),
        ("shards", lambda c: edit(c, "shards", []) or [p.unlink() for p in c.glob("shard-*")], "says 10 images"),
    ],
)
def test_verify_compares_the_files_with_the_record(
    npz_tree: Path, shards: Path, tmp_path: Path, form: str, change: Callable, words: str
) -> None:
    """And training refuses the trees."""
    own = Path(shutil.copytree({"npz": npz_tree, "shards": shards}[form], tmp_path / "own"))
    change(own)
    with pytest.raises(ValueError, match=words):
        main(["--verify", "--cached_path", str(own)])
    if form == "npz":
        with pytest.raises((ValueError, FileNotFoundError), match="cached_path"):
            open_cache(own)


def edit(cache: Path, key: str, value: object) -> None:
    """Change an entry of cache.json; None removes it."""
    record = json.loads((cache / "cache.json").read_text())
    record.pop(key) if value is None else record.update({key: value})
    (cache / "cache.json").write_text(json.dumps(record))


def test_odd_names(sharded: Argv, npz: Argv, own_data: Path, tmp_path: Path) -> None:
    """Backslashes, colons and bytes that are no text are kept; what no cache can keep is refused before the work."""
    china = own_data / "train" / "china"
    china.rename(own_data / "train" / "C:china")
    china = own_data / "train" / "C:china"
    for i, name in enumerate((b"back\\slash.png", b"\xff.png", b"a..png", "\u732b \u00e9.png".encode())):
        os.rename(os.fsencode(china / f"{i:02d}.png"), os.path.join(os.fsencode(china), name))
    for argv in (sharded, npz):
        out = tmp_path / ("shards" if argv is sharded else "tree")
        main(argv(out, data_path=own_data))
        main(["--verify", "--cached_path", str(out), "--data_path", str(own_data)])
        assert len(open_cache(out)) == 10 and open_cache(out).classes == ["C:china", "flower"]
    long = "x" * 248 + ".png"
    for name, form, words in (
        ("a\nb.png", sharded, r"a\\nb\.png cannot be cached: its name has a line break"),
        ("a\\..\\b.png", sharded, "reads as an absolute one, or as one with .."),
        (long, npz, "too long with .npz after it.*format shards takes it"),
    ):
        path = own_data / "train" / "flower" / "04.png"
        path.rename(path.with_name(name))
        with pytest.raises(ValueError, match=rf"{words}.*\(--data_path\)"):
            main(form(tmp_path / "refused", data_path=own_data))
        assert not [p for p in (tmp_path / "refused").rglob("*") if p.is_file()]
        if name == long:
            main(sharded(tmp_path / "long", data_path=own_data))
        path.with_name(name).rename(path)


def test_formats_are_not_mixed(sharded: Argv, npz: Argv, npz_tree: Path, own_shards: Path, tmp_path: Path) -> None:
    published = Path(shutil.copytree(npz_tree, tmp_path / "published"))
    with pytest.raises(ValueError, match="format was shards, now npz"):
        main(npz(own_shards))
    with pytest.raises(ValueError, match="format was npz, now shards"):
        main(sharded(published))
    for cache in (published, own_shards):
        (cache / "cache.json").unlink()
    without = r"holds \.npz latents without a cache\.json.*--format npz, or turn it into shards with --convert"
    with pytest.raises(ValueError, match=without):
        main(sharded(published))
    with pytest.raises(ValueError, match="holds shards but no cache.json"):
        main(sharded(own_shards))


def test_two_processes_write_each_image_once(npz: Argv, finished: Path, tmp_path: Path) -> None:
    """Ten images at batch 4 on two processes: two batches and one; the same files as one process."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for name in ("china/00.png.npz", "china/03.png.npz", "flower/04.png.npz"):
        (out / name).unlink()
    kept = stamps(out)
    done = run_processes(["main_cache.py", *npz(out)], nproc=2)
    assert done.returncode == 0, done.stderr
    assert "3 images encoded, 7 were there, 0 corrupt" in done.stderr
    assert contents(out).keys() == contents(finished).keys() and kept.items() <= stamps(out).items()
    for name in stamps(out):
        with zipfile.ZipFile(out / name) as archive:
            assert archive.testzip() is None
    assert_same_latents(out, finished)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(cached_path=""), "--cached_path is"),
        (dict(img_size=15), "--img_size 15 is not a multiple of the stride 2"),
        (dict(img_size=0), r"img_size must be at least 1, got 0 \(--img_size\)"),
        (dict(batch_size=0), r"batch_size must be at least 1, got 0 \(--batch_size\)"),
        (dict(crops=0), r"crops must be at least 1, got 0 \(--crops\)"),
        (dict(shard_size=0), "shard_size must be at least 1"),
        (dict(vae_embed_dim=16), r"vae_embed_dim 16 contradicts .*vae\.pth, whose VAE has 4 \(--vae_embed_dim\)"),
        (dict(vae_path="absent.pth"), r"no VAE weights at absent\.pth"),
        (dict(data_path="absent"), r"no folder absent.train \(--data_path\)"),
        (dict(device="cuda"), "--device cuda .* no CUDA device"),
        (dict(dist_on_itp=True), "--dist_on_itp is refused"),
        (dict(info=True, verify=True), "--info, --verify and --convert are different things"),
        (dict(format="npz", dtype="float16", shard_size=None), r"dtype does not go with format npz.*\(--dtype\)"),
        (dict(format="npz", mode="mean", shard_size=None), "mode does not go with format npz"),
        (dict(format="npz"), "--shard_size does not go with --format npz"),
        (dict(quant_bits=4), "--quant_bits changes --mode indices only"),
        (dict(mode="indices", dtype="float16"), "dtype does not go with mode indices"),
        (dict(mode="indices", dtype=None, quant_bits=13), r"quant_bits must be at most 12, got 13 \(--quant_bits\)"),
        (
            dict(mode="indices", dtype=None, quantizer="lloyd"),
            r"lloyd is fitted to latents: give .*\(--quantizer_tables\)",
        ),
        (
            dict(mode="indices", dtype=None, quantizer="lloyd", quantizer_tables="absent.json"),
            r"no quantizer tables at absent\.json: python -m tools.vae_stats writes them",
        ),
    ],
)
def test_bad_flags_are_refused_before_any_work(
    sharded: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=words):
        main(sharded(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_vae_embed_dim_that_agrees_is_accepted(npz: Argv, tmp_path: Path) -> None:
    # the default, 16, was not given: `finished` shows that
    main(npz(tmp_path / "out", vae_embed_dim=4))
    assert len(stamps(tmp_path / "out")) == 10


def test_vae_file_of_another_shape(npz: Argv, tmp_path: Path) -> None:
    path = save_cache_vae(tmp_path / "plain.pth", with_config=False)  # without a config it is taken for KL-16
    with pytest.raises(ValueError, match=r"plain\.pth does not fit the VAE"):
        main(npz(tmp_path / "out", vae_path=path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--on_bad_image", "ignore"], ["--precision", "fp8"], ["--batchsize", "3"]])
def test_unknown_choices_and_flags_are_refused(
    npz: Argv, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(npz(tmp_path / "out") + flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_empty_data_folder(npz: Argv, tmp_path: Path) -> None:
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    argv = npz(tmp_path / "out", data_path=tmp_path / "data")
    with pytest.raises(OSError, match=r"--data_path\) holds class folders but no"):
        main(argv)
    assert run_cli(lambda: main(argv)) == 2 and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_or_hold_other_things(npz: Argv, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write to .*file.out \(--cached_path\)"):
        main(npz(tmp_path / "file" / "out"))
    (tmp_path / "out" / "another_class").mkdir(parents=True)
    foreign = r"\(--cached_path\) holds 1 folders that are no class of the images \(--data_path\), first: another_class"
    with pytest.raises(ValueError, match=foreign):
        main(npz(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["another_class"]


@pytest.mark.parametrize("with_record", [True, False])
def test_convert_a_tree_as_published(
    npz_tree: Path, shards: Path, cache_vae: Path, tmp_path: Path, with_record: bool, messages: list[str]
) -> None:
    old, new, fingerprint = tmp_path / "old", tmp_path / "new", load_vae(cache_vae).latent_fingerprint()
    shutil.copytree(npz_tree, old)
    if not with_record:
        (old / "cache.json").unlink()
    before = contents(old)
    flags = ["--convert", str(old), *ON_CPU, "--shard_size", "6", "--batch_size", "2"]
    for _ in range(2):
        main([*flags[:2], str(new), *flags[2:], "--dtype", "float32"])
    assert contents(new)[SHARDS[0]] == contents(shards)[SHARDS[0]]
    assert open_cache(new).labels == CachedLatents(old).labels
    assert read_record(new)["latent_fingerprint"] == (fingerprint if with_record else None)
    assert says(messages, "training will not check it") is not with_record
    assert says(messages, "is complete: 0 images encoded, 10 were there")  # the second time
    size = ["--img_size", str(CACHE_SIZE)]
    main([*flags[:2], str(tmp_path / "named"), *flags[2:], "--mode", "mean", "--vae_path", str(cache_vae), *size])
    assert read_record(tmp_path / "named")["latent_fingerprint"] == fingerprint
    mean = open_cache(tmp_path / "named")[3][0].float()
    torch.testing.assert_close(mean, CachedLatents(old)[3][0][:4], rtol=2e-3, atol=2e-3)
    assert contents(old) == before and len(before) == 10 + with_record


def test_convert_what_cannot_be(npz_tree: Path, shards: Path, tmp_path: Path) -> None:
    other = save_cache_vae(tmp_path / "other.pth", seed=1)
    for old, new, more, words in (
        (tmp_path / "absent", tmp_path / "x", [], r"no folder .*absent \(--convert\)"),
        (shards, tmp_path / "x", [], "holds shards already"),
        (npz_tree, npz_tree, [], "NEW must be another folder"),
        (npz_tree, npz_tree / "china", [], "NEW must be another folder"),
        (npz_tree, tmp_path / "x", ["--crops", "2"], "--crops does not go with --convert"),
        (npz_tree, tmp_path / "x", ["--cached_path", "y"], "--cached_path does not go with --convert"),
        (npz_tree, tmp_path / "x", ["--vae_path", str(other)], "was made with another VAE"),
        (npz_tree, tmp_path / "x", ["--img_size", "64"], "img_size 64 contradicts"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            main(["--convert", str(old), str(new), *ON_CPU, *more])
    old = Path(shutil.copytree(npz_tree, tmp_path / "old"))
    (old / "china" / "03.png.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"1 of 10 images are corrupt .*03\.png\.npz \(--convert\) cannot be read"):
        main(["--convert", str(old), str(tmp_path / "x"), *ON_CPU])
    assert (tmp_path / "x" / "bad_images.txt").read_text() == "china/03.png\n"


def test_info_and_verify(shards: Path, npz_tree: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    main(["--info", "--cached_path", str(shards)])
    text, each = capsys.readouterr().out, sum((shards / name).stat().st_size for name in SHARDS) / 10
    facts = ("img_size             16", "classes              2", f"2, 0.0 MiB, {each:.0f} bytes per image")
    assert ": complete" in text and all(fact in text for fact in facts)
    for cache in (shards, npz_tree):
        main(["--verify", "--cached_path", str(cache)])
        assert "10 images, every checksum is right" in capsys.readouterr().out
    spoilt = Path(shutil.copytree(npz_tree, tmp_path / "tree"))
    for name in ("00.png.npz", ".hidden.npz"):  # training lists no hidden files
        (spoilt / "flower" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 problems.*00\.png\.npz cannot be read"):
        main(["--verify", "--cached_path", str(spoilt)])
    (spoilt / "cache.json").unlink()
    main(["--info", "--cached_path", str(spoilt)])
    assert "as published" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for flag in ("--info", "--verify"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*absent \(--cached_path\)"):
            main([flag, "--cached_path", str(tmp_path / "absent")])
        with pytest.raises(FileNotFoundError, match="is no cache"):
            main([flag, "--cached_path", str(tmp_path / "empty")])
