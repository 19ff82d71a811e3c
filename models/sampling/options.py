"""The sampler's settings, which are flags too, and what it needs of a model. Letters as in loop.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from models.sampling.orders import ORDERS
from models.sampling.schedules import CFG_SCHEDULES, MASK_SCHEDULES, TEMPERATURE_SCHEDULES, temperature_at
from util.options import ArgumentError, check_options, option

FeatureSource = Callable[[Tensor, Tensor, int, Tensor, float], Tensor]
"""values (B, L, C), orders (B, L), number of masked tokens, target positions (B, M), guidance scale -> z (B, M, D)."""

LOWEST_TEMPERATURE = 1e-4  # logits divided by less overflow


@dataclass(kw_only=True)
class SamplerOptions:
    """How images are sampled. The defaults are the published sampler's; ArgumentError for values out of bounds.

    channel_temperature: one factor per dimension in *head* order, or two, for the first and the last dimension, with a
    line between. reuse_features, reuse_guidance: see reuse.py; 1 recomputes at every step. compile: see compiled.py.
    """

    num_iter: int = option(64, "sampling steps", lowest=1, highest=10**5)
    cfg: float = option(1.0, "guidance scale; 1 means none", lowest=-1e4, highest=1e4)
    cfg_schedule: str = option("linear", "guidance over the steps; linear as published", choices=CFG_SCHEDULES)
    cfg_interval: tuple[float, float] = option(
        (0.2, 0.8),
        "for cfg_schedule interval: guide while the share of revealed tokens is within",
        lowest=0,
        highest=1,
        nargs=2,
        metavar=("FROM", "TO"),
    )
    temperature: float = option(1.0, "divides the logits; 0 means argmax", lowest=0, highest=1e4)
    temperature_schedule: str = option(
        "constant", "linear and cosine go from temperature to temperature_end", choices=TEMPERATURE_SCHEDULES
    )
    temperature_end: float = option(0.0, lowest=0, highest=1e4)
    channel_temperature: tuple[float, ...] = option(
        (),
        "factors of the temperature by dimension in the head's order: one each, or two, for the first and the last",
        lowest=0,
        highest=1e4,
        nargs="+",
        metavar="FACTOR",
    )
    top_k: int = option(0, "sample from the k most likely levels only; 0 for all", lowest=0)
    top_p: float = option(1.0, "sample from the most likely levels that make up this probability", above=0, highest=1)
    order: str = option("random", "which tokens are revealed first; random as published", choices=ORDERS)
    mask_schedule: str = option("cosine", "how many tokens stay masked over the steps", choices=MASK_SCHEDULES)
    confidence_temperature: float = option(1.0, "for order confidence: weight of its noise", lowest=0, highest=1e6)
    reuse_features: int = option(
        1, "run the whole backbone at every n-th step, only the changed tokens in between (approximate)", lowest=1
    )
    reuse_guidance: int = option(
        1, "run the unconditional pass at every n-th step, reuse its difference in between (approximate)", lowest=1
    )
    compile: bool = option(False, "torch.compile the sampler: slower start, faster steps")

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.cfg_interval) != 2 or self.cfg_interval[0] > self.cfg_interval[1]:
            raise ArgumentError("cfg_interval", f"cfg_interval must be two shares, from <= to, got {self.cfg_interval}")
        temperatures = [("temperature", self.temperature), ("temperature_end", self.temperature_end)]
        for name, value in temperatures + [("channel_temperature", factor) for factor in self.channel_temperature]:
            if 0 < value < LOWEST_TEMPERATURE:
                lowest = f"{name} must be 0, which takes the likeliest level, or at least {LOWEST_TEMPERATURE:g}"
                raise ArgumentError(name, f"{lowest}; got {value:g}")
        for name in ("reuse_features", "reuse_guidance"):
            if self.compile and getattr(self, name) > 1:
                raise ArgumentError(name, f"compile and {name} cannot be combined: the shapes of reused parts change")

    def check(self, num_channels: int) -> None:
        """ArgumentError for what does not fit a model with `num_channels` dimensions."""
        factors = tuple(self.channel_temperature)
        if len(factors) not in (0, 2, num_channels):
            message = f"channel_temperature takes 2 or {num_channels} factors, got {factors}"
            raise ArgumentError("channel_temperature", message)

    def temperatures(self, step: int, num_channels: int) -> list[float]:
        """Temperature of each dimension (C values, head order) at a step."""
        now = temperature_at(step, self.num_iter, self.temperature, self.temperature_end, self.temperature_schedule)
        factors = self.channel_temperature or (1.0, 1.0)
        factors = factors if len(factors) == num_channels else np.linspace(*factors, num_channels)
        return [now * float(factor) for factor in factors]


class SamplerModel(Protocol):
    """What the loop needs of a model; models/tokenbridge.py is one.

    compiled.py and reuse.py run the backbone's and the head's parts by themselves, and need TokenBridge's.
    """

    num_tokens: int  # L
    token_dim: int  # C
    grid_size: int
    to_head_order: Tensor  # (C,)
    to_natural_order: Tensor  # (C,)
    fake_latent: Tensor  # (1, D) class embedding of no class
    training: bool

    def train(self, mode: bool = True) -> nn.Module:
        """Of nn.Module."""

    def modules(self) -> Iterable[nn.Module]:
        """Of nn.Module."""

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, C)."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and their values, both of x's shape."""

    def dequantize(self, indices: Tensor) -> Tensor:
        """Values of indices, same shape."""

    def run_encoder(self, values: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        """(B, V, C), (B, V), (B, D) -> (B, S+V, D)."""

    def run_decoder(self, x: Tensor, visible: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, S+V, D) -> z of the targets (B, M, D), or of all tokens."""

    def leading_logits(self, z: Tensor) -> Tensor:
        """(N, D) -> logits (N, K) of the leading dimension."""

    def channel_sample(
        self, z: Tensor, uniforms: Tensor, temperature: Sequence[float], top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """Indices (N, C) in head order, and whether all of a token's are valid (N,)."""
