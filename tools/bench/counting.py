"""What the benches share: counting what reaches torch's dispatcher, timing in turn, tables, flags, models with random weights.

FLOPs are torch.utils.flop_counter's (a multiply-add is two), counted under FakeTensorMode, where nothing is computed.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from util import dist
from util.cli import at_least
from util.heap import keep_freed_memory

SYNC_OPS = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)
INDEX_OPS = ("index", "index_put", "index_put_")  # with a boolean index they have to learn how many entries are True

for direction in ("", "_backward"):  # torch 2.6 counts no attention on a CPU: as much as a GPU's
    flash = f"_scaled_dot_product_flash_attention{{}}{direction}"
    flop_registry.setdefault(
        getattr(torch.ops.aten, flash.format("_for_cpu")), flop_registry[getattr(torch.ops.aten, flash.format(""))]
    )


class OpCounter(TorchDispatchMode):
    """Counts what reaches torch's dispatcher while it is entered.

    ops: all of them; views: those that only look at memory in another way; by_name; syncs: those for which the host must wait for the
    device's result, by name; largest: elements of the largest tensor made, and largest_bytes. `armed` False lets everything pass uncounted.
    """

    def __init__(self, armed: bool = True):
        super().__init__()
        self.armed, self.ops, self.views, self.largest, self.largest_bytes = armed, 0, 0, 0, 0
        self.by_name: dict[str, int] = {}
        self.syncs: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001 (torch's signature)
        result = func(*args, **(kwargs or {}))
        if self.armed and func.namespace == "aten":  # fake tensors are also asked for their device, which is no work
            name = func.overloadpacket.__name__
            self.ops += 1
            self.views += func.is_view or name in ("_unsafe_view", "detach")
            self.by_name[name] = self.by_name.get(name, 0) + 1
            if is_host_sync(name, args, result):
                self.syncs[name] = self.syncs.get(name, 0) + 1
            for x in tree_flatten(result)[0]:
                if isinstance(x, Tensor) and all(isinstance(n, int) for n in x.shape):
                    self.largest = max(self.largest, x.numel())
                    self.largest_bytes = max(self.largest_bytes, x.numel() * x.element_size())
        return result

    def arm_at(self, module: torch.nn.Module) -> None:
        """Count from the first call of `module` on: leaves out the checks of inputs, which are host tensors."""
        self.armed = False
        handle = module.register_forward_pre_hook(lambda *_: (setattr(self, "armed", True), handle.remove())[0])


def is_host_sync(name: str, args: Sequence, result: object) -> bool:
    """Whether the op makes the host wait: it returns a number, its result's size depends on values, or it copies to the host."""
    if name in SYNC_OPS:
        return True
    if name in INDEX_OPS:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
        source = args[0] if name == "_to_copy" else args[1]
        return isinstance(source, Tensor) and result.device.type == "cpu" and source.device.type != "cpu"
    return False


@dataclass
class Counts:
    """What one run of a function was counted to do."""

    flops: int
    ops: int
    syncs: dict[str, int]
    by_name: dict[str, int] = field(default_factory=dict)
    views: int = 0

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())


@functools.cache
def no_fake_gpu() -> str:
    """Why fake tensors cannot stand for a GPU's here, "" if they can: torch 2.6 built for CUDA needs a driver even for them."""
    try:
        with FakeTensorMode(), torch.device("cuda"):
            torch.nn.Linear(2, 2)
    except RuntimeError as error:
        return f"torch {torch.__version__} cannot make fake CUDA tensors here: {str(error).splitlines()[0]}"
    return ""


def count(function: Callable[[], object], arm_at: torch.nn.Module | None = None) -> Counts:
    """Run `function` (under the caller's FakeTensorMode, if any) and count FLOPs, dispatched ops and host syncs."""
    counter = OpCounter()
    if arm_at is not None:
        counter.arm_at(arm_at)
    with FlopCounterMode(display=False) as flops, counter:
        function()
    return Counts(flops.get_total_flops(), counter.ops, counter.syncs, counter.by_name, counter.views)


def fake_mode() -> FakeTensorMode:
    """Fake tensors that also stand for results whose size depends on values (the plain way indexes with masks)."""
    return FakeTensorMode(shape_env=ShapeEnv())


def timed(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 1,
    *,
    ours: int | None = None,
) -> list[float]:
    """Median seconds of each function, run in turn so that a slow moment hits all of them alike.

    ours: number of the one that runs with freed memory kept, as training and sampling on a CPU do; the others run without. None: as it is.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(warm_up + repeats):
        for number, (function, seen) in enumerate(zip(functions, times, strict=True)):
            if ours is not None and device.type == "cpu":
                keep_freed_memory(number == ours)
            dist.synchronize(device)
            started = time.perf_counter()
            function()
            dist.synchronize(device)
            if turn >= warm_up:
                seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in times]


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """A title, a header and rows of right-aligned cells."""
    print(f"\n{title}\n{'':<34}" + "".join(f"{c:>16}" for c in columns))
    for name, cells in rows:
        print(f"{name:<34}" + "".join(f"{c:>16}" for c in cells))


# ------------------------------------------------------------------------------------------------------------- models and flags


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model of the flags with random weights, adaLN's too: their zeros would make every block of the head the identity."""
    from models import MODELS

    depth = {} if getattr(args, "layers", None) is None else dict(encoder_depth=args.layers, decoder_depth=args.layers)
    model = MODELS[args.model](
        img_size=args.img_size,
        vae_stride=args.vae_stride,
        vae_embed_dim=args.vae_embed_dim,
        buffer_size=args.buffer_size,
        quant_levels=2**args.quant_bits,
        **depth,
    )
    for layer in model.modulation_layers:
        torch.nn.init.xavier_uniform_(layer[1].weight)
    return model


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    function: Callable[[argparse.Namespace], None],
    check: Callable[[argparse.Namespace], None],
    description: str,
    repeats: int,
) -> argparse.ArgumentParser:
    """A sub-command with --device and --repeats; `check` refuses bad flags before `function` runs."""
    sub = commands.add_parser(
        name,
        help=description,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.add_argument("--device", default="auto", help=dist.DEVICES)
    sub.add_argument("--repeats", type=int, default=repeats, help="timed runs; the median counts")
    sub.set_defaults(function=function, check=check)
    return sub


def add_model_flags(sub: argparse.ArgumentParser) -> None:
    """What `build_model` needs, batch size, precision, --dry."""
    from models import MODELS

    sub.add_argument("--model", default="tokenbridge_base", choices=list(MODELS))
    sub.add_argument("--batch_size", type=int, default=1)
    sub.add_argument(
        "--precision",
        default=None,
        choices=dist.PRECISIONS,
        help="default: bf16 on cuda that has it, else fp16; fp32 on cpu",
    )
    sub.add_argument("--dry", "--flops_only", action="store_true", help="count only, compute nothing")
    sub.add_argument("--seed", type=int, default=0)
    for flag, default in (
        ("img_size", 256),
        ("vae_stride", 16),
        ("vae_embed_dim", 16),
        ("buffer_size", 64),
        ("quant_bits", 6),
    ):
        sub.add_argument(f"--{flag}", type=int, default=default)


def check_model_flags(args: argparse.Namespace) -> None:
    """ValueError naming the flag for a size that no model has."""
    from models.quantizer import gaussian_tables

    gaussian_tables(args.quant_bits)
    at_least(args, repeats=1, batch_size=1, img_size=1, vae_stride=1, vae_embed_dim=1, buffer_size=1)
