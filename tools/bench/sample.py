"""`python -m tools.bench sample`: the sampler against the plain way of doing the same, which is kept here as the reference."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tools.bench.counting import (
    Counts,
    add_command,
    add_model_flags,
    build_model,
    check_model_flags,
    count,
    fake_mode,
    print_table,
    timed,
)
from util import dist
from util.cli import at_least


def pick(x: Tensor, chosen: Tensor, each: int) -> Tensor:
    """x (B, T, D) where chosen (B, T) is True, `each` of them in every row: (B, each, D). A boolean index, so the host waits."""
    picked = x[chosen]
    torch._check(picked.shape[0] == len(x) * each)  # what fake tensors cannot know
    return picked.view(len(x), each, x.shape[-1])


def plain_features(
    model: torch.nn.Module, values: Tensor, masked: Tensor, num_masked: int, class_embedding: Tensor
) -> Tensor:
    """The reference backbone: values (B, L, C), masked (B, L) bool, class_embedding (B, D) -> z (B, L, D) of *every* token."""
    s, batch = model.buffer_size, len(values)
    x = torch.cat([class_embedding.unsqueeze(1).expand(-1, s, -1), model.z_proj(values)], dim=1)  # (B, S+L, D)
    x = model.z_proj_ln(x + model.encoder_pos_embed_learned)
    kept = torch.cat([masked.new_zeros(batch, s), masked], dim=1).logical_not()  # (B, S+L)
    x = pick(x, kept, x.shape[1] - num_masked)  # (B, S+V, D)
    for block in model.encoder_blocks:
        x = block(x)
    x = model.decoder_embed(model.encoder_norm(x))
    grid = model.mask_token.to(x.dtype).expand(batch, kept.shape[1], -1).clone()  # (B, S+L, D)
    grid[kept] = x.flatten(0, 1)
    x = grid + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_norm(x)[:, s:] + model.output_pos_embed


def plain_head(model: torch.nn.Module, z: Tensor) -> Tensor:
    """The reference head at temperature 0: z (N, D) -> indices (N, C) in head order; dimension c runs positions 0..c anew."""
    h = model.condition_proj(z)  # (N, H)
    inputs, indices = [h + model.timesteps_embeddings[:, 0] if model.head_start == "official" else h], []
    for c in range(model.num_channels):
        x = torch.stack(inputs, dim=1) + model.channel_embed[:, : c + 1]  # (N, c+1, H)
        conditioning = h.unsqueeze(1) + model.timesteps_embeddings[:, : c + 1]
        features = model.head_forward(x, model.modulations(conditioning))
        indices.append(model.channel_heads[c](features[:, -1]).argmax(-1))
        if c < model.num_channels - 1:
            inputs.append(model.token_embeddings[c](indices[-1]))
    return torch.stack(indices, dim=1)


@torch.no_grad()
def sample_plain(
    model: torch.nn.Module, orders: Tensor, labels: Tensor, num_iter: int, cfg: float, cfg_schedule: str
) -> Tensor:
    """The reference sampler at temperature 0: latents (B, C, H, W) as TokenBridge.sample_tokens gives them (SPEC 6).

    Two passes of the whole backbone per step for guidance, all tokens decoded, the head without a cache.
    """
    from models.sampling.schedules import guidance_scale, unmasking_plan

    model.eval()
    batch, num_tokens = orders.shape
    class_embedding, no_class = model.class_emb(labels), model.fake_latent.expand(batch, -1)  # (B, D)
    values = torch.zeros(batch, num_tokens, model.token_dim, device=orders.device)
    masked = torch.ones_like(orders, dtype=torch.bool)
    for before, after, keep in unmasking_plan(num_iter, num_tokens):
        if before == after:
            continue
        z = plain_features(model, values, masked, before, class_embedding)  # (B, L, D)
        scale = guidance_scale(cfg, cfg_schedule, num_tokens, keep)
        if scale != 1:
            z_u = plain_features(model, values, masked, before, no_class)
            z = z_u + scale * (z - z_u)
        chosen = torch.zeros_like(masked).scatter_(1, orders[:, after:before], True)
        indices = plain_head(model, pick(z, chosen, before - after).flatten(0, 1))  # (B*M, C)
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


def samplers(
    model: torch.nn.Module, orders: Tensor | None, labels: Tensor, num_iter: int, cfg: float, cfg_schedule: str
) -> list[Callable[[], Tensor]]:
    """The plain way and ours, as functions without arguments. orders None: random ones (fake tensors have no values to check)."""
    from models.sampling.orders import random_orders

    drawn = random_orders(len(labels), model.num_tokens, device=labels.device) if orders is None else orders
    return [
        lambda: sample_plain(model, drawn, labels, num_iter, cfg, cfg_schedule),
        lambda: model.sample_tokens(len(labels), num_iter, cfg, cfg_schedule, labels, 0.0, orders),
    ]


def count_samplers(
    build: Callable[[], torch.nn.Module],
    batch_size: int,
    num_iter: int,
    cfg: float,
    cfg_schedule: str,
    device: torch.device,
    precision: str = "fp32",
) -> list[tuple[Counts, float]]:
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
    if args.study != "whole":
        from tools.bench import sample_study as bench_sample_study

        return bench_sample_study.run(args)
    device = dist.pick_device(args.device)
    precision = dist.pick_precision(args.precision, device)
    counts = count_samplers(
        lambda: build_model(args), args.batch_size, args.num_iter, args.cfg, args.cfg_schedule, device, precision
    )
    (plain, plain_positions), (ours, our_positions) = counts

    def row(name: str, a: float, b: float, form: str) -> tuple[str, list[str]]:
        return name, [format(a, form), format(b, form), f"{a / b:.2f}x" if b else "-"]

    rows = [
        row("TFLOP per image", plain.flops / 1e12 / args.batch_size, ours.flops / 1e12 / args.batch_size, ".4g"),
        row("head positions per token", plain_positions, our_positions, ".0f"),
        row("dispatched ops", plain.ops, ours.ops, "d"),
        row("dispatched ops but for views", plain.ops - plain.views, ours.ops - ours.views, "d"),
        row("host syncs in the loop", plain.num_syncs, ours.num_syncs, "d"),
    ]
    if not args.dry:
        rows += timed_samplers(args, device, precision, row)
    guidance = f"cfg {args.cfg:g} {args.cfg_schedule}" if args.cfg != 1 else "no guidance"
    print_table(
        f"Sampling {args.model}: {args.batch_size} image(s), {args.num_iter} iterations, {guidance}, temperature 0, {precision} on {device}",
        ["plain", "ours", "ratio"],
        rows,
    )
    if args.dry:
        print("counted on fake tensors; nothing was computed (--dry)")


def timed_samplers(
    args: argparse.Namespace, device: torch.device, precision: str, row: Callable
) -> list[tuple[str, list[str]]]:
    """Run both ways with the same orders: rows for the seconds per image and the share of equal tokens."""
    from models.sampling.orders import random_orders

    torch.manual_seed(args.seed)
    model = build_model(args).to(device).eval()
    orders = random_orders(args.batch_size, model.num_tokens, torch.Generator("cpu").manual_seed(args.seed)).to(device)
    labels = torch.arange(args.batch_size, device=device) % model.class_num
    with dist.autocast(device, precision):
        functions = samplers(model, orders, labels, args.num_iter, args.cfg, args.cfg_schedule)
        drawn: list[Tensor] = [orders, orders]
        ways = [lambda i=i, function=function: drawn.__setitem__(i, function()) for i, function in enumerate(functions)]
        seconds = timed(ways, args.repeats, device, warm_up=0 if device.type == "cpu" else 1, ours=1)
        plain, ours = (model.quantize(latents)[0] for latents in drawn)
    same = (plain == ours).double().mean().item()
    if same < 1 and precision == "fp32" and device.type == "cpu":
        raise RuntimeError(f"the two samplers disagree: {same:.2%} of the tokens are equal")
    return [
        row("seconds per image", seconds[0] / args.batch_size, seconds[1] / args.batch_size, ".3f"),
        ("equal tokens", ["", f"{same:.2%}", ""]),
    ]


def check(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    check_model_flags(args)
    at_least(args, num_iter=1)


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    from models.sampling.schedules import CFG_SCHEDULES

    sub = add_command(
        commands, "sample", bench_sample, check, "sampling: the plain way against TokenBridge.sample_tokens", 1
    )
    sub.add_argument("--num_iter", type=int, default=8, help="sampling steps")
    sub.add_argument("--cfg", type=float, default=3.0, help="guidance scale; 1 means none")
    sub.add_argument("--cfg_schedule", default="linear", choices=CFG_SCHEDULES)
    sub.add_argument(
        "--study",
        default="whole",
        choices=("whole", "head", "deep", "growth", "reuse"),
        help="a part by itself, see tools/bench/sample_study.py",
    )
    add_model_flags(sub)
