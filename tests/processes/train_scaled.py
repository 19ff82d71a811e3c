"""Train the tiny model on fixed moments, wrapped in some way, and write a whole checkpoint; test_scale.py runs it in
two processes.

train_scaled.py OUT.pth '{"fsdp": true, "compiled": false, "grad_checkpointing": false, "accum_iter": 2, "batch_size":
4, "steps": 4}' [CHECKPOINT]
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils.data import DataLoader

from dataset.loader import GlobalBatchSampler
from engine_tokenbridge import train_one_epoch
from tests.helpers import tiny_model, tiny_vae
from tests.processes.train_tiny import IMAGES, Moments, settings
from training.posthoc_ema import SnapshotWriter, read_snapshot, snapshot_path
from training.state import TrainState
from util import checkpoint, dist
from util.cli import run_cli
from util.log import JsonlLog


def run(
    out: Path,
    *,
    batch_size: int,
    accum_iter: int = 1,
    steps: int = 4,
    fsdp: bool = False,
    compiled: bool = False,
    resume: str = "",
    spoil_from: int | None = None,
    spoilt_rank: int = 1,
    device: str = "cpu",
    **model_changes: object,
) -> dict | None:
    """The checkpoint on rank 0 after `steps`; spoil_from: images of rank `spoilt_rank` are NaN after so many."""
    torch.manual_seed(0)
    s = settings(batch_size, accum_iter, steps, fsdp=fsdp, compile=compiled, posthoc_ema_freq=100)
    model, device = tiny_model(label_drop_prob=0.2, **model_changes), dist.pick_device(device)
    content = checkpoint.read_file(resume) if resume else None
    if content is not None:
        checkpoint.load_state(model, content["model"], resume)
    # one process in a group has DDP all the same, to see it at work on the only GPU
    grouped = torch.distributed.is_initialized() and not fsdp
    with mock.patch.object(dist, "world_size", lambda: 2) if grouped else contextlib.nullcontext():
        state = TrainState(model, s, device)
    if content is not None:
        state.load_state_dict(content, s.steps_per_epoch, resume)
    sampler = GlobalBatchSampler(IMAGES, batch_size, dist.rank(), dist.world_size(), s.seed)
    loader = DataLoader(Moments(spoil_from if dist.rank() == spoilt_rank else None), batch_sampler=sampler)
    log = JsonlLog(out.with_suffix(".jsonl"), state.step) if dist.is_main() else None
    while state.step < s.total_steps:
        epoch, done = divmod(state.step, s.steps_per_epoch)
        sampler.set_epoch(epoch, done * accum_iter)
        train_one_epoch(state, tiny_vae().to(device), loader, s, device, log)
    if log is not None:
        log.close()
    snapshots = SnapshotWriter(out.parent / out.stem, "toy", state.step)
    snapshots.take(state.step, state.power_emas, fsdp)
    snapshots.close()
    average = state.averaged_model()
    snapshot = state.snapshot(s.steps_per_epoch)
    seen = dist.gather_objects(loader.dataset.seen)
    if snapshot is not None:
        snapshot["seen"] = seen  # numbers of the images by rank
        snapshot["snapshot"] = read_snapshot(snapshot_path(snapshots.folder, state.step), "toy")
        snapshot["averaged"] = average.state_dict()
    return snapshot


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        device = dist.init(options.get("device", "cpu"), "env://")
        torch.set_float32_matmul_precision("highest")  # no TF32
        if "device" in options and not torch.distributed.is_initialized():  # one process, in a group all the same
            on_gpu = dict(backend="cpu:gloo,cuda:nccl", device_id=device)
            torch.distributed.init_process_group(**on_gpu if device.type == "cuda" else dict(backend="gloo"))
        content = run(out, **options)
        if content is not None:
            checkpoint.atomic_save(content, out)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
