"""The sampler through torch.compile and CUDA graphs: launches of whole parts instead of thousands of operations.

The blocks of the backbone are compiled, each for any number of images and tokens, so that few compilations serve all
steps. On a GPU, the two costly parts of a step, backbone with guidance and head, are also captured as CUDA graphs, one
for each shape, and replayed: two launches per step, whatever the depth. What is captured is what runs otherwise, with
the same shapes. A large batch keeps a GPU busy for longer than the host takes to launch its kernels: no graphs then.

Exact up to the rounding of fused operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.sampling.options import SamplerModel
from util import dist

MOST_COMPILED = 64  # of one function: torch would fall back to eager, silently, after its default of 8
MOST_REPLAYED_SLOTS = 8192  # rows times slots of the backbone; not measured
MOST_GRAPHS = 600  # of one model; beyond, the parts run as they are
LAUNCHES_PER_STEP = 2  # on a GPU: backbone, head

Capture = Callable[[Callable[..., object], list[Tensor]], Callable[..., object]]
"""A function and tensors -> the function, captured on a device, for other tensors of their shapes."""


class CompiledSampler:
    """Compiled blocks and captured parts; one per model (`of`), so that later batches reuse them.

    launches: calls of captured parts so far. compile, capture: for tests, what to use instead of torch.compile and CUDA
    graphs.
    """

    def __init__(self, model: SamplerModel, compile: Callable = torch.compile, capture: Capture | None = None):
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
        setattr(config, limit, max(getattr(config, limit), MOST_COMPILED))
        self.model, self.launches = model, 0
        self.capture = capture or dist.graph_capture(model.fake_latent.device)
        self.blocks = (*model.encoder_blocks, *model.decoder_blocks)
        self.compiled = [compile(block._call_impl, dynamic=True) for block in self.blocks]
        self.graphs: dict[tuple, Callable] = {}
        self.addresses: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: SamplerModel, **arguments: object) -> CompiledSampler:
        """The model's own; kept in its __dict__, where state_dict() and modules() do not see it."""
        if "_compiled_sampler" not in model.__dict__:
            model.__dict__["_compiled_sampler"] = cls(model, **arguments)
        return model.__dict__["_compiled_sampler"]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the blocks of the backbone are the compiled ones."""
        try:
            for block, compiled in zip(self.blocks, self.compiled, strict=True):
                block._compiled_call_impl = compiled  # what block.compile() sets
            yield
        finally:
            for block in self.blocks:
                block._compiled_call_impl = None

    def replays(self, images: int) -> bool:
        """Whether a batch of so many images is replayed; graphs of weights that have moved are dropped."""
        addresses = tuple(p.data_ptr() for p in self.model.parameters())
        if addresses != self.addresses:
            self.graphs.clear()
            self.addresses = addresses
        slots = self.model.buffer_size + self.model.num_tokens
        return self.capture is not None and 2 * images * slots <= MOST_REPLAYED_SLOTS

    def replay(self, function: Callable[..., object], *arguments: object) -> object:
        """function(*arguments), captured at the first call with these shapes and other arguments (hashable).

        What it returns is overwritten by later calls.
        """
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        constants = [Tensor if isinstance(x, Tensor) else x for x in arguments]  # the class where a tensor stood
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        device = tensors[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = function, shapes, autocast, *constants
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                return function(*arguments)

            def on(*tensors: Tensor) -> object:
                rest = iter(tensors)
                return function(*(next(rest) if x is Tensor else x for x in constants))

            self.graphs[key] = self.capture(on, tensors)
        self.launches += 1
        return self.graphs[key](*tensors)
