"""The architecture of a TokenBridge model as data: what its constructor needs, checked, and what checkpoints keep."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from models import quantizer
from models.latent_space import KL16, checked_order
from util.options import ArgumentError, check_options, option

logger = logging.getLogger("tokenbridge")

HEADS = ("autoregressive", "parallel")
CHECKPOINTING = ("none", "selective", "full")
HEAD_STARTS = ("official", "trained")
# Larger sizes are a damaged file's, or a slip: huge has 1280 and 20, and 256 tokens.
MOST = {"width": 2**14, "depth": 256, "tokens": 2**16}


@dataclass(frozen=True, kw_only=True)
class TokenBridgeConfig:
    """Sizes default to large. ArgumentError, which names the argument, for values that do not fit together.

    quant_levels: K, a power of two from 2 to 4096. channel_order: latent dimensions in the head's order; by default
    KL-16's for 16 channels, otherwise the identity. head_start: first input of the head in *sampling* (docs/spec.md 5).
    head: "parallel" for the ablation that predicts the dimensions of a token at once.
    """

    img_size: int = option(256, "side of the images, pixels", lowest=1, highest=2**14)
    vae_stride: int = option(
        16, "pixels per latent position; taken from the VAE's file if it says so", lowest=1, highest=4096
    )
    patch_size: int = option(1, "latent positions per token side; the head is defined for 1 only")
    encoder_embed_dim: int = option(1024, lowest=1, highest=MOST["width"])
    encoder_depth: int = option(16, lowest=1, highest=MOST["depth"])
    encoder_num_heads: int = option(16, lowest=1, highest=MOST["width"])
    decoder_embed_dim: int = option(1024, lowest=1, highest=MOST["width"])
    decoder_depth: int = option(16, lowest=1, highest=MOST["depth"])
    decoder_num_heads: int = option(16, lowest=1, highest=MOST["width"])
    channel_embed_dim: int = option(1024, lowest=1, highest=MOST["width"])
    channel_depth: int = option(4, lowest=1, highest=MOST["depth"])
    channel_heads: int = option(8, lowest=1, highest=MOST["width"])
    mlp_ratio: float = option(4.0, above=0, highest=64)
    quant_levels: int = option(64, check=False)
    vae_embed_dim: int = option(16, "latent channels; taken from the VAE's file if it says so", lowest=1, highest=4096)
    mask_ratio_min: float = option(0.7, "smallest share of masked tokens in training", above=0, highest=1)
    label_drop_prob: float = option(0.1, "share of images trained without their class", lowest=0, highest=1)
    class_num: int = option(1000, "number of classes", lowest=1, highest=10**6)
    attn_dropout: float = option(0.1, "on attention weights, in training", lowest=0, highest=1)
    proj_dropout: float = option(0.1, "after projections and in the MLPs, in training", lowest=0, highest=1)
    buffer_size: int = option(64, "class-token slots before the image tokens", lowest=1, highest=2**14)
    grad_checkpointing: str = option(
        CHECKPOINTING[0],
        "what encoder and decoder recompute in the backward pass: nothing, norms and activation functions (selective), "
        "or whole blocks (full; also given without a value, as published); numbers stay the same",
        choices=CHECKPOINTING,
        nargs="?",
        const="full",
    )
    head_chunk: int | None = option(
        None, "tokens whose loss the head computes together, 0 for all; default: by its size and the device", lowest=0
    )
    quant_min: float = option(-5.0, "lowest latent value of the quantizer", check=False)
    quant_max: float = option(5.0, "highest latent value of the quantizer", check=False)
    channel_order: Sequence[int] | None = None
    head_start: str = option("trained", choices=HEAD_STARTS)
    head: str = option(
        "autoregressive",
        "how a token's dimensions are predicted: one after another, or (ablation) all at once",
        choices=HEADS,
    )

    def __post_init__(self) -> None:
        if isinstance(self.grad_checkpointing, bool):  # the published flag, as in earlier checkpoints: given or not
            object.__setattr__(self, "grad_checkpointing", "full" if self.grad_checkpointing else CHECKPOINTING[0])
        check_options(self)
        self._check_sizes()
        quantizer.check_range(self.quant_min, self.quant_max)
        if self.head == "parallel" and self.head_start != "trained":
            message = "belongs to the published autoregressive head, not to the parallel one"
            raise ArgumentError("head_start", f"head_start {self.head_start!r} {message}")
        object.__setattr__(self, "channel_order", self._checked_order())

    def _check_sizes(self) -> None:
        if self.patch_size != 1:
            reason = "the head is defined for one latent position per token, only 1 is possible"
            raise ArgumentError("patch_size", f"patch_size {self.patch_size}: {reason}")
        if self.img_size % self.vae_stride:
            message = f"img_size {self.img_size} is not a multiple of the VAE's stride {self.vae_stride}"
            raise ArgumentError("img_size", message)
        if self.num_tokens > MOST["tokens"]:
            message = f"img_size {self.img_size} at stride {self.vae_stride} makes {self.num_tokens:,} tokens"
            raise ArgumentError("img_size", f"{message}, more than {MOST['tokens']:,}")
        for part, of_heads in (("encoder", "num_heads"), ("decoder", "num_heads"), ("channel", "heads")):
            width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_{of_heads}")
            if width % heads:
                message = f"{part}_embed_dim {width} is not a multiple of {part}_{of_heads} {heads}"
                raise ArgumentError(f"{part}_embed_dim", message)
        if not 2 <= self.quant_levels <= 4096 or self.quant_levels & (self.quant_levels - 1):
            message = f"quant_levels must be a power of two from 2 to 4096, got {self.quant_levels}"
            raise ArgumentError("quant_levels", message)

    def _checked_order(self) -> tuple[int, ...]:
        order = self.channel_order
        if order is None and self.vae_embed_dim == KL16.channels:
            order = KL16.channel_order
        elif order is None:
            order = range(self.vae_embed_dim)
            message = "no channel_order given for %d latent channels: they are predicted in natural order"
            logger.info(message, self.vae_embed_dim)
        return tuple(checked_order(order, self.vae_embed_dim))

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
