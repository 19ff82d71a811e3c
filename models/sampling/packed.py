"""Weights laid out for the CPU's matrix products once per batch of images, instead of at every product.

Behind nn.Linear on a CPU, MKL copies a weight into blocks that suit its kernel each time it multiplies by it. While
images are sampled the weights stay the same and the head multiplies them by few rows, so that copying takes up to half
of its time. oneDNN, which torch ships, can copy once and keep the result. The price is a second copy of the weights in
memory while a batch is sampled. The sums are the same, added in another order; a row's sum hardly ever depends on the
number of rows, unlike MKL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTHWHILE = 512 * 512  # numbers in the largest weight of a model: below, the calls cost more than is saved


def can_pack(weight: Tensor) -> bool:
    """Whether products with the weight gain: a real float32 tensor (no fake one) on an x86 CPU, outside autocast."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def packed_linear(layer: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    """layer(x) from its weight as `_reorder_linear_weight` packed it (the ops that torch.compile uses on a CPU)."""
    if x.numel() == 0:
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")


class PackedLinears:
    """Every nn.Linear among the modules, its weight packed as it is now; within `used()` they compute that way.

    None if all of their weights are small or `can_pack` refuses them.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        layers = [layer for layer in modules if type(layer) is nn.Linear and can_pack(layer.weight)]
        if max((layer.weight.numel() for layer in layers), default=0) < WORTHWHILE:
            layers = []
        self.forwards: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = [
            (layer, partial(packed_linear, layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())))
            for layer in layers
        ]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the layers' forward is the packed one: without gradients, and blind to changes of the weights."""
        try:
            for layer, forward in self.forwards:
                layer.forward = forward
            yield
        finally:
            for layer, _ in self.forwards:
                layer.__dict__.pop("forward", None)
