"""Features reused between neighbouring sampling steps (after LazyMAR, arXiv 2503.12450): approximate, off by default.

A step reveals few tokens, so most features hardly change. Two independent savings:

reuse_features n   the whole backbone runs at every n-th step and keeps every block's keys and values. Between, only the tokens that changed run:
                   those revealed since the last step (encoder and decoder) and those wanted now (decoder). They attend to all tokens; what
                   the other tokens hold is that of the last step in which they ran.
reuse_guidance n   the unconditional half runs at every n-th step. Between, z_c - z_u of the same token is taken from that step.

With n = 1 everything is computed anew: the exact sampler.

Letters: R rows (B images, 2B where both halves run), S buffer slots, L tokens, V visible, N new since the last step, M wanted, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import LayerCache, block_queries, block_rest, take

if TYPE_CHECKING:
    from models.sampling.loop import SamplerOptions
    from models.tokenbridge import TokenBridge


def cached_block(
    block: nn.Module, x: Tensor, cache: LayerCache, slots: slice | Tensor, length: int, asking: Tensor | None = None
) -> Tensor:
    """One backbone block over some tokens x (R, N, D), which attend to the first `length` slots of the cache after writing theirs.

    slots: where their keys and values go, a slice of the cache or slot numbers (R, N). asking (R, M, D): those of x whose output is needed, if not all.
    """
    rows, (q, k, v) = len(x), block_queries(block, x, asking)  # (R, heads, N, hd)
    for store, new in ((cache.keys, k), (cache.values, v)):
        if isinstance(slots, slice):
            store[:rows, :, slots] = new
        else:
            store[:rows].scatter_(2, slots[:, None, :, None].expand_as(new), new.to(store.dtype))
    attended = F.scaled_dot_product_attention(
        q, cache.keys[:rows, :, :length].to(q.dtype), cache.values[:rows, :, :length].to(q.dtype)
    )
    return block_rest(block, x if asking is None else asking, attended)


class ReusedFeatures:
    """z of the wanted tokens, as `feature_source` promises; one object per batch, called once per step, in order."""

    def __init__(self, model: TokenBridge, class_embedding: Tensor, options: SamplerOptions):
        self.model, self.options = model, options
        self.embedding = torch.cat([class_embedding, model.fake_latent.detach().expand_as(class_embedding)])  # (2B, D)
        self.batch, self.calls, self.known = len(class_embedding), 0, 0
        self.current_rows = 0  # rows whose caches hold the last step: later ones are stale
        self.encoder_caches: list[LayerCache] = []
        self.decoder_caches: list[LayerCache] = []
        self.difference: Tensor | None = None  # z_c - z_u (B, L, D) of the last step that ran both halves

    def __call__(self, values: Tensor, orders: Tensor, num_masked: int, wanted: Tensor, scale: float) -> Tensor:
        """values (B, L, C), orders (B, L), wanted (B, M) -> z (B, M, D)."""
        o, batch = self.options, self.batch
        both = scale != 1 and (self.difference is None or self.calls % o.reuse_guidance == 0)
        rows = 2 * batch if both else batch
        whole = self.calls % o.reuse_features == 0 or rows > self.current_rows
        self.calls += 1
        keep_difference = both and o.reuse_guidance > 1
        # later steps need the difference of every masked token
        asked = orders[:, :num_masked] if keep_difference else wanted
        run = self._plain if o.reuse_features == 1 else self._whole if whole else self._changed
        z = run(values, orders, num_masked, asked, rows)  # (R, M or masked, D)
        self.known, self.current_rows = orders.shape[1] - num_masked, rows
        if scale == 1:
            return z
        if both:
            conditional, unconditional = z.chunk(2)
            if not keep_difference:
                return unconditional + scale * (conditional - unconditional)
            stored = z.new_zeros(batch, orders.shape[1], z.shape[-1])
            places = asked.unsqueeze(-1).expand_as(conditional)
            self.difference = stored.scatter(1, places, conditional - unconditional)
            z = take(stored.scatter(1, places, conditional), wanted)
        return z + (scale - 1) * take(self.difference, wanted)

    def _rows(self, x: Tensor, rows: int) -> Tensor:
        """x (B, ...) for all rows (R, ...)."""
        return x if rows == self.batch else torch.cat([x, x])

    def _allocate(self, x: Tensor, blocks: nn.ModuleList, dtype: torch.dtype) -> list[LayerCache]:
        slots = self.model.buffer_size + self.model.num_tokens
        attention = blocks[0].attn
        return LayerCache.allocate(
            len(blocks), (len(self.embedding), attention.num_heads, slots, attention.head_dim), x, dtype
        )

    def _encoder(self, x: Tensor, slots: slice) -> Tensor:
        for block, cache in zip(self.model.encoder_blocks, self.encoder_caches, strict=True):
            x = cached_block(block, x, cache, slots, slots.stop)
        return self.model.decoder_embed(self.model.encoder_norm(x))

    def _decoder(self, x: Tensor, slots: slice | Tensor, asked: Tensor, places: Tensor) -> Tensor:
        """z (R, M, D) of the asked tokens (R, M), which stand at places (R, M) of x (R, N, D)."""
        length = self.model.buffer_size + self.model.num_tokens
        *blocks, (last, last_cache) = zip(self.model.decoder_blocks, self.decoder_caches, strict=True)
        for block, cache in blocks:
            x = cached_block(block, x, cache, slots, length)
        x = cached_block(last, x, last_cache, slots, length, take(x, places))
        return self.model.decoder_outputs(x, asked)

    def _plain(self, values: Tensor, orders: Tensor, num_masked: int, asked: Tensor, rows: int) -> Tensor:
        """The whole backbone, nothing kept."""
        visible, known = self._rows(orders[:, num_masked:], rows), self._rows(values, rows)
        encoded = self.model.encode(take(known, visible), visible, self.embedding[:rows])
        return self.model.decode(encoded, visible, self._rows(asked, rows))

    def _whole(self, values: Tensor, orders: Tensor, num_masked: int, asked: Tensor, rows: int) -> Tensor:
        """The whole backbone, every block's keys and values kept. In the encoder's caches, tokens stand in the order of their revealing."""
        m = self.model
        visible = self._rows(orders[:, num_masked:].flip(1), rows)  # (R, V) first revealed first
        asked = self._rows(asked, rows)
        x = m.encoder_inputs(take(self._rows(values, rows), visible), visible, self.embedding[:rows])  # (R, S+V, D)
        if not self.encoder_caches:
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            self.encoder_caches, self.decoder_caches = (
                self._allocate(x, m.encoder_blocks, dtype),
                self._allocate(x, m.decoder_blocks, dtype),
            )
        x = m.decoder_inputs(self._encoder(x, slice(0, x.shape[1])), visible)  # (R, S+L, D)
        return self._decoder(x, slice(0, x.shape[1]), asked, asked + m.buffer_size)

    def _changed(self, values: Tensor, orders: Tensor, num_masked: int, asked: Tensor, rows: int) -> Tensor:
        """Only what changed since the last step: the new tokens through encoder and decoder, the asked ones through the decoder."""
        m, s = self.model, self.model.buffer_size
        end = orders.shape[1] - self.known
        new = self._rows(orders[:, num_masked:end].flip(1), rows)  # (R, N) revealed since the last step
        asked = self._rows(asked, rows)
        x = m.z_proj(take(self._rows(values, rows), new)) + F.embedding(new, m.encoder_pos_embed_learned[0, s:])
        x = self._encoder(m.z_proj_ln(x), slice(s + self.known, s + self.known + new.shape[1]))  # (R, N, D)
        hidden = m.mask_token.to(x.dtype).expand(rows, asked.shape[1], x.shape[-1])
        active = torch.cat([new, asked], dim=1)  # (R, N+M)
        x = torch.cat([x, hidden], dim=1) + F.embedding(active, m.decoder_pos_embed_learned[0, s:])
        places = torch.arange(new.shape[1], active.shape[1], device=x.device).expand(rows, -1)  # behind the new ones
        return self._decoder(x, active + s, asked, places)


FeatureSource = Callable[[Tensor, Tensor, int, Tensor, float], Tensor]
