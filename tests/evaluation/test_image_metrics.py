"""evaluation/image_metrics.py: PSNR and SSIM against scikit-image, LPIPS against its package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from evaluation.image_metrics import Lpips, find_alexnet_weights, psnr, ssim
from tests.stand_ins import as_tensor, crops, damaged
from util.options import ArgumentError


def test_psnr_is_scikit_images() -> None:
    a = as_tensor(crops(4, 48, seed=1))
    b = damaged(a, 12.0)
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(psnr(a, b).numpy(), expected, rtol=1e-6)
    assert psnr(a, a).tolist() == [100.0] * 4
    one_pixel = a.clone()
    one_pixel[:, 0, 0, 0] ^= 1
    assert (psnr(a, one_pixel) < 100).all()


@pytest.mark.parametrize("height, width", [(64, 64), (11, 11), (40, 23)])
def test_ssim_is_scikit_images(height: int, width: int) -> None:
    a = as_tensor(crops(20, 64, seed=2))[..., :height, :width]  # more than one chunk
    b = torch.cat([damaged(a[:10], 5.0), damaged(a[10:], 40.0)])
    b[0], b[1] = 0, 255  # flat images have no variance at all
    expected = [
        structural_similarity(
            x, y, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    found = ssim(a, b)
    assert found.shape == (20,)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(ssim(a, a).numpy(), 1.0, atol=1e-7)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[..., :10], a[..., :10])


def test_lpips_is_the_packages(tmp_path: Path) -> None:
    """torchvision's AlexNet file, here with random weights, inside the package's metric; 0 for equal images."""
    import lpips
    from torchvision.models import alexnet

    torch.manual_seed(0)
    state = {key: value for key, value in alexnet().state_dict().items() if key.startswith("features")}
    torch.save(state, tmp_path / "alexnet.pth")
    ours = Lpips(str(tmp_path / "alexnet.pth"), torch.device("cpu"))
    images = as_tensor(crops(2, 64))
    noisy = damaged(images, 25.0)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for i, layer in enumerate(theirs.net.state_dict()):
        theirs.net.state_dict()[layer].copy_(list(state.values())[i])
    with torch.no_grad():
        expected = theirs(noisy.float() / 127.5 - 1, images.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(ours(noisy, images), expected, rtol=1e-5, atol=1e-7)
    assert ours(images, images).abs().max() == 0 and expected.min() > 0


def test_alexnet_weights_absent_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no AlexNet weights at .*none.pth: download https://"):
        find_alexnet_weights(str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ArgumentError, match="text.pth does not hold torchvision's AlexNet"):
        Lpips(str(tmp_path / "text.pth"), torch.device("cpu"))
