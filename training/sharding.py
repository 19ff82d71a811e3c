"""Parameters sharded across ranks (--fsdp, torch's fully_shard), and gathered for checkpoints, which keep the published
layout.

A sharded parameter is a DTensor: it has the whole shape, and this process's part of the numbers. Plain tensors pass
through unchanged.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from util import dist
from util.options import ArgumentError


def cannot_shard(device: torch.device) -> str:
    """Why sharding does not work here, "" if it does: on a CPU torch 2.6 fails, and 2.7 sums gradients."""
    from torch.distributed.fsdp import FSDPModule

    if device.type == "cpu" and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        return f"fsdp on a CPU needs torch 2.8 or later, this is {torch.__version__}: leave it out, or update torch"
    return ""


def check_sharding(fsdp: bool, device: torch.device) -> None:
    """ArgumentError if parameters are to be sharded and cannot be."""
    if fsdp and dist.world_size() == 1:
        raise ArgumentError(
            "fsdp",
            "fsdp shards the weights over several processes, and there is one: start it with torchrun "
            "--nproc_per_node, or leave it out",
        )
    if fsdp and (reason := cannot_shard(device)):
        raise ArgumentError("fsdp", reason)


def shard(model: nn.Module, units: Iterable[nn.Module], device: torch.device) -> None:
    """Cut the parameters over all processes, in place: each unit is gathered when it runs and freed after; the rest
    makes one more unit.

    Only one unit at a time is ever whole on the device, beside the model's own. Ask `cannot_shard` first.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # slow to import; only for runs that shard

    mesh = init_device_mesh(device.type, (dist.world_size(),))
    for module in (*units, model):
        fully_shard(module, mesh=mesh)
        if device.type == "cpu":  # asked for a mean, gloo gave the sum in torch 2.7 and 2.8
            module.set_force_sum_reduction_for_comms(True)
    model.to(device)  # buffers


def is_sharded(value: Tensor) -> bool:
    """Whether it is a DTensor (asked without importing that class, which takes seconds)."""
    return hasattr(value, "full_tensor")


def local(value: Tensor) -> Tensor:
    """This process's part of the tensor."""
    return value.to_local() if is_sharded(value) else value


def full(value: Tensor) -> Tensor:
    """The whole tensor, on this device; every process must ask for it."""
    return value.full_tensor() if is_sharded(value) else value


def like(value: Tensor, reference: Tensor) -> Tensor:
    """This process's shard of the whole tensor `value`, if `reference` is sharded and has its shape."""
    if not is_sharded(reference) or value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def to_host(value: object, keep: bool = True) -> object:
    """A copy on the CPU of all tensors in nested dicts, lists and tuples, whole; every process must ask, only those
    with `keep` get it.

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
