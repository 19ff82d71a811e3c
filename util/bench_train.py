"""`python -m util.bench train`: FLOPs, bytes and time of a training step."""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from util import dist
from util.counting import Counts, add_command, add_model_flags, build_model, check_model_flags, count, fake_mode, print_table, timed


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


def check(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    check_model_flags(args)
    if args.mask_ratio is not None and not 0 < args.mask_ratio <= 1:
        raise ValueError(f"--mask_ratio must be in (0, 1], got {args.mask_ratio}")


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    sub = add_command(commands, "train", bench_train, check, "training step: FLOPs, bytes, time", 3)
    sub.add_argument("--mask_ratio", type=float, default=None, help="one more mask ratio, which is then the one that is timed")
    add_model_flags(sub)
