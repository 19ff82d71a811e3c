"""main_cache.py --format npz, the published layout: the files, that running it again mends and never mixes; and what any format refuses."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset import encode as engine_cache
from dataset.encode import read_moments
from dataset.latents import CachedLatents
from dataset.loader import ImageFolderDataset
from main_cache import main
from models.vae import AutoencoderKL, load_vae
from tests.helpers import run_processes, write_image_folder
from util.log import run_cli

SIZE, SHAPE = 16, (8, 8, 8)  # 16-pixel images; moments of 4 channels at stride 2


def save_vae(path: Path, seed: int = 0, with_config: bool = True) -> Path:
    """A tiny VAE file (32 wide, stride 2, 4 channels) with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(embed_dim=4, ch_mult=(1, 1), ch=32, num_res_blocks=1, attention=False, scale_factor=1.5)
    torch.save({"model": vae.state_dict()} | ({"config": vae.config} if with_config else {}), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("cache_data"), per_class=5, size=(20, 18))


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("cache_vae") / "vae.pth")


@pytest.fixture(scope="module")
def finished(data: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache. Read only."""
    out = tmp_path_factory.mktemp("finished_cache")
    main(arguments(data, vae_path, out))
    return out


def arguments(data: Path, vae_path: Path, out: Path, /, **changes: object) -> list[str]:
    flags = (
        dict(
            data_path=data,
            vae_path=vae_path,
            cached_path=out,
            img_size=SIZE,
            batch_size=4,
            num_workers=0,
            device="cpu",
            format="npz",
        )
        | changes
    )
    return [
        part
        for name, value in flags.items()
        if value is not None
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.npz")}


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return {key: found[key] for key in found.files}


def moments(vae_path: Path, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return load_vae(vae_path).encode(images).parameters.numpy()


# ------------------------------------------------------------------------------------------------------- what it writes


def test_every_image_has_a_file_with_its_moments_and_those_of_its_mirror_image(
    finished: Path, data: Path, vae_path: Path
) -> None:
    dataset = ImageFolderDataset(data / "train", SIZE, flip=False)
    images = torch.stack([dataset.load(i) for i in range(len(dataset))])
    plain, mirrored = moments(vae_path, images), moments(vae_path, images.flip(-1))
    names = {f"{Path(path).parent.name}/{Path(path).name}.npz": i for i, (path, _) in enumerate(dataset.samples)}
    assert "china/00.png.npz" in names and len(names) == 10
    assert set(snapshot(finished)) == set(names) | {"cache.json"}  # nothing more, nothing temporary
    for name, i in names.items():
        found = arrays(finished / name)
        assert found.keys() == {"moments", "moments_flip"} and {a.dtype for a in found.values()} == {
            np.dtype(np.float32)
        }
        assert found["moments"].shape == found["moments_flip"].shape == SHAPE
        np.testing.assert_allclose(found["moments"], plain[i], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["moments_flip"], mirrored[i], rtol=0, atol=1e-5)
        assert np.abs(plain[i] - mirrored[i]).max() > 1e-2  # the two differ, so the test can tell them apart
        # and the flip is of the image, not of the latents
        assert np.abs(mirrored[i] - plain[i][..., ::-1]).max() > 1e-3


def test_the_record(finished: Path, vae_path: Path) -> None:
    record, vae = json.loads((finished / "cache.json").read_text()), load_vae(vae_path)
    assert (
        record["img_size"] == SIZE
        and record["precision"] == "fp32"
        and record["vae"] == vae.config
        and record["scale_factor"] == 1.5
    )
    assert (
        record["vae_sha256"] == hashlib.sha256(vae_path.read_bytes()).hexdigest()
        and record["latent_fingerprint"] == vae.latent_fingerprint()
    )
    assert (
        record["images"] == 10
        and record["classes"] == ["china", "flower"]
        and record["corrupt"] == 0
        and record["complete"] is True
    )


def test_training_reads_it(finished: Path, data: Path) -> None:
    latents, images = CachedLatents(finished, class_num=2), ImageFolderDataset(data / "train", SIZE)
    assert len(latents) == 10 and latents.shape == SHAPE and latents.classes == images.classes == ["china", "flower"]
    assert latents.labels == images.labels and [Path(p).name for p, _ in latents.samples] == [
        Path(p).name + ".npz" for p, _ in images.samples
    ]
    assert torch.equal(latents[3][0], torch.from_numpy(arrays(finished / "china" / "03.png.npz")["moments"]))


def test_a_class_without_images_keeps_its_number_and_names_keep_their_extension(
    data: Path, vae_path: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    (root / "train" / "aaa").mkdir()
    (root / "train" / "china" / "deep").mkdir()
    shutil.copy(root / "train" / "china" / "01.png", root / "train" / "china" / "01.PNG.bmp")
    # DatasetFolder looks into sub-folders
    shutil.copy(root / "train" / "china" / "01.png", root / "train" / "china" / "deep" / "01.png")
    main(arguments(root, vae_path, tmp_path / "out"))
    assert (
        CachedLatents(tmp_path / "out").labels == ImageFolderDataset(root / "train", SIZE).labels == [1] * 7 + [2] * 5
    )
    assert (tmp_path / "out" / "china" / "01.PNG.bmp.npz").is_file() and (
        tmp_path / "out" / "china" / "deep" / "01.png.npz"
    ).is_file()


def test_half_precision_encodes_nearly_the_same(finished: Path, data: Path, vae_path: Path, tmp_path: Path) -> None:
    main(arguments(data, vae_path, tmp_path, precision="bf16"))
    half, full = (arrays(folder / "flower" / "02.png.npz")["moments"] for folder in (tmp_path, finished))
    assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < 0.05
    with pytest.raises(ValueError, match=r"cache\.json .*--precision was bf16, now fp32"):
        main(arguments(data, vae_path, tmp_path))


def test_loader_workers_change_nothing(finished: Path, data: Path, vae_path: Path, tmp_path: Path) -> None:
    main(arguments(data, vae_path, tmp_path, num_workers=2))
    assert {k: v for k, v in snapshot(tmp_path).items() if k.endswith(".npz")}.keys() == stamps(finished).keys()
    for name in stamps(finished):
        assert all(np.array_equal(v, arrays(tmp_path / name)[k]) for k, v in arrays(finished / name).items())


# ------------------------------------------------------------------------------------------------------- running it again


def test_complete_files_are_kept_and_all_others_mended(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, messages: list[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    whole = (out / "china" / "00.png.npz").read_bytes()
    (out / "china" / "00.png.npz").write_bytes(whole[:-100])  # cut short
    (out / "china" / "01.png.npz").write_bytes(b"")
    (out / "china" / "02.png.npz").unlink()
    flipped = bytearray((out / "china" / "03.png.npz").read_bytes())
    flipped[500] ^= 1  # one bit of the data: the checksum tells
    (out / "china" / "03.png.npz").write_bytes(flipped)
    np.savez(out / "china" / "04.png.npz", moments=np.zeros(SHAPE, np.float32))  # no moments_flip
    np.savez(
        out / "flower" / "00.png.npz", **dict.fromkeys(("moments", "moments_flip"), np.zeros((8, 4, 4), np.float32))
    )
    np.savez(
        out / "flower" / "01.png.npz", **dict.fromkeys(("moments", "moments_flip"), np.full(SHAPE, np.nan, np.float32))
    )
    (out / "flower" / ".02.png.npz.tmp").write_bytes(b"left by a kill")
    (out / "flower" / "02.png.npz").unlink()
    kept = {name: stamps(out)[name] for name in ("flower/03.png.npz", "flower/04.png.npz")}
    main(arguments(data, vae_path, out))
    assert {name: stamps(out)[name] for name in kept} == kept
    assert any("8 images encoded, 2 were there, 0 corrupt" in line for line in messages)
    assert snapshot(out).keys() == snapshot(finished).keys()
    for name in stamps(finished):
        assert read_moments(out / name)[0].shape == SHAPE
        for key, value in arrays(finished / name).items():
            np.testing.assert_allclose(arrays(out / name)[key], value, rtol=0, atol=1e-5)


def test_after_a_kill_the_same_command_finishes(
    data: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    class Killed(BaseException):
        pass

    calls, encode = [], engine_cache.Encoder.posterior

    def die_in_third_batch(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 5:  # two calls a batch
            raise Killed
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine_cache.Encoder, "posterior", die_in_third_batch)
        with pytest.raises(Killed):
            main(arguments(data, vae_path, tmp_path))
    record = json.loads((tmp_path / "cache.json").read_text())
    before = stamps(tmp_path)
    assert record["complete"] is False and len(before) == 8
    with pytest.raises(ValueError, match=r"cache\.json .*encoder weights"):  # another VAE must not go on with it
        main(arguments(data, save_vae(tmp_path / "other.pth", seed=1), tmp_path))
    main(arguments(data, vae_path, tmp_path))
    assert any("2 images encoded, 8 were there" in line for line in messages)
    assert (
        before.items() <= stamps(tmp_path).items()
        and json.loads((tmp_path / "cache.json").read_text())["complete"] is True
    )


def test_another_vae_or_size_is_refused_and_overwrite_replaces(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path
) -> None:
    out, other = Path(shutil.copytree(finished, tmp_path / "out")), save_vae(tmp_path / "other.pth", seed=1)
    before = snapshot(out)
    with pytest.raises(
        ValueError, match=r"cache\.json \(--cached_path\).*--vae_path \(encoder weights\) was .*--overwrite"
    ):
        main(arguments(data, other, out))
    with pytest.raises(ValueError, match=r"cache\.json \(--cached_path\).*--img_size was 16, now 32"):
        main(arguments(data, vae_path, out, img_size=32))
    (out / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json \(--cached_path\) is not a record of main_cache"):
        main(arguments(data, vae_path, out))
    (out / "cache.json").write_bytes(before["cache.json"])
    assert snapshot(out) == before
    main(arguments(data, other, out, overwrite=True))
    assert json.loads((out / "cache.json").read_text())["latent_fingerprint"] == load_vae(other).latent_fingerprint()
    image = ImageFolderDataset(data / "train", SIZE).load(0)[None]
    np.testing.assert_allclose(
        arrays(out / "china" / "00.png.npz")["moments"], moments(other, image)[0], rtol=0, atol=1e-5
    )


def test_a_copy_of_the_vae_with_another_decoder_is_no_contradiction(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path
) -> None:
    out, content = Path(shutil.copytree(finished, tmp_path / "out")), torch.load(vae_path, weights_only=True)
    content["model"]["decoder.conv_out.bias"] += 1
    torch.save(content, tmp_path / "decoder.pth")
    before = stamps(out)
    main(arguments(data, tmp_path / "decoder.pth", out))
    assert stamps(out) == before


def test_published_caches_without_a_record_are_kept_with_a_warning(
    finished: Path, data: Path, vae_path: Path, tmp_path: Path, messages: list[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "cache.json").unlink()
    np.savez(out / "flower" / "gone.png.npz", **arrays(out / "flower" / "00.png.npz"))
    before = stamps(out)
    main(arguments(data, vae_path, out))
    assert stamps(out) == before and (out / "cache.json").is_file()
    assert any("no cache.json" in line for line in messages) and any(
        "1 latents of other images" in line for line in messages
    )


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(cached_path=""), "--cached_path is empty"),
        (dict(img_size=15), "--img_size 15 is not a multiple of the stride 2"),
        (dict(img_size=0), "--img_size must be at least 1"),
        (dict(batch_size=0), "--batch_size must be at least 1"),
        (dict(vae_embed_dim=16), r"--vae_embed_dim 16 contradicts .*vae\.pth, whose VAE has 4"),
        (dict(vae_path="absent.pth"), r"no VAE weights at absent\.pth \(--vae_path\)"),
        (dict(data_path="absent"), r"no folder absent.train \(--data_path\)"),
        (dict(device="cuda"), "--device cuda .* no CUDA device"),
        (dict(dist_on_itp=True), "--dist_on_itp is refused"),
    ],
)
def test_bad_flags_are_refused_before_any_work(
    data: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=words):
        main(arguments(data, vae_path, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_vae_embed_dim_that_agrees_is_accepted(data: Path, vae_path: Path, tmp_path: Path) -> None:
    # the default, 16, was no wish: `finished` shows that
    main(arguments(data, vae_path, tmp_path / "out", vae_embed_dim=4))
    assert len(stamps(tmp_path / "out")) == 10


def test_vae_file_of_another_shape(data: Path, tmp_path: Path) -> None:
    path = save_vae(tmp_path / "plain.pth", with_config=False)  # without a config it is taken for KL-16
    with pytest.raises(ValueError, match=r"plain\.pth \(--vae_path\) lacks \d+ of the VAE's"):
        main(arguments(data, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--on_bad_image", "ignore"], ["--precision", "fp8"], ["--batchsize", "3"]])
def test_unknown_choices_and_flags_are_refused(
    data: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(data, vae_path, tmp_path / "out") + flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_empty_data_folder(vae_path: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    with pytest.raises(OSError, match=r"--data_path\) holds class folders but no"):
        main(arguments(tmp_path / "data", vae_path, tmp_path / "out"))
    assert run_cli(lambda: main(arguments(tmp_path / "data", vae_path, tmp_path / "out"))) == 2
    assert not (tmp_path / "out").exists()


def test_corrupt_images(data: Path, vae_path: Path, tmp_path: Path, messages: list[str]) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    for name in ("01.png", "04.png"):
        (root / "train" / "china" / name).write_bytes(b"not a picture")
    with pytest.raises(
        ValueError,
        match=r"2 of 10 images are corrupt .*bad_images\.txt; .*china.01\.png cannot be read .*on_bad_image skip",
    ):
        main(arguments(root, vae_path, tmp_path / "out"))
    assert (
        json.loads((tmp_path / "out" / "cache.json").read_text())["complete"] is False
        and len(stamps(tmp_path / "out")) == 8
    )
    main(arguments(root, vae_path, tmp_path / "out", on_bad_image="skip"))
    assert sum("corrupt image" in line for line in messages) == 4 and any("2 corrupt" in line for line in messages)
    assert (tmp_path / "out" / "bad_images.txt").read_text() == "china/01.png\nchina/04.png\n"
    assert sorted(p.name for p in (tmp_path / "out" / "china").iterdir()) == ["00.png.npz", "02.png.npz", "03.png.npz"]
    record = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert (record["images"], record["corrupt"], record["complete"]) == (8, 2, True)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"--data_path\): not one of its 10 images can be read"):
        main(arguments(root, vae_path, tmp_path / "none", on_bad_image="skip"))


def test_folders_that_cannot_be_written_or_hold_other_things(data: Path, vae_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write to .*file.out \(--cached_path\)"):
        main(arguments(data, vae_path, tmp_path / "file" / "out"))
    (tmp_path / "out" / "another_class").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"\(--cached_path\) holds 1 folders that are no class of --data_path, first: another_class"
    ):
        main(arguments(data, vae_path, tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["another_class"]


def test_a_failed_write_leaves_no_half_file(
    data: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    savez = np.savez

    def disk_full(file: object, **content: np.ndarray) -> None:
        savez(file, moments=content["moments"])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine_cache.np, "savez", disk_full)
        with pytest.raises(OSError, match="No space left"):
            main(arguments(data, vae_path, tmp_path))
    assert (
        set(snapshot(tmp_path)) == {"cache.json"}
        and json.loads((tmp_path / "cache.json").read_text())["complete"] is False
    )


def test_latents_that_are_not_finite_are_never_written(data: Path, vae_path: Path, tmp_path: Path) -> None:
    content = torch.load(vae_path, weights_only=True)
    for key in ("encoder.conv_out.weight", "quant_conv.weight"):
        content["model"][key] *= 1e30  # finite weights whose product is not
    torch.save(content, tmp_path / "huge.pth")
    with pytest.raises(ValueError, match="NaN or infinite under --precision fp32"):
        main(arguments(data, tmp_path / "huge.pth", tmp_path / "out"))
    assert not stamps(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- processes


def test_two_processes_write_each_image_once(finished: Path, data: Path, vae_path: Path, tmp_path: Path) -> None:
    """Ten images at batch 4 on two processes: two batches each, 4 + 1; the same files as one process."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for name in ("china/00.png.npz", "china/03.png.npz", "flower/04.png.npz"):
        (out / name).unlink()
    kept = stamps(out)
    done = run_processes(["main_cache.py", *arguments(data, vae_path, out)], nproc=2)
    assert done.returncode == 0, done.stderr
    assert "3 images encoded, 7 were there, 0 corrupt" in done.stderr
    assert snapshot(out).keys() == snapshot(finished).keys() and kept.items() <= stamps(out).items()
    for name in stamps(finished):
        with zipfile.ZipFile(out / name) as archive:
            assert archive.testzip() is None
        for key, value in arrays(finished / name).items():
            np.testing.assert_allclose(arrays(out / name)[key], value, rtol=0, atol=1e-5)
