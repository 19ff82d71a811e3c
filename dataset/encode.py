"""The loop that encodes a data set into a cache of latents.

The unit of work is a batch: a fixed run of images, which depends neither on the number of processes nor on what is
cached already. Images that are not needed or cannot be read are zeros in the VAE's input, so that each image is encoded
at the same position of the same batch, and the files of an interrupted job equal those of one run, byte for byte.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache_files import CacheFiles, Counts
from dataset.encoder_inputs import Inputs, stack_items
from dataset.loader import build_loader
from util import dist
from util.log import first_line, get_logger

logger = get_logger()

SYNC_EVERY = 8  # batches between messages among the processes: progress, and whether one of them has failed
LOG_SECONDS = 5  # between progress lines
# inputs (b, ...), image numbers -> records (b, V, *shape) on the CPU
Encode = Callable[[Tensor, Sequence[int]], Tensor]


def encode_all(files: CacheFiles, encode: Encode, *, num_workers: int = 0, pin_memory: bool = False) -> Counts:
    """Encode what is missing; returns the counts of all processes. An error in one stops all at the next message."""
    counts, cache = Counts(), files.cache
    plan = files.plan(counts)
    needed, free = zip(*dist.gather_objects((files.bytes_needed(plan), shutil.disk_usage(cache).free)), strict=True)
    check_room(cache, sum(needed), min(free))
    batches = iter(build_loader(files.source, plan, num_workers, False, stack_items))
    rounds, error, waited = max(dist.gather_objects(len(plan))), None, 0.0
    started = logged = time.perf_counter()
    for k in range(rounds):
        try:
            if error is None and k < len(plan):
                waiting = time.perf_counter()
                inputs = next(batches)
                waited += time.perf_counter() - waiting if k else 0  # the first wait is the loader's start
                encode_batch(files, encode, plan[k], inputs, counts, pin_memory)
            if error is None and k == rounds - 1:
                files.wait()
        except ValueError as problem:
            error = problem
        except OSError as problem:
            advice = "What is finished stays valid; make room or mend the disk, then run the same command again"
            error = OSError(f"{first_line(problem)} in {cache} (cached_path). {advice}")
        if (k + 1) % SYNC_EVERY == 0 or k == rounds - 1 or dist.world_size() == 1:
            dist.agree(error)
            counts.waited = waited / max(time.perf_counter() - started, 1e-9)
            everything = counts.of_all()
            if k == rounds - 1 or time.perf_counter() - logged >= LOG_SECONDS:
                logged = time.perf_counter()
                log_progress(everything, len(files.source), logged - started)
    return counts.of_all()


def encode_batch(
    files: CacheFiles, encode: Encode, numbers: Sequence[int], inputs: Inputs, counts: Counts, pin_memory: bool
) -> None:
    """One batch from its Inputs to the files."""
    for number, problem in inputs.problems.items():
        if number not in counts.corrupt:
            counts.corrupt.add(number)
            logger.warning("corrupt image %d: %s", len(counts.corrupt), problem)
    present, data, encoded = inputs.present, inputs.data, int(inputs.present.sum())
    values = torch.empty(0, files.spec.views, *files.spec.shape)
    if data is not None:  # (b, crops, 3, S, S) or (b, V, 2C, h, w)
        values = encode(data.pin_memory() if pin_memory else data, numbers)[torch.from_numpy(present)]
    files.discard(inputs.problems)
    files.write(numbers, values, present, inputs.stamps[present])
    counts.encoded += encoded
    counts.changed += inputs.changed
    counts.kept += len(numbers) - encoded - len(inputs.problems)


def check_room(cache: Path, needed: int, free: int) -> None:
    """ValueError if the disk has fewer than `needed` bytes."""
    if needed > free:
        sizes = f"{free / 2**30:.1f} GiB of free disk space, the missing shards need {needed / 2**30:.1f} GiB"
        advice = "free some, choose another folder, or store less (dtype float16, mode mean or indices, no_flip)"
        raise ValueError(f"{cache} (cached_path) has {sizes}; {advice}")


def log_progress(counts: Counts, total: int, seconds: float) -> None:
    """A line about the counts of all processes."""
    done = counts.encoded + counts.kept + len(counts.corrupt)
    logger.info(
        "%d/%d images: %d encoded, %d were there, %d corrupt  %.1f images/s  waiting for files %.1f%%  ETA %.0f s",
        *(done, total, counts.encoded, counts.kept, len(counts.corrupt)),
        *(counts.encoded / max(seconds, 1e-9), 100 * counts.waited, seconds * (total - done) / max(counts.encoded, 1)),
    )
