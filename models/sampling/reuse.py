"""Features reused between neighbouring sampling steps (after LazyMAR, arXiv 2503.12450): approximate, off by default.

A step reveals few tokens, so most features hardly change. Two independent savings:

reuse_features n   the whole backbone runs at every n-th step and keeps every block's keys and values. In between, only
                   the tokens that changed run: those revealed since the last step (encoder and decoder) and the target
                   tokens (decoder). They attend to all tokens, of which the others keep the keys and values of the last
                   step in which they ran.
reuse_guidance n   the unconditional pass runs at every n-th step. In between, z_c - z_u of the same token is that of
                   the last such step.

With n = 1 everything is recomputed: the exact sampler.

Letters: R rows (B images, 2B where both passes run), S buffer slots, L tokens, V visible, N revealed since the last
step, M targets, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import LayerCache, take
from models.sampling.options import SamplerModel, SamplerOptions
from models.vit_blocks import cached_block


class ReusedFeatures:
    """A `FeatureSource`; one object per batch, called once per step, in order."""

    def __init__(self, model: SamplerModel, class_embedding: Tensor, options: SamplerOptions):
        self.model, self.options = model, options
        self.embedding = torch.cat([class_embedding, model.fake_latent.detach().expand_as(class_embedding)])  # (2B, D)
        self.batch, self.calls, self.known = len(class_embedding), 0, 0
        self.current_rows = 0  # rows whose caches hold the last step; those of later rows are stale
        self.encoder_caches: list[LayerCache] = []
        self.decoder_caches: list[LayerCache] = []
        self.difference: Tensor | None = None  # z_c - z_u (B, L, D) of the last step that ran both passes

    def __call__(self, values: Tensor, orders: Tensor, num_masked: int, targets: Tensor, scale: float) -> Tensor:
        """values (B, L, C), orders (B, L), targets (B, M) -> z (B, M, D)."""
        features, guidance = self.options.reuse_features, self.options.reuse_guidance
        both = scale != 1 and (self.difference is None or self.calls % guidance == 0)
        rows = 2 * self.batch if both else self.batch
        # The unconditional caches of a step that ran one pass only are stale: the next step with both runs everything.
        whole = self.calls % features == 0 or rows > self.current_rows
        self.calls += 1
        keep_difference = both and guidance > 1
        computed = orders[:, :num_masked] if keep_difference else targets  # later steps need it of every masked token
        run = self._plain if features == 1 else self._whole if whole else self._changed
        z = run(values, orders, num_masked, computed, rows)  # (R, M or masked, D)
        self.known, self.current_rows = orders.shape[1] - num_masked, rows
        if scale == 1:
            return z
        if both:
            conditional, unconditional = z.chunk(2)
            if not keep_difference:
                return unconditional + scale * (conditional - unconditional)
            grid = z.new_zeros(self.batch, orders.shape[1], z.shape[-1])  # (B, L, D)
            places = computed.unsqueeze(-1).expand_as(conditional)
            self.difference = grid.scatter(1, places, conditional - unconditional)
            z = take(grid.scatter(1, places, conditional), targets)
        # z_u + s (z_c - z_u) = z_c + (s - 1) (z_c - z_u): only z_c has to be of this step.
        return z + (scale - 1) * take(self.difference, targets)

    def _rows(self, x: Tensor, rows: int) -> Tensor:
        """x (B, ...) for all rows (R, ...)."""
        return x if rows == self.batch else torch.cat([x, x])

    def _allocate(self, x: Tensor, blocks: nn.ModuleList) -> list[LayerCache]:
        """Caches of the blocks for both passes and all positions, in the type that autocast computes in."""
        device, attention = x.device.type, blocks[0].attn
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        slots = self.model.buffer_size + self.model.num_tokens
        shape = (len(self.embedding), attention.num_heads, slots, attention.head_dim)
        return LayerCache.allocate(len(blocks), shape, x, dtype)

    def _encoder(self, x: Tensor, slots: slice) -> Tensor:
        """Inputs x (R, N, D), whose keys and values go to `slots`, through the encoder to the decoder's width."""
        for block, cache in zip(self.model.encoder_blocks, self.encoder_caches, strict=True):
            x = cached_block(block, x, cache, slots, slots.stop)
        return self.model.decoder_embed(self.model.encoder_norm(x))

    def _decoder(self, x: Tensor, slots: slice | Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """z (R, M, D) of the target tokens (R, M), which stand at places (R, M) of x (R, N, D)."""
        length = self.model.buffer_size + self.model.num_tokens
        *blocks, (last, last_cache) = zip(self.model.decoder_blocks, self.decoder_caches, strict=True)
        for block, cache in blocks:
            x = cached_block(block, x, cache, slots, length)
        x = cached_block(last, x, last_cache, slots, length, take(x, places))
        return self.model.decoder_outputs(x, targets)

    def _plain(self, values: Tensor, orders: Tensor, num_masked: int, targets: Tensor, rows: int) -> Tensor:
        """The whole backbone, nothing kept."""
        visible = self._rows(orders[:, num_masked:], rows)
        encoded = self.model.run_encoder(take(self._rows(values, rows), visible), visible, self.embedding[:rows])
        return self.model.run_decoder(encoded, visible, self._rows(targets, rows))

    def _whole(self, values: Tensor, orders: Tensor, num_masked: int, targets: Tensor, rows: int) -> Tensor:
        """The whole backbone, every block's keys and values kept.

        The encoder's caches hold the visible tokens in the order in which they were revealed, so that those of a later
        step are appended and the attended prefix grows; the decoder's hold every token at its place in the grid.
        """
        m = self.model
        visible = self._rows(orders[:, num_masked:].flip(1), rows)  # (R, V) first revealed first
        targets = self._rows(targets, rows)
        x = m.encoder_inputs(take(self._rows(values, rows), visible), visible, self.embedding[:rows])  # (R, S+V, D)
        if not self.encoder_caches:
            self.encoder_caches = self._allocate(x, m.encoder_blocks)
            self.decoder_caches = self._allocate(x, m.decoder_blocks)
        x = m.decoder_inputs(self._encoder(x, slice(0, x.shape[1])), visible)  # (R, S+L, D)
        return self._decoder(x, slice(0, x.shape[1]), targets, targets + m.buffer_size)

    def _changed(self, values: Tensor, orders: Tensor, num_masked: int, targets: Tensor, rows: int) -> Tensor:
        """Only what changed: tokens revealed since the last step in encoder and decoder, the targets in the decoder.

        Old tokens do not attend to new ones (their keys and values stay); that is the approximation.
        """
        m, s = self.model, self.model.buffer_size
        end = orders.shape[1] - self.known
        new = self._rows(orders[:, num_masked:end].flip(1), rows)  # (R, N)
        targets = self._rows(targets, rows)
        x = m.z_proj(take(self._rows(values, rows), new)) + F.embedding(new, m.encoder_pos_embed_learned[0, s:])
        x = self._encoder(m.z_proj_ln(x), slice(s + self.known, s + self.known + new.shape[1]))  # (R, N, D)
        hidden = m.mask_token.to(x.dtype).expand(rows, targets.shape[1], x.shape[-1])
        active = torch.cat([new, targets], dim=1)  # (R, N+M)
        x = torch.cat([x, hidden], dim=1) + F.embedding(active, m.decoder_pos_embed_learned[0, s:])
        places = torch.arange(new.shape[1], active.shape[1], device=x.device).expand(rows, -1)  # after the new ones
        return self._decoder(x, active + s, targets, places)
