"""A timm transformer block in parts, for callers that bring their own keys and values, or that keep less
of it for the backward pass. No dropout but in `TrainedBlock`.

Letters: N sequences, P positions, M of them, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import LayerCache, take


def block_qkv(block: nn.Module, x: Tensor, queries: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (N, heads, P, head_dim) of the block's input x (N, P, D).

    queries (N, M, D): block inputs whose queries to return instead of those of x.
    """
    attn, dim = block.attn, x.shape[-1]
    heads = (attn.num_heads, attn.head_dim)
    if queries is None:
        return attn.qkv(block.norm1(x)).unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4).unbind()
    weight_q, weight_kv = attn.qkv.weight.split([dim, 2 * dim])
    bias_q, bias_kv = attn.qkv.bias.split([dim, 2 * dim])
    q = F.linear(block.norm1(queries), weight_q, bias_q).unflatten(-1, heads).transpose(1, 2)  # (N, heads, M, hd)
    kv = F.linear(block.norm1(x), weight_kv, bias_kv).unflatten(-1, (2, *heads))  # (N, P, 2, heads, hd)
    return q, *kv.permute(2, 0, 3, 1, 4).unbind()


def block_rest(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention of a block: x (N, P, D), attended (N, heads, P, head_dim) -> (N, P, D)."""
    x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def partial_block(block: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """A block whose output is needed at the places (N, M) only, all of x (N, P, D) being attended to: (N, M, D)."""
    queries = take(x, places)
    return block_rest(block, queries, F.scaled_dot_product_attention(*block_qkv(block, x, queries)))


def cached_block(
    block: nn.Module, x: Tensor, cache: LayerCache, slots: slice | Tensor, length: int, queries: Tensor | None = None
) -> Tensor:
    """A block over some tokens x (N, P, D), which attend to the first `length` slots of the cache after writing theirs.

    slots: where their keys and values go, a slice of the cache or slot numbers (N, P). queries (N, M, D): those of x
    whose output is needed, if not all.
    """
    rows, (q, k, v) = len(x), block_qkv(block, x, queries)  # (N, heads, P, hd)
    for store, new in ((cache.keys, k), (cache.values, v)):
        if isinstance(slots, slice):
            store[:rows, :, slots] = new
        else:
            store[:rows].scatter_(2, slots[:, None, :, None].expand_as(new), new.to(store.dtype))
    keys, values = (store[:rows, :, :length].to(q.dtype) for store in (cache.keys, cache.values))
    return block_rest(block, x if queries is None else queries, F.scaled_dot_product_attention(q, keys, values))


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which x alone is kept for the backward pass.

    The recomputation stops once it has everything that was saved: a Linear at the end, which saves its input only, does
    not run a second time.
    """
    return checkpoint(function, x, use_reentrant=False)


class TrainedBlock(Block):
    """timm's block. With `selective`, training keeps the outputs of matmuls and of attention for the backward pass, and
    recomputes norms, GELU and the MLP's inner dropout: the same numbers, the same random draws.

    A compiled block is left as it is: the compiler decides what it recomputes.
    """

    def __init__(self, *arguments: object, selective: bool = False, **more: object):
        super().__init__(*arguments, **more)
        self.selective = selective

    def forward(self, x: Tensor) -> Tensor:
        """x (N, P, D) -> (N, P, D)."""
        if not (self.selective and self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        attn, mlp = self.attn, self.mlp
        qkv = recomputed(lambda x: attn.qkv(self.norm1(x)), x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (N, heads, P, head_dim) each
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p)
        x = x + attn.proj_drop(attn.proj(attended.transpose(1, 2).flatten(2)))
        hidden = recomputed(lambda x: mlp.fc1(self.norm2(x)), x)
        return x + mlp.drop2(recomputed(lambda x: mlp.fc2(mlp.drop1(mlp.act(x))), hidden))
