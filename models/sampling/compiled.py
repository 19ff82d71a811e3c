"""The sampler through torch.compile: a few graphs with static shapes instead of hundreds of thousands of ops.

Shapes that change over the steps are rounded up to buckets, so that a handful of graphs serves all steps:
  backbone   the visible tokens: padded with copies of one of them, which no query attends to. A copy has its original's
             features, so that putting it back into the grid changes nothing.
  head       the tokens decoded together; and *one* graph is called for each of the C dimensions, the position being a
             tensor.
On a GPU, torch.compile's "reduce-overhead" mode replays each graph as one launch (CUDA graphs): C + 2 launches per
step, whatever the depth.

A large batch keeps a GPU busy for longer than the host takes to launch its kernels. There the backbone runs as it is,
without padding and mask (which would rule out flash attention), each block compiled for any shape.

Exact up to the rounding of fused ops. Letters: R rows (B images, 2B with guidance), L tokens, C dimensions, K levels,
V visible, N tokens decoded, D and H widths of backbone and head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.channel_ar import is_valid, sample_levels, spread_temperatures
from models.layers import LayerCache, Modulation, take
from models.sampling.options import FeatureSource, SamplerModel
from util.options import ArgumentError

MOST_GRAPHS = 64  # of one function: torch would fall back to eager, silently, after its default of 8
MOST_REPLAYED_SLOTS = 8192  # rows times slots of the backbone: a larger batch runs without graphs; not measured
VISIBLE_BUCKETS = 4  # lengths of the encoder's sequence that are compiled, besides that with nothing visible


def launches_per_step(num_channels: int) -> int:
    """Graphs called at a sampling step, whatever the depth: backbone, start of the head, one for each dimension."""
    return 2 + num_channels


def bucket(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... that is at least `count`: at most a third is padding."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def graph(function: Callable, device: torch.device) -> Callable:
    """`function` compiled for static shapes, without breaks; on a GPU as a CUDA graph."""
    mode = None if device.type == "cpu" else "reduce-overhead"
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


class HeadWeights(NamedTuple):
    """Parameters of the C positions, stacked so that a position tensor can select from them."""

    tables: Tensor  # (C, K, H) input of the next position for each level; the last is never used
    weight: Tensor  # (C, K, H) of channel_heads
    bias: Tensor  # (C, K)


class CompiledSampler:
    """The two costly parts of a sampling step, compiled; one per model (`of`), so that later batches reuse the graphs.

    launches: number of graph calls so far; a GPU replays each call as one launch. graph: for tests, what to compile
    with.
    """

    def __init__(self, model: SamplerModel, graph: Callable = graph):
        if model.head != "autoregressive":
            raise ArgumentError("compile", f"compile needs the autoregressive head, the model's is {model.head}")
        self.model, self.launches = model, 0
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
        setattr(config, limit, max(getattr(config, limit), MOST_GRAPHS))
        parts = (self.backbone, self.begin, self.position)
        self._backbone, self._begin, self._position = (graph(part, model.mask_token.device) for part in parts)
        self._blocks: list[Callable] = []
        self._weights: HeadWeights | None = None
        self._caches: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, model: SamplerModel, graph: Callable = graph) -> CompiledSampler:
        """The model's own, for a new batch; kept in its __dict__, where state_dict() and modules() do not see it."""
        if "_compiled_sampler" not in model.__dict__:
            model.__dict__["_compiled_sampler"] = cls(model, graph)
        sampler = model.__dict__["_compiled_sampler"]
        sampler._weights = None
        return sampler

    def replays(self, rows: int) -> bool:
        """Whether the backbone of so many rows runs as graphs with static shapes."""
        return rows * (self.model.buffer_size + self.model.num_tokens) <= MOST_REPLAYED_SLOTS

    @contextmanager
    def compiled_blocks(self) -> Iterator[None]:
        """Within, the blocks of the backbone are compiled for any batch and number of tokens."""
        blocks = (*self.model.encoder_blocks, *self.model.decoder_blocks)
        self._blocks = self._blocks or [torch.compile(block._call_impl, dynamic=True) for block in blocks]
        try:
            for block, compiled in zip(blocks, self._blocks, strict=True):
                block._compiled_call_impl = compiled  # what block.compile() sets
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def _head_weights(self) -> HeadWeights:
        """Stacked once per batch of images."""
        if self._weights is None:
            m = self.model
            self._weights = HeadWeights(
                F.pad(m.next_inputs(), (0, 0, 0, 0, 0, 1)),
                torch.stack([head.weight for head in m.channel_heads]),
                torch.stack([head.bias for head in m.channel_heads]),
            )
        return self._weights

    def _key_value_cache(self, count: int, like: Tensor) -> Tensor:
        """Zeros (layers, 2, N, heads, C, head_dim), kept: a CUDA graph writes to an input at a fixed address only."""
        key = count, like.dtype, like.device
        if key not in self._caches:
            attention = self.model.channel_blocks[0].attn
            shape = len(self.model.channel_blocks), 2, count, attention.num_heads, self.model.num_channels
            self._caches[key] = like.new_empty((*shape, attention.head_dim))
            torch._dynamo.mark_static_address(self._caches[key])
        return self._caches[key].zero_()

    def _launch(self, compiled: Callable, *arguments: object) -> object:
        self.launches += 1
        return compiled(*arguments)

    def backbone(
        self, values: Tensor, visible: Tensor, attended: Tensor, class_embedding: Tensor, scale: Tensor | None
    ) -> Tensor:
        """z (B, L, D) of all tokens; `scale` 0-dim, None without guidance.

        values (R, V, C), visible (R, V), attended (S+V,) False for padding, class_embedding (R, D).
        """
        encoded = self.model.run_encoder(values, visible, class_embedding, attended)  # (R, S+V, D)
        z = self.model.run_decoder(encoded, visible)  # (R, L, D)
        if scale is None:
            return z
        conditional, unconditional = z.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def features(self, class_embedding: Tensor) -> FeatureSource:
        """A feature source for images with class_embedding (B, D)."""
        m = self.model
        both = torch.cat([class_embedding, m.fake_latent.detach().expand_as(class_embedding)])  # (2B, D)
        step = math.ceil(m.num_tokens / VISIBLE_BUCKETS)

        def features(values: Tensor, orders: Tensor, num_masked: int, targets: Tensor, scale: float) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            known = m.num_tokens - num_masked
            length = min(math.ceil(known / step) * step, m.num_tokens)
            visible = orders[:, num_masked:]  # (B, known)
            if length > known:
                visible = torch.cat([visible, visible[:, :1].expand(-1, length - known)], dim=1)  # (B, V)
            attended = torch.arange(m.buffer_size + length, device=values.device) < m.buffer_size + known  # (S+V,)
            inputs, rows, strength = (take(values, visible), visible), class_embedding, None  # (B, V, C), (B, V)
            if scale != 1:
                inputs, rows = tuple(torch.cat([x, x]) for x in inputs), both
                strength = torch.full((), scale, device=values.device)
            return take(self._launch(self._backbone, *inputs, attended, rows, strength), targets)  # (B, M, D)

        return features

    def begin(self, z: Tensor) -> tuple[Tensor, list[Modulation]]:
        """First input (N, H) and the modulations of all positions, from z (N, D)."""
        return self.model.head_start_and_modulations(z)

    def position(
        self,
        x: Tensor,
        modulations: Sequence[Modulation],
        keys_values: Tensor,
        position: Tensor,
        uniforms: Tensor,
        temperatures: Tensor | None,
        weights: HeadWeights,
        top_k: int,
        top_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One dimension: x (N, H) at `position` (1,) -> its indices and their `is_valid` numbers (N,), the next x.

        keys_values (layers, 2, N, heads, C, head_dim) is filled in place; uniforms (N, C); temperatures (C,), None for
        argmax.
        """
        caches = [LayerCache(*layer.unbind()) for layer in keys_values.unbind()]
        now = [tuple(term.index_select(1, position) for term in modulation) for modulation in modulations]  # (N, 1, H)
        features = self.model.head_forward(x.unsqueeze(1), now, caches, position)[:, 0]  # (N, H)
        tables, weight, bias = (part.index_select(0, position)[0] for part in weights)
        temperature = 0.0 if temperatures is None else temperatures.index_select(0, position)
        uniform = uniforms.index_select(1, position)[:, 0]
        indices, numbers = sample_levels(F.linear(features, weight, bias), uniform, temperature, top_k, top_p)
        return indices, numbers, F.embedding(indices, tables)

    def channel_sample(
        self, z: Tensor, uniforms: Tensor, temperature: float | Sequence[float], top_k: int = 0, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """As TokenBridge.channel_sample; the tokens that fill the bucket are decoded and discarded."""
        m, count = self.model, len(z)
        z, uniforms = (F.pad(x, (0, 0, 0, bucket(count) - count)) for x in (z, uniforms))  # (N, D), (N, C)
        temperatures = spread_temperatures(temperature, m.num_channels)
        warm = torch.stack([torch.full((), t or 1.0, device=z.device) for t in temperatures])  # (C,) no copy from host
        x, modulations = self._launch(self._begin, z)
        keys_values = self._key_value_cache(len(z), modulations[0][0])
        weights = self._head_weights()
        results = []
        for c in range(m.num_channels):
            position = torch.full((1,), c, device=z.device)
            now = warm if temperatures[c] else None
            arguments = (x, modulations, keys_values, position, uniforms, now, weights, top_k, top_p)
            *result, x = (part.clone() for part in self._launch(self._position, *arguments))  # graphs reuse outputs
            results.append(result)
        indices, numbers = (torch.stack(part, dim=1)[:count] for part in zip(*results, strict=True))  # (N, C)
        return indices, is_valid(numbers).all(1)
