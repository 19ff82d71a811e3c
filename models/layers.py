"""The layers of the per-dimension head: causal attention with an optional key-value cache, adaLN blocks.

Letters: B images, L tokens of each, M of them, N tokens of all, P positions handled now (1 while decoding, C while
training), C latent dimensions, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from util.options import ArgumentError

LAYER_NORM_EPS = 1e-6

Modulation = tuple[Tensor, ...]
"""Shifts, scales and gates, each (N, P, H); a scale has its 1 added already: once for all positions."""


def addcmul(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a * b in one kernel, which reads each type as it is; CUDA's autocast would first copy all to float32."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return torch.addcmul(x, a, b)
    with torch.autocast(device, enabled=False):
        return torch.addcmul(x, a, b)


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x (B, L, D) at positions (B, M): (B, M, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass
class LayerCache:
    """Keys and values of one attention layer for all positions, allocated once: (N, heads, P, head_dim) each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, num_layers: int, shape: tuple[int, int, int, int], like: Tensor, dtype: torch.dtype
    ) -> list[LayerCache]:
        """One per layer, of shape (N, heads, P, head_dim), in one uninitialised tensor on the device of `like`."""
        return [cls(*layer.unbind()) for layer in like.new_empty((num_layers, 2, *shape), dtype=dtype).unbind()]


class CausalAttention(nn.Module):
    """Multi-head causal self-attention over the dimensions of a token; LayerNorm on queries and keys per head.

    attn_dropout, proj_dropout: rates on the attention weights and after `proj`, in training mode only.
    """

    def __init__(self, dim: int, num_heads: int, attn_dropout: float = 0.0, proj_dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            message = f"channel_embed_dim {dim} is not a multiple of channel_heads {num_heads}"
            raise ArgumentError("channel_embed_dim", message)
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=LAYER_NORM_EPS)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(dim, dim)
        self.attn_dropout, self.proj_drop = attn_dropout, nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """x (N, P, H) at positions start .. start+P-1; earlier positions come from `cache`, which is filled in place.

        Either P positions from 0 on, or one position at a time with a cache.
        """
        num_tokens, positions, dim = x.shape
        qkv = self.qkv(x).view(num_tokens, positions, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, P, hd)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k)  # autocast runs the norms in float32
        if cache is None:
            k = k.to(v.dtype)
        else:
            end = start + positions
            cache.keys[:, :, start:end] = k
            cache.values[:, :, start:end] = v
            k, v = cache.keys[:, :, :end], cache.values[:, :, :end]
        dropout = self.attn_dropout if self.training else 0.0
        is_causal = cache is None or positions > 1  # in this order: compiled, the number of positions may be a symbol
        x = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=is_causal)  # (N, heads, P, hd)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(num_tokens, positions, dim)))


class AdaLNBlock(nn.Module):
    """Pre-norm transformer block, modulated by a conditioning vector (docs/spec.md 5).

    x += gate * f(LN(x) * (1 + scale) + shift), for f the attention and then the MLP. attn_dropout: rate on attention
    weights; proj_dropout: after the attention's projection, the MLP's activation and its second Linear.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, attn_dropout: float = 0.0, proj_dropout: float = 0.0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CausalAttention(dim, num_heads, attn_dropout, proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_dropout)  # GELU (erf)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def modulation(self, activated: Tensor) -> Modulation:
        """The six terms, (N, P, H) each, from SiLU(conditioning) (N, P, H), which is the same for all blocks."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation[1](activated).chunk(6, dim=-1)
        return shift_a, 1 + scale_a, gate_a, shift_m, 1 + scale_m, gate_m

    def forward(self, x: Tensor, modulation: Modulation, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """x (N, P, H) -> (N, P, H), at positions start .. start+P-1."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = addcmul(x, gate_a, self.attn(addcmul(shift_a, self.norm1(x), scale_a), cache, start))
        return addcmul(x, gate_m, self.mlp(addcmul(shift_m, self.norm2(x), scale_m)))


class FinalModulation(nn.Module):
    """LayerNorm without affine, then scale and shift (in this order) from the conditioning (docs/spec.md 5)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulation(self, activated: Tensor) -> Modulation:
        """Scale and shift, (N, P, H) each, from SiLU(conditioning)."""
        scale, shift = self.adaLN_modulation[1](activated).chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        """x (N, P, H) -> (N, P, H)."""
        scale, shift = modulation
        return addcmul(shift, self.norm(x), scale)
