"""Train the tiny model for a few steps on fixed moments."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dataset.loader import GlobalBatchSampler
from engine_tokenbridge import train_one_epoch
from tests.helpers import tiny_model, tiny_vae
from training.settings import TrainSettings
from training.state import TrainState
from util import dist
from util.log import JsonlLog

IMAGES = 48


class Moments(TensorDataset):
    """Fixed moments (32, 4, 4) and labels; notes which samples were asked for, and spoils those of one step on one rank
    with NaN.
    """

    def __init__(self, spoil_from: int | None = None):
        generator = torch.Generator().manual_seed(3)
        super().__init__(torch.randn(IMAGES, 32, 4, 4, generator=generator), torch.arange(IMAGES) % 10)
        self.seen: list[int] = []
        self.spoil_from = spoil_from

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        moments, label = super().__getitem__(index[0])
        self.seen.append(index[0])
        spoilt = self.spoil_from is not None and len(self.seen) > self.spoil_from
        return moments * float("nan") if spoilt else moments, label


def settings(batch_size: int, accum_iter: int, steps: int, **more: object) -> TrainSettings:
    per_epoch = IMAGES // (batch_size * accum_iter * dist.world_size())
    schedule = dict(epochs=100, steps_per_epoch=per_epoch, lr=1e-3, min_lr=0.0, lr_schedule="cosine", warmup_epochs=1)
    sizes = dict(batch_size=batch_size, accum_iter=accum_iter, max_steps=steps)
    rest = dict(grad_clip=3.0, seed=7, precision="fp32", log_freq=2, max_bad_steps=3, ema_rate=0.9)
    return TrainSettings(**schedule | sizes | rest | more)


def run(
    batch_size: int,
    accum_iter: int,
    steps: int,
    log: JsonlLog | None = None,
    spoil_from: int | None = None,
    dropout: float = 0.1,
) -> tuple[TrainState, list[int]]:
    """(state after `steps`, samples that this process saw). dropout: in backbone and head."""
    torch.manual_seed(0)
    s, dataset = settings(batch_size, accum_iter, steps), Moments(spoil_from)
    model = tiny_model(label_drop_prob=0.2, attn_dropout=dropout, proj_dropout=dropout)
    state = TrainState(model, s)
    sampler = GlobalBatchSampler(IMAGES, batch_size, dist.rank(), dist.world_size(), s.seed)
    loader = DataLoader(dataset, batch_sampler=sampler)
    vae = tiny_vae()
    while state.step < s.total_steps:
        epoch, done = divmod(state.step, s.steps_per_epoch)
        sampler.set_epoch(epoch, done * accum_iter)
        train_one_epoch(state, vae, loader, s, torch.device("cpu"), log)
    return state, dataset.seen
