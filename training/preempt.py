"""Stop requests: SIGTERM and SIGUSR1 end a run after its step, with a checkpoint, on all processes alike."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal has come. `agreed()` is asked once per step, by every process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number  # nothing else: the signal may have come in the middle of anything

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the signals set the flag, afterwards they do what they did before. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
            if self._pending is not None:
                self._pending[1].wait()  # before any process leaves the group
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """True on every process at the same call, once a signal has reached one of them.

        With several processes the answer is the one collected during the previous call: the hosts then never wait for
        each other, nor for the device; the run stops one step later. (A tensor on the CPU goes through gloo, also
        beside nccl. A group of its own would not come back after one of torchrun's restarts: torch 2.15 then meets the
        addresses of the processes before.)
        """
        if not torch.distributed.is_initialized():
            return self.received is not None
        previous, flag = self._pending, torch.tensor([self.received is not None], dtype=torch.int32)
        self._pending = (flag, torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True))
        if previous is None:
            return False
        previous[1].wait()
        return bool(previous[0][0])
