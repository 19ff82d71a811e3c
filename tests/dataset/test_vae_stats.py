"""dataset/latent_statistics.py and tools/vae_stats.py: known spectra and scales, rate and distortion, the files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.images import read_image
from dataset.latent_statistics import (
    best_ranges,
    channel_moments,
    entropy_bits,
    frequency_order,
    latent_scale,
    low_frequency_share,
    normal_distance,
    rate_distortion,
    suggest_point,
    suggest_scale,
)
from models.quantizer import GaussianQuantizer
from models.quantizer_tables import build_quantizer, read_quantizer
from models.vae_loading import load_vae
from tests.helpers import argv_of, tiny_vae, write_image_folder
from tools.vae_stats import main


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def wave(frequency: float, n: int = 64, grid: int = 16) -> torch.Tensor:
    """Plane waves (n, h, w) of one frequency (cycles per position) along the width, phases drawn."""
    phase = torch.rand(n, 1, 1, generator=torch.Generator().manual_seed(int(1000 * frequency))) * 2 * math.pi
    return (2 * math.pi * frequency * torch.arange(grid) + phase).cos().expand(n, grid, grid)


def test_frequency_order_of_known_spectra() -> None:
    """Waves of 1/16 to 7/16 cycles per position; noise has a share of about pi/16 in a circle of radius 1/4."""
    noise, low, high = normal(64, 16, 16), wave(1 / 16), wave(7 / 16)
    latents = torch.stack([high, low + 0.5 * high, noise, low, 3.0 + 0.01 * low + 0.01 * noise], 1)
    share = low_frequency_share(latents)
    assert share[3] == pytest.approx(1, abs=1e-6) and share[0] == pytest.approx(0, abs=1e-6)
    assert share[1] == pytest.approx(1 / 1.25, abs=1e-3)  # energies 1 and 1/4
    assert share[2] == pytest.approx(49 / 256, abs=0.01)  # 49 of the 16 x 16 frequencies have radius <= 1/4
    assert frequency_order(latents) == [3, 1, 4, 2, 0]  # a large mean counts for nothing


def test_scale_and_moments() -> None:
    latents = normal(200, 3, 8, 8) * torch.tensor([1.0, 2, 4]).view(3, 1, 1) + 5
    mean, std = channel_moments(latents)
    assert mean.tolist() == pytest.approx([5, 5, 5], abs=0.15) and std.tolist() == pytest.approx([1, 2, 4], rel=0.03)
    scale, shift = suggest_scale(latents, per_channel=True)
    assert shift == mean.tolist() and scale == pytest.approx((1 / std).tolist())
    assert suggest_scale(latents, per_channel=False) == (latent_scale(latents), 0.0)
    assert latent_scale(latents) == pytest.approx(1 / latents.numpy().astype(np.float64).std(ddof=1), rel=1e-12)
    assert normal_distance(latents).abs().max() < 0.2 and normal_distance(latents.sign() * latents.abs() ** 3).min() > 1


def test_entropy_by_hand() -> None:
    assert entropy_bits(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 8) == 2.0
    assert entropy_bits(torch.tensor([5, 5, 5]), 8) == 0.0
    assert entropy_bits(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)


def test_rate_distortion_of_a_normal() -> None:
    """A normal uses all Gaussian levels about equally; Lloyd's error is the known one of a normal (Max 1960)."""
    x = normal(100_000, 1, 1, 1)
    points = rate_distortion(x, lambda b, half: GaussianQuantizer(b, -half, half), [2, 4, 6], [1.0, 3.0, 5.0])
    assert len(points) == 9
    best = best_ranges(points)
    assert [p["bits"] for p in best] == [2, 4, 6] and best[0]["mse"] > 5 * best[1]["mse"] > 25 * best[2]["mse"]
    plain = next(p for p in points if p["bits"] == 4 and p["range"] == 3.0)
    assert plain["rate"] == pytest.approx(4, abs=0.06) and plain["clamped"] == pytest.approx(0.0027, abs=0.001)
    for bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        lloyd = build_quantizer("lloyd", bits, -5, 5, latents=x.numpy())
        others = [build_quantizer(kind, bits, -3, 3) for kind in ("gaussian", "uniform")]
        error, *worse = (float((q(x) - x).square().mean()) for q in (lloyd, *others))
        assert error == pytest.approx(known, rel=0.02) and error <= min(worse)


def test_suggested_point() -> None:
    points = [{"bits": bits, "psnr": psnr} for bits, psnr in ((3, 20.0), (4, 29.95), (5, 30.0))]
    assert suggest_point(points, psnr_alone=30.0, tolerance=0.1) == (points[1], True)
    assert suggest_point(points, psnr_alone=31.0, tolerance=0.1) == (points[2], False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    root = tmp_path_factory.mktemp("vae_stats")
    write_image_folder(root / "data", per_class=6, size=(20, 18))
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 2), ch=8, num_res_blocks=1, norm_groups=4, scale_factor=9.0)
    torch.save({"model": vae.state_dict(), "config": vae.config}, root / "vae.pth")
    flags = argv_of(vae_path=root / "vae.pth", data_path=root / "data", img_size=16, device="cpu", num_workers=0)
    flags += argv_of(bits=[2, 4, 6], range=[3, 5], decoded_images=4, batch_size=3)
    main([*flags, "--output_dir", str(root / "out"), "--quantizer", "lloyd", "--per_channel"])
    return root, root / "out", flags


def test_the_commands_files(measured: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    root, out, flags = measured
    found, description = (json.loads((out / name).read_text()) for name in ("stats.json", "description.json"))
    assert found["images"] == 12 and len(found["points"]) == 6 and [p["bits"] for p in found["best"]] == [2, 4, 6]
    assert found["suggested"] == suggest_point(found["best"], found["psnr_vae_alone"], 0.1)[0]
    assert (description["channels"], description["stride"]) == (4, 2)
    assert description["quant_bits"] == found["suggested"]["bits"]
    assert description["shift"] == found["mean"] and sorted(description["channel_order"]) == [0, 1, 2, 3]
    assert description["scale_factor"] == pytest.approx((1 / np.array(found["std"])).tolist())
    stored = found["stored_moments"]
    assert stored["float32"]["indices_changed"] == 0 and 0 < stored["float16"]["largest_error"] < 0.01
    assert read_image(out / "vae_stats.png").size[0] > 500
    tables = read_quantizer(out / "quantizer.json")
    assert (tables.kind, tables.bits) == ("lloyd", description["quant_bits"])
    assert tables.max_value == description["quant_max"]
    assert not (root / "vae.latents.json").exists()
    main([*flags, "--output_dir", str(root / "second"), "--install"])
    assert "suggested: {" in capsys.readouterr().out
    vae = load_vae(root / "vae.pth")
    installed = (root / "vae.latents.json").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"vae\.latents\.json \(--install\) is there already: .*move it away first"
    ):
        main([*flags, "--output_dir", str(root / "third"), "--install"])
    assert (root / "vae.latents.json").read_bytes() == installed and not (root / "third").exists()
    assert vae.shift == 0.0 and vae.scale_factor != 9.0 and vae.quant_bits is not None and vae.channel_order is not None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bits", "0"], r"bits must be at least 1, got 0 \(--bits\)"),
        (["--bits", "13"], r"bits must be at most 12, got 13 \(--bits\)"),
        (["--range", "-1"], r"range must be above 0, got -1.0 \(--range\)"),
        (["--img_size", "15"], "img_size 15 is not a multiple of the stride 2"),
        (["--vae_path", "absent.pth"], "no VAE weights at absent.pth"),
        (["--data_path", "absent"], r"no folder absent.train \(--data_path\)"),
        (["--num_images", "1"], "num_images must be at least 2"),
        (["--tolerance", "-1"], "tolerance must be at least 0"),
    ],
)
def test_bad_input(measured: tuple[Path, Path, list[str]], tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        main([*measured[2], "--output_dir", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()
