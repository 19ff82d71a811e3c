"""`python -m tools.bench train`: FLOPs, bytes and time of a training step; what the presets need, computed."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine_tokenbridge import train_one_epoch
from models import MODELS
from models.tokenbridge import TokenBridge, num_masked_tokens
from models.vae import AutoencoderKL
from tools.bench.baselines import baseline_step
from tools.bench.counting import OpCounter, count, fake_mode, no_fake_gpu, print_table, timed
from tools.bench.options import REPEATS, ModelOptions
from training.flops import IMAGENET, mean_mask_ratio, mean_masked, peak_tflops, step_flops
from training.settings import TrainSettings
from training.state import TrainState
from training.step import batch_latents, draw_step, nan_gradients_if_not_finite, optimizer_step
from util import dist
from util.options import option
from util.presets import Preset, load_preset, preset_names

STEPS_PER_CALL = 3  # timed together, so that the one logging step among ours weighs little
ASSUMED_MFU = 0.4  # of the peak; what well-tuned transformers of this size reach, not measured here
DEVICES = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3"}
GIB = 2**30


@dataclass
class Options(ModelOptions):
    """A model, one more mask ratio, and what makes a step of it shorter."""

    repeats: int = option(3, REPEATS, lowest=1)
    mask_ratio: float | None = option(None, "count at one more mask ratio", above=0, highest=1)
    layers: int | None = option(None, "limit encoder and decoder to so many blocks each (for a CPU)", lowest=1)
    compile: bool = option(False, "time our loop with compiled blocks")
    memory: bool = option(False, "only compare peak memory and time of forward and backward with and without savings")

    def build_model(self, **changes: int) -> TokenBridge:
        """The model, as deep as --layers says."""
        depth = dict.fromkeys(("encoder_depth", "decoder_depth"), self.layers) if self.layers else {}
        return super().build_model(**depth | changes)

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random moments (B, 2C, h, w) and labels (B,) on the device."""
        side, generator = self.img_size // self.vae_stride, torch.Generator().manual_seed(self.seed)
        moments = torch.randn(self.batch_size, 2 * self.vae_embed_dim, side, side, generator=generator)
        return moments.to(device), torch.arange(self.batch_size, device=device) % 1000

    def settings(self, precision: str) -> TrainSettings:
        """Settings of a run that never ends and never logs by itself."""
        schedule = dict(epochs=10**6, steps_per_epoch=10**6, lr=1e-4, min_lr=0.0, lr_schedule="constant")
        rest = dict(warmup_epochs=0, log_freq=10**9, seed=self.seed, precision=precision, compile=self.compile)
        return TrainSettings(batch_size=self.batch_size, **schedule, **rest)

    def small_vae(self) -> AutoencoderKL:
        """Only its scale is used: the batches are moments."""
        return AutoencoderKL(embed_dim=self.vae_embed_dim, ch_mult=(1,), ch=8, num_res_blocks=1, norm_groups=4)


def our_loop(options: Options, device: torch.device, precision: str) -> tuple[TrainState, Callable[[], None]]:
    """State, and a function that does STEPS_PER_CALL steps of the real loop on moments in memory; the last one logs."""
    settings, vae, batch = options.settings(precision), options.small_vae().to(device), options.batch(device)
    state = TrainState(options.built(device).train(), settings)

    def stopped() -> bool:
        return state.step % STEPS_PER_CALL == 0

    def steps() -> None:
        train_one_epoch(state, vae, [batch] * (STEPS_PER_CALL + 1), settings, device, should_stop=stopped)

    return state, steps


def forward_pass(model: TokenBridge, batch_size: int, masked: int, precision: str | None) -> Tensor:
    """Loss of random latents with `masked` tokens of each image masked. precision None: as it is around."""
    device = model.mask_token.device
    latents = torch.randn(batch_size, model.token_dim, model.grid_size, model.grid_size, device=device)
    labels = torch.arange(batch_size, device=device) % model.class_num
    with dist.autocast(device, precision) if precision else contextlib.nullcontext():
        return model(latents, labels, num_masked=masked)


def count_training(
    build: Callable[[], TokenBridge],
    batch_size: int,
    mask_ratios: Sequence[float],
    device: torch.device,
    precision: str = "fp32",
) -> list[tuple[OpCounter, OpCounter]]:
    """For each mask ratio: counts of forward, and of forward + backward, of one batch of latents; on fake tensors."""
    counted = []
    with fake_mode(), device:
        model = build().train()
        for ratio in mask_ratios:
            forward = partial(forward_pass, model, batch_size, num_masked_tokens(ratio, model.num_tokens), precision)
            with torch.no_grad():  # otherwise the head's part of the backward pass is among it
                forwards = count(forward)
            counted.append((forwards, count(lambda forward=forward: forward().backward())))
            model.zero_grad(set_to_none=True)
    return counted


def run(options: Options) -> None:
    """FLOPs by mask ratio and bytes of the training state; then the presets (--dry) or the time of a whole step."""
    device = dist.pick_device(options.device)
    precision, images = dist.pick_precision(options.precision, device), options.batch_size
    if options.memory:
        return print_memory(options, device, precision)
    with fake_mode():
        model = options.build_model()
    lowest, mean = model.mask_ratio_min, mean_mask_ratio(model.mask_ratio_min)
    ratios = {} if options.mask_ratio is None else {f"{options.mask_ratio:g}": options.mask_ratio}
    ratios |= {f"mean {mean:.3f}": mean, f"{lowest:g}": lowest, "1": 1.0}
    counted = count_training(options.build_model, images, list(ratios.values()), device, precision)
    forward, both = ([counter.flops / images / 1e12 for counter in counters] for counters in zip(*counted, strict=True))
    masked = [num_masked_tokens(ratio, model.num_tokens) for ratio in ratios.values()]
    setting = f"{images} image(s) as latents, {precision} on {device}; columns are mask ratios"
    rows = [
        ("masked tokens", [f"{m}/{model.num_tokens}" for m in masked]),
        ("TFLOP per image, forward", [f"{x:.4g}" for x in forward]),
        ("TFLOP per image, forward+backward", [f"{x:.4g}" for x in both]),
        ("dispatched ops, forward+backward", [f"{counter.ops}" for _, counter in counted]),
        ("host syncs, forward+backward", [f"{counter.num_syncs}" for _, counter in counted]),
    ]
    print_table(f"Training step of {options.model}: {setting}", list(ratios), rows)
    numbers = sum(p.numel() for p in model.parameters())
    columns = {"weights": 1, "gradients": 1, "EMA": 1, "AdamW state": 2, "sum": 5}
    cells = [f"{x * 4 * numbers / GIB:.2f}" for x in columns.values()]
    print_table(f"{numbers / 1e6:.2f} M parameters; GiB per process", list(columns), [("", cells)])
    if options.dry:
        print_presets()
        print("counted on fake tensors; nothing was computed (--dry)")
    else:
        print_times(options, device, precision, next(iter(ratios)), both[0])


def print_times(options: Options, device: torch.device, precision: str, ratio: str, tflops: float) -> None:
    """Seconds of a whole step of both loops; `tflops` per image are those of mask ratio `ratio`."""
    ours, baseline, baseline_syncs = timed_loops(options, device, precision)
    rows = []
    for name, s, syncs in (("baseline", baseline, baseline_syncs), ("ours", ours, count_step_syncs(options))):
        rate = options.batch_size / s
        rows.append((name, [f"{s:.3f}", f"{rate:.2f}", f"{tflops * rate:.3g}", f"{baseline / s:.2f} x", str(syncs)]))
    about = f"TFLOP/s as of mask ratio {ratio}; host syncs outside logging steps"
    title = f"Whole step (draws, forward, backward, clip, AdamW, EMA); {about}"
    print_table(title, ["seconds", "images/s", "TFLOP/s", "faster", "host syncs"], rows)
    peak, threads = dist.peak_memory_gib(device), torch.get_num_threads()
    print(f"peak memory {peak:.2f} GiB, both loops in one process; {threads} CPU threads, torch {torch.__version__}")


SAVINGS = {  # name: selective checkpointing, tokens of a group
    "all tokens at once, nothing recomputed": (False, 0),
    "groups of tokens (default)": (False, None),
    "groups, selective": (True, None),
}


def print_memory(options: Options, device: torch.device, precision: str) -> None:
    """Peak memory above that before a step, and seconds, of forward and backward with each of SAVINGS, run in turn."""
    model = options.built(device).train()
    masked = mean_masked(model.config)
    peaks = {name: [] for name in SAVINGS}

    def step(name: str) -> None:
        selective, model.head_chunk = SAVINGS[name]
        for block in (*model.encoder_blocks, *model.decoder_blocks):
            block.selective = selective
        before = dist.reset_peak_memory(device)
        forward_pass(model, options.batch_size, masked, precision).backward()
        peaks[name].append(dist.peak_memory_gib(device) - before)
        model.zero_grad(set_to_none=True)

    seconds = timed([partial(step, name) for name in SAVINGS], options.repeats, device)
    rows = [
        (name, [f"{max(peaks[name]):.2f}", f"{s:.3f}", f"{s / seconds[0]:.3f} x"])
        for name, s in zip(SAVINGS, seconds, strict=True)
    ]
    setting = (
        f"{options.model}, {options.batch_size} image(s), {precision} on {device}, {torch.get_num_threads()} threads"
    )
    columns = ["peak GiB added", "seconds", "time"]
    print_table(f"Forward and backward: {setting}, median of {options.repeats}", columns, rows, first_width=40)


def timed_loops(options: Options, device: torch.device, precision: str) -> tuple[float, float, int]:
    """Median seconds per step of our loop (engine_tokenbridge.py) and of the baseline; host syncs of a baseline step.

    STEPS_PER_CALL steps of each in turn, on the same moments with the same mask ratios.
    """
    vae, batch, counter = options.small_vae().to(device), options.batch(device), OpCounter()
    step = baseline_step(options.built(device).train(), vae, batch, options.seed, precision, counter)
    _, our_steps = our_loop(options, device, precision)
    ways = [our_steps, lambda: [step() for _ in range(STEPS_PER_CALL)]]
    ours, baseline = (seconds / STEPS_PER_CALL for seconds in timed(ways, options.repeats, device, ours=0))
    return ours, baseline, counter.num_syncs


def count_step_syncs(options: Options) -> int | str:
    """Host syncs of one step of our loop outside logging steps; "-" where there are no fake GPU tensors.

    Draws on the CPU, the rest but the backward pass on fake GPU tensors. (That pass needs a CUDA build there; its
    operations are of the same kinds as the forward pass's.)
    """
    if no_fake_gpu():
        return "-"
    counter = OpCounter()
    with FakeTensorMode():
        model = options.build_model()
    with counter:
        draw_step(model, options.settings("bf16"), 0, torch.device("cpu"))
    with FakeTensorMode(), torch.device("cuda"):
        model, vae, b = options.build_model().train(), options.small_vae(), options.batch_size
        model.head_chunk = 0  # groups have a backward pass
        state = TrainState(model, options.settings("bf16"))
        c, side = model.token_dim, model.grid_size
        moments, noise, labels = torch.zeros(b, 2 * c, side, side), torch.zeros(b, c, side, side), torch.zeros(b).long()
        mask, label_drop = torch.ones(b, model.num_tokens).bool(), torch.ones(b).bool()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with counter:
            with torch.autocast("cuda", torch.bfloat16):
                latents = batch_latents(moments, vae, noise, model)
                loss = model(latents, labels, mask, num_masked=model.num_tokens - 1, label_drop=label_drop)
                nan_gradients_if_not_finite(loss)
            optimizer_step(state, list(model.parameters()), 3.0)
            state.ema.update()
    return counter.num_syncs


def step_gib(
    name: str, batch_size: int, precision: str = "bf16", device_type: str = "cuda", **settings: object
) -> float:
    """GiB that forward and backward of a model take at most beside its weights, at the mean mask ratio: activations,
    gradients, temporary results.

    Counted on fake tensors, by when each is made and freed. Groups are those of the device type. Without attention
    dropout: with it the CPU's kernel keeps the attention matrices, flash attention does not.
    """
    with fake_mode():
        model = MODELS[name](**({"attn_dropout": 0.0} | settings)).train()
        model.head_chunk = model.group_size(device_type)
        with OpCounter() as counter:
            forward_pass(model, batch_size, mean_masked(model.config), precision).backward()
    return counter.peak_bytes / GIB


def counted_memory(name: str, batch_size: int) -> float:
    """GiB that a step in bf16 with dropout is counted to need: weights, EMA, AdamW's moments, the forward and the
    backward pass with gradients and half-precision copies of weights."""
    with torch.device("meta"):
        numbers = sum(p.numel() for p in MODELS[name]().parameters())
    return 4 * 4 * numbers / GIB + step_gib(name, batch_size)


def preset_cells(preset: Preset) -> dict[str, str]:
    """{row: cell} of what a training preset needs on ImageNet."""
    name, batch = preset.flags["model"], preset.global_batch
    with fake_mode():
        model = MODELS[name]()
    masked = mean_masked(model.config)
    numbers = sum(p.numel() for p in model.parameters())
    sizes = [sum(p.numel() for p in block.parameters()) for block in (*model.encoder_blocks, *model.decoder_blocks)]
    gathered = 2 * 4 * (numbers - sum(sizes) + max(sizes)) / GIB  # weights and gradients of head, embeddings, one block
    state = 5 * 4 * numbers / GIB

    per_image = step_flops(model.config, masked)
    total = per_image * (IMAGENET // batch * batch) * preset.flags["epochs"]
    speeds = {name: peak_tflops(full_name, "bf16") * 1e12 * ASSUMED_MFU for name, full_name in DEVICES.items()}
    return {
        "parameters, M": f"{numbers / 1e6:.2f}",
        "GiB per GPU, DDP: weights, gradients, EMA, AdamW": f"{state:.2f}",
        "  the same with --fsdp on 8 GPUs": f"{state / 8 + gathered:.2f}",
        "  the same with --fsdp on 32 GPUs": f"{state / 32 + gathered:.2f}",
        "GiB of forward and backward, bf16, batch 64": f"{step_gib(name, 64):.1f}",
        "  with --head_chunk 0": f"{step_gib(name, 64, head_chunk=0):.1f}",
        "  with --grad_checkpointing selective": f"{step_gib(name, 64, grad_checkpointing='selective'):.1f}",
        "  with --grad_checkpointing (full)": f"{step_gib(name, 64, grad_checkpointing='full'):.1f}",
        "TFLOP per image (forward, backward)": f"{per_image / 1e12:.3f}",
        "training, 10^21 FLOP": f"{total / 1e21:.3g}",
        **{f"GPU-hours, {name}": f"{total / speed / 3600:,.0f}" for name, speed in speeds.items()},
        "  days on 32 GPUs, A100": f"{total / speeds['A100'] / 86400 / 32:.1f}",
    }


def print_presets() -> None:
    """Memory per GPU and GPU-hours of every training preset, from formulas and counts: computed, not measured."""
    presets = [load_preset(name) for name in preset_names()]
    presets = [preset for preset in presets if preset.published and not preset.evaluates]
    columns = [preset_cells(preset) for preset in presets]
    rows = [(name, [column[name] for column in columns]) for name in columns[0]]
    assumed = f"global batch {presets[0].global_batch}, bf16, {ASSUMED_MFU:.0%} of the peak assumed"
    names = [preset.name for preset in presets]
    print_table(f"Presets, computed: ImageNet, {assumed}", names, rows, first_width=52, width=12)
