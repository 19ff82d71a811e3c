"""What of TokenBridge depends on the VAE: posterior, channels, stride, scale, shift, channel order, quantizer range.

KL-16's description is built in. Others stand in a VAE checkpoint ("config", and "description" if it has one) or, for
any VAE, in a small JSON file beside its weights, which takes precedence: kl16.ckpt -> kl16.latents.json, a folder DIR
-> DIR/tokenbridge.json. Keys are the fields of VaeDescription; `python -m tools.vae_stats` writes it.

Letters: B batch, C latent channels, h and w latent grid.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from util.checkpoint import fingerprint
from util.json_reader import conforms, read_json
from util.options import ArgumentError

Number = float | Sequence[float]
LARGEST_SIZE, LARGEST_SCALE = 4096, 1e6  # of channels and stride, of scale and shift; those of KL-16 are 16 and 0.2
DECODER_KEYS = ("decoder.", "post_quant_conv.")


class DiagonalGaussian:
    """Posterior N(mean, std^2) from moments (B, 2C, h, w): mean and unclamped log-variance along the channels."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise (B, C, h, w); `noise` is drawn from `generator` when it is not given."""
        if noise is None:
            noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) in nats, summed over each sample: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


@dataclass
class VaeDescription:
    """channels C and stride (pixels per latent position). scale_factor, shift: one number, or one per channel.

    channel_order: latent dimensions from low to high frequency (docs/spec.md 6), None where unknown. quant_bits,
    quant_min, quant_max: the quantizer that suits the scaled latents, None where unknown. ValueError for values that
    do not fit together.
    """

    channels: int
    stride: int
    scale_factor: Number = 1.0
    shift: Number = 0.0
    channel_order: Sequence[int] | None = None
    quant_bits: int | None = None
    quant_min: float | None = None
    quant_max: float | None = None

    def __post_init__(self) -> None:
        for size in (self.channels, self.stride):
            if not conforms(size, int) or not 1 <= size <= LARGEST_SIZE:
                got = f"{self.channels!r} and {self.stride!r}"
                raise ValueError(f"channels and stride must be whole numbers from 1 to {LARGEST_SIZE}, got {got}")
        self.scale_factor = self._numbers("scale_factor", "finite numbers, none of them 0")
        self.shift = self._numbers("shift", "finite numbers")
        if self.channel_order is not None:
            self.channel_order = checked_order(self.channel_order, self.channels)
        if self.quant_bits is not None and not (conforms(self.quant_bits, int) and 1 <= self.quant_bits <= 12):
            raise ValueError(f"quant_bits must be a whole number from 1 to 12, got {self.quant_bits!r}")
        low, high = self.quant_min, self.quant_max
        if (low, high) != (None, None):
            if not conforms([low, high], [float]) or low >= high:
                raise ValueError(f"quant_min must be less than quant_max, both finite; got {low!r} and {high!r}")
            self.quant_min, self.quant_max = float(low), float(high)

    def _numbers(self, name: str, kind: str) -> Number:
        """scale_factor or shift as floats; ValueError for another count or other numbers than `kind`."""
        value = getattr(self, name)
        several = isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if several else [value]
        if several and len(values) != self.channels:
            raise ValueError(f"{name} has {len(values)} values but the VAE has {self.channels} latent channels")
        lowest = 0 if name == "shift" else 1 / LARGEST_SCALE
        if not all(conforms(v, float) and lowest <= abs(v) <= LARGEST_SCALE for v in values):
            raise ValueError(f"{name} must be {kind}, got {value!r}")
        return [float(v) for v in values] if several else float(value)


def checked_order(order: object, channels: int) -> list[int]:
    """An order of the latent dimensions as a list; ArgumentError unless it is a permutation of 0..channels - 1."""
    numbers = list(order) if isinstance(order, Sequence) else None
    if not conforms(numbers, [int]) or sorted(numbers) != list(range(channels)):
        message = f"channel_order must be a permutation of 0..{channels - 1}, got {order!r:.80}"
        raise ArgumentError("channel_order", message)
    return [int(c) for c in numbers]


KL16 = VaeDescription(
    16,
    16,
    scale_factor=0.2325,  # 1/std of its latents on ImageNet (docs/spec.md 2)
    channel_order=[8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5],  # by frequency (docs/spec.md 5)
    quant_bits=6,
    quant_min=-5.0,
    quant_max=5.0,
)


def description_path(vae_path: str | Path) -> Path:
    """Where the description of a VAE file or folder stands."""
    path = Path(vae_path)
    return path / "tokenbridge.json" if path.is_dir() else path.with_suffix(".latents.json")


def read_description(path: str | Path) -> VaeDescription:
    """ValueError naming the file if it is no description."""
    try:
        content = read_json(path)
        known = {field.name for field in fields(VaeDescription)}
        if set(content) - known:
            raise ValueError(f"unknown keys {sorted(set(content) - known)}; known are {', '.join(sorted(known))}")
        return VaeDescription(**content)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not describe a VAE: {error}") from error


def find_description(vae_path: str | Path) -> VaeDescription | None:
    """The description beside a VAE's weights, None if there is none.

    ValueError naming the file if it cannot be used.
    """
    path = description_path(vae_path)
    return read_description(path) if path.is_file() else None


class LatentSpace:
    """What every VAE class here shares: the description's values as attributes, scaling, the fingerprint.

    The attributes have the names of VaeDescription's fields; C is `embed_dim`.

    A VAE class adds `encode(images) -> DiagonalGaussian`, `decode(latents) -> images`, `config` (JSON-able, what builds
    it again) and calls `set_description` in its constructor.
    """

    embed_dim: int
    stride: int
    scale_factor: Number
    shift: Number
    channel_order: list[int] | None
    deterministic = False  # True: no posterior, the encoder gives one latent

    def set_description(self, description: VaeDescription) -> None:
        """Take over a description's values; None keeps an earlier one. ValueError for other channels or stride."""
        d = description
        channels, stride = getattr(self, "embed_dim", d.channels), getattr(self, "stride", d.stride)
        if (d.channels, d.stride) != (channels, stride):
            said = f"the description beside the VAE's weights says {d.channels} channels at stride {d.stride}"
            raise ValueError(f"{said}, the VAE has {channels} at {stride}")
        self.embed_dim = d.channels
        for name, value in asdict(d).items():
            if name != "channels" and (value is not None or not hasattr(self, name)):
                setattr(self, name, value)

    @property
    def description(self) -> VaeDescription:
        """These values as a description."""
        names = [field.name for field in fields(VaeDescription) if field.name != "channels"]
        return VaeDescription(channels=self.embed_dim, **{name: getattr(self, name) for name in names})

    @property
    def latent_config(self) -> dict:
        """The part of `config` that says how latents reach the transformer; JSON-able."""
        values = asdict(self.description)
        return {name: values[name] for name in ("scale_factor", "shift", "channel_order")}

    def quantizer_settings(self) -> dict[str, float]:
        """Those of quant_bits, quant_min and quant_max that are known to suit this VAE."""
        values = asdict(self.description)
        return {name: value for name, value in values.items() if name.startswith("quant_") and value is not None}

    def check_images(self, images: Tensor) -> None:
        """ValueError unless the stride divides height and width."""
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            size = tuple(images.shape[-2:])
            raise ArgumentError("img_size", f"image size {size} is not a multiple of the VAE's stride {self.stride}")

    def latent_fingerprint(self) -> str:
        """SHA-256 of the weights that define the latent space, all but the decoder's, to tell one VAE from another."""
        weights = {k: v for k, v in sorted(self.state_dict().items()) if not k.startswith(DECODER_KEYS)}
        if not weights:
            raise ValueError("this VAE has no weights outside its decoder, so nothing identifies its latent space")
        return fingerprint(weights)

    def scale(self, z: Tensor) -> Tensor:
        """Raw latents -> the transformer's latents of about unit variance: (z - shift) * scale_factor, (B, C, h, w)."""
        return (z - per_channel(self.shift, z)) * per_channel(self.scale_factor, z)

    def unscale(self, latents: Tensor) -> Tensor:
        """Inverse of `scale`: what `decode` takes, (B, C, h, w)."""
        return latents / per_channel(self.scale_factor, latents) + per_channel(self.shift, latents)


def per_channel(value: Number, like: Tensor) -> float | Tensor:
    """A number as it is, or one per channel as (C, 1, 1) on the device of `like`."""
    if isinstance(value, Sequence):
        numbers = torch.tensor(list(value), dtype=like.dtype, device="cpu")
        return numbers.to(like.device, non_blocking=True).view(-1, 1, 1)  # (C, 1, 1); the host does not wait
    return value
