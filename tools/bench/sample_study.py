"""`python -m tools.bench sample --study head|deep|growth|reuse`: parts of the sampler looked at by themselves.

head     64 tokens through the per-dimension head: anew for every dimension (the reference) against one with a key-value cache
deep     large's depth at a narrow width, 256 iterations, one image: operations that the host has to dispatch, and host syncs
growth   time against iterations, batch and tokens, each with the exponent of a power law fitted to it
reuse    FLOPs and time of what computes less: features and guidance reused, fewer confidence candidates (their effect on images: demo/samplers.py)
"""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tools.bench.counting import OpCounter, build_model, count, fake_mode, print_table, timed
from tools.bench.sample import plain_head, samplers
from util import dist

DEEP = dict(
    encoder_embed_dim=32,
    encoder_depth=16,
    encoder_num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=16,
    decoder_num_heads=2,
    channel_embed_dim=32,
    channel_depth=4,
    channel_heads=2,
)


def study_head(args: argparse.Namespace, device: torch.device) -> None:
    """Seconds of both ways on the same 64 features; their indices must be equal."""
    torch.manual_seed(args.seed)
    model = build_model(args).to(device).eval()
    z = torch.randn(64, model.mask_token.shape[-1], generator=torch.Generator("cpu").manual_seed(args.seed)).to(device)
    noise = torch.zeros(64, model.num_channels, device=device)
    with torch.no_grad():
        ways = [lambda: plain_head(model, z), lambda: model.channel_sample(z, noise, 0.0)[0]]
        plain, ours = (way() for way in ways)
        if not torch.equal(plain, ours):
            raise RuntimeError(f"the two heads disagree in {(plain != ours).double().mean():.2%} of the indices")
        seconds = timed(ways, max(3, args.repeats), device, warm_up=0)
    print_table(
        f"Head of {args.model}: 64 tokens, temperature 0, fp32 on {device}; equal indices",
        ["plain", "ours", "ratio"],
        [("seconds", [f"{seconds[0]:.3f}", f"{seconds[1]:.3f}", f"{seconds[0] / seconds[1]:.2f}x"])],
    )


def study_deep(args: argparse.Namespace, device: torch.device) -> None:
    """Operations of the whole loop, those that only make views left out, and host syncs; how many graphs a step of --compile launches."""
    from models.sampling.compiled import launches_per_step
    from models.sampling.orders import random_orders
    from models.tokenbridge import TokenBridge

    torch.manual_seed(args.seed)
    model = TokenBridge(**DEEP).to(device).eval()
    orders = random_orders(1, model.num_tokens, torch.Generator("cpu").manual_seed(args.seed)).to(device)
    ways = samplers(model, orders, torch.tensor([1], device=device), 256, args.cfg, args.cfg_schedule)
    counters = []
    for way in ways:
        counters.append(OpCounter())
        counters[-1].arm_at(model.z_proj)
        with counters[-1]:
            way()
    plain, ours = counters
    work = [counter.ops - counter.views for counter in counters]
    rows = [
        ("operations but for views", [str(work[0]), str(work[1]), f"{work[0] / work[1]:.2f}x"]),
        ("all dispatched operations", [str(plain.ops), str(ours.ops), f"{plain.ops / ours.ops:.2f}x"]),
        ("host syncs in the loop", [str(sum(plain.syncs.values())), str(sum(ours.syncs.values())), "-"]),
        ("graph launches a step, --compile", ["-", str(launches_per_step(model.num_channels)), "-"]),
    ]
    print_table(
        f"Depth 16 + 16 + 4, width 32, 256 iterations, 1 image, cfg {args.cfg:g}, temperature 0 on {device}",
        ["plain", "ours", "ratio"],
        rows,
    )


def fitted_exponent(x: Sequence[float], seconds: Sequence[float]) -> float:
    """p of the power law seconds ~ x^p, least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def study_growth(args: argparse.Namespace, device: torch.device) -> None:
    """Median seconds of one batch as one setting grows and the others stay."""
    torch.manual_seed(args.seed)
    settings = {"iterations": (4, 8, 16, 32), "batch": (1, 2, 4), "tokens": (64, 144, 256)}
    for name, values in settings.items():
        seconds = []
        for value in values:
            size = args.vae_stride * (math.isqrt(value) if name == "tokens" else 8)
            model = build_model(argparse.Namespace(**(vars(args) | {"img_size": size}))).to(device).eval()
            batch, steps = value if name == "batch" else 1, value if name == "iterations" else 8

            def run(model: torch.nn.Module = model, batch: int = batch, steps: int = steps) -> object:
                return model.sample_tokens(
                    batch, steps, args.cfg, args.cfg_schedule, torch.zeros(batch, dtype=torch.long), 0.0
                )

            seconds.append(timed([run], args.repeats, device)[0])
        print_table(
            f"{args.model}, seconds against {name} (otherwise 1 image, 8 iterations, 64 tokens) on {device}",
            [str(v) for v in values],
            [("seconds", [f"{s:.3f}" for s in seconds])],
        )
        print(f"fitted: seconds ~ {name}^{fitted_exponent(values, seconds):.2f}")


REUSE = {
    "exact, random order": {},
    "reuse_features 2": dict(reuse_features=2),
    "reuse_features 4": dict(reuse_features=4),
    "reuse_guidance 2": dict(reuse_guidance=2),
    "reuse_guidance 4": dict(reuse_guidance=4),
    "both 2": dict(reuse_features=2, reuse_guidance=2),
    "order confidence": dict(order="confidence"),
}


def study_reuse(args: argparse.Namespace, device: torch.device) -> None:
    """FLOPs per image on fake tensors, and seconds unless --dry, of every setting of REUSE beside the exact sampler, in one run."""
    from models.tokenbridge import TokenBridge

    def run(model: TokenBridge, options: dict) -> object:
        labels = torch.zeros(args.batch_size, dtype=torch.long)
        return model.sample_tokens(args.batch_size, args.num_iter, args.cfg, args.cfg_schedule, labels, 1.0, **options)

    with fake_mode(), torch.no_grad():
        model = build_model(args).eval()
        flops = [
            count(lambda options=options: run(model, options)).flops / args.batch_size for options in REUSE.values()
        ]
    rows = [(name, [f"{f / 1e12:.4g}", f"{flops[0] / f:.2f}x"]) for name, f in zip(REUSE, flops, strict=True)]
    if not args.dry:
        torch.manual_seed(args.seed)
        real = build_model(args).to(device).eval()
        ways = [lambda options=options: run(real, options) for options in REUSE.values()]
        seconds = [s / args.batch_size for s in timed(ways, args.repeats, device, warm_up=0)]
        rows = [
            (name, [*cells, f"{s:.2f}", f"{seconds[0] / s:.2f}x"])
            for (name, cells), s in zip(rows, seconds, strict=True)
        ]
    print_table(
        f"{args.model}: {args.batch_size} image(s), {args.num_iter} iterations, cfg {args.cfg:g} {args.cfg_schedule}, temperature 1, on {device}",
        ["TFLOP/image", "fewer"] + ["s/image", "faster"] * (not args.dry),
        rows,
    )


STUDIES: dict[str, Callable[[argparse.Namespace, torch.device], None]] = {
    "head": study_head,
    "deep": study_deep,
    "growth": study_growth,
    "reuse": study_reuse,
}


def run(args: argparse.Namespace) -> None:
    """The study of --study."""
    STUDIES[args.study](args, dist.pick_device(args.device))
