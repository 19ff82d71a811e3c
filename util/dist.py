"""Devices, precision and processes. The only file that names a device type."""

import contextlib
import ctypes
import datetime
import functools
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from util.launcher import launched
from util.options import ArgumentError

DEVICES = "auto, cpu, cuda, cuda:N"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(DTYPES)
TIMEOUT = datetime.timedelta(minutes=30)  # of a process that waits for the others


# ---- processes


def init(device_flag: str, dist_url: str = "env://") -> torch.device:
    """This process's device; joins the process group when torchrun started several (nccl on cuda, gloo on cpu)."""
    device = pick_device(device_flag)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if launched("WORLD_SIZE") > 1 and not dist.is_initialized():
        meeting = dist.rendezvous(dist_url, launched("RANK"), launched("WORLD_SIZE"), timeout=TIMEOUT)
        store, index, processes = next(meeting)
        store.set_timeout(TIMEOUT)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = store_of_this_start(store, index, processes)
        group = dict(store=store, rank=index, world_size=processes, timeout=TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, **group, device_id=device if on_gpu else None)
    return device


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        # torch 2.6 frees a group under Python's lock, for which gloo's thread may be waiting: both wait for ever. A
        # reference to the backend leaves it to be freed after the group, which is done without the lock.
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        dist.destroy_process_group()
        del backend


def store_of_this_start(
    store: dist.Store, index: int, processes: int, timeout: datetime.timedelta = TIMEOUT
) -> dist.Store:
    """The store under a prefix that only the processes started together share; each of them calls this.

    torchrun keeps one store over all its restarts (torch 2.5 to 2.15), so new processes would take the addresses that
    dead ones left there for their peers'. The count of restarts does not help, because every node counts its own. So
    rank 0 draws a prefix, and every other rank asks for it under a name that it drew itself. Rank 0 answers dead
    processes too, and stops only when a live one of every rank has confirmed. RuntimeError that names the missing ranks
    after `timeout`.
    """
    name = uuid.uuid4().hex
    if index > 0:
        store.set(f"asks/{index}", name)
        prefix = store.get(f"answer/{name}").decode()
        store.set(f"confirmed/{prefix}/{index}", "")
        return dist.PrefixStore(prefix, store)
    missing, deadline = set(range(1, processes)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"confirmed/{name}/{other}"]):
                missing.discard(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"{processes} processes were started, but ranks {ranks} did not join within {timeout}")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


# ---- collectives: with one process each returns its argument


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over the processes, in place; the tensor itself with one process."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= world_size()
    return x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_objects(value: object) -> list:
    """Every process's `value` (picklable), in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_to_main(value: object) -> list | None:
    """Every process's `value` (picklable), in rank order, on rank 0; None on the others, which spares their memory."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def broadcast_from_main(value: object) -> object:
    """Rank 0's `value` (picklable), on every process; what the others pass is ignored."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


# ---- errors on all processes


def check_same(value: object, what: str) -> None:
    """ValueError on every process unless all have the same value: otherwise some read another file than the others."""
    if any(other != value for other in gather_objects(value)):
        advice = "is it on a disk that all of them share, and was it replaced meanwhile?"
        raise ValueError(f"the processes read different contents of {what}: {advice}")


def agree(error: Exception | None) -> None:
    """Raise together: if any process has an error, every process raises one, so that none waits for a dead peer."""
    messages = [m for m in gather_objects(None if error is None else str(error)) if m is not None]
    if error is not None:
        raise error
    if messages:
        raise ValueError(messages[0])


@contextlib.contextmanager
def on_main(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """Rank 0 enters `context`, the others wait for it; an error on entering is raised on every process."""
    error = None
    with contextlib.ExitStack() as stack:
        try:
            if is_main():
                stack.enter_context(context)
        except (ValueError, OSError) as problem:
            error = problem
        agree(error)
        yield


# ---- devices


def pick_device(flag: str) -> torch.device:
    """--device auto|cpu|cuda|cuda:N -> device; auto takes cuda where there is one, cuda the local rank's.

    ValueError if there is no such device.
    """
    if flag == "auto":
        flag = "cuda" if torch.cuda.is_available() else "cpu"
    if flag == "cpu":
        return torch.device("cpu")
    if not (flag == "cuda" or (flag.startswith("cuda:") and flag[5:].isdigit())):
        raise ValueError(f"--device {flag!r} is not one of {DEVICES}")
    if not torch.cuda.is_available():
        reason = "this machine has no CUDA device that torch can use; use --device cpu or auto"
        raise ValueError(f"--device {flag} was asked for, but {reason}")
    index = int(flag[5:]) if ":" in flag else launched("LOCAL_RANK")
    if index >= torch.cuda.device_count():
        there = f"there are {torch.cuda.device_count()} (--nproc_per_node larger than the number of GPUs?)"
        raise ValueError(f"--device {flag}: process needs CUDA device {index}, but {there}")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The accelerator's own name, "cpu" on cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_count() -> int:
    """CUDA devices of this machine."""
    return torch.cuda.device_count()


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle (for timing); nothing on cpu."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def same_bits_every_time() -> None:
    """Let cuDNN choose kernels by shape alone, not by timing them, so that two runs give the same bits; for cuda."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def device_random_state(device: torch.device) -> Tensor | None:
    """State of torch's global generator on the device; None on cpu, whose state is torch.get_rng_state()."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_random_state(device: torch.device, state: Tensor | None) -> None:
    """Put back what `device_random_state` returned; nothing if it was another kind of device."""
    if device.type == "cuda" and state is not None:
        torch.cuda.set_rng_state(state, device)


def prefetch(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches on the device, each copied from pinned memory while the device still works on the one before.

    The copies have a stream of their own; the host, which runs ahead of the device, never waits for them.
    """
    if device.type != "cuda":
        yield from (tuple(x.to(device) for x in batch) for batch in batches)
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = tuple(x.to(device, non_blocking=True) for x in batch)
        working.wait_stream(copying)  # the device's queue waits, not the host
        for x in copied:
            x.record_stream(working)  # its memory is not free before the work on it is done
        yield copied


class CudaGraph:
    """A function on a GPU as one launch: it runs on copies of its arguments, always at the same addresses.

    What it returns is overwritten by the next call, also by that of another graph with the same `pool` of memory.
    """

    def __init__(self, pool: tuple, stream: object, function: Callable[..., object], arguments: Sequence[Tensor]):
        self.inputs, self.graph = [x.clone() for x in arguments], torch.cuda.CUDAGraph()
        caching = torch.is_autocast_cache_enabled()
        stream.wait_stream(torch.cuda.current_stream())
        torch.set_autocast_cache_enabled(False)  # it would keep casts that were captured, not computed
        try:
            with torch.cuda.stream(stream):
                function(*self.inputs)  # compiles, and libraries start
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                self.outputs = function(*self.inputs)
                self.graph.capture_end()
        finally:
            torch.set_autocast_cache_enabled(caching)
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, *arguments: Tensor) -> object:
        """function(*arguments) for arguments of the same shapes and types."""
        for own, given in zip(self.inputs, arguments, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


def graph_capture(device: torch.device) -> Callable[..., CudaGraph] | None:
    """What captures (function, arguments) as a CudaGraph; None on cpu. Its graphs share memory: use results at once."""
    if device.type != "cuda":
        return None
    return functools.partial(CudaGraph, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))


# ---- memory


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory allocated on the device so far, GiB; on cpu the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak_memory(device: torch.device) -> float:
    """Free cached memory and let `peak_memory_gib` count from now on (on a CPU: with Linux); returns the GiB in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the kernel
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_gib(device)


def total_memory_gib(device: torch.device) -> float:
    """Memory of the device, GiB; 0 on cpu."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0


# ---- precision


def pick_precision(flag: str | None, device: torch.device) -> str:
    """The precision asked for, or by device: bf16 on cuda that has it, fp16 on older cuda, fp32 on cpu."""
    if flag is not None:
        if flag not in PRECISIONS:
            raise ArgumentError("precision", f"precision {flag!r} is not one of {', '.join(PRECISIONS)}")
        return flag
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to the precision; fp32 turns it off. Weights stay float32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def allows_tf32(device: torch.device) -> bool:
    """Whether float32 matrix products on the device may be computed in TF32; torch's own default is no."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


@contextlib.contextmanager
def float32_precision(device: torch.device) -> Iterator[None]:
    """Full float32 within the block: no autocast, no TF32 in matrix products and convolutions.

    Every score is computed within it, so that scores do not depend on how the images were made.
    """
    matmul, convolutions = torch.get_float32_matmul_precision(), _convolutions()
    saved = [part.fp32_precision for part in convolutions] or torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for part in convolutions:  # allow_tf32 = False leaves them to torch.backends.fp32_precision
        part.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = saved if not convolutions else "tf32" in saved
        for part, value in zip(convolutions, saved if convolutions else (), strict=True):
            part.fp32_precision = value


def _convolutions() -> tuple:
    """cuDNN's settings of their own for convolutions and recurrent layers, which torch has from 2.9 on."""
    return (torch.backends.cudnn.conv, torch.backends.cudnn.rnn) if hasattr(torch.backends.cudnn, "conv") else ()
