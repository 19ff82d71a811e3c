"""`python -m tools.bench sample`: the sampler against a baseline; with --study a part of it by itself.

head     64 tokens through the per-dimension head, without (the baseline) and with a key-value cache
deep     large's depth at a narrow width, 256 iterations, one image: operations that the host dispatches, and host syncs
growth   time against iterations, batch and tokens, each with the exponent of a power law fitted to it
reuse    FLOPs and time of features and guidance reused, and of the confidence order (effect on images: demo.samplers)
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.sampling.compiled import LAUNCHES_PER_STEP
from models.sampling.orders import random_orders
from models.sampling.schedules import CFG_SCHEDULES
from models.tokenbridge import TokenBridge
from tools.bench.baselines import baseline_head, sample_baseline
from tools.bench.counting import OpCounter, Row, count, fake_mode, on_fake_gpu, print_table, ratio_row, timed
from tools.bench.options import ModelOptions
from util import dist
from util.options import option

COLUMNS = ["baseline", "ours", "ratio"]


@dataclass
class Options(ModelOptions):
    """The sampler's settings."""

    num_iter: int = option(8, "sampling steps", lowest=1)
    cfg: float = option(3.0, "guidance scale; 1 means none")
    cfg_schedule: str = option("linear", choices=CFG_SCHEDULES)
    study: str = option("whole", "a part by itself, see above", choices=("whole", "head", "deep", "growth", "reuse"))

    @property
    def guidance(self) -> tuple[int, float, str]:
        """(steps, guidance scale, its schedule), as `TokenBridge.sample_tokens` takes them."""
        return self.num_iter, self.cfg, self.cfg_schedule


class HeadPositions:
    """Number of positions that pass the head's last norm: the cost of a token in units of one pass through the head."""

    def __init__(self, model: TokenBridge):
        self.total = 0
        self.handle = model.channel_norm.register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self.total += inputs[0].shape[0] * inputs[0].shape[1]


def samplers(
    model: TokenBridge, orders: Tensor | None, labels: Tensor, num_iter: int, cfg: float, cfg_schedule: str
) -> list[Callable[[], Tensor]]:
    """Baseline and ours, as functions without arguments. orders None: random ones (fake tensors have no values)."""
    drawn = random_orders(len(labels), model.num_tokens, device=labels.device) if orders is None else orders
    return [
        partial(sample_baseline, model, drawn, labels, num_iter, cfg, cfg_schedule),
        partial(model.sample_tokens, len(labels), num_iter, cfg, cfg_schedule, labels, 0.0, orders),
    ]


def count_samplers(
    build: Callable[[], TokenBridge], images: int, guidance: tuple, device: torch.device, precision: str = "fp32"
) -> list[tuple[OpCounter, float]]:
    """Of baseline and ours: counts of one batch, and head positions per token; on fake tensors."""
    counted = []
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            contexts = fake_mode(), device, dist.autocast(device, precision)
        else:
            contexts = on_fake_gpu(precision), torch.no_grad()
        for context in contexts:
            stack.enter_context(context)
        model = build().eval().requires_grad_(False)
        labels = torch.zeros(images, dtype=torch.long, device=device)
        for function in samplers(model, None, labels, *guidance):
            positions = HeadPositions(model)
            counted.append((count(function, arm_at=model.z_proj), positions.total / (images * model.num_tokens)))
            positions.handle.remove()
    return counted


def seeded(options: Options, images: int, device: torch.device) -> tuple[TokenBridge, Tensor, Tensor]:
    """The model in eval mode, orders (B, L) and labels (B,) of the seed."""
    model = options.built(device).eval()
    orders = random_orders(images, model.num_tokens, torch.Generator().manual_seed(options.seed)).to(device)
    return model, orders, torch.arange(images, device=device) % model.class_num


def run(options: Options) -> None:
    """The study of --study."""
    STUDIES[options.study](options, options.picked_device())


def study_whole(options: Options, device: torch.device) -> None:
    """Counts of both; unless --dry, time and the share of equal tokens too."""
    precision, images = dist.pick_precision(options.precision, device), options.batch_size
    counted = count_samplers(options.build_model, images, options.guidance, device, precision)
    (baseline, baseline_positions), (ours, our_positions) = counted
    rows = [
        ratio_row("TFLOP per image", baseline.flops / 1e12 / images, ours.flops / 1e12 / images, ".4g"),
        ratio_row("head positions per token", baseline_positions, our_positions, ".0f"),
        *dispatch_rows(baseline, ours),
    ]
    if not options.dry:
        rows += timed_samplers(options, device, precision)
    guidance = f"cfg {options.cfg:g} {options.cfg_schedule}" if options.cfg != 1 else "no guidance"
    steps = f"{images} image(s), {options.num_iter} iterations, {guidance}, temperature 0"
    print_table(f"Sampling {options.model}: {steps}, {precision} on {device}", COLUMNS, rows)
    if options.dry:
        print("counted on fake tensors; nothing was computed (--dry)")


def dispatch_rows(baseline: OpCounter, ours: OpCounter) -> list[Row]:
    """Rows of operations, kernels and host syncs."""
    return [
        ratio_row("dispatched ops", baseline.ops, ours.ops, "d"),
        ratio_row("dispatched ops (excluding views)", baseline.work, ours.work, "d"),
        ratio_row("kernels launched", baseline.launches, ours.launches, "d"),
        ratio_row("GB read and written by them", baseline.bytes / 1e9, ours.bytes / 1e9, ".4g"),
        ratio_row("host syncs in the loop", baseline.num_syncs, ours.num_syncs, "d"),
    ]


def timed_samplers(options: Options, device: torch.device, precision: str) -> list[Row]:
    """Rows for the seconds per image and the share of equal tokens, with the same orders for both."""
    model, orders, labels = seeded(options, options.batch_size, device)
    latents: dict[int, Tensor] = {}
    with dist.autocast(device, precision):
        functions = samplers(model, orders, labels, *options.guidance)
        ways = [lambda i=i, way=way: latents.update({i: way()}) for i, way in enumerate(functions)]
        seconds = timed(ways, options.repeats, device, warm_up=0 if device.type == "cpu" else 1, ours=1)
        indices = [model.quantize(latents[i])[0] for i in range(2)]
    same = (indices[0] == indices[1]).double().mean().item()
    if same < 1 and precision == "fp32" and device.type == "cpu":
        raise RuntimeError(f"the two samplers disagree: {same:.2%} of the tokens are equal")
    per_image = [s / options.batch_size for s in seconds]
    return [ratio_row("seconds per image", *per_image, ".3f"), ("equal tokens", ["", f"{same:.2%}", ""])]


def study_head(options: Options, device: torch.device) -> None:
    """Seconds of both heads on the same 64 features; their indices must be equal."""
    model, _, _ = seeded(options, 1, device)
    generator = torch.Generator().manual_seed(options.seed)
    z = torch.randn(64, model.mask_token.shape[-1], generator=generator).to(device)
    noise = torch.zeros(64, model.num_channels, device=device)
    with torch.no_grad():
        ways = [lambda: baseline_head(model, z), lambda: model.channel_sample(z, noise, 0.0)[0]]
        baseline, ours = (way() for way in ways)
        if not torch.equal(baseline, ours):
            raise RuntimeError(f"the two heads disagree in {(baseline != ours).double().mean():.2%} of the indices")
        seconds = timed(ways, max(3, options.repeats), device, warm_up=0)
    title = f"Head of {options.model}: 64 tokens, temperature 0, fp32 on {device}; equal indices"
    print_table(title, COLUMNS, [ratio_row("seconds", *seconds, ".3f")])


def study_deep(options: Options, device: torch.device) -> None:
    """Operations of the whole loop, and host syncs; graphs that a step of --compile launches."""
    sides = {f"{side}_embed_dim": 32 for side in ("encoder", "decoder", "channel")}
    sides |= {f"{side}_num_heads": 2 for side in ("encoder", "decoder")} | {"channel_heads": 2}
    torch.manual_seed(options.seed)
    model = TokenBridge(**sides, encoder_depth=16, decoder_depth=16, channel_depth=4).to(device).eval()
    orders = random_orders(1, model.num_tokens, torch.Generator().manual_seed(options.seed)).to(device)
    ways = samplers(model, orders, torch.tensor([1], device=device), 256, options.cfg, options.cfg_schedule)
    rows = dispatch_rows(*(count(way, arm_at=model.z_proj) for way in ways))
    rows.append(("graph launches a step, --compile", ["-", str(LAUNCHES_PER_STEP), "-"]))
    title = f"Depth 16 + 16 + 4, width 32, 256 iterations, 1 image, cfg {options.cfg:g}, temperature 0 on {device}"
    print_table(title, COLUMNS, rows)


def study_growth(options: Options, device: torch.device) -> None:
    """Median seconds of one batch as one setting grows and the others stay."""
    for name, values in {"iterations": (4, 8, 16, 32), "batch": (1, 2, 4), "tokens": (64, 144, 256)}.items():
        seconds = []
        for value in values:
            side = math.isqrt(value) if name == "tokens" else 8
            model = options.built(device, img_size=options.vae_stride * side).eval()
            images, steps = value if name == "batch" else 1, value if name == "iterations" else 8
            labels = torch.zeros(images, dtype=torch.long)
            way = partial(model.sample_tokens, images, steps, options.cfg, options.cfg_schedule, labels, 0.0)
            seconds.append(timed([way], options.repeats, device)[0])
        title = f"{options.model}, seconds against {name} (otherwise 1 image, 8 iterations, 64 tokens) on {device}"
        print_table(title, [str(v) for v in values], [("seconds", [f"{s:.3f}" for s in seconds])])
        print(f"fitted: seconds ~ {name}^{np.polyfit(np.log(values), np.log(seconds), 1)[0]:.2f}")


REUSE = {
    "exact, random order": {},
    "reuse_features 2": dict(reuse_features=2),
    "reuse_features 4": dict(reuse_features=4),
    "reuse_guidance 2": dict(reuse_guidance=2),
    "reuse_guidance 4": dict(reuse_guidance=4),
    "both 2": dict(reuse_features=2, reuse_guidance=2),
    "order confidence": dict(order="confidence"),
}


def study_reuse(options: Options, device: torch.device) -> None:
    """FLOPs per image on fake tensors, and seconds unless --dry, of every setting of REUSE beside the exact sampler."""
    images = options.batch_size

    def sample(model: TokenBridge, settings: dict) -> Tensor:
        labels = torch.zeros(images, dtype=torch.long)
        return model.sample_tokens(images, *options.guidance, labels, 1.0, **settings)

    with fake_mode(), torch.no_grad():
        model = options.build_model().eval()
        flops = [count(partial(sample, model, settings)).flops / images for settings in REUSE.values()]
    columns, cells = ["TFLOP/image", "fewer"], [[f"{f / 1e12:.4g}", f"{flops[0] / f:.2f}x"] for f in flops]
    if not options.dry:
        model, _, _ = seeded(options, 1, device)
        ways = [partial(sample, model, settings) for settings in REUSE.values()]
        seconds = [s / images for s in timed(ways, options.repeats, device, warm_up=0)]
        columns += ["s/image", "faster"]
        cells = [[*c, f"{s:.2f}", f"{seconds[0] / s:.2f}x"] for c, s in zip(cells, seconds, strict=True)]
    settings = f"{options.num_iter} iterations, cfg {options.cfg:g} {options.cfg_schedule}, temperature 1, on {device}"
    print_table(f"{options.model}: {images} image(s), {settings}", columns, list(zip(REUSE, cells, strict=True)))


STUDIES = {"whole": study_whole, "head": study_head, "deep": study_deep, "growth": study_growth, "reuse": study_reuse}
