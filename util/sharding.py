"""Weights cut over the processes (--fsdp, torch's fully_shard), and whole again for checkpoints, which keep the published layout.

A sharded parameter is a DTensor: it has the whole shape, and this process's part of the numbers. Plain tensors pass through unchanged.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from util import dist


def shard(model: nn.Module, units: Iterable[nn.Module], device: torch.device) -> None:
    """Cut the parameters over all processes, in place: each unit is gathered when it runs and freed after; the rest makes one more unit.

    Inner units come before the ones that hold them. Only one unit at a time is ever whole on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # slow to import; only for runs that shard
    if not hasattr(torch.cpu.Stream, "record_event"):           # torch 2.6: the stand-in for a CPU's streams lacks what fully_shard calls
        torch.cpu.Stream.record_event = torch.cpu.Stream.wait_event = lambda *_: None
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    for module in (*units, model):
        fully_shard(module, mesh=mesh)
    model.to(device)                                            # buffers


def is_sharded(value: Tensor) -> bool:
    """Whether it is a DTensor (asked without importing that class, which takes seconds)."""
    return hasattr(value, "full_tensor")


def full(value: Tensor) -> Tensor:
    """The whole tensor, on this device; every process must ask for it."""
    return value.full_tensor() if is_sharded(value) else value


def like(value: Tensor, reference: Tensor) -> Tensor:
    """This process's part of the whole tensor `value`, if `reference` is cut and has its shape; every process brings the same numbers."""
    if not is_sharded(reference) or value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None)


def to_host(value: object, keep: bool = True) -> object:
    """A copy on the CPU of all tensors in nested dicts, lists and tuples, whole; every process must ask, only those with `keep` get it.

    One tensor is gathered after the other, so that no device ever holds all of them.
    """
    if isinstance(value, Tensor):
        whole = full(value.detach())
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: to_host(v, keep) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(v, keep) for v in value)
    return value
