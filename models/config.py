"""The architecture of a TokenBridge model as data: what its constructor needs, checked, and what checkpoints keep under config["model"]."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from models import quantizer
from models.latent_space import KL16
from util.options import ArgumentError

logger = logging.getLogger("tokenbridge")

HEADS = ("autoregressive", "parallel")
HEAD_STARTS = ("official", "trained")


@dataclass(frozen=True, kw_only=True)
class TokenBridgeConfig:
    """Sizes default to large. Raises ArgumentError, which names the argument, for values that do not fit together.

    quant_levels: K, a power of two from 2 to 4096. channel_order: latent dimensions in the head's order; KL-16's for 16 channels, otherwise
    the identity unless given. head_start: what the *sampler* feeds the head first (docs/spec.md 5). head: "parallel" for the ablation that
    predicts the dimensions of a token at once.
    """

    img_size: int = 256
    vae_stride: int = 16
    patch_size: int = 1
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    channel_embed_dim: int = 1024
    channel_depth: int = 4
    channel_heads: int = 8
    mlp_ratio: float = 4.0
    quant_levels: int = 64
    vae_embed_dim: int = 16
    mask_ratio_min: float = 0.7
    label_drop_prob: float = 0.1
    class_num: int = 1000
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    buffer_size: int = 64
    grad_checkpointing: bool = False
    quant_min: float = -5.0
    quant_max: float = 5.0
    channel_order: Sequence[int] | None = None
    head_start: str = "trained"
    head: str = "autoregressive"

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_training()
        self._check_head()

    def _check_sizes(self) -> None:
        if self.patch_size != 1:
            raise ArgumentError(
                "patch_size",
                f"patch_size {self.patch_size}: the per-dimension head is defined for one latent position per token, so only 1 is possible",
            )
        if self.img_size < 1 or self.img_size % self.vae_stride:
            raise ArgumentError(
                "img_size", f"img_size {self.img_size} is not a multiple of the VAE's stride {self.vae_stride}"
            )
        for name in ("class_num", "buffer_size", "encoder_depth", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, f"{name} must be at least 1, got {getattr(self, name)}")
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if width % heads:
                raise ArgumentError(
                    f"{part}_embed_dim", f"{part}_embed_dim {width} is not a multiple of {part}_num_heads {heads}"
                )
        if not 2 <= self.quant_levels <= 4096 or self.quant_levels & (self.quant_levels - 1):
            raise ArgumentError(
                "quant_levels", f"quant_levels must be a power of two from 2 to 4096, got {self.quant_levels}"
            )
        quantizer.check_range(self.quant_min, self.quant_max)

    def _check_training(self) -> None:
        if not 0 < self.mask_ratio_min <= 1:
            raise ArgumentError("mask_ratio_min", f"mask_ratio_min must be in (0, 1], got {self.mask_ratio_min}")
        for name in ("label_drop_prob", "attn_dropout", "proj_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(name, f"{name} must be a probability, got {getattr(self, name)}")

    def _check_head(self) -> None:
        if self.head_start not in HEAD_STARTS:
            raise ArgumentError(
                "head_start", f"head_start must be one of {', '.join(HEAD_STARTS)}, got {self.head_start!r}"
            )
        if self.head not in HEADS:
            raise ArgumentError("head", f"head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.head == "parallel" and self.head_start != "trained":
            raise ArgumentError(
                "head_start",
                f'head_start {self.head_start!r} belongs to the published autoregressive head; the parallel one has "trained" only',
            )
        order = self.channel_order
        if order is None:
            order = KL16.channel_order if self.vae_embed_dim == 16 else range(self.vae_embed_dim)
            if self.vae_embed_dim != 16:
                logger.info(
                    "no channel_order given for %d latent channels: dimensions are predicted in their natural order",
                    self.vae_embed_dim,
                )
        order = tuple(int(c) for c in order)
        if sorted(order) != list(range(self.vae_embed_dim)):
            raise ArgumentError(
                "channel_order",
                f"channel_order must be a permutation of 0..{self.vae_embed_dim - 1}, got {list(order)}",
            )
        object.__setattr__(self, "channel_order", order)

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.img_size // self.vae_stride

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.grid_size**2

    def to_dict(self) -> dict:
        """JSON-able; `TokenBridgeConfig(**config.to_dict()) == config`. What a checkpoint keeps."""
        return asdict(self) | {"channel_order": list(self.channel_order)}

    def changed(self, **changes: object) -> "TokenBridgeConfig":
        """A copy with other values, checked again."""
        return replace(self, **changes)
