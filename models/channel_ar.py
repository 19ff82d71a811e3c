"""The per-dimension autoregressive head (docs/spec.md 5): p(token) = product over c of p(index_c | earlier ones, z).

A token has K^C values, too many for one softmax; its dimensions are predicted one after another, from low to high
frequency, by a small causal transformer whose sequence is the C dimensions of *one* token. "Head order" is that
frequency order; position c of the head predicts dimension channel_order[c].

For comparison there is the head that the paper argues against, head="parallel": the same blocks, but no position sees
an index of the token, so the dimensions are predicted at once and sampled independently given z. Its state dict lacks
the token_embeddings.

Letters: N tokens, C dimensions, K levels, P positions handled now, H head width, D backbone width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import TokenBridgeConfig
from models.grouped_loss import grouped_sum
from models.layers import LAYER_NORM_EPS, AdaLNBlock, FinalModulation, LayerCache, Modulation

DECODE_CHUNK_BYTES = 2**30  # tokens are decoded in groups whose adaLN terms fit in this much memory
# The head's loss is computed in groups of tokens whose activations take about this much memory in float32, on a CPU and
# elsewhere: 45 % less in half precision. 160 bytes for each position, width and block are counted (tools.bench train).
GROUP_BYTES, GROUP_BYTES_ON_CPU = 2**32, 2**29
GROUP_BYTES_EACH = 160


def embedding(*shape: int) -> nn.Parameter:
    """A learned embedding, initialised to N(0, 0.02)."""
    return nn.Parameter(torch.empty(shape).normal_(std=0.02))


class ChannelAR(nn.Module):
    """The head's parameters and its two uses: `channel_logits` (training, all positions at once) and `channel_sample`.

    A base class instead of a submodule because the published state dict has its keys at the root.
    """

    # ---- construction

    def build_head_embeddings(self, config: TokenBridgeConfig) -> None:
        """Parameters of the head; call it at their place in the published order (optimizer states are by position)."""
        self.channel_embed = embedding(1, config.vae_embed_dim, config.channel_embed_dim)
        self.timesteps_embeddings = embedding(1, config.vae_embed_dim, config.channel_embed_dim)

    def build_head(self, config: TokenBridgeConfig) -> None:
        """Modules of the head; call it after the backbone's, as in the published order."""
        c, dim = config, config.channel_embed_dim
        self.num_channels, self.num_levels = c.vae_embed_dim, c.quant_levels
        self.head, self.head_start, self.head_chunk = c.head, c.head_start, c.head_chunk
        self.checkpoint_head = c.grad_checkpointing == "full" and c.head_chunk == 0
        self.channel_order = list(c.channel_order)
        inverse = [self.channel_order.index(i) for i in range(self.num_channels)]
        self.register_buffer("to_head_order", torch.tensor(self.channel_order), persistent=False)
        self.register_buffer("to_natural_order", torch.tensor(inverse), persistent=False)
        self.condition_proj = nn.Linear(c.decoder_embed_dim, dim)
        embedded = self.num_channels - 1 if c.head == "autoregressive" else 0
        self.token_embeddings = nn.ModuleList(nn.Embedding(self.num_levels, dim) for _ in range(embedded))
        self.channel_blocks = nn.ModuleList(
            AdaLNBlock(dim, c.channel_heads, c.mlp_ratio, c.attn_dropout, c.proj_dropout)
            for _ in range(c.channel_depth)
        )
        self.channel_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.channel_final = FinalModulation(dim)
        self.channel_heads = nn.ModuleList(nn.Linear(dim, self.num_levels) for _ in range(self.num_channels))

    def zero_channel_modulation(self) -> None:
        """Zero the last Linear of every adaLN, so that each block starts as the identity (docs/spec.md 5)."""
        for layers in self.modulation_layers:
            nn.init.zeros_(layers[1].weight)
            nn.init.zeros_(layers[1].bias)

    @property
    def modulation_layers(self) -> list[nn.Module]:
        """The Sequential (SiLU, Linear) of every block and the final one."""
        return [module.adaLN_modulation for module in (*self.channel_blocks, self.channel_final)]

    def head_parameters(self) -> list[nn.Parameter]:
        """All parameters of the head."""
        modules = (self.condition_proj, self.token_embeddings, self.channel_blocks, self.channel_norm)
        modules = nn.ModuleList((*modules, self.channel_final, self.channel_heads))
        return [self.channel_embed, self.timesteps_embeddings, *modules.parameters()]

    # ---- the network

    def head_forward(
        self, x: Tensor, modulations: Sequence[Modulation], caches: list[LayerCache] | None = None, start: int = 0
    ) -> Tensor:
        """The one forward pass of the head: inputs x (N, P, H) at positions start.. -> features (N, P, H).

        modulations: those of the same positions, see `modulations`.
        """
        for i, block in enumerate(self.channel_blocks):
            x = block(x, modulations[i], caches[i] if caches else None, start)
        return self.channel_final(self.channel_norm(x), modulations[-1])

    def modulations(self, conditioning: Tensor) -> list[Modulation]:
        """Every block's modulation, then the final one, from the conditioning (N, P, H)."""
        activated = F.silu(conditioning)
        return [module.modulation(activated) for module in (*self.channel_blocks, self.channel_final)]

    def embedding_table(self) -> Tensor:
        """All token embeddings in one: ((C-1)*K, H), those of position c at c*K; (0, H) for a single dimension."""
        return torch.cat([table.weight for table in self.token_embeddings] or [self.channel_embed[0, :0]])

    # ---- training

    def channel_logits(self, z: Tensor, indices: Tensor | None) -> Tensor:
        """Teacher-forced logits (N, C, K) from z (N, D) and the true indices (N, C), all in head order.

        The parallel head does not use the indices.
        """
        h = self.condition_proj(z)  # (N, H)
        x = self._inputs(h, indices) + self.channel_embed  # (N, C, H)
        conditioning = h.unsqueeze(1) + self.timesteps_embeddings  # (N, C, H)
        if self.checkpoint_head and self.training and torch.is_grad_enabled():
            x = self._checkpointed(x, F.silu(conditioning))
        else:
            x = self.head_forward(x, self.modulations(conditioning))
        weight = torch.stack([head.weight for head in self.channel_heads])  # (C, K, H)
        bias = torch.stack([head.bias for head in self.channel_heads])  # (C, K)
        return torch.baddbmm(bias.unsqueeze(1), x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)  # (N, C, K)

    def _inputs(self, h: Tensor, indices: Tensor | None) -> Tensor:
        """Inputs (N, C, H) before the positions' embeddings: h, then the previous index; h throughout if parallel."""
        if self.head == "parallel":
            return h.unsqueeze(1).expand(-1, self.num_channels, -1)
        offsets = torch.arange(self.num_channels - 1, device=h.device) * self.num_levels
        previous = F.embedding(indices[:, :-1] + offsets, self.embedding_table())  # (N, C-1, H)
        return torch.cat([h.unsqueeze(1), previous], dim=1)

    def _checkpointed(self, x: Tensor, activated: Tensor) -> Tensor:
        """`head_forward` of all positions that recomputes each block, its modulation included, in the backward pass."""

        def run(block: AdaLNBlock, x: Tensor, activated: Tensor) -> Tensor:
            return block(x, block.modulation(activated))

        for block in self.channel_blocks:
            x = checkpoint(run, block, x, activated, use_reentrant=False)
        return self.channel_final(self.channel_norm(x), self.channel_final.modulation(activated))

    def channel_loss(self, z: Tensor, targets: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all (token, dimension) pairs, a float32 scalar, from z (N, D) and targets (N, C).

        And (2, C) without a gradient: loss and accuracy of each dimension. All in head order. Computed in groups of
        `group_size` tokens (0: as a whole), forward and backward together (grouped_loss.py), or from given logits.
        """
        size = self.group_size(z.device.type)
        if size and logits is None:
            total, details = grouped_sum(self.summed_losses, z, targets, self.head_parameters(), size)
        else:
            total, details = self.summed_losses(z, targets, logits)
        return total / targets.numel(), details / len(targets)

    def summed_losses(self, z: Tensor, targets: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over tokens and dimensions, a float32 scalar, from z (N, D) and targets (N, C).

        And (2, C): the loss of each dimension, and how many of its targets have the highest logit; without a gradient.
        """
        logits = self.channel_logits(z, targets) if logits is None else logits
        logits = logits.transpose(0, 1)  # (C, N, K), as the head made them
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.T.flatten(), reduction="none")
        losses = losses.view(self.num_channels, -1).sum(1)  # (C,)
        return losses.sum(), torch.stack([losses.detach(), (logits.detach().argmax(-1) == targets.T).sum(1)])

    def group_size(self, device_type: str) -> int:
        """Tokens whose loss is computed together: `head_chunk`, or as many as fit GROUP_BYTES."""
        if self.head_chunk is not None:
            return self.head_chunk
        each = GROUP_BYTES_EACH * self.num_channels * self.condition_proj.out_features * len(self.channel_blocks)
        return max(1, (GROUP_BYTES_ON_CPU if device_type == "cpu" else GROUP_BYTES) // each)

    # ---- sampling

    def channel_sample(
        self, z: Tensor, uniforms: Tensor, temperature: float | Sequence[float], top_k: int = 0, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Indices (N, C) in head order from z (N, D), and whether all of a token's are valid (N,).

        One dimension after another with a key-value cache (parallel head: one pass). uniforms (N, C), temperature (one,
        or C), top_k, top_p: see `sample_levels`.
        """
        temperatures = temperature if isinstance(temperature, Sequence) else [temperature] * self.num_channels
        per_token = self.num_channels * self.condition_proj.out_features * (6 * len(self.channel_blocks) + 2) * 4
        size = max(1, DECODE_CHUNK_BYTES // per_token)
        sample = self._sample_parallel if self.head == "parallel" else self._sample_in_turn
        groups = zip(z.split(size), uniforms.split(size), strict=True)
        parts = [sample(*group, temperatures, top_k, top_p) for group in groups]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _sample_in_turn(
        self, z: Tensor, uniforms: Tensor, temperatures: Sequence[float], top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """`channel_sample` of all tokens at once: static shapes, no host sync."""
        x, modulations = self.decoding_start(z, self.num_channels)  # (N, 1, H)
        attention, tables = self.channel_blocks[0].attn, self.next_inputs()  # (C-1, K, H)
        shape, dtype = (len(z), attention.num_heads, self.num_channels, attention.head_dim), modulations[0][0].dtype
        caches = LayerCache.allocate(len(self.channel_blocks), shape, z, dtype)
        # by layer, then by position: the terms of one position, (N, 1, H) each
        by_position = [list(zip(*(term.split(1, dim=1) for term in terms), strict=True)) for terms in modulations]
        results = []
        for c, uniform in enumerate(uniforms.unbind(1)):
            features = self.head_forward(x, [layer[c] for layer in by_position], caches, start=c)  # (N, 1, H)
            logits = self.channel_heads[c](features[:, 0])  # (N, K)
            results.append(sample_levels(logits, uniform, temperatures[c], top_k, top_p))
            if c < self.num_channels - 1:
                x = F.embedding(results[-1][0], tables[c]).unsqueeze(1)
        return stack_levels(results)

    def _sample_parallel(
        self, z: Tensor, uniforms: Tensor, temperatures: Sequence[float], top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """`channel_sample` of the parallel head: all dimensions from one pass."""
        columns = zip(self.channel_logits(z, None).unbind(1), uniforms.unbind(1), temperatures, strict=True)
        return stack_levels([sample_levels(*column, top_k, top_p) for column in columns])

    def decoding_start(self, z: Tensor, num_positions: int) -> tuple[Tensor, list[Modulation]]:
        """Input of position 0 (N, 1, H), and each layer's modulation of the first P positions, from z (N, D)."""
        h = self.condition_proj(z).unsqueeze(1)  # (N, 1, H)
        conditioning = h + self.timesteps_embeddings[:, :num_positions]  # (N, P, H)
        start = conditioning[:, :1] if self.head_start == "official" else h  # docs/spec.md 5, start token
        return start + self.channel_embed[:, :1], self.modulations(conditioning)  # one matmul per layer

    def next_inputs(self) -> Tensor:
        """For decoding: (C-1, K, H), the input of position c + 1 when dimension c has index k (with channel_embed)."""
        tables = self.embedding_table().view(self.num_channels - 1, self.num_levels, self.channel_embed.shape[-1])
        return tables + self.channel_embed[0, 1:, None]

    def leading_logits(self, z: Tensor) -> Tensor:
        """Logits (N, K) of the leading dimension (first in head order) from z (N, D)."""
        features = self.head_forward(*self.decoding_start(z, num_positions=1))  # (N, 1, H)
        return self.channel_heads[0](features[:, 0]).float()


# ---- levels from logits


def sample_levels(
    logits: Tensor, uniform: Tensor, temperature: float | Tensor, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Levels (N,) from logits (N, K), and a number each, `is_valid` only if it had a distribution to be sampled from.

    Argmax at temperature 0 or top_k 1; otherwise a sample of softmax(logits / temperature), restricted by `keep_top`:
    uniform (N,) in [0, 1) inverts the cumulative distribution, so the same image comes out of any batch, without a host
    sync. temperature: a number, or a tensor of one number above 0.
    """
    logits = logits.float()
    is_number = not isinstance(temperature, Tensor)
    if top_k == 1 or (is_number and temperature == 0):
        highest, levels = logits.max(-1)
        return levels, highest
    if not (is_number and temperature == 1):
        logits = logits / temperature
    cumulative = keep_top(logits, top_k, top_p).softmax(-1).cumsum(-1)  # (N, K)
    total = cumulative[:, -1:]  # (N, 1), 1 up to rounding; NaN if a logit is
    levels = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)[:, 0]
    return levels.clamp_(max=logits.shape[-1] - 1), total[:, 0]


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (N, K) with -inf for all but the top_k largest (0: all) and the fewest whose probability reaches top_p."""
    num_levels = logits.shape[-1]
    if (top_k == 0 or top_k >= num_levels) and top_p == 1:
        return logits
    ordered, place = logits.sort(dim=-1, descending=True, stable=True)  # equal logits: lowest level first, as argmax
    if 0 < top_k < num_levels:
        ordered = torch.cat([ordered[:, :top_k], torch.full_like(ordered[:, top_k:], -torch.inf)], dim=-1)
    if top_p < 1:
        p = ordered.softmax(-1)
        top_p = max(top_p, torch.finfo(p.dtype).tiny)  # not 0 in float32: the most likely level always stays
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(-1, place, ordered)


def is_valid(numbers: Tensor) -> Tensor:
    """Whether the numbers of `sample_levels` (any shape) are of distributions: False for NaN and overflow."""
    return numbers.abs() < math.inf


def stack_levels(results: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """From the results of `sample_levels` for each dimension: levels (N, C), and whether all of a token's are valid."""
    levels, numbers = (torch.stack(part, dim=1) for part in zip(*results, strict=True))  # (N, C)
    return levels, is_valid(numbers).all(1)
