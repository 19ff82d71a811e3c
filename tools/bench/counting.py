"""What the benches share: counting what reaches torch's dispatcher, timing several functions in turn, tables.

FLOPs are torch.utils.flop_counter's (a multiply-add is two), counted under FakeTensorMode, where nothing is computed.
"""

import contextlib
import functools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from util import dist
from util.heap import keep_freed_memory

Row = tuple[str, Sequence[str]]  # name and cells

SYNC_OPS = {"_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal"}
SYNC_OPS |= {"_unique2", "unique_dim", "unique_consecutive"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # no kernel
GATHERS = {"gather", "embedding", "index_select"}  # these read as many rows as they write
INDEX_OPS = {"index", "index_put", "index_put_"}  # a boolean index needs the number of its True entries

for direction in ("", "_backward"):  # torch 2.6 counts no attention on a CPU: as much as a GPU's
    flash = f"_scaled_dot_product_flash_attention{{}}{direction}"
    on_cpu, on_gpu = (getattr(torch.ops.aten, flash.format(suffix)) for suffix in ("_for_cpu", ""))
    flop_registry.setdefault(on_cpu, flop_registry[on_gpu])


class OpCounter(TorchDispatchMode):
    """Counts what reaches torch's dispatcher while it is entered.

    ops: all operations; views: those that make another view of the same memory; by_name: number of each; syncs: those
    for which the host waits, by name; largest, largest_bytes: of the largest tensor made; flops: set by `count`;
    launches, bytes: operations that run a kernel on a GPU, and what these read and write, each tensor once; peak_bytes:
    the most that all tensors made took at one time, each for as long as something refers to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.armed = True
        self.flops = self.ops = self.views = self.largest = self.largest_bytes = self.launches = self.bytes = 0
        self.alive_bytes = self.peak_bytes = 0
        self.by_name: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.armed and func.namespace == "aten":  # fake tensors are also asked for their device, which is no work
            name = func.overloadpacket.__name__
            is_view = func.is_view or name in ("_unsafe_view", "detach")
            self.ops += 1
            self.views += is_view
            if not is_view and name not in ALLOCATIONS:
                self.launches += 1
                self.bytes += moved_bytes(name, (args, kwargs), result)
            self.by_name[name] += 1
            if is_host_sync(name, args, result):
                self.syncs[name] += 1
            older = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in tree_leaves(result):
                if is_sized(x):
                    self.largest = max(self.largest, x.numel())
                    self.largest_bytes = max(self.largest_bytes, x.numel() * x.element_size())
                    if x.untyped_storage()._cdata not in older:
                        self._add_bytes(x.untyped_storage().nbytes())
                        weakref.finalize(x.untyped_storage(), self._add_bytes, -x.untyped_storage().nbytes())
        return result

    def _add_bytes(self, number: int) -> None:
        self.alive_bytes += number
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    @property
    def num_syncs(self) -> int:
        """Number of operations for which the host waits."""
        return self.syncs.total()

    @property
    def work(self) -> int:
        """Number of operations that are no views."""
        return self.ops - self.views


def is_sized(x: object) -> bool:
    """Whether x is a tensor of a known size: that of a fake one may depend on values."""
    return isinstance(x, Tensor) and all(isinstance(n, int) for n in x.shape)


def moved_bytes(name: str, arguments: object, result: object) -> int:
    """Bytes that a kernel reads and writes, each tensor of a known size once; a broadcast one counts as stored."""

    def size(tree: object) -> int:
        tensors = [x for x in tree_leaves(tree) if is_sized(x)]
        return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)

    return size(result) * 2 if name in GATHERS else size(result) + size(arguments)


class GpuAttention(TorchFunctionMode):
    """Attention as a GPU with fused kernels runs it (sm80 or later), which no CPU build of torch selects.

    Flash attention for half precision without a mask, otherwise the memory-efficient kernel.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_,
    ) -> Tensor:
        """As F.scaled_dot_product_attention."""
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        if mask is None and q.dtype != torch.float32:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        bias = None if mask is None else mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, dropout_p, is_causal)[0]


@contextlib.contextmanager
def on_fake_gpu(precision: str) -> Iterator[None]:
    """Within, fake CUDA tensors run the operations of a real GPU: autocast (torch turns it off without a GPU) and
    attention. Forward passes only."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision != "fp32")
    torch.set_autocast_dtype("cuda", dist.DTYPES[precision])
    torch.autocast_increment_nesting()
    try:
        with fake_mode(), torch.device("cuda"), GpuAttention():
            yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def is_host_sync(name: str, args: Sequence, result: object) -> bool:
    """Whether the host waits: the op returns a number, its size depends on values, or it copies to the host."""
    if name in INDEX_OPS:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
        source = args[0] if name == "_to_copy" else args[1]
        return isinstance(source, Tensor) and result.device.type == "cpu" and source.device.type != "cpu"
    return name in SYNC_OPS


@functools.cache
def no_fake_gpu() -> str:
    """Why there are no fake GPU tensors here, "" if there are: torch 2.6 built for CUDA needs a driver for them."""
    try:
        with FakeTensorMode(), torch.device("cuda"):
            torch.nn.Linear(2, 2)
    except RuntimeError as error:
        return f"torch {torch.__version__} cannot make fake CUDA tensors here: {str(error).splitlines()[0]}"
    return ""


def count(function: Callable[[], object], arm_at: torch.nn.Module | None = None) -> OpCounter:
    """Run `function` (under the caller's FakeTensorMode, if any) and count FLOPs, dispatched ops and host syncs.

    arm_at: count ops and syncs from the first call of this module on, without the checks of inputs (host tensors).
    """
    counter, handle = OpCounter(), None
    if arm_at is not None:
        counter.armed = False
        handle = arm_at.register_forward_pre_hook(lambda *_: setattr(counter, "armed", True))
    with FlopCounterMode(display=False) as flops, counter:
        function()
    if handle is not None:
        handle.remove()
    counter.flops = flops.get_total_flops()
    return counter


def fake_mode() -> FakeTensorMode:
    """Fake tensors that also stand for results whose size depends on values (the baseline indexes with masks)."""
    return FakeTensorMode(shape_env=ShapeEnv())


def timed(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 1,
    *,
    ours: int | None = None,
) -> list[float]:
    """Median seconds of each function, run in turn so that a slow moment affects all of them alike.

    ours: number of the function that runs with freed memory kept, as training and sampling on a CPU do.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(warm_up + repeats):
        for number, function in enumerate(functions):
            if ours is not None and device.type == "cpu":
                keep_freed_memory(number == ours)
            dist.synchronize(device)
            started = time.perf_counter()
            function()
            dist.synchronize(device)
            if turn >= warm_up:
                times[number].append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def ratio_row(name: str, baseline: float, ours: float, form: str) -> Row:
    """A row of two numbers and how many times larger the baseline's is."""
    return name, [format(baseline, form), format(ours, form), f"{baseline / ours:.2f}x" if ours else "-"]


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Row], first_width: int = 34, width: int = 16
) -> None:
    """A title, a header and rows of right-aligned cells."""
    print(f"\n{title}")
    for name, cells in [("", columns), *rows]:
        print(f"{name:<{first_width}}" + "".join(f"{cell:>{width}}" for cell in cells))
