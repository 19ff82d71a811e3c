"""VAEs of diffusers (AutoencoderKL: SD-VAE and others; AutoencoderDC: DC-AE) behind the interface of models/vae.py.

Needs the package `diffusers` (requirements-extra.txt); imported only here. The network is diffusers' own class with its
own weights; this file translates names. Letters: B batch, C latent channels, H and W image size, h = H/stride, w =
W/stride.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from models.latent_space import DiagonalGaussian, LatentSpace, VaeDescription
from util.json_reader import check_schema, read_json

CLASSES = ("AutoencoderKL", "AutoencoderDC")
LARGEST_CONFIG = {"layers": 64, "": 2**16}  # most layers of a level, and largest number, of a config from a file


class PointPosterior(DiagonalGaussian):
    """The posterior of an encoder that gives one latent (B, C, h, w): no spread, every sample is that latent."""

    def __init__(self, latent: Tensor):
        super().__init__(torch.cat([latent, torch.full_like(latent, -30.0)], 1))  # the smallest unclamped log-variance

    @property
    def std(self) -> Tensor:
        """0 (B, C, h, w)."""
        return torch.zeros_like(self.mean)

    def kl(self) -> Tensor:
        """ValueError."""
        raise ValueError("this VAE has no posterior, so no KL divergence")


class DiffusersVAE(nn.Module, LatentSpace):
    """A diffusers autoencoder with the interface of a `LatentSpace`.

    scale_factor and shift come from its config (scaling_factor, shift_factor, or latents_mean and latents_std per
    channel).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, settings = net, net.config
        self.kind = type(net).__name__
        self.deterministic = self.kind == "AutoencoderDC"
        stride = net.spatial_compression_ratio if self.deterministic else 2 ** (len(settings["block_out_channels"]) - 1)
        scale, shift = settings.get("scaling_factor") or 1.0, settings.get("shift_factor") or 0.0
        if settings.get("latents_mean") is not None and settings.get("latents_std") is not None:
            shift, scale = list(settings["latents_mean"]), [scale / std for std in settings["latents_std"]]
        self.set_description(VaeDescription(int(settings["latent_channels"]), int(stride), scale, shift))

    @property
    def config(self) -> dict:
        """What identifies the VAE's structure and scaling; JSON-able."""
        settings = {key: value for key, value in self.net.config.items() if not key.startswith("_")}
        return {"diffusers": self.kind, "diffusers_config": json.loads(json.dumps(settings))} | self.latent_config

    def state_dict(self, *args: object, **kwargs: object) -> dict:
        """The network's own, with its own keys."""
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict, *args: object, **kwargs: object) -> object:
        """Into the network, with its own keys."""
        return self.net.load_state_dict(state_dict, *args, **kwargs)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image (B, 3, H, W) in [-1, 1] -> posterior over raw latents (B, C, h, w)."""
        self.check_images(x)
        output = self.net.encode(x)
        return PointPosterior(output.latent) if self.deterministic else DiagonalGaussian(output.latent_dist.parameters)

    def decode(self, z: Tensor) -> Tensor:
        """Raw (unscaled) latents (B, C, h, w) -> image (B, 3, H, W), about [-1, 1], not clipped."""
        return self.net.decode(z).sample


def load_diffusers_vae(folder: str | Path) -> DiffusersVAE:
    """The VAE of a folder with diffusers' config.json and weights, or with such a folder `vae`.

    FileNotFoundError or ValueError naming the folder if it holds none, weights are absent or do not fit, or diffusers
    is not installed.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    kind, names = read_kind(folder), [path.name for path in folder.glob("*.safetensors*")]
    if not names:
        raise FileNotFoundError(f"{folder} has no .safetensors weights; save it again with save_pretrained")
    options = dict(use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    if all(".fp16." in name for name in names):  # published beside the full precision, or alone
        options["variant"] = "fp16"
    try:
        net, report = class_of(kind, folder).from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # safetensors, torch, accelerate and diffusers each have their own
        raise ValueError(f"{folder} cannot be loaded by diffusers: {str(error).splitlines()[0]}") from error
    missing = sorted(report.get("missing_keys") or [])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the VAE's weights, first: {missing[0]}")
    bad = [name for name, value in net.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{folder} holds NaN or infinite weights, first: {bad[0]}")
    return DiffusersVAE(net)


def class_of(kind: str, source: object) -> type:
    """A class of diffusers. ValueError, which names what needs it, if diffusers is not installed."""
    try:
        import diffusers
    except ImportError as error:
        advice = "pip install -r requirements-extra.txt"
        raise ValueError(f"{source} is a VAE of diffusers, which is not installed: {advice}") from error
    return getattr(diffusers, kind)


def build_diffusers_vae(config: dict) -> DiffusersVAE:
    """The VAE of a `DiffusersVAE.config`, with random weights: what tools.export writes. ValueError for another."""
    check_schema(config, {"diffusers": CLASSES, "diffusers_config": dict}, "config")
    settings = config["diffusers_config"]
    for key, value in settings.items():
        most = LARGEST_CONFIG["layers" if "layers" in key else ""]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"{key} {number} is more than {most}")
    vae = DiffusersVAE(class_of(config["diffusers"], "it").from_config(settings))
    scaling = {key: config[key] for key in ("scale_factor", "shift", "channel_order") if key in config}
    vae.set_description(VaeDescription(vae.embed_dim, vae.stride, **scaling))
    return vae


def read_kind(folder: Path) -> str:
    """The diffusers class that the folder's config.json names; FileNotFoundError, or ValueError if not in CLASSES."""
    path = folder / "config.json"
    try:
        kind = read_json(path, {"_class_name": str})["_class_name"]
    except FileNotFoundError:
        advice = "give a checkpoint file, or a VAE folder of diffusers"
        raise FileNotFoundError(f"{folder} is a folder without config.json: {advice}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no config of diffusers: {error}") from error
    if kind not in CLASSES:
        raise ValueError(f"{folder} holds a {kind}; of diffusers' classes {' and '.join(CLASSES)} can be used")
    return kind
