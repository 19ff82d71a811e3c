"""A sum over rows computed in groups, forward and backward together, so that only one group's activations exist.

The backward pass of a loss that is a sum over tokens needs nothing of the other tokens. So a group's gradients are
computed right after its forward pass and added up; what autograd calls backward later only scales them. Nothing is
computed twice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Summed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x (n, D), targets (n, ...)) -> a scalar, and details of fixed shape, both sums over the n rows."""


def grouped_sum(
    function: Summed, x: Tensor, targets: Tensor, parameters: Sequence[Tensor], size: int
) -> tuple[Tensor, Tensor]:
    """`function` of all rows of x (N, D) and targets (N, ...), from equal groups of at most `size` rows.

    parameters: those that the function uses; they and x get their gradients, summed in float32. The details have none.
    Calling it without gradients enabled runs the forward passes only. One backward pass per call, none of second order.
    """
    groups = -(-len(x) // size)
    if torch.is_grad_enabled():
        return _GroupedSum.apply(function, groups, x, targets, *(p for p in parameters if p.requires_grad))
    parts = [function(*group) for group in zip(x.tensor_split(groups), targets.tensor_split(groups), strict=True)]
    total, details = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return total, details


class _GroupedSum(torch.autograd.Function):
    """Its inputs are the parameters themselves, so that hooks on their gradients run as usual (DDP)."""

    @staticmethod
    def forward(
        ctx: object, function: Summed, groups: int, x: Tensor, targets: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        x_gradients, parts = [], []
        for rows, own_targets in zip(x.tensor_split(groups), targets.tensor_split(groups), strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                total, details = function(rows.view_as(rows), own_targets)  # no leaf: FlopCounterMode hooks inputs
            x_gradient, *gradients = torch.autograd.grad(total, (rows, *parameters))
            torch._foreach_add_(sums, gradients)
            x_gradients.append(x_gradient)
            parts.append((total.detach(), details.detach()))
        ctx.gradients = [torch.cat(x_gradients), *sums]
        ctx.dtypes = [x.dtype, *(p.dtype for p in parameters)]
        total, details = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(details)
        return total, details

    @staticmethod
    @once_differentiable
    def backward(ctx: object, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through a loss computed in groups; set head_chunk to 0 for that")
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, scale)  # in place: they are as large as the parameters
        x_gradient, *gradients = (g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, x_gradient, None, *gradients
