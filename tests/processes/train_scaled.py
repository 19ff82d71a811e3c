"""Train the tiny model on fixed moments, wrapped in some way, and write a whole checkpoint; test_scale.py runs it in
two processes.

train_scaled.py OUT.pth '{"fsdp": true, "compiled": false, "grad_checkpointing": false, "accum_iter": 2, "batch_size":
4, "steps": 4}' [CHECKPOINT]
"""

import json
import sys
from pathlib import Path

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
    **model_changes: object,
) -> dict | None:
    """The checkpoint on rank 0 after `steps`; spoil_from: images of rank `spoilt_rank` are NaN after so many."""
    torch.manual_seed(0)
    s = settings(batch_size, accum_iter, steps, fsdp=fsdp, compile=compiled, posthoc_ema_freq=100)
    model, device = tiny_model(label_drop_prob=0.2, **model_changes), torch.device("cpu")
    content = checkpoint.read_file(resume) if resume else None
    if content is not None:
        checkpoint.load_state(model, content["model"], resume)
    state = TrainState(model, s, device)
    if content is not None:
        state.load_state_dict(content, s.steps_per_epoch, resume)
    sampler = GlobalBatchSampler(IMAGES, batch_size, dist.rank(), dist.world_size(), s.seed)
    loader = DataLoader(Moments(spoil_from if dist.rank() == spoilt_rank else None), batch_sampler=sampler)
    log = JsonlLog(out.with_suffix(".jsonl"), state.step) if dist.is_main() else None
    while state.step < s.total_steps:
        epoch, done = divmod(state.step, s.steps_per_epoch)
        sampler.set_epoch(epoch, done * accum_iter)
        train_one_epoch(state, tiny_vae(), loader, s, device, log)
    snapshots = SnapshotWriter(out.parent / out.stem, "toy", state.step)
    snapshots.take(state.step, state.power_emas, fsdp)
    snapshots.close()
    average = state.averaged_model()
    snapshot = state.snapshot(s.steps_per_epoch)
    if snapshot is not None:
        snapshot["snapshot"] = read_snapshot(snapshot_path(snapshots.folder, state.step), "toy")
        snapshot["averaged"] = average.state_dict()
    return snapshot


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        dist.init("cpu", "env://")
        content = run(out, **options)
        if content is not None:
            checkpoint.atomic_save(content, out)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
