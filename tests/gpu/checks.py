"""What the GPU checks share. On a CPU the switches of CUDA do nothing."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset.loader import GlobalBatchSampler
from engine_tokenbridge import train_one_epoch
from models import channel_ar
from models.tokenbridge import TokenBridge
from tests.helpers import fill_golden, tiny_config, tiny_vae
from tests.processes.train_tiny import IMAGES, Moments, settings
from training.settings import TrainSettings
from training.state import TrainState
from util.log import JsonlLog

CPU = torch.device("cpu")
NEAR = 1e-4  # of a border between two levels: there float32 sums in another order may decide


def wait_for_host(device: torch.device, mode: str) -> None:
    """torch.cuda.set_sync_debug_mode: "error" makes every operation for which the host waits an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Within, nothing makes the host wait for the device."""
    wait_for_host(device, "error")
    try:
        yield
    finally:
        wait_for_host(device, "default")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within, kernels give the same bits every time, or are an error."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.double().cpu() - b.double().cpu()).abs().max())


def in_float64(model: TokenBridge) -> TokenBridge:
    """The model, which then computes in float64 (CPU) from the same tokens; its tables stay float32."""
    tables = {name: getattr(model, name) for name in ("boundaries", "reconstruction_values")}
    model.double()
    for name, table in tables.items():
        setattr(model, name, table.float())
    model.z_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model


# ---- training


def tiny_trainer(device: torch.device, s: TrainSettings, **changes: object) -> TrainState:
    """A new training of the golden tiny model, with dropout."""
    rates = dict(label_drop_prob=0.2, attn_dropout=0.1, proj_dropout=0.1)
    return TrainState(fill_golden(TokenBridge(**tiny_config(**rates | changes))), s, device)


def train_to(
    state: TrainState,
    s: TrainSettings,
    steps: int,
    *,
    log: JsonlLog | None = None,
    spoil_from: int | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> TrainState:
    """Train on fixed moments until `steps` are done; they are NaN after `spoil_from` images."""
    sampler = GlobalBatchSampler(IMAGES, s.batch_size, 0, 1, s.seed)
    loader, vae = (
        DataLoader(Moments(spoil_from), batch_sampler=sampler),
        tiny_vae(scale_factor=[1.0] * 16).to(state.device),
    )

    def stop() -> bool:
        after_step()
        return state.step >= steps

    while state.step < steps:
        epoch, done = divmod(state.step, s.steps_per_epoch)
        sampler.set_epoch(epoch, done)
        train_one_epoch(state, vae, loader, s, state.device, log, should_stop=stop)
    return state


def trainer_settings(**more: object) -> TrainSettings:
    """Eight images a step, six steps an epoch."""
    return settings(8, 1, 100, **(dict(log_freq=1000) | more))


# ---- sampling


def sampled(model: TokenBridge, **options: object) -> Tensor:
    """Tokens (B, L, C) of images of class i % classes with seed i; NaN latents are an error."""
    batch = options.pop("batch", 4)
    labels = torch.arange(batch, device=model.mask_token.device) % model.class_num
    latents = model.sample_tokens(batch, labels=labels, seeds=list(range(batch)), **options)
    assert latents.isfinite().all()
    return model.quantize(model.patchify(latents))[0]


class Borders:
    """Samples a reference and keeps, of every draw, its distance from the nearest border between two levels."""

    def __init__(self, model: TokenBridge, **options: object):
        self.model, self.steps, calls = model, [], []
        sample_levels = channel_ar.sample_levels

        def recorded(logits: Tensor, uniform: Tensor, temperature: float, *more: object) -> tuple[Tensor, Tensor]:
            cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
            calls.append((cumulative / cumulative[:, -1:] - uniform.unsqueeze(1)).abs().amin(1))
            return sample_levels(logits, uniform, temperature, *more)

        batch, before = options.pop("batch", 4), model.num_tokens
        labels = torch.arange(batch, device=model.mask_token.device) % model.class_num
        with mock.patch.object(channel_ar, "sample_levels", recorded):
            for state in model.sample_steps(batch, labels=labels, seeds=list(range(batch)), **options):
                if before > state.num_masked:
                    distances = torch.stack(calls, 1).view(batch, before - state.num_masked, -1)  # (B, M, C) head order
                    self.steps.append((state.orders[:, state.num_masked : before].cpu(), distances.cpu()))
                calls.clear()
                before = state.num_masked
        self.tokens = model.quantize(model.patchify(state.latents))[0].cpu()

    def check(self, tokens: Tensor) -> float:
        """Share of equal tokens; AssertionError unless an image's first unequal draws are all NEAR a border."""
        unequal = (tokens.cpu() != self.tokens)[:, :, list(self.model.channel_order)]  # (B, L, C) head order
        for image in range(len(unequal)):
            for targets, distances in self.steps:
                rows = unequal[image, targets[image]]  # (M, C)
                if rows.any():
                    of_token = rows.any(1)
                    first = rows[of_token].int().argmax(1, keepdim=True)  # the first dimension, where they part
                    distance = float(distances[image][of_token].gather(1, first).max())
                    assert distance < NEAR, f"image {image} parts {distance:.2e} from a border"
                    break
        return float((~unequal).double().mean())


def on(device: torch.device, build: Callable[[], nn.Module]) -> nn.Module:
    """The module on the device, in eval mode."""
    return build().eval().to(device)
