"""The pieces of the per-dimension head: causal attention with an optional key-value cache, adaLN blocks, the final modulation.

(The backbone's blocks are timm's.) Letters: N tokens, P positions handled now (1 while decoding, C while training), C latent
dimensions, H head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


@dataclass
class LayerCache:
    """Keys and values of one attention layer for all C positions, allocated once: (N, heads, C, head_dim) each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, num_tokens: int, num_heads: int, num_positions: int, head_dim: int, like: Tensor, dtype: torch.dtype) -> "LayerCache":
        shape = (num_tokens, num_heads, num_positions, head_dim)
        return cls(like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype))


class CausalAttention(nn.Module):
    """Multi-head causal self-attention over the dimensions of a token; LayerNorm on queries and keys per head."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"head width {dim} is not a multiple of its {num_heads} heads (channel_embed_dim, channel_heads)")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=LAYER_NORM_EPS)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """x (N, P, H) at positions start .. start+P-1; earlier positions come from `cache`, which is filled in place.

        Either P positions from 0 on, or one position at a time with a cache.
        """
        num_tokens, positions, dim = x.shape
        q, k, v = self.qkv(x).view(num_tokens, positions, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (N, heads, P, hd)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)      # autocast runs the norms in float32
        if cache is not None:
            cache.keys[:, :, start : start + positions] = k
            cache.values[:, :, start : start + positions] = v
            k, v = cache.keys[:, :, : start + positions], cache.values[:, :, : start + positions]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=positions > 1)                # (N, heads, P, hd)
        return self.proj(x.transpose(1, 2).reshape(num_tokens, positions, dim))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, in two operations: (N, P, H) each."""
    return torch.addcmul(x + shift, x, scale)


class AdaLNBlock(nn.Module):
    """Pre-norm transformer block, modulated by a conditioning vector: x += gate * f(LN(x) * (1 + scale) + shift), twice (SPEC 5)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CausalAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))             # GELU (erf), no dropout
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, modulation: Tensor, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """x (N, P, H), modulation (N, P, 6H) = adaLN_modulation(conditioning) -> (N, P, H)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)    # (N, P, H) each
        x = torch.addcmul(x, gate_a, self.attn(modulate(self.norm1(x), shift_a, scale_a), cache, start))
        return torch.addcmul(x, gate_m, self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class FinalModulation(nn.Module):
    """LayerNorm without affine, then scale and shift (in this order) from the conditioning (SPEC 5)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (N, P, H), modulation (N, P, 2H) -> (N, P, H)."""
        scale, shift = modulation.chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)
