"""What of TokenBridge depends on the VAE: channels, stride, scale, shift, channel order, quantizer range. KL-16's is built in.

It stands in a VAE checkpoint ("config", and "description" if it has one) or, for any VAE, in a small JSON file beside its weights, which
takes precedence: kl16.ckpt -> kl16.latents.json, a folder DIR -> DIR/tokenbridge.json. Keys are the fields of VaeDescription;
`python -m tools.vae_stats` writes it.

Letters: B batch, C latent channels, h and w latent grid.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

Number = float | Sequence[float]


@dataclass
class VaeDescription:
    """channels C and stride (pixels per latent position). scale_factor, shift: a number, or one per channel, see `LatentSpace.scale`.

    channel_order: latent dimensions from low to high frequency (SPEC 6), None where unknown. quant_bits, quant_min, quant_max: the quantizer that
    suits the scaled latents, None where unknown. Raises ValueError for values that do not fit together.
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
        if not (
            isinstance(self.channels, int) and isinstance(self.stride, int) and self.channels >= 1 and self.stride >= 1
        ):
            raise ValueError(
                f"channels and stride must be whole numbers of at least 1, got {self.channels!r} and {self.stride!r}"
            )
        for name in ("scale_factor", "shift"):
            value = getattr(self, name)
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            if len(values) not in ((self.channels,) if isinstance(value, Sequence) else (1,)):
                raise ValueError(f"{name} has {len(values)} values but the VAE has {self.channels} latent channels")
            if not all(isinstance(v, (int, float)) and math.isfinite(v) and (v or name == "shift") for v in values):
                raise ValueError(
                    f"{name} must be finite numbers{', none of them 0' if name == 'scale_factor' else ''}, got {value!r}"
                )
            setattr(self, name, [float(v) for v in values] if isinstance(value, Sequence) else float(value))
        if self.channel_order is not None:
            if not isinstance(self.channel_order, Sequence) or sorted(self.channel_order) != list(range(self.channels)):
                raise ValueError(
                    f"channel_order must be a permutation of 0..{self.channels - 1}, got {self.channel_order!r}"
                )
            self.channel_order = [int(c) for c in self.channel_order]
        if self.quant_bits is not None and not (isinstance(self.quant_bits, int) and 1 <= self.quant_bits <= 12):
            raise ValueError(f"quant_bits must be a whole number from 1 to 12, got {self.quant_bits!r}")
        low, high = self.quant_min, self.quant_max
        if (
            (low is None) != (high is None)
            or low is not None
            and not (math.isfinite(low) and math.isfinite(high) and low < high)
        ):
            raise ValueError(f"quant_min must be less than quant_max, both finite; got {low!r} and {high!r}")


# 1/std of KL-16 latents on ImageNet (SPEC 2); belongs to those weights
KL16 = VaeDescription(
    16,
    16,
    scale_factor=0.2325,
    channel_order=[8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5],  # by frequency (SPEC 5)
    quant_bits=6,
    quant_min=-5.0,
    quant_max=5.0,
)  # SPEC 3


def description_path(vae_path: str | Path) -> Path:
    """Where the description of a VAE file or folder stands."""
    path = Path(vae_path)
    return path / "tokenbridge.json" if path.is_dir() else path.with_suffix(".latents.json")


def read_description(path: str | Path) -> VaeDescription:
    """ValueError naming the file if it is no description."""
    try:
        content = json.loads(Path(path).read_text())
        known = {field.name for field in fields(VaeDescription)}
        if not isinstance(content, dict) or set(content) - known:
            raise ValueError(
                f"unknown keys {sorted(set(content) - known)}; known are {', '.join(sorted(known))}"
                if isinstance(content, dict)
                else "it is no JSON object"
            )
        return VaeDescription(**content)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not describe a VAE (beside --vae_path): {error}") from error


def find_description(vae_path: str | Path) -> VaeDescription | None:
    """The description beside a VAE's weights, None if there is none. ValueError naming the file if it cannot be used."""
    path = description_path(vae_path)
    return read_description(path) if path.is_file() else None


class LatentSpace:
    """What every VAE class here shares: the description's values as attributes, scaling, the fingerprint of the encoder."""

    embed_dim: int
    stride: int
    scale_factor: Number
    shift: Number
    channel_order: list[int] | None
    quant_range: tuple[float, float] | None = None
    quant_bits: int | None = None
    deterministic = False  # True: no posterior, the encoder gives one latent

    def set_description(self, found: VaeDescription) -> None:
        """Take over a description's values. ValueError if it is of another VAE: other channels or stride."""
        actual = (getattr(self, "embed_dim", found.channels), getattr(self, "stride", found.stride))
        if (found.channels, found.stride) != actual:
            raise ValueError(
                f"the description (the JSON file beside --vae_path) says {found.channels} channels at stride {found.stride}, the VAE has "
                f"{actual[0]} at {actual[1]}"
            )
        self.embed_dim, self.stride = found.channels, found.stride
        self.scale_factor, self.shift = found.scale_factor, found.shift
        if found.channel_order is not None or not hasattr(self, "channel_order"):
            self.channel_order = found.channel_order
        if found.quant_min is not None:
            self.quant_range = (float(found.quant_min), float(found.quant_max))
        self.quant_bits = self.quant_bits if found.quant_bits is None else found.quant_bits

    @property
    def description(self) -> VaeDescription:
        low, high = self.quant_range or (None, None)
        return VaeDescription(
            self.embed_dim, self.stride, self.scale_factor, self.shift, self.channel_order, self.quant_bits, low, high
        )

    @property
    def latent_config(self) -> dict:
        """The part of `config` that says how latents reach the transformer; JSON-able."""
        about = asdict(self.description)
        return {key: about[key] for key in ("scale_factor", "shift", "channel_order")}

    def fill_in_range(self, args: object, given: set[str]) -> None:
        """Set args.quant_bits, .quant_min and .quant_max to what suits this VAE, where it is known, but for those given on the command line."""
        known = {"quant_bits": self.quant_bits} if self.quant_bits is not None else {}
        if self.quant_range is not None:
            known |= dict(zip(("quant_min", "quant_max"), self.quant_range, strict=True))
        for name in known.keys() - given:
            setattr(args, name, known[name])

    def latent_fingerprint(self) -> str:
        """SHA-256 of the weights that define the latent space (encoder and quant_conv), to tell one VAE from another."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def scale(self, z: Tensor) -> Tensor:
        """Raw latents -> the transformer's latents of about unit variance: (z - shift) * scale_factor, (B, C, h, w)."""
        return (z - per_channel(self.shift, z)) * per_channel(self.scale_factor, z)

    def unscale(self, latents: Tensor) -> Tensor:
        """Inverse of `scale`: what `decode` takes, (B, C, h, w)."""
        return latents / per_channel(self.scale_factor, latents) + per_channel(self.shift, latents)


def per_channel(value: Number, like: Tensor) -> float | Tensor:
    """A number as it is, or one per channel as (C, 1, 1) beside `like`."""
    if isinstance(value, Sequence):
        return torch.tensor(list(value), device=like.device, dtype=like.dtype).view(-1, 1, 1)  # (C, 1, 1)
    return value
