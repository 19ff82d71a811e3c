"""Counts and times of the parts that were made fast, beside the plain way of doing the same, which is kept here as the reference.

  python -m util.bench quantizer                                           nearest level: binary search against a (..., K) distance tensor
  python -m util.bench sample --model tokenbridge_base --num_iter 8        sampling: one guided batch and a KV cache against neither
  python -m util.bench train  --model tokenbridge_base --dry               training step: FLOPs, bytes, time

FLOPs are torch.utils.flop_counter's (a multiply-add is two), counted under FakeTensorMode, where nothing is computed. `--dry` stops there and
takes seconds; without it the same code is then run and timed. This file may import models, inside its functions.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from util import dist
from util.cli import at_least, make_parser
from util.log import run_cli

SYNC_OPS = ("_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
INDEX_OPS = ("index", "index_put", "index_put_")          # with a boolean index they have to learn how many entries are True


class OpCounter(TorchDispatchMode):
    """Counts what reaches torch's dispatcher while it is entered.

    ops: all of them; by_name; syncs: those for which the host must wait for the device's result, by name; largest: elements of the
    largest tensor made, and largest_bytes. `armed` False lets everything pass uncounted.
    """

    def __init__(self, armed: bool = True):
        super().__init__()
        self.armed, self.ops, self.largest, self.largest_bytes = armed, 0, 0, 0
        self.by_name: dict[str, int] = {}
        self.syncs: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001 (torch's signature)
        result = func(*args, **(kwargs or {}))
        if self.armed and func.namespace == "aten":         # fake tensors are also asked for their device, which is no work
            name = func.overloadpacket.__name__
            self.ops += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
            if is_host_sync(name, args, result):
                self.syncs[name] = self.syncs.get(name, 0) + 1
            for x in tree_flatten(result)[0]:
                if isinstance(x, Tensor) and all(isinstance(n, int) for n in x.shape):
                    self.largest = max(self.largest, x.numel())
                    self.largest_bytes = max(self.largest_bytes, x.numel() * x.element_size())
        return result

    def arm_at(self, module: torch.nn.Module) -> None:
        """Count from the first call of `module` on: leaves out the checks of inputs, which are host tensors."""
        self.armed = False
        handle = module.register_forward_pre_hook(lambda *_: (setattr(self, "armed", True), handle.remove())[0])


def is_host_sync(name: str, args: Sequence, result: object) -> bool:
    """Whether the op makes the host wait: it returns a number, its result's size depends on values, or it copies to the host."""
    if name in SYNC_OPS:
        return True
    if name in INDEX_OPS:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
        source = args[0] if name == "_to_copy" else args[1]
        return isinstance(source, Tensor) and result.device.type == "cpu" and source.device.type != "cpu"
    return False


@dataclass
class Counts:
    """What one run of a function was counted to do."""

    flops: int
    ops: int
    syncs: dict[str, int]
    by_name: dict[str, int] = field(default_factory=dict)

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())


def count(function: Callable[[], object], arm_at: torch.nn.Module | None = None) -> Counts:
    """Run `function` (under the caller's FakeTensorMode, if any) and count FLOPs, dispatched ops and host syncs."""
    counter = OpCounter()
    if arm_at is not None:
        counter.arm_at(arm_at)
    with FlopCounterMode(display=False) as flops, counter:
        function()
    return Counts(flops.get_total_flops(), counter.ops, counter.syncs, counter.by_name)


def fake_mode() -> FakeTensorMode:
    """Fake tensors that also stand for results whose size depends on values (the plain way indexes with masks)."""
    return FakeTensorMode(shape_env=ShapeEnv())


def timed(functions: Sequence[Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1) -> list[float]:
    """Median seconds of each function, run in turn so that a slow moment hits all of them alike."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(warm_up + repeats):
        for function, seen in zip(functions, times, strict=True):
            dist.synchronize(device)
            started = time.perf_counter()
            function()
            dist.synchronize(device)
            if turn >= warm_up:
                seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in times]


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """A title, a header and rows of right-aligned cells."""
    print(f"\n{title}\n{'':<34}" + "".join(f"{c:>16}" for c in columns))
    for name, cells in rows:
        print(f"{name:<34}" + "".join(f"{c:>16}" for c in cells))


# ------------------------------------------------------------------------------------------------------------- quantizer

def quantize_by_distance(x: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """The reference: index of the nearest of `values` (K,) by an argmin over a (..., K) tensor of distances; x of any shape -> int64."""
    x = ((x - min_value) / (max_value - min_value) * 6.0 - 3.0).clamp(-3.0, 3.0)
    return (x.unsqueeze(-1) - values).abs().argmin(-1)


def bench_quantizer(args: argparse.Namespace) -> None:
    """Both ways on the same latents: time, largest tensor, equal indices."""
    from models.quantizer import GaussianQuantizer, quantize
    device = dist.pick_device(args.device)
    tables = GaussianQuantizer(args.bits, -args.range, args.range).to(device)
    values = tables.reconstruction_values
    x = torch.randn(*args.shape, generator=torch.Generator("cpu").manual_seed(0)).to(device)

    def plain() -> Tensor:
        return quantize_by_distance(x, values, -args.range, args.range)

    def ours() -> Tensor:
        return quantize(x, values, -args.range, args.range)
    found, largest = [], []
    for function in (plain, ours):
        with OpCounter() as counter:
            found.append(function())
        largest.append(counter.largest_bytes)
    seconds = timed([plain, ours], args.repeats, device)
    same = (found[0] == found[1]).double().mean().item()
    shape = "(" + ", ".join(map(str, args.shape)) + ")"
    print_table(f"Quantizing {shape} float32 latents at {2**args.bits} levels on {device}", ["distances", "bucketize", "ratio"], [
        ("median time, ms", [f"{1e3 * seconds[0]:.3f}", f"{1e3 * seconds[1]:.3f}", f"{seconds[0] / seconds[1]:.1f}x"]),
        ("largest tensor made, MiB", [f"{b / 2**20:.2f}" for b in largest] + [f"{largest[0] / largest[1]:.1f}x"]),
        ("equal indices", ["", f"{same:.4%}", ""])])


# ------------------------------------------------------------------------------------------------------------- models

def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model of the flags with random weights, adaLN's too: their zeros would make every block of the head the identity."""
    from models import MODELS
    model = MODELS[args.model](img_size=args.img_size, vae_stride=args.vae_stride, vae_embed_dim=args.vae_embed_dim,
                               buffer_size=args.buffer_size, quant_levels=2**args.quant_bits)
    for layer in model.modulation_layers:
        torch.nn.init.xavier_uniform_(layer[1].weight)
    return model


# ------------------------------------------------------------------------------------------------------------- sampling

def pick(x: Tensor, chosen: Tensor, each: int) -> Tensor:
    """x (B, T, D) where chosen (B, T) is True, `each` of them in every row: (B, each, D). A boolean index, so the host waits."""
    picked = x[chosen]
    torch._check(picked.shape[0] == len(x) * each)          # what fake tensors cannot know
    return picked.view(len(x), each, x.shape[-1])


def plain_features(model: torch.nn.Module, values: Tensor, masked: Tensor, num_masked: int, class_embedding: Tensor) -> Tensor:
    """The reference backbone: values (B, L, C), masked (B, L) bool, class_embedding (B, D) -> z (B, L, D) of *every* token."""
    s, batch = model.buffer_size, len(values)
    x = torch.cat([class_embedding.unsqueeze(1).expand(-1, s, -1), model.z_proj(values)], dim=1)         # (B, S+L, D)
    x = model.z_proj_ln(x + model.encoder_pos_embed_learned)
    kept = torch.cat([masked.new_zeros(batch, s), masked], dim=1).logical_not()                          # (B, S+L)
    x = pick(x, kept, x.shape[1] - num_masked)                                                           # (B, S+V, D)
    for block in model.encoder_blocks:
        x = block(x)
    x = model.decoder_embed(model.encoder_norm(x))
    grid = model.mask_token.to(x.dtype).expand(batch, kept.shape[1], -1).clone()                         # (B, S+L, D)
    grid[kept] = x.flatten(0, 1)
    x = grid + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_norm(x)[:, s:] + model.output_pos_embed


def plain_head(model: torch.nn.Module, z: Tensor) -> Tensor:
    """The reference head at temperature 0: z (N, D) -> indices (N, C) in head order; dimension c runs positions 0..c anew."""
    h = model.condition_proj(z)                                                                          # (N, H)
    inputs, indices = [h + model.timesteps_embeddings[:, 0] if model.head_start == "official" else h], []
    for c in range(model.num_channels):
        x = torch.stack(inputs, dim=1) + model.channel_embed[:, : c + 1]                                 # (N, c+1, H)
        conditioning = h.unsqueeze(1) + model.timesteps_embeddings[:, : c + 1]
        features = model.head_forward(x, [layer(conditioning) for layer in model.modulation_layers])
        indices.append(model.channel_heads[c](features[:, -1]).argmax(-1))
        if c < model.num_channels - 1:
            inputs.append(model.token_embeddings[c](indices[-1]))
    return torch.stack(indices, dim=1)


@torch.no_grad()
def sample_plain(model: torch.nn.Module, orders: Tensor, labels: Tensor, num_iter: int, cfg: float, cfg_schedule: str) -> Tensor:
    """The reference sampler at temperature 0: latents (B, C, H, W) as TokenBridge.sample_tokens gives them (SPEC 6).

    Two passes of the whole backbone per step for guidance, all tokens decoded, the head without a cache.
    """
    from models.tokenbridge import guidance_scale, unmasking_plan
    model.eval()
    batch, num_tokens = orders.shape
    class_embedding, no_class = model.class_emb(labels), model.fake_latent.expand(batch, -1)             # (B, D)
    values = torch.zeros(batch, num_tokens, model.token_dim, device=orders.device)
    masked = torch.ones_like(orders, dtype=torch.bool)
    for before, after, keep in unmasking_plan(num_iter, num_tokens):
        if before == after:
            continue
        z = plain_features(model, values, masked, before, class_embedding)                               # (B, L, D)
        scale = guidance_scale(cfg, cfg_schedule, num_tokens, keep)
        if scale != 1:
            z_u = plain_features(model, values, masked, before, no_class)
            z = z_u + scale * (z - z_u)
        chosen = torch.zeros_like(masked).scatter_(1, orders[:, after:before], True)
        indices = plain_head(model, pick(z, chosen, before - after).flatten(0, 1))                       # (B*M, C)
        values[chosen] = model.dequantize(indices[:, model.to_natural_order])
        masked = masked & ~chosen
    return model.unpatchify(values)


class HeadPositions:
    """How many positions the head's last norm has seen: what a token costs, in units of one pass through the head."""

    def __init__(self, model: torch.nn.Module):
        self.total = 0
        self.handle = model.channel_norm.register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self.total += inputs[0].shape[0] * inputs[0].shape[1]


def samplers(model: torch.nn.Module, orders: Tensor | None, labels: Tensor, num_iter: int, cfg: float, cfg_schedule: str) -> list[Callable[[], Tensor]]:
    """The plain way and ours, as functions without arguments. orders None: random ones (fake tensors have no values to check)."""
    from models.tokenbridge import random_orders
    drawn = random_orders(len(labels), model.num_tokens, device=labels.device) if orders is None else orders
    return [lambda: sample_plain(model, drawn, labels, num_iter, cfg, cfg_schedule),
            lambda: model.sample_tokens(len(labels), num_iter, cfg, cfg_schedule, labels, 0.0, orders)]


def count_samplers(build: Callable[[], torch.nn.Module], batch_size: int, num_iter: int, cfg: float, cfg_schedule: str, device: torch.device,
                   precision: str = "fp32") -> list[tuple[Counts, float]]:
    """For the plain way and ours: counts of one batch, and head positions per token; on fake tensors. `build` makes the model."""
    found = []
    with fake_mode(), device, dist.autocast(device, precision):
        model = build().eval()
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
        for function in samplers(model, None, labels, num_iter, cfg, cfg_schedule):
            positions = HeadPositions(model)
            found.append((count(function, arm_at=model.z_proj), positions.total / (batch_size * model.num_tokens)))
            positions.handle.remove()
    return found


def bench_sample(args: argparse.Namespace) -> None:
    """Counts of the plain way and ours side by side; unless --dry, time and the share of equal tokens too."""
    device = dist.pick_device(args.device)
    precision = dist.pick_precision(args.precision, device)
    counts = count_samplers(lambda: build_model(args), args.batch_size, args.num_iter, args.cfg, args.cfg_schedule, device, precision)
    (plain, plain_positions), (ours, our_positions) = counts

    def row(name: str, a: float, b: float, form: str) -> tuple[str, list[str]]:
        return name, [format(a, form), format(b, form), f"{a / b:.2f}x" if b else "-"]
    rows = [row("TFLOP per image", plain.flops / 1e12 / args.batch_size, ours.flops / 1e12 / args.batch_size, ".4g"),
            row("head positions per token", plain_positions, our_positions, ".0f"),
            row("dispatched ops", plain.ops, ours.ops, "d"),
            row("host syncs in the loop", plain.num_syncs, ours.num_syncs, "d")]
    if not args.dry:
        rows += timed_samplers(args, device, precision, row)
    guidance = f"cfg {args.cfg:g} {args.cfg_schedule}" if args.cfg != 1 else "no guidance"
    print_table(f"Sampling {args.model}: {args.batch_size} image(s), {args.num_iter} iterations, {guidance}, temperature 0, {precision} on {device}",
                ["plain", "ours", "ratio"], rows)
    if args.dry:
        print("counted on fake tensors; nothing was computed (--dry)")


def timed_samplers(args: argparse.Namespace, device: torch.device, precision: str, row: Callable) -> list[tuple[str, list[str]]]:
    """Run both ways with the same orders: rows for the seconds per image and the share of equal tokens."""
    from models.tokenbridge import random_orders
    torch.manual_seed(args.seed)
    model = build_model(args).to(device).eval()
    orders = random_orders(args.batch_size, model.num_tokens, torch.Generator("cpu").manual_seed(args.seed)).to(device)
    labels = torch.arange(args.batch_size, device=device) % model.class_num
    with dist.autocast(device, precision):
        functions = samplers(model, orders, labels, args.num_iter, args.cfg, args.cfg_schedule)
        plain, ours = (model.quantize(function())[0] for function in functions)                # also the warm-up
        seconds = timed(functions, args.repeats, device, warm_up=0)
    same = (plain == ours).double().mean().item()
    return [row("seconds per image", seconds[0] / args.batch_size, seconds[1] / args.batch_size, ".3f"), ("equal tokens", ["", f"{same:.2%}", ""])]


# ------------------------------------------------------------------------------------------------------------- training

def mean_mask_ratio(mask_ratio_min: float) -> float:
    """Expected mask ratio of a training step: the mean of a normal (loc 1, scale 0.25) truncated to [mask_ratio_min, 1] (SPEC 4.5)."""
    normal, lowest = statistics.NormalDist(), (mask_ratio_min - 1) / 0.25
    return 1 - 0.25 * (normal.pdf(0) - normal.pdf(lowest)) / (normal.cdf(0) - normal.cdf(lowest))


def count_training(build: Callable[[], torch.nn.Module], batch_size: int, mask_ratios: Sequence[float], device: torch.device,
                   precision: str = "fp32") -> list[tuple[Counts, Counts]]:
    """For each mask ratio: counts of the forward pass, and of forward + backward, of one batch of latents; on fake tensors."""
    from models.tokenbridge import num_masked_tokens
    found = []
    with fake_mode(), device:
        model = build().train()
        latents = torch.zeros(batch_size, model.token_dim, model.grid_size, model.grid_size, device=device)
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
        for ratio in mask_ratios:
            def forward(masked: int = num_masked_tokens(ratio, model.num_tokens)) -> Tensor:
                with dist.autocast(device, precision):
                    return model(latents, labels, num_masked=masked)
            found.append((count(forward), count(lambda: forward().backward())))  # noqa: B023 (called at once)
            model.zero_grad(set_to_none=True)
    return found


def bench_train(args: argparse.Namespace) -> None:
    """FLOPs by mask ratio and bytes of the training state; unless --dry, the time of a whole step too."""
    from models.tokenbridge import num_masked_tokens
    device = dist.pick_device(args.device)
    precision = dist.pick_precision(args.precision, device)
    with fake_mode():
        model = build_model(args)
    mean = mean_mask_ratio(model.mask_ratio_min)
    ratios = {f"mean {mean:.3f}": mean, f"{model.mask_ratio_min:g}": model.mask_ratio_min, "1": 1.0}
    if args.mask_ratio is not None:
        ratios = {f"{args.mask_ratio:g}": args.mask_ratio, **ratios}
    counts = count_training(lambda: build_model(args), args.batch_size, list(ratios.values()), device, precision)
    per_image = [both.flops / args.batch_size for _, both in counts]
    print_table(f"Training step of {args.model}: {args.batch_size} image(s) as latents, {precision} on {device}; columns are mask ratios", list(ratios), [
        ("masked tokens", [f"{num_masked_tokens(r, model.num_tokens)}/{model.num_tokens}" for r in ratios.values()]),
        ("TFLOP per image, forward", [f"{forward.flops / args.batch_size / 1e12:.4g}" for forward, _ in counts]),
        ("TFLOP per image, forward+backward", [f"{flops / 1e12:.4g}" for flops in per_image]),
        ("dispatched ops, forward+backward", [f"{both.ops}" for _, both in counts]),
        ("host syncs, forward+backward", [f"{both.num_syncs}" for _, both in counts])])
    numbers = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    print_table(f"{numbers / 1e6:.2f} M parameters; GiB per process", ["weights", "gradients", "EMA", "AdamW state", "sum"],
                [("", [f"{x * size:.2f}" for x in (1, 1, 1, 2, 5)])])
    if args.dry:
        print("counted on fake tensors; nothing was computed (--dry)")
        return
    first = next(iter(ratios))
    seconds = timed_step(args, device, precision, ratios[first])
    print_table(f"Whole step (forward, backward, clip, AdamW, EMA) at mask ratio {first}", ["seconds", "images/s", "TFLOP/s", "peak GiB"],
                [("", [f"{seconds:.3f}", f"{args.batch_size / seconds:.2f}", f"{per_image[0] * args.batch_size / seconds / 1e12:.2f}",
                       f"{dist.peak_memory_gib(device):.2f}"])])


def timed_step(args: argparse.Namespace, device: torch.device, precision: str, mask_ratio: float) -> float:
    """Median seconds of a whole training step on random latents."""
    from models.tokenbridge import num_masked_tokens
    from util.ema import ModelEma
    torch.manual_seed(args.seed)
    model = build_model(args).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
    ema, scaler = ModelEma(model, 0.9999), torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    latents = torch.randn(args.batch_size, model.token_dim, model.grid_size, model.grid_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % model.class_num
    masked = num_masked_tokens(mask_ratio, model.num_tokens)

    def step() -> None:
        with dist.autocast(device, precision):
            loss = model(latents, labels, num_masked=masked)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        scaler.step(optimizer)
        scaler.update()
        ema.update()
        optimizer.zero_grad(set_to_none=True)
    return timed([step], args.repeats, device)[0]


# ------------------------------------------------------------------------------------------------------------- command line

def build_parser() -> argparse.ArgumentParser:
    """One sub-command per bench, each with the flags that change it."""
    from models import MODELS
    from models.quantizer import MAX_BITS
    from models.tokenbridge import CFG_SCHEDULES
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)

    def command(name: str, function: Callable, description: str, repeats: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--device", default="auto", help=dist.DEVICES)
        sub.add_argument("--repeats", type=int, default=repeats, help="timed runs; the median counts")
        sub.set_defaults(function=function)
        return sub
    quantizer = command("quantizer", bench_quantizer, "nearest level: binary search against a distance tensor", 20)
    quantizer.add_argument("--bits", type=int, default=6, help=f"1 to {MAX_BITS}")
    quantizer.add_argument("--range", type=float, default=5.0, help="the quantizer covers [-range, range]")
    quantizer.add_argument("--shape", type=int, nargs="+", default=[64, 16, 16, 16], help="of the latents")

    sample = command("sample", bench_sample, "sampling: the plain way against TokenBridge.sample_tokens", 1)
    sample.add_argument("--num_iter", type=int, default=8, help="sampling steps")
    sample.add_argument("--cfg", type=float, default=3.0, help="guidance scale; 1 means none")
    sample.add_argument("--cfg_schedule", default="linear", choices=CFG_SCHEDULES)
    train = command("train", bench_train, "training step: FLOPs, bytes, time", 3)
    train.add_argument("--mask_ratio", type=float, default=None, help="one more mask ratio, which is then the one that is timed")
    for sub in (sample, train):
        sub.add_argument("--model", default="tokenbridge_base", choices=list(MODELS))
        sub.add_argument("--batch_size", type=int, default=1)
        sub.add_argument("--precision", default=None, choices=dist.PRECISIONS, help="default: bf16 on cuda that has it, else fp16; fp32 on cpu")
        sub.add_argument("--dry", "--flops_only", action="store_true", help="count only, compute nothing")
        sub.add_argument("--seed", type=int, default=0)
        for flag, default in (("img_size", 256), ("vae_stride", 16), ("vae_embed_dim", 16), ("buffer_size", 64), ("quant_bits", 6)):
            sub.add_argument(f"--{flag}", type=int, default=default)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    from models.quantizer import gaussian_tables
    at_least(args, repeats=1)
    if args.bench == "quantizer":
        gaussian_tables(args.bits)
        at_least(args, range=1e-6)
        if min(args.shape) < 1:
            raise ValueError(f"--shape takes sizes of at least 1, got {args.shape}")
        needed = 2 * 4 * 2**args.bits * torch.Size(args.shape).numel() / 2**30
        if needed > 8:
            raise ValueError(f"the distance tensors would take {needed:.0f} GiB; lower --bits or --shape")
        return
    gaussian_tables(args.quant_bits)
    at_least(args, batch_size=1, img_size=1, vae_stride=1, vae_embed_dim=1, buffer_size=1)
    if args.bench == "sample":
        at_least(args, num_iter=1)
    elif args.mask_ratio is not None and not 0 < args.mask_ratio <= 1:
        raise ValueError(f"--mask_ratio must be in (0, 1], got {args.mask_ratio}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run one bench. Raises ValueError for bad input."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    args.function(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
