"""dataset/loader.py: an order of samples that does not depend on the number of processes."""

import errno
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dataset.image_folder import ImageFolderDataset
from dataset.loader import GlobalBatchSampler, build_loader
from util.options import ArgumentError


def job(
    world: int, batch: int, samples: int = 30, epoch: int = 0, start: int = 0, seed: int = 7
) -> list[list[tuple[int, int]]]:
    """What all ranks see at each step, in rank order."""
    ranks = []
    for rank in range(world):
        sampler = GlobalBatchSampler(samples, batch, rank, world, seed)
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
    return [[pair for part in step for pair in part] for step in zip(*ranks, strict=True)]


def test_no_number_of_processes_changes_the_order():
    assert job(1, 4) == job(2, 2) == job(4, 1)
    assert job(1, 4, epoch=3) == job(4, 1, epoch=3)
    assert len(job(1, 4)) == 7 and all(len(step) == 4 for step in job(1, 4))  # 30 = 7 * 4 + 2 left over


def test_an_epoch_sees_every_sample_once_and_each_epoch_anew():
    first, second = ([number for step in job(2, 5, epoch=epoch) for number, _ in step] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second and first != list(range(30))
    seeds = [seed for epoch in range(3) for step in job(2, 5, epoch=epoch) for _, seed in step]
    assert len(set(seeds)) == 90  # flips are drawn anew in every epoch
    assert job(2, 5) == job(2, 5) and job(2, 5) != job(2, 5, seed=8)


def test_shuffling_is_uniform():
    """Where sample 0 of 5 lands, over 2,000 epochs: 400 at each place, standard error 18."""
    places = np.bincount(
        [[n for step in job(1, 1, samples=5, epoch=e) for n, _ in step].index(0) for e in range(2000)], minlength=5
    )
    assert abs(places - 400).max() < 75


@pytest.mark.parametrize("start", [0, 1, 5, 7])
def test_start_leaves_out_what_an_interrupted_run_has_seen(start):
    assert job(2, 2, epoch=2, start=start) == job(2, 2, epoch=2)[start:]


def test_start_holds_for_its_epoch_only():
    sampler = GlobalBatchSampler(10, 2, 0, 1, 0)
    sampler.set_epoch(1, 3)
    assert len(list(sampler)) == 2 and len(sampler) == 5
    sampler.set_epoch(2)
    assert len(list(sampler)) == 5


def test_batches_that_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        GlobalBatchSampler(10, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="10 samples, fewer than one global batch of 6 x 2.*lower batch_size"):
        GlobalBatchSampler(10, 6, 0, 2, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_samplers_batches(image_root, num_workers):
    """In its order, with its flips, whatever the number of loader processes; the second epoch too, from a start."""
    data = ImageFolderDataset(image_root / "train", img_size=32)
    sampler = GlobalBatchSampler(len(data), 5, 0, 1, seed=1)
    loader = build_loader(data, sampler, num_workers, pin_memory=True)
    for epoch, start in ((0, 0), (1, 1)):
        sampler.set_epoch(epoch, start)
        expected = list(sampler)
        batches = list(loader)
        assert len(batches) == len(expected) == 2 - start
        for (images, labels), pairs in zip(batches, expected, strict=True):
            assert torch.equal(images, torch.stack([data[pair][0] for pair in pairs]))
            assert labels.tolist() == [data.labels[number] for number, _ in pairs]


def test_an_error_in_a_worker_names_the_file(own_images):
    for path in (own_images / "china").iterdir():
        path.write_bytes(b"no picture")
    data = ImageFolderDataset(own_images, img_size=32)
    loader = build_loader(data, GlobalBatchSampler(len(data), 12, 0, 1, 0), num_workers=1, pin_memory=False)
    with pytest.raises(ValueError, match=r"china/0\d\.png"):
        next(iter(loader))


class Failing(Dataset):
    """In a loader's process, `fail` is called for each batch, or its result cannot be sent."""

    def __init__(self, fail: Callable[[], object]):
        self.fail = fail

    def __len__(self) -> int:
        return 8

    def read_batch(self, indices: list) -> list:
        return [self.fail()]


class Unsendable:
    """Its pickling runs out of file descriptors, as a tensor's does where they are few."""

    def __reduce__(self) -> tuple:
        raise OSError(errno.EMFILE, "Too many open files")


def full() -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (Unsendable, r"Too many open files"),
        (full, "shared memory"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed|exited"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "Bus error"),
    ],
)
def test_a_loader_process_that_fails_says_which_limits_matter(fail, words):
    """At once, also if the thread that sends batches fails, which otherwise waits for ever."""
    data = Failing(fail)
    loader = build_loader(data, GlobalBatchSampler(len(data), 2, 0, 1, 0), num_workers=1, pin_memory=False)
    advice = r"Use fewer .*/dev/shm has \d+ MiB.*ulimit -n is \d+"
    with pytest.raises(ArgumentError, match=rf"num_workers 1: a loader process failed \(.*({words}).*\)\. {advice}"):
        next(iter(loader))
