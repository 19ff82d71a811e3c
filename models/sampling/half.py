"""Weights in half precision while images are sampled under autocast, cast once per batch of images.

Autocast casts a weight at every product, or keeps its copy only while one autocast region lasts and only for weights
that require a gradient: those of a loaded pipeline do not. The head multiplies by each of its weights C times a step.
The numbers are those of autocast. The price is a copy of the weights at half their size, kept with the model so that
CUDA graphs find it at the same address again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HalfWeights:
    """Half-precision copies of the weights and biases of every nn.Linear; within `used()` they replace these."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        owners = [module._parameters for module in model.modules() if type(module) is nn.Linear]
        places = [(owner, name, p) for owner in owners for name, p in owner.items() if p is not None]
        self.places = [(owner, name, p) for owner, name, p in places if p.dtype == torch.float32]
        self.copies = [nn.Parameter(p.detach().to(dtype), requires_grad=False) for _, _, p in self.places]

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> HalfWeights:
        """The model's own, with the weights of this moment; kept in its __dict__, which state_dict() does not see."""
        kept = model.__dict__.setdefault("_half_weights", {})
        if dtype in kept and kept[dtype].fits():
            kept[dtype].refresh()
        else:
            kept[dtype] = cls(model, dtype)
        return kept[dtype]

    def fits(self) -> bool:
        """Whether the layers still have the parameters that were copied, on the same device."""
        pairs = zip(self.places, self.copies, strict=True)
        return all(owner[name] is p and p.device == copy.device for (owner, name, p), copy in pairs)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again, to the same addresses."""
        torch._foreach_copy_(self.copies, [p for _, _, p in self.places])

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the layers compute with the copies: without gradients, and blind to changes of the weights."""
        try:
            for (owner, name, _), copy in zip(self.places, self.copies, strict=True):
                owner[name] = copy
            yield
        finally:
            for owner, name, parameter in self.places:
                owner[name] = parameter
