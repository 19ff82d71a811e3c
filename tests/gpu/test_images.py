"""VAE, Inception features, precision and recall: the GPU's numbers are the CPU's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu.checks import CPU, largest
from tests.helpers import tiny_vae

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]
FIDELITY = "torch-fidelity is not installed"


@torch.no_grad()
def test_vae_by_batch(device: torch.device, report: Callable) -> None:
    """Contiguous and channels-last, whole and in parts."""
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cpu = tiny_vae()
    moments = cpu.encode(images).parameters
    decoded = cpu.decode(moments[:, :16])
    for layout in (torch.contiguous_format, torch.channels_last):
        vae = tiny_vae().to(device).to(memory_format=layout)
        found = torch.cat([vae.encode(part.to(device)).parameters for part in images.split(4)])
        pixels = torch.cat([vae.decode(part.to(device)) for part in moments[:, :16].split(4)])
        report(f"tiny VAE, {layout}: moments {largest(found, moments):.1e}, pixels {largest(pixels, decoded):.1e} off")
        assert max(largest(found, moments), largest(pixels, decoded)) < 1e-4


def test_inception(device: torch.device, report: Callable, tmp_path: Path) -> None:
    """Random weights in the real format: features, logits and the spatial features of sFID."""
    pytest.importorskip("torch_fidelity", reason=FIDELITY)
    from evaluation.inception import InceptionFeatures, write_random_inception
    from tools.bench.evaluation import smooth_images

    weights, images = str(write_random_inception(tmp_path / "inception.pth")), smooth_images(5, 64, 0)
    expected, found = (InceptionFeatures(weights, where)(images) for where in (CPU, device))
    for key, value in expected.items():
        error = largest(found[key], value) / float(value.abs().max())
        report(f"Inception, {key}: {error:.1e} of the largest")
        assert error < 1e-4 and found[key].device.type == device.type


def test_precision_recall_and_kid(device: torch.device) -> None:
    pytest.importorskip("torch_fidelity", reason=FIDELITY)
    from evaluation.metrics import precision_recall

    generator = torch.Generator().manual_seed(0)
    generated, real = torch.randn(300, 64, generator=generator), 1.1 * torch.randn(400, 64, generator=generator)
    expected, found = precision_recall(generated, real), precision_recall(generated.to(device), real.to(device))
    assert 0.05 < expected[0] < 0.999 and expected[1] > 0.05
    assert found == pytest.approx(expected, abs=1.01 / 300)  # one image at the edge of the manifold


def test_lpips(device: torch.device) -> None:
    pytest.importorskip("lpips", reason="lpips is not installed")
    import lpips

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        expected = network(a, b)
        assert largest(network.to(device)(a.to(device), b.to(device)), expected) < 1e-4
