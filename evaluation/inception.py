"""Inception features of images, by torch-fidelity's network (docs/spec.md 9).

Letters: B images of a batch, S their side in pixels.
"""

import socket
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from util.dist import agree, float32_precision
from util.files import file_sha256, unchanged
from util.launcher import launched
from util.log import first_line
from util.options import ArgumentError

FEATURE_DIM = 2048
SPATIAL_CHANNELS, SPATIAL_GRID = 7, 17
SPATIAL_DIM = SPATIAL_GRID**2 * SPATIAL_CHANNELS  # ADM's sFID features: 2023
LOGITS_DIM = 1008
FEATURE_KEYS = ("2048", "spatial", "logits_unbiased")
CHUNK = 32  # images at a time, so that activations stay below 1 GiB
DOWNLOAD_TIMEOUT = 20  # seconds; a firewall that drops packets would block the job for ever


def torch_fidelity() -> ModuleType:
    """Its module of the network, imported where it is needed: training and sampling run without the package."""
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


def download_target() -> Path:
    """Where torch-fidelity keeps its download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / torch_fidelity().URL_INCEPTION_V3.rsplit("/", 1)[1]


def find_inception_weights(path: str | None) -> Path:
    """The weights file: `path`, else torch-fidelity's download. ArgumentError says what to put where."""
    weights = Path(path) if path else download_target()
    if not weights.is_file():
        advice = f"download {torch_fidelity().URL_INCEPTION_V3} and give its path, or put it at {download_target()}"
        raise ArgumentError("inception_weights", f"no Inception weights at {weights}: {advice}")
    return weights


def fetch_inception_weights(path: str | None, download: bool = True) -> Path:
    """As `find_inception_weights`, but the default file is downloaded if it is missing; every process must call it.

    One process per machine downloads, the others wait. ArgumentError with what to do by hand if that fails.
    """
    error = None
    try:
        find_inception_weights(path)
    except ArgumentError as missing:
        error = missing
        if download and not path:
            error = _download(missing) if launched("LOCAL_RANK") == 0 else None
    agree(error)
    return find_inception_weights(path)


def _download(missing: ArgumentError) -> ArgumentError | None:
    """torch-fidelity's weights into torch's download folder; None if that worked, otherwise `missing` with a reason."""
    target, url, timeout = download_target(), torch_fidelity().URL_INCEPTION_V3, socket.getdefaulttimeout()
    expected_hash = target.stem.rsplit("-", 1)[1]
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=expected_hash, progress=False)
        return None
    except Exception as error:  # URLError, timeouts, a wrong hash, a full disk
        return ArgumentError(missing.argument, f"{missing} (the download failed: {first_line(error)})")
    finally:
        socket.setdefaulttimeout(timeout)


class InceptionFeatures:
    """torch-fidelity's `inception-v3-compat` extractor on a device.

    uint8 images (B, 3, S, S) -> {"2048": pool features (B, 2048), "spatial": (B, 2023), "logits_unbiased": (B, 1008)},
    float32 on the device. The spatial features are those of ADM's sFID: the first 7 channels of the 17 x 17 map of
    block Mixed_6d (TensorFlow's mixed_6), row by row with the channel fastest. Every process must make one at the same
    time. ArgumentError without weights, or for a file that does not hold them (code in it is never run).
    """

    dim = FEATURE_DIM  # of the pool features

    def __init__(self, weights: str | None, device: torch.device):
        path = fetch_inception_weights(weights)
        with unchanged(path):
            self.sha256 = file_sha256(path)
            network = self._load(path)
        self.network = network.to(device)
        # this branch's channels come first in the block's 768
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.device = device

    def _load(self, path: Path) -> torch.nn.Module:
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run code in the file
            network = torch_fidelity().FeatureExtractorInceptionV3
            return network("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        except Exception as error:
            message = f"{path} does not hold torch-fidelity's Inception weights: {first_line(error)}"
            raise ArgumentError("inception_weights", message) from error

    def _keep_spatial(self, module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, 3, S, S), by FEATURE_KEYS."""
        parts = []
        with float32_precision(self.device):
            for chunk in images.split(CHUNK):
                pool, logits = self.network(chunk.to(self.device))
                parts.append((pool, self._spatial, logits))
        return dict(zip(FEATURE_KEYS, map(torch.cat, zip(*parts, strict=True)), strict=True))


def write_random_inception(path: Path) -> Path:
    """Weights in torch-fidelity's format, drawn from seed 0 so that activations keep their size; for tests, benches."""

    class Unfilled(torch_fidelity().FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            """The constructor insists on a file; this one is about to make it."""

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Unfilled("inception-v3-compat", ["2048"], str(path))
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        torch.nn.init.normal_(network.fc.weight, std=0.05)
    torch.save(network.state_dict(), path)
    return path
