"""The sampler through torch.compile (`--compile`): few graphs with static shapes instead of hundreds of thousands of small operations.

Shapes that change over the steps are rounded up to buckets, so that a handful of graphs serves all steps:
  backbone   the visible tokens: padded with copies of one of them, which no query attends to. A copy has its original's features, so that
             putting it back into the grid changes nothing.
  head       the tokens decoded together; and *one* graph is called for each of the C dimensions, the position being a tensor.
On a GPU, torch.compile's "reduce-overhead" mode replays each graph as one launch (CUDA graphs): C + 2 launches per step, whatever the depth.

Exact up to the rounding of fused operations. Letters: R rows (B images, 2B with guidance), L tokens, V visible, N tokens decoded, D and H widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.channel_ar import draw_indices, spread_temperatures
from models.layers import LayerCache, Modulation, take

if TYPE_CHECKING:
    from models.tokenbridge import TokenBridge

MOST_GRAPHS = 64  # of one function: torch would fall back to eager, silently, after its default of 8
VISIBLE_BUCKETS = 4  # lengths of the encoder's sequence that are compiled, beside that with nothing visible


def launches_per_step(num_channels: int) -> int:
    """Graphs called at a sampling step, whatever the depth: the backbone, the head's beginning, one for each dimension."""
    return 2 + num_channels


def bucket(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... that is at least `count`: at most a third is padding."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def graph(function: Callable, device: torch.device) -> Callable:
    """`function` compiled for static shapes, without breaks; on a GPU as a CUDA graph."""
    return torch.compile(
        function, dynamic=False, fullgraph=True, mode=None if device.type == "cpu" else "reduce-overhead"
    )


class CompiledSampler:
    """The two costly parts of a sampling step, compiled; made once per model (`of`), so that later batches find the graphs ready.

    launches: how often a graph was called so far; a GPU replays each call as one launch.
    """

    def __init__(self, model: TokenBridge):
        if model.head != "autoregressive":
            raise ValueError(
                f"--compile samples with the autoregressive head only, the model's is {model.head}; leave --compile out"
            )
        self.model, self.launches = model, 0
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
        setattr(config, limit, max(getattr(config, limit), MOST_GRAPHS))
        device = model.mask_token.device
        self._backbone, self._begin, self._position = (
            graph(f, device) for f in (self.backbone, self.begin, self.position)
        )

    @classmethod
    def of(cls, model: TokenBridge) -> CompiledSampler:
        """The model's own; kept in its __dict__, out of reach of state_dict() and modules()."""
        key = "_compiled_sampler"
        if key not in model.__dict__:
            model.__dict__[key] = cls(model)
        return model.__dict__[key]

    def _launch(self, compiled: Callable, *arguments: object) -> object:
        self.launches += 1
        return compiled(*arguments)

    # ------------------------------------------------------------------------------------------------------- backbone

    def backbone(
        self, values: Tensor, visible: Tensor, seen: Tensor, class_embedding: Tensor, scale: Tensor | None
    ) -> Tensor:
        """z (B, L, D) of all tokens. values (R, V, C), visible (R, V), seen (S+V,) False for padding, class_embedding (R, D); scale 0-dim or None."""
        z = self.model.decode(self.model.encode(values, visible, class_embedding, seen), visible)  # (R, L, D)
        if scale is None:
            return z
        conditional, unconditional = z.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def features(self, class_embedding: Tensor) -> Callable[[Tensor, Tensor, int, Tensor, float], Tensor]:
        """A feature source for images with class_embedding (B, D), see models.sampling.loop.feature_source."""
        m = self.model
        both = torch.cat([class_embedding, m.fake_latent.detach().expand_as(class_embedding)])  # (2B, D)
        step = math.ceil(m.num_tokens / VISIBLE_BUCKETS)

        def features(values: Tensor, orders: Tensor, num_masked: int, wanted: Tensor, scale: float) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            known = m.num_tokens - num_masked
            length = min(math.ceil(known / step) * step, m.num_tokens)
            visible = orders[:, num_masked:]  # (B, known)
            if length > known:
                visible = torch.cat([visible, visible[:, :1].expand(-1, length - known)], dim=1)  # (B, V)
            seen = torch.arange(m.buffer_size + length, device=values.device) < m.buffer_size + known  # (S+V,)
            shown = take(values, visible)  # (B, V, C)
            if scale == 1:
                z = self._launch(self._backbone, shown, visible, seen, class_embedding, None)
            else:
                strength = torch.full((), scale, device=values.device)
                z = self._launch(
                    self._backbone, torch.cat([shown, shown]), torch.cat([visible, visible]), seen, both, strength
                )
            return take(z, wanted)  # (B, M, D)

        return features

    # ------------------------------------------------------------------------------------------------------- head

    def begin(self, z: Tensor) -> tuple[Tensor, list[Modulation]]:
        """First input (N, H) and the modulations of all positions, from z (N, D)."""
        return self.model.head_start_and_modulations(z)

    def position(
        self,
        x: Tensor,
        modulations: Sequence[Modulation],
        keys_values: Tensor,
        position: Tensor,
        noise: Tensor,
        temperatures: Tensor | None,
        tables: Tensor,
        weight: Tensor,
        bias: Tensor,
        top_k: int,
        top_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One dimension: x (N, H) at `position` (1,) -> its indices and witnesses (N,), the next x. temperatures (C,); None: argmax.

        keys_values (layers, 2, N, heads, C, head_dim) is filled in place. tables (C, K, H): what the next position gets; weight (C, K, H) and
        bias (C, K) of the heads.
        """
        caches = [LayerCache(*layer.unbind()) for layer in keys_values.unbind()]
        # (N, 1, H) each
        now = [tuple(term.index_select(1, position) for term in modulation) for modulation in modulations]
        features = self.model.head_forward(x.unsqueeze(1), now, caches, position)[:, 0]  # (N, H)
        logits = F.linear(features, weight.index_select(0, position)[0], bias.index_select(0, position)[0])  # (N, K)
        temperature = 0.0 if temperatures is None else temperatures.index_select(0, position)
        drawn, witness = draw_indices(logits, noise.index_select(1, position)[:, 0], temperature, top_k, top_p)
        return drawn, witness, F.embedding(drawn, tables.index_select(0, position)[0])

    def channel_sample(
        self, z: Tensor, noise: Tensor, temperature: float | Sequence[float], top_k: int = 0, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """As TokenBridge.channel_sample; tokens beyond N that fill the bucket are decoded and thrown away."""
        m = self.model
        count, length = len(z), bucket(len(z))
        z, noise = (F.pad(x, (0, 0) * (x.ndim - 1) + (0, length - count)) for x in (z, noise))  # (N, D), (N, C[, K])
        temperatures = spread_temperatures(temperature, m.num_channels)
        # (C,), no copy from the host
        warm = torch.stack([torch.full((), t or 1.0, device=z.device) for t in temperatures])
        x, modulations = self._launch(self._begin, z)
        attention, weights = m.channel_blocks[0].attn, m.channel_heads
        keys_values = x.new_zeros(
            len(m.channel_blocks), 2, length, attention.num_heads, m.num_channels, attention.head_dim
        )
        tables = F.pad(m.next_inputs(), (0, 0, 0, 0, 0, 1))  # (C, K, H), the last never used
        weight, bias = torch.stack([w.weight for w in weights]), torch.stack([w.bias for w in weights])
        indices, witnesses = [], []
        for c in range(m.num_channels):
            position = torch.full((1,), c, device=z.device)
            drawn, witness, x = self._launch(
                self._position,
                x,
                modulations,
                keys_values,
                position,
                noise,
                warm if temperatures[c] else None,
                tables,
                weight,
                bias,
                top_k,
                top_p,
            )
            indices.append(drawn.clone())  # a CUDA graph reuses its output
            witnesses.append(witness.clone())
            x = x.clone()
        return torch.stack(indices, dim=1)[:count], torch.stack(witnesses, dim=1).sum(1)[:count]
