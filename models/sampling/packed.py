"""Weights laid out for the CPU's matrix products once per batch of images, instead of at every product.

Behind nn.Linear on a CPU, MKL copies a weight into blocks that suit its kernel each time it multiplies by it. While images are drawn the weights
stay the same and the head multiplies them by few rows, so that the copying is up to half of its time. oneDNN, which torch brings along, copies
once. The price is a second copy of the weights in memory while a batch is drawn. The sums are the same, added up in another order; a row's sum
hardly ever depends on how many rows there are, unlike MKL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

WORTHWHILE = 512 * 512  # numbers in the largest weight of a model: below, the calls cost more than is saved


def can_pack(weight: Tensor) -> bool:
    """Whether products with the weight gain: float32 on an x86 CPU, outside autocast (and not a fake tensor, which has no numbers)."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not isinstance(weight, FakeTensor)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def packed_linear(layer: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    """What layer(x) gives, from its weight as `_reorder_linear_weight` packed it (the operators that torch.compile uses on a CPU)."""
    if x.numel() == 0:
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")


class PackedLinears:
    """Every nn.Linear among the modules, its weight packed as it is now; inside `used()` they compute that way.

    There are none if all of their weights are small or `can_pack` is against it.
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
