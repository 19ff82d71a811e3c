"""reconstruction.py on a small trained VAE and real photographs: its figures, what they do not depend on, bad input."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reconstruction
from checkpoints import download
from dataset.folders import spread_evenly
from dataset.images import center_crop_adm, read_image, to_tensor, to_uint8
from dataset.latent_statistics import latent_scale
from evaluation import reconstruction_options
from evaluation.image_metrics import psnr, ssim
from evaluation.inception import write_random_inception
from evaluation.metrics import Reference, fid
from evaluation.reconstruction import (
    Variant,
    decode_variants,
    first_of_each_class,
    posterior_noise,
    reconstruct,
    several,
)
from evaluation.reconstruction_options import Measures, ReconstructionOptions
from evaluation.reconstruction_report import published_figures, worst_and_median
from models.quantizer import GaussianQuantizer
from models.quantizer_tables import build_quantizer
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from reconstruction import build_parser, load_inputs, main
from tests.helpers import GOLDEN, photographs
from tests.processes.forked import run_processes
from tests.stand_ins import FewColours, offline, stats_of
from util.cli import run_cli
from util.options import read_options

CPU = torch.device("cpu")
ADM_FILE = "fid_stats/adm_in256_stats.npz"


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAE (stride 2, 8 channels) trained for seconds on crops of the photographs, with its scale; 20 dB."""
    photos = torch.from_numpy(np.stack(photographs())).permute(0, 3, 1, 2).float() / 127.5 - 1  # (2, 3, 427, 640)
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(embed_dim=8, ch_mult=(1, 1), ch=8, num_res_blocks=1, attention=False, norm_groups=1)
        optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=150)
        for _ in range(150):
            corners = zip(rng.integers(395, size=8), rng.integers(608, size=8), strict=True)
            batch = torch.stack([photos[i % 2, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(corners)])
            posterior = vae.encode(batch)
            loss = (vae.decode(posterior.sample()) - batch).abs().mean() + 1e-6 * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    vae.scale_factor = latent_scale(posterior.mean.detach())
    path = tmp_path_factory.mktemp("vae") / "vae.pth"
    torch.save({"model": vae.state_dict(), "config": vae.config}, path)
    return path


@pytest.fixture
def run(vae_path: Path, image_root: Path, tmp_path: Path) -> Callable[..., dict]:
    """run(*flags, out="out", image_dir=...) runs reconstruction.main in this process and returns results.json."""

    def call(
        *flags: object, out: str = "out", image_dir: Path = image_root / "train", no_rfid: bool = True, size: int = 32
    ) -> dict:
        usual = ["--vae_path", vae_path, "--image_dir", image_dir, "--img_size", size, "--output_dir", tmp_path / out]
        process = ["--num_workers", 0, "--device", "cpu", *(["--no_rfid"] if no_rfid else [])]
        main([str(word) for word in (*usual, *process, *flags)])
        return json.loads((tmp_path / out / "results.json").read_text())

    return call


@pytest.fixture
def variants_of(vae_path: Path, image_root: Path) -> Callable[..., list[Variant]]:
    """variants_of(**options): the variants after a pass over the pictures."""

    def call(**changes: object) -> list[Variant]:
        place = dict(vae_path=str(vae_path), image_dir=str(image_root / "train"), img_size=32, no_rfid=True)
        options = ReconstructionOptions(**(place | changes)).resolved()
        codec, variants = load_inputs(options, CPU), decode_variants(options, CPU)
        chosen = first_of_each_class(codec.folder.labels, options.images_per_class, options.num_images)
        reconstruct(codec, variants, chosen, Measures())
        return variants

    return call


def pictures_of(image_root: Path, size: int = 32) -> Tensor:
    """The twelve pictures (12, 3, S, S) in [-1, 1]."""
    files = sorted((image_root / "train").glob("*/*.png"))
    return torch.stack([to_tensor(center_crop_adm(read_image(path), size)) for path in files])


def encoded(vae: AutoencoderKL, image_root: Path, seed: int) -> tuple[Tensor, Tensor]:
    """The twelve pictures (12, 3, 32, 32) uint8 and their scaled latents, step by step from the files."""
    images = pictures_of(image_root)
    with torch.no_grad():
        posterior = vae.encode(images)
        noise = posterior_noise(seed, range(12), posterior.mean.shape[1:])
        return to_uint8(images), vae.scale(posterior.sample(noise=noise))


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor, pixels: str = "round") -> Tensor:
    """uint8 images of scaled latents."""
    return to_uint8(vae.decode(vae.unscale(latents)), pixels)


def by_name(results: dict) -> dict[str, dict]:
    return {row["name"]: row for row in results["rows"]}


def assert_same_figures(a: dict, b: dict) -> None:
    """Equal rows; a convolution's last bit may differ between batch sizes, and with it some pixels by a level."""
    assert [row["name"] for row in a["rows"]] == [row["name"] for row in b["rows"]]
    for x, y in zip(a["rows"], b["rows"], strict=True):
        assert x["psnr"] == pytest.approx(y["psnr"], abs=1e-3)
        assert x["ssim"] == pytest.approx(y["ssim"], abs=1e-4)
        assert x["clamped_share"] == pytest.approx(y["clamped_share"], abs=1e-5)


def test_published_flags_keep_their_defaults() -> None:
    published = json.loads((GOLDEN / "cli_flags.json").read_text())["reconstruction.py"]
    args = vars(build_parser().parse_args([]))
    assert all(args[flag["dest"]] == flag["default"] for flag in published.values())
    options = read_options(ReconstructionOptions, build_parser().parse_args(["--bits", "4", "--range", "2.5"]))
    assert (options.bits, options.range) == ((4,), (2.5,))
    flags = ["--bits", "3", "4", "3", "--range", "2", "3.5", "--images_per_class", "all"]
    options = read_options(ReconstructionOptions, build_parser().parse_args(flags))
    assert (several(options.bits), several(options.range), several(6)) == ([3, 4], [2.0, 3.5], [6])
    assert options.images_per_class > 10**9


def test_save_images_writes_each_image_of_the_first_pair(
    run: Callable, image_root: Path, tmp_path: Path, vae_path: Path
) -> None:
    results = run("--bits", "4", "2", "--save_images")
    folder, root = tmp_path / "out" / "images", image_root / "train"
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert names == sorted(path.relative_to(root) for path in root.rglob("*.png")) and len(names) == 12
    vae = load_vae(vae_path)
    images, latents = encoded(vae, image_root, 0)
    quantizer = GaussianQuantizer(4, -5.0, 5.0)
    expected = decoded(vae, quantizer.dequantize(quantizer.quantize(latents)))
    written = torch.stack([to_uint8(to_tensor(read_image(folder / name))) for name in names])
    assert (written.int() - expected.int()).abs().max() <= 1
    assert run("--bits", "4", "2", "--save_images")["rows"] == results["rows"]  # the same command may be repeated
    with pytest.raises(ValueError, match=r"holds images of another run \(images\): .*--output_dir"):
        run("--bits", "4", "--save_images", "--num_images", 2)
    assert psnr(written, images).mean() == pytest.approx(results["rows"][1]["psnr"], abs=0.01)


def test_choice_of_images() -> None:
    labels = [0] * 4 + [1] * 2 + [2] * 5
    assert first_of_each_class(labels, 3, None) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert first_of_each_class(labels, 3, 4) == [0, 2, 5, 7]  # evenly over the classes
    assert first_of_each_class(labels, 50, 100) == list(range(11))
    assert spread_evenly("abcdef", 3) == ["a", "c", "e"] and spread_evenly("ab", 5) == ["a", "b"]
    assert spread_evenly("ab", 0) == []


def test_noise_depends_on_seed_and_number_alone() -> None:
    noise = posterior_noise(3, [5, 9], (4, 8, 8))
    assert torch.equal(posterior_noise(3, [9, 1, 5], (4, 8, 8))[[2, 0]], noise)
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(posterior_noise(4, [5], (4, 8, 8))[0], noise[0])
    many = posterior_noise(0, range(50), (4, 16, 16))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_sweep(run: Callable, tmp_path: Path) -> None:
    """All pairs; many levels over a wide range cost nothing, fewer bits or a narrower range never help."""
    results = run("--bits", "1", "2", "3", "4", "6", "12", "--range", "0.5", "6", "--mode")
    rows = by_name(results)
    assert len(results["rows"]) == 1 + 6 * 2 and results["num_images"] == 12 and results["num_classes"] == 2
    alone = rows["VAE alone"]
    assert alone["psnr"] > 15 and alone["bits"] is None and alone["clamped_share"] is None
    assert rows["12 bits, ±6"]["psnr"] == pytest.approx(alone["psnr"], abs=0.02)
    assert rows["12 bits, ±6"]["ssim"] == pytest.approx(alone["ssim"], abs=1e-3)
    ladder = [rows[f"{bits} bits, ±6"]["psnr"] for bits in (1, 2, 3, 4, 6, 12)]
    assert all(fewer <= more + 0.05 for fewer, more in zip(ladder, ladder[1:], strict=False)), ladder
    assert rows["1 bits, ±6"]["psnr"] < alone["psnr"] - 0.5
    assert rows["12 bits, ±0.5"]["psnr"] < rows["12 bits, ±6"]["psnr"] - 0.5  # most latents are clamped
    assert rows["12 bits, ±0.5"]["clamped_share"] > 0.3 and rows["12 bits, ±6"]["clamped_share"] < 0.001
    assert rows["1 bits, ±6"]["indices_used"] == 2 and rows["3 bits, ±0.5"]["indices_used"] == 8
    assert all(row["rfid"] is None and row["inception_score"] is None for row in results["rows"])
    assert results["rfid_not_computed"] == "--no_rfid was given"
    assert results["settings"]["bits"] == [1, 2, 3, 4, 6, 12] and results["vae"]["stride"] == 2
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * 34 + 2, 8 * 34 + 2)  # 8 rows of original | VAE alone | first pair
        pixels = np.asarray(grid)
    first = read_image(Path(results["settings"]["image_dir"]) / "china" / "00.png")
    original = to_uint8(to_tensor(center_crop_adm(first, 32)))
    np.testing.assert_array_equal(pixels[2:34, 2:34], original.permute(1, 2, 0).numpy())
    assert not list((tmp_path / "out").glob(".*"))  # no temporary file is left


def test_figures_by_hand(run: Callable, vae_path: Path, image_root: Path) -> None:
    """PSNR, SSIM, share clamped and indices of one pair, computed here (docs/spec.md 9)."""
    row = run("--bits", "3", "--range", "1.5", "--seed", "11")["rows"][1]
    vae, quantizer = load_vae(vae_path), GaussianQuantizer(3, -1.5, 1.5)
    images, latents = encoded(vae, image_root, 11)
    indices = quantizer.quantize(latents)
    found = decoded(vae, quantizer.dequantize(indices))
    assert row["psnr"] == pytest.approx(psnr(found, images).mean().item(), abs=1e-4)
    assert row["ssim"] == pytest.approx(ssim(found, images).mean().item(), abs=1e-5)
    assert row["clamped_share"] == pytest.approx((latents.abs() > 1.5).double().mean().item(), abs=1e-9)
    assert row["indices_used"] == len(indices.unique())


def test_quantizers_side_by_side(run: Callable, vae_path: Path, image_root: Path) -> None:
    """Lloyd's levels are fitted to these latents: a smaller error than the paper's and equal widths (which of those
    gives the nearer pixels is up to this small VAE). Published numbers are the paper's."""
    kinds = ("gaussian", "uniform", "lloyd")
    rows = run("--bits", "2", "--range", "5", "--quantizer", *kinds, "--seed", "11")["rows"]
    assert [row["quantizer"] for row in rows] == [None, *kinds] and rows[3]["name"] == "2 bits, ±5, lloyd"
    vae, errors = load_vae(vae_path), []
    images, latents = encoded(vae, image_root, 11)
    for row, kind in zip(rows[1:], kinds, strict=True):
        quantizer = build_quantizer(kind, 2, -5.0, 5.0, latents=latents.numpy())
        found = quantizer.dequantize(quantizer.quantize(latents))
        errors.append((found - latents).square().mean().item())
        assert row["psnr"] == pytest.approx(psnr(decoded(vae, found), images).mean().item(), abs=1e-3)
    assert errors[2] < min(errors[:2]) and rows[0]["psnr"] > rows[3]["psnr"]
    assert all(row["published_fid"] is row["published_rfid"] is None for row in rows)  # nothing is published at 32 px


def test_batch_size_changes_nothing(run: Callable) -> None:
    large, small = (run("--bits", "3", "6", "--batch_size", size, out=str(size)) for size in (12, 5))
    assert_same_figures(large, small)


def test_mode_ignores_the_seed_and_samples_do_not(run: Callable) -> None:
    mode = [run("--mode", "--seed", seed)["rows"] for seed in (0, 1)]
    sampled = [run("--seed", seed)["rows"] for seed in (0, 0, 1)]
    assert mode[0] == mode[1]
    assert sampled[0] == sampled[1] != sampled[2]
    assert mode[0][0]["psnr"] > sampled[0][0]["psnr"]  # the mean is closer to the image than a draw around it


def test_fewer_images_are_those_of_the_full_run(variants_of: Callable, run: Callable, tmp_path: Path) -> None:
    """images_per_class takes the first of each class; every image comes out as in the full run, noise and all."""
    everything = variants_of()[1].scores
    first_two, three = variants_of(images_per_class=2)[1].scores, variants_of(num_images=3)[1].scores
    assert len(everything) == 12 and list(first_two) == [0, 1, 6, 7] and list(three) == [0, 4, 8]
    for part in (first_two, three):
        for number, scores in part.items():
            assert scores == pytest.approx(everything[number], abs=1e-3)
    assert run("--images_per_class", 2, "--grid_images", 0)["num_images"] == 4
    assert not (tmp_path / "out" / "grid.png").exists()
    assert run("--images_per_class", "all", "--grid_images", 0)["num_images"] == 12


def test_the_table_without_published_numbers(run: Callable, capsys: pytest.CaptureFixture) -> None:
    results = run("--bits", "3", "6", "--range", "5", "7")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[4] for line in lines[2:6]] == [f"{results['rows'][i]['ssim']:.4f}" for i in range(1, 5)]
    assert "published" not in out and "not computed (--no_rfid was given)" in lines[-1]
    assert results["pixels"] == results["settings"]["pixels"] == "round" and results["published_is_about"] is None


def test_published_figures_by_bits_and_range() -> None:
    pairs = [None, (3, 5.0), (4, 5.0), (5, 5.0), (6, 5.0), (6, 4.0), (6, 3.0), (6, 2.0), (6, 7.0)]
    found = [published_figures(pair, True) for pair in pairs]
    assert [one["published_fid"] for one in found] == [1.11, 3.69, 1.33, 1.12, 1.11, 1.13, 1.22, 2.26, None]
    assert [one["published_rfid"] for one in found] == [0.53] + [None] * 8
    assert [one["published_inception_score"] for one in found] == [None] * 4 + [305] + [None] * 4
    assert set(published_figures((6, 5.0), False).values()) == {None}


def in_processes(nproc: int, out: Path, vae_path: Path, image_dir: Path, *flags: object) -> str:
    """`reconstruction.py` by so many processes; its standard output, or AssertionError with its errors."""
    usual = ["--vae_path", vae_path, "--image_dir", image_dir, "--img_size", 32, "--num_workers", 0]
    result = run_processes(["reconstruction.py", *usual, "--output_dir", out, *flags], nproc, timeout=400)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_processes_change_nothing(run: Callable, vae_path: Path, image_root: Path, tmp_path: Path) -> None:
    flags = ["--bits", "3", "6", "--range", "1", "5", "--batch_size", 4, "--no_rfid"]
    one = run(*flags)
    printed = in_processes(2, tmp_path / "two", vae_path, image_root / "train", *flags)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["world_size"] == 2 and two["num_images"] == 12
    assert_same_figures(one, two)
    assert [row["indices_used"] for row in one["rows"]] == [row["indices_used"] for row in two["rows"]]
    assert printed.count("VAE alone") == 1  # one process prints


def test_rate_and_entropy_per_dimension(run: Callable, vae_path: Path, image_root: Path, tmp_path: Path) -> None:
    """bits/image is bits x dimensions x tokens; the entropy is that of each dimension's own histogram, found here."""
    results = run("--bits", "3", "6", "--range", "4", "--mode")
    vae = load_vae(vae_path)
    with torch.no_grad():
        latents = vae.scale(vae.encode(pictures_of(image_root)).mode())  # (12, 8, 16, 16)
    for bits in (3, 6):
        row, indices = by_name(results)[f"{bits} bits, ±4"], GaussianQuantizer(bits, -4, 4).quantize(latents)
        expected = []
        for c in range(8):
            p = np.bincount(indices[:, c].flatten().numpy(), minlength=2**bits) / (12 * 256)
            expected.append(-sum(x * math.log2(x) for x in p if x > 0))
        assert row["entropy_per_dimension"] == pytest.approx(expected, abs=1e-3)
        assert row["entropy_bits_per_image"] == pytest.approx(256 * sum(expected), rel=1e-3)
        assert row["entropy_bits_per_image"] < row["bits_per_image"] == bits * 8 * 256
    assert results["rows"][0]["bits_per_image"] is None
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [line["name"] for line in lines] == ["VAE alone", "3 bits, ±4", "6 bits, ±4"]
    assert float(lines[1]["entropy_mean"]) < 3 and lines[0]["bits_per_image"] == ""
    assert float(lines[2]["psnr"]) == results["rows"][2]["psnr"]
    assert read_image(tmp_path / "out" / "rate_distortion.png").width > 400


def test_worst_and_median_images(run: Callable, variants_of: Callable, tmp_path: Path) -> None:
    """The images that the first pair harms most come first, then those in the middle; as the pass decoded them."""
    assert worst_and_median({5: 30.0, 7: 10.0, 1: 20.0, 2: 25.0, 9: 12.0}, 1) == ([7], [1])
    assert worst_and_median({5: 3.0, 7: 1.0}, 4) == ([7, 5], [7, 5])
    run("--bits", "2", "--grid_images", 4)
    scores = {number: values[0] for number, values in variants_of(bits=2)[1].scores.items()}
    order = sorted(scores, key=scores.get)
    grid = torch.from_numpy(np.array(read_image(tmp_path / "out" / "worst_median.png"))).permute(2, 0, 1)
    assert grid.shape == (3, 4 * 34 + 2, 3 * 34 + 2)
    for i, number in enumerate(order[:2] + order[5:7]):
        rows = slice(34 * i + 2, 34 * i + 34)
        original, quantized = grid[None, :, rows, 2:34], grid[None, :, rows, 70:102]
        assert psnr(quantized, original).item() == pytest.approx(scores[number], abs=0.01)


def test_lpips_is_in_the_results(run: Callable, tmp_path: Path) -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), tmp_path / "alexnet.pth")
    rows = run("--bits", "1", "--num_images", "2", "--lpips_weights", tmp_path / "alexnet.pth", size=64)["rows"]
    assert 0 < rows[0]["lpips"] < rows[1]["lpips"]
    assert run("--grid_images", 0)["lpips_not_computed"] == "it needs 64 pixels"


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> FewColours:
    """Stands in for Inception; the rest of the path is the real one."""
    found = FewColours()
    monkeypatch.setattr(reconstruction_options, "fetch_inception_weights", lambda path, download: Path("weights.pth"))
    monkeypatch.setattr(reconstruction_options, "InceptionFeatures", lambda path, device: found)
    return found


@pytest.fixture
def adm_stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """Stands in for ADM's statistics of ImageNet, in a folder of its own; the file is there."""
    reference = Reference(np.full(6, 100.0), 500 * np.eye(6))
    monkeypatch.setattr(reconstruction_options, "load_reference", lambda *_, **__: reference)
    (tmp_path / "fid_stats").mkdir()
    (tmp_path / ADM_FILE).touch()
    monkeypatch.chdir(tmp_path)
    return reference


def test_rfid_is_against_the_originals_own_features(
    run: Callable, extractor: FewColours, vae_path: Path, image_root: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--bits", "1", "12", "--range", "4", "--batch_size", "5", "--mode"]
    results = run(*flags, no_rfid=False)
    assert extractor.calls == 12 * 4  # originals once, each row once
    vae, images = load_vae(vae_path), pictures_of(image_root)
    with torch.no_grad():
        made = decoded(vae, vae.scale(vae.encode(images).mode()))
    features = [stats_of(extractor(x)["2048"]) for x in (made, to_uint8(images))]
    alone, one_bit, twelve_bits = results["rows"]
    assert alone["rfid"] == pytest.approx(fid(*features), rel=1e-3)
    assert twelve_bits["rfid"] == pytest.approx(alone["rfid"], rel=0.05) and one_bit["rfid"] > alone["rfid"]
    assert results["rfid_not_computed"] is None and results["inception_sha256"] == "stand-in"
    assert all(row["inception_score"] >= 1 for row in results["rows"])  # 12 images are enough for 10 splits
    assert "fewer than 10000, so too high" in capsys.readouterr().out


def columns(line: str) -> list[str]:
    return line.replace(" dB", "").replace("VAE alone", "alone").replace("6 bits, ", "6bits").split()


def test_fid_to_other_statistics_and_published_figures(
    run: Callable,
    extractor: FewColours,
    adm_stats: Reference,
    vae_path: Path,
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    messages: list[str],
) -> None:
    """At 256 px the FID against ADM's statistics is beside 1.11 and 305, that against the originals beside 0.53."""
    results = run("--num_images", "10", "--grid_images", "0", "--mode", no_rfid=False, size=256)
    assert results["fid_stats"] == ADM_FILE and results["pixels"] == "truncate"
    assert results["fid_not_computed"] is None and "fid_stats_given" not in results["settings"]
    assert "pixels truncated" in results["published_is_about"]["published_fid"]
    vae, images = load_vae(vae_path), torch.stack(spread_evenly(list(pictures_of(image_root, 256)), 10))
    with torch.no_grad():
        made = to_uint8(vae.decode(vae.encode(images).mode()), "truncate")
    found = [stats_of(extractor(x)["2048"]) for x in (made, to_uint8(images))]
    alone = results["rows"][0]
    assert alone["fid"] == pytest.approx(fid(found[0], adm_stats.pool), rel=1e-3)
    assert alone["rfid"] == pytest.approx(fid(*found), rel=1e-3) != alone["fid"]
    lines = capsys.readouterr().out.splitlines()
    head, first, second = (columns(line) for line in lines[:3])
    assert head[:8] == ["PSNR", "SSIM", "FID", "published*", "IS", "published*", "rFID", "published+"]
    assert (first[4], first[6], first[8]) == ("1.11", "-", "0.53")
    assert (second[4], second[6], second[8]) == ("1.11", "305", "-")
    assert lines[-1] == f"FID against {ADM_FILE}, pixels: truncate"
    assert any("adm_in256_stats.npz (--fid_stats) has another content than ADM's published file" in m for m in messages)
    table = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    published = [(row["pixels"], row["published_fid"], row["published_rfid"]) for row in table]
    assert published == [("truncate", "1.11", "0.53"), ("truncate", "1.11", "")]


@pytest.mark.parametrize(
    "options, pixels, reference",
    [
        (dict(img_size=256), "truncate", ADM_FILE),
        (dict(img_size=256, pixels="round"), "round", ADM_FILE),
        (dict(img_size=256, fid_stats="none"), "round", None),
        (dict(img_size=256, fid_stats="mine.npz"), "round", "mine.npz"),
        (dict(img_size=256, no_rfid=True), "round", None),
        (dict(img_size=128), "round", None),
        (dict(img_size=128, pixels="truncate"), "truncate", None),
        (dict(fid_stats=f"elsewhere/{ADM_FILE}"), "truncate", f"elsewhere/{ADM_FILE}"),
    ],
)
def test_defaults_of_reference_and_pixels(options: dict, pixels: str, reference: str | None, tmp_path: Path) -> None:
    found = ReconstructionOptions(image_dir=str(tmp_path), **options).resolved()
    assert (found.pixels, found.fid_stats) == (pixels, reference)


def test_truncated_pixels_are_the_published_ones() -> None:
    """(x * 255) cast to uint8 after clipping, against rounding, which loses nothing of images from bytes."""
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5, 0.999, 1.0, 1.5])
    expected = ((x.double() + 1) / 2).clip(0, 1).numpy() * 255
    assert to_uint8(x, "truncate").tolist() == expected.astype(np.uint8).tolist() == [0, 0, 127, 191, 254, 255, 255]
    assert to_uint8(x).tolist() == np.round(expected).astype(np.uint8).tolist() == [0, 0, 128, 191, 255, 255, 255]
    every = torch.arange(256, dtype=torch.float32)
    assert torch.equal(to_uint8(every / 127.5 - 1), every.to(torch.uint8))


@pytest.mark.usefixtures("extractor")
def test_missing_statistics_are_reported(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], capsys: pytest.CaptureFixture
) -> None:
    """By default the rest is computed; log (before the work), output and file give the reason. Asked for: an error."""
    monkeypatch.chdir(tmp_path)
    flags = ["--num_images", "2", "--grid_images", "0", "--no_download"]
    results = run(*flags, no_rfid=False, size=256)
    assert "python -m tools.download stats fetches it" in results["fid_not_computed"]
    row = results["rows"][0]
    assert row["fid"] is None and row["rfid"] is not None and row["published_fid"] == 1.11
    assert any(line.startswith(f"the FID against {ADM_FILE} is not computed: no fid_stats/") for line in messages)
    assert f"FID against {ADM_FILE}: not computed (no {ADM_FILE}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="python -m tools.download stats fetches it"):
        run(*flags, "--fid_stats", ADM_FILE, no_rfid=False, size=256)


@pytest.mark.usefixtures("extractor", "adm_stats")
def test_the_default_statistics_are_fetched(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fetched = tmp_path / ADM_FILE, []
    path.unlink()
    monkeypatch.setattr(download, "fetch_all", lambda names, *_: (fetched.append(names), path.touch()))
    results = run("--num_images", "2", "--grid_images", "0", no_rfid=False, size=256)
    assert fetched == [["stats"]] and results["rows"][0]["fid"] is not None


def test_train_is_a_folder_of_classes(run: Callable, image_root: Path, tmp_path: Path, messages: list[str]) -> None:
    """--image_dir DIR with train/ in it, as the published command gives it, means DIR/train."""
    results = run("--grid_images", 0, "--save_images", "--bits", 1, image_dir=image_root)
    assert results["num_images"] == 12 and results["num_classes"] == 2
    assert results["settings"]["image_dir"] == str(image_root / "train")
    assert f"{image_root} (--image_dir) holds train/: the images are those of {image_root / 'train'}" in messages
    assert {path.name for path in (tmp_path / "out" / "images").iterdir()} == {"china", "flower"}
    assert results["rows"] == run("--grid_images", 0, "--bits", 1, out="same")["rows"]


@pytest.mark.usefixtures("extractor")
def test_too_few_images_for_a_score(run: Callable) -> None:
    nine, one = (run("--num_images", count, no_rfid=False, out=str(count)) for count in (9, 1))
    assert all(row["rfid"] is not None and row["inception_score"] is None for row in nine["rows"])
    assert all(row["rfid"] is None for row in one["rows"]) and "at least two images" in one["rfid_not_computed"]


def test_no_weights_are_no_error_and_are_reported(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    reason = run(no_rfid=False)["rfid_not_computed"]
    assert "no Inception weights at " in reason and reason in capsys.readouterr().out


@pytest.mark.slow
def test_rfid_with_inception_on_two_processes(vae_path: Path, image_root: Path, tmp_path: Path) -> None:
    """The real extractor, random weights: one process and two give the same rFID and Inception Score."""
    weights, found = write_random_inception(tmp_path / "weights.pth"), []
    for nproc in (1, 2):
        flags = ["--bits", "2", "--inception_weights", weights]
        in_processes(nproc, tmp_path / str(nproc), vae_path, image_root / "train", *flags)
        found.append(json.loads((tmp_path / str(nproc) / "results.json").read_text()))
    for one, two in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert one["rfid"] > 0 and two["rfid"] == pytest.approx(one["rfid"], rel=1e-3)
        assert two["inception_score"] == pytest.approx(one["inception_score"], rel=1e-4)
    # (random features need not rank them as Inception's do)
    assert found[0]["rows"][1]["rfid"] != found[0]["rows"][0]["rfid"]
    assert len(found[0]["inception_sha256"]) == 64


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bits", "6", "13"], "bits must be at most 12, got 13 (--bits)"),
        (["--range", "0"], "range must be above 0, got 0.0 (--range)"),
        (["--range", "5", "-2"], "range must be above 0, got -2.0 (--range)"),
        (["--range", "nan"], "range must be finite, got nan (--range)"),
        (["--img_size", "33"], "img_size 33 is not a multiple of 2"),
        (["--img_size", "8"], "img_size must be at least 11, got 8 (--img_size)"),
        (["--images_per_class", "0"], "images_per_class must be at least 1, got 0 (--images_per_class)"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0 (--batch_size)"),
        (["--image_dir", "{tmp}/none"], "no folder {tmp}/none (--image_dir)"),
        (["--image_dir", "{tmp}/empty"], "{tmp}/empty (--image_dir) holds no class folders"),
        (["--image_dir", "{tmp}/classes"], "{tmp}/classes (--image_dir) holds class folders but no"),
        (["--vae_path", "{tmp}/none.pth"], "no VAE weights at {tmp}/none.pth"),
        (["--vae_path", "{tmp}/text.pth"], "{tmp}/text.pth cannot be read"),
        (["--vae_embed_dim", "16"], "vae_embed_dim 16 contradicts"),
        (["--device", "cuda"], "--device cuda was asked for"),
        (["--device", "gpu"], "--device 'gpu' is not one of"),
        (["--output_dir", "{tmp}/text.pth/out"], "cannot write to {tmp}/text.pth/out (--output_dir)"),
        (["--inception_weights", "{tmp}/none.pth"], "no Inception weights at {tmp}/none.pth"),
        (["--inception_weights", "{tmp}/text.pth"], "{tmp}/text.pth does not hold torch-fidelity's Inception weights"),
        (["--fid_stats", "x", "--no_rfid"], "no_rfid and fid_stats contradict each other; leave one out (--fid_stats)"),
        (["--lpips_weights", "{tmp}/text.pth"], "LPIPS needs images of at least 64 pixels, img_size is 32"),
        (["--lpips_weights", "{tmp}/none.pth", "--img_size", "64"], "no AlexNet weights at {tmp}/none.pth"),
        (
            ["--lpips_weights", "{tmp}/text.pth", "--img_size", "64"],
            "{tmp}/text.pth does not hold torchvision's AlexNet",
        ),
        (["--image_dir", "{tmp}/root"], "{tmp}/root/train (--image_dir) holds no class folders"),
        (["--image_dir", "{tmp}/held_out"], "{tmp}/held_out holds val/, which is no class: give {tmp}/held_out/val"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    flags: list[str],
    message: str,
    vae_path: Path,
    image_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """An error that names the flag, exit status 2, before any work, and an earlier run's results stay as they are."""
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has the device that the test needs absent")
    for folder in ("empty", "classes/a", "root/train", "root/val", "held_out/val/a", "out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "out" / "results.json").write_text("earlier")
    monkeypatch.setattr(reconstruction, "reconstruct", lambda *_: pytest.fail("work was begun"))
    usual = {"--vae_path": vae_path, "--image_dir": image_root / "train", "--img_size": 32, "--device": "cpu"}
    usual["--output_dir"] = tmp_path / "out"
    given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    argv = [str(x) for flag, value in usual.items() if flag not in flags for x in (flag, value)] + given
    assert run_cli(lambda: main(argv)) == 2
    error = capsys.readouterr().err
    assert message.replace("{tmp}", str(tmp_path)) in error
    assert flags[0] in error or flags[0] == "--vae_path"  # names the file at least
    assert (tmp_path / "out" / "results.json").read_text() == "earlier" and len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("flags", [["--bits", "six"], ["--range", "5;4"], ["--precision", "fp8"], ["--bit", "6"]])
def test_what_argparse_refuses(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.fixture
def with_bad_image(image_root: Path, tmp_path: Path) -> Path:
    """The pictures, one of them truncated."""
    folder = shutil.copytree(image_root / "train", tmp_path / "pictures")
    bad = folder / "china" / "02.png"
    bad.write_bytes(bad.read_bytes()[:500])
    return folder


def test_a_bad_image_is_an_error(run: Callable, with_bad_image: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"china/02\.png cannot be read .*skip such images .--on_bad_image"):
        run(image_dir=with_bad_image)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_a_bad_image_stops_every_process(vae_path: Path, with_bad_image: Path, tmp_path: Path) -> None:
    """Only one of the two meets it; the other does not wait for ever."""
    with pytest.raises(AssertionError) as caught:
        in_processes(2, tmp_path / "two", vae_path, with_bad_image, "--no_rfid")
    assert str(caught.value).count("china/02.png cannot be read") >= 2
    assert not (tmp_path / "two" / "results.json").exists()


def test_a_bad_image_is_left_out_and_named(run: Callable, with_bad_image: Path) -> None:
    """The other eleven are as they were; no other image is counted in its place."""
    full, eleven = run(out="full"), run("--on_bad_image", "skip", image_dir=with_bad_image)
    assert eleven["num_images"] == 11 and eleven["bad_images"] == [str(with_bad_image / "china" / "02.png")]
    for row, other in zip(full["rows"], eleven["rows"], strict=True):
        left_out = 12 * row["psnr"] - 11 * other["psnr"]  # what the missing image alone must have had
        assert 5 < left_out < 60 and row["psnr"] != other["psnr"]


def test_not_one_image_can_be_read(run: Callable, with_bad_image: Path) -> None:
    for image in with_bad_image.glob("*/*.png"):
        image.write_bytes(b"")
    with pytest.raises(ValueError, match="not one of the 12 chosen images can be read"):
        run("--on_bad_image", "skip", image_dir=with_bad_image)


def test_a_vae_that_overflows_is_an_error(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """No uint8 image is made of NaN."""
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: z.new_full((len(z), 3, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="the pixels of image 0 .* are not finite: the VAE is broken .--vae_path."):
        run()
