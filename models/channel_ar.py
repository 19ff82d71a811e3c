"""The per-dimension autoregressive head (SPEC 5): p(token) = product over its C dimensions of p(index_c | earlier dimensions, z).

A token has K^C values, too many for one softmax; its dimensions are predicted one after another, from low to high frequency, by
a small causal transformer whose sequence is the C dimensions of *one* token. "Head order" means that frequency order; position c
of the head predicts dimension channel_order[c].

For comparison there is the head that the paper argues against, head="parallel": the same blocks, but no position sees an index of the token,
so the dimensions are predicted at once and drawn independently given z. Its state dict lacks the token_embeddings.

Letters: N tokens, C dimensions, K levels, H head width, D backbone width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import LAYER_NORM_EPS, AdaLNBlock, FinalModulation, LayerCache, Modulation

HEADS = ("autoregressive", "parallel")
HEAD_STARTS = ("official", "trained")
DECODE_CHUNK_BYTES = 2**30  # tokens are decoded in groups whose adaLN terms fit in this much memory


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (N, K) with -inf outside the top_k largest (0: all) and outside the smallest set of levels whose probability reaches top_p."""
    levels = logits.shape[-1]
    if (top_k == 0 or top_k >= levels) and top_p == 1:
        return logits
    ordered, place = logits.sort(dim=-1, descending=True, stable=True)  # equal logits: lowest level first, as argmax
    if 0 < top_k < levels:
        ordered = torch.cat([ordered[:, :top_k], torch.full_like(ordered[:, top_k:], -torch.inf)], dim=-1)
    if top_p < 1:
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)  # the most likely level always stays
    return torch.full_like(logits, -torch.inf).scatter_(-1, place, ordered)


def draw_indices(
    logits: Tensor, noise: Tensor, temperature: float | Tensor, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Indices (N,) from logits (N, K): argmax at temperature 0 or top_k 1, otherwise a draw from softmax(logits / temperature), cut by `keep_top`.

    No host sync, and the same image for any batch split, since the draw is decided by `noise`: uniforms (N,) in [0, 1) invert the cumulative
    distribution, Gumbel noise (N, K) is added to the logits, whose maximum is then the draw. Second: a witness (N,), finite only if the draw
    had a distribution to draw from (no NaN, no overflow).
    """
    logits = logits.float()
    known = not isinstance(temperature, Tensor)  # a tensor (0-dim) is above 0
    if known and temperature == 0 or top_k == 1:
        highest, indices = logits.max(-1)
        return indices, highest
    if not (known and temperature == 1):
        logits = logits / temperature
    logits = keep_top(logits, top_k, top_p)
    if noise.ndim == 2:
        highest, indices = (logits + noise).max(-1)
        return indices, highest
    cumulative = torch.softmax(logits, -1).cumsum(-1)  # (N, K)
    total = cumulative[:, -1:]  # 1 up to rounding; NaN if a logit is
    # (N, 1): how many are <= the uniform
    indices = torch.searchsorted(cumulative, noise.unsqueeze(1) * total, right=True)
    return indices[:, 0].clamp_(max=logits.shape[-1] - 1), total[:, 0]


def spread_temperatures(temperature: float | Sequence[float], num_channels: int) -> list[float]:
    """One temperature per dimension: the given ones, or the same for all."""
    return list(temperature) if isinstance(temperature, Sequence) else [temperature] * num_channels


class ChannelAR(nn.Module):
    """The head's parameters and its two uses: `channel_logits` (training, all positions at once) and `channel_sample` (decoding).

    A base class instead of a submodule because the published state dict keeps its keys at the root.
    """

    def build_channel_head(
        self,
        *,
        condition_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_channels: int,
        num_levels: int,
        channel_order: Sequence[int],
        head_start: str,
        grad_checkpointing: bool,
        attn_dropout: float,
        proj_dropout: float,
        head: str = "autoregressive",
    ) -> None:
        """Create the modules; call it where their place in the parameter order is (optimizer states are saved by position).

        attn_dropout, proj_dropout: rates in every block, in training mode only (SPEC 5); the backbone has the same.
        """
        if head_start not in HEAD_STARTS:
            raise ValueError(f"head_start must be one of {', '.join(HEAD_STARTS)}, got {head_start!r}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)} (--head), got {head!r}")
        if head == "parallel" and head_start != "trained":
            raise ValueError(
                f'head_start {head_start!r} belongs to the published autoregressive head; the parallel one (--head) has "trained" only'
            )
        if sorted(channel_order) != list(range(num_channels)):
            raise ValueError(f"channel_order must be a permutation of 0..{num_channels - 1}, got {list(channel_order)}")
        self.num_channels, self.num_levels, self.head_start, self.head = num_channels, num_levels, head_start, head
        self.checkpoint_head = grad_checkpointing
        self.channel_order = [int(c) for c in channel_order]
        inverse = [self.channel_order.index(c) for c in range(num_channels)]
        self.register_buffer("to_head_order", torch.tensor(self.channel_order), persistent=False)
        self.register_buffer("to_natural_order", torch.tensor(inverse), persistent=False)
        self.condition_proj = nn.Linear(condition_dim, dim)
        self.token_embeddings = nn.ModuleList(
            nn.Embedding(num_levels, dim) for _ in range(num_channels - 1 if head == "autoregressive" else 0)
        )
        self.channel_blocks = nn.ModuleList(
            AdaLNBlock(dim, num_heads, mlp_ratio, attn_dropout, proj_dropout) for _ in range(depth)
        )
        self.channel_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.channel_final = FinalModulation(dim)
        self.channel_heads = nn.ModuleList(nn.Linear(dim, num_levels) for _ in range(num_channels))

    def zero_channel_modulation(self) -> None:
        """Zero the last Linear of every adaLN, so that each block starts as the identity (SPEC 5, initialisation)."""
        for module in (*self.channel_blocks, self.channel_final):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)

    def modulations(self, conditioning: Tensor) -> list[Modulation]:
        """Every block's modulation, then the final one, from the conditioning (N, P, H)."""
        activated = F.silu(conditioning)
        return [module.modulation(activated) for module in (*self.channel_blocks, self.channel_final)]

    def head_forward(
        self,
        x: Tensor,
        modulations: Sequence[Modulation],
        caches: list[LayerCache] | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        """The one forward pass of the head: inputs x (N, P, H) at positions start.. -> features (N, P, H) before `channel_heads`.

        modulations: those of the same positions, see `modulations`.
        """
        for i, block in enumerate(self.channel_blocks):
            x = block(x, modulations[i], caches[i] if caches else None, start)
        return self.channel_final(self.channel_norm(x), modulations[-1])

    @property
    def modulation_layers(self) -> list[nn.Module]:
        """The Sequential (SiLU, Linear) of every block and the final one."""
        return [module.adaLN_modulation for module in (*self.channel_blocks, self.channel_final)]

    def embedding_table(self) -> Tensor:
        """All token embeddings in one: ((C-1)*K, H), those of position c at c*K; with a single dimension, which has none, (0, H)."""
        return torch.cat([embedding.weight for embedding in self.token_embeddings] or [self.channel_embed[0, :0]])

    def channel_logits(self, z: Tensor, indices: Tensor | None) -> Tensor:
        """Teacher-forced logits (N, C, K) in head order from z (N, D) and the true indices (N, C) in head order (parallel head: unused)."""
        h = self.condition_proj(z)  # (N, H)
        x = self._inputs(h, indices) + self.channel_embed  # (N, C, H)
        conditioning = h.unsqueeze(1) + self.timesteps_embeddings  # (N, C, H)
        if self.checkpoint_head and self.training and torch.is_grad_enabled():
            activated = F.silu(conditioning)
            for block in self.channel_blocks:
                x = checkpoint(
                    lambda x, a, block=block: block(x, block.modulation(a)), x, activated, use_reentrant=False
                )
            x = self.channel_final(self.channel_norm(x), self.channel_final.modulation(activated))
        else:
            x = self.head_forward(x, self.modulations(conditioning))
        weight = torch.stack([head.weight for head in self.channel_heads])  # (C, K, H)
        bias = torch.stack([head.bias for head in self.channel_heads])  # (C, K)
        return torch.baddbmm(bias.unsqueeze(1), x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)  # (N, C, K)

    def _inputs(self, h: Tensor, indices: Tensor | None) -> Tensor:
        """What the positions see before their embeddings (N, C, H): h, then the previous dimension's index; the parallel head h throughout."""
        if self.head == "parallel":
            return h.unsqueeze(1).expand(-1, self.num_channels, -1)
        offsets = torch.arange(self.num_channels - 1, device=h.device) * self.num_levels
        previous = F.embedding(indices[:, :-1] + offsets, self.embedding_table())  # (N, C-1, H)
        return torch.cat([h.unsqueeze(1), previous], dim=1)

    def leading_logits(self, z: Tensor) -> Tensor:
        """Logits (N, K) of the leading dimension (first in head order) from z (N, D)."""
        h = self.condition_proj(z)  # (N, H)
        conditioning = (h + self.timesteps_embeddings[:, 0]).unsqueeze(1)  # (N, 1, H)
        x = (conditioning if self.head_start == "official" else h.unsqueeze(1)) + self.channel_embed[:, :1]
        features = self.head_forward(x, self.modulations(conditioning))
        return self.channel_heads[0](features[:, 0]).float()

    def channel_sample(
        self, z: Tensor, noise: Tensor, temperature: float | Sequence[float], top_k: int = 0, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Indices (N, C) in head order from z (N, D), one dimension after another with a key-value cache; parallel head: all from one pass.

        noise (N, C) or (N, C, K), temperature (one, or C in head order), top_k, top_p: see `draw_indices`. Positions per token: C, not C(C+1)/2.
        Second: a witness (N,), finite only where every draw of the token was sound.
        """
        temperatures = spread_temperatures(temperature, self.num_channels)
        per_token = self.num_channels * self.condition_proj.out_features * (6 * len(self.channel_blocks) + 2) * 4
        chunk = max(1, DECODE_CHUNK_BYTES // per_token)
        parts = [
            self.sample_chunk(z[i : i + chunk], noise[i : i + chunk], temperatures, top_k, top_p)
            for i in range(0, len(z), chunk)
        ]
        if len(parts) == 1:
            return parts[0]
        indices, witness = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(witness)

    def head_start_and_modulations(self, z: Tensor) -> tuple[Tensor, list[Modulation]]:
        """For decoding: the input of position 0 (N, H), and every layer's modulation of all positions, from z (N, D)."""
        h = self.condition_proj(z)  # (N, H)
        conditioning = h.unsqueeze(1) + self.timesteps_embeddings  # (N, C, H)
        start = conditioning[:, 0] if self.head_start == "official" else h  # SPEC 5, start token
        return start + self.channel_embed[:, 0], self.modulations(conditioning)  # all positions in one matmul per layer

    def next_inputs(self) -> Tensor:
        """For decoding: (C-1, K, H), what position c + 1 gets when dimension c has index k, its embedding of the position included."""
        return (
            self.embedding_table().view(self.num_channels - 1, self.num_levels, self.channel_embed.shape[-1])
            + self.channel_embed[0, 1:, None]
        )

    def sample_chunk(
        self, z: Tensor, noise: Tensor, temperatures: Sequence[float | Tensor], top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """`channel_sample` of all tokens at once: static shapes, no host sync, one graph for torch.compile."""
        if self.head == "parallel":
            logits = self.channel_logits(z, None)  # (N, C, K)
            drawn, witness = zip(
                *(
                    draw_indices(logits[:, c], noise[:, c], temperatures[c], top_k, top_p)
                    for c in range(self.num_channels)
                ),
                strict=True,
            )
            return torch.stack(drawn, dim=1), torch.stack(witness, dim=1).sum(1)
        x, modulations = self.head_start_and_modulations(z)  # (N, H)
        attention, tables = self.channel_blocks[0].attn, self.next_inputs()  # (C-1, K, H)
        shape, dtype = (len(z), attention.num_heads, self.num_channels, attention.head_dim), modulations[0][0].dtype
        caches = LayerCache.allocate(len(self.channel_blocks), shape, z, dtype)
        indices, witnesses = [], []
        for c in range(self.num_channels):
            now = [tuple(term[:, c : c + 1] for term in modulation) for modulation in modulations]
            features = self.head_forward(x.unsqueeze(1), now, caches, start=c)  # (N, 1, H)
            drawn, witness = draw_indices(
                self.channel_heads[c](features[:, 0]), noise[:, c], temperatures[c], top_k, top_p
            )
            indices.append(drawn)
            witnesses.append(witness)
            if c < self.num_channels - 1:
                x = F.embedding(drawn, tables[c])
        return torch.stack(indices, dim=1), torch.stack(witnesses, dim=1).sum(1)
