"""`python -m tools.bench train`: FLOPs, bytes and time of a training step, beside a plain loop; what the presets need, computed."""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench.counting import (
    Counts,
    OpCounter,
    add_command,
    add_model_flags,
    build_model,
    check_model_flags,
    count,
    fake_mode,
    no_fake_gpu,
    print_table,
    timed,
)
from tools.bench.quantizer import quantize_by_distance
from tools.bench.sample import plain_features
from util import dist
from util.cli import at_least


def mean_mask_ratio(mask_ratio_min: float) -> float:
    """Expected mask ratio of a training step: the mean of a normal (loc 1, scale 0.25) truncated to [mask_ratio_min, 1] (SPEC 4.5)."""
    normal, lowest = statistics.NormalDist(), (mask_ratio_min - 1) / 0.25
    return 1 - 0.25 * (normal.pdf(0) - normal.pdf(lowest)) / (normal.cdf(0) - normal.cdf(lowest))


def count_training(
    build: Callable[[], torch.nn.Module],
    batch_size: int,
    mask_ratios: Sequence[float],
    device: torch.device,
    precision: str = "fp32",
) -> list[tuple[Counts, Counts]]:
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
    print_table(
        f"Training step of {args.model}: {args.batch_size} image(s) as latents, {precision} on {device}; columns are mask ratios",
        list(ratios),
        [
            (
                "masked tokens",
                [f"{num_masked_tokens(r, model.num_tokens)}/{model.num_tokens}" for r in ratios.values()],
            ),
            ("TFLOP per image, forward", [f"{forward.flops / args.batch_size / 1e12:.4g}" for forward, _ in counts]),
            ("TFLOP per image, forward+backward", [f"{flops / 1e12:.4g}" for flops in per_image]),
            ("dispatched ops, forward+backward", [f"{both.ops}" for _, both in counts]),
            ("host syncs, forward+backward", [f"{both.num_syncs}" for _, both in counts]),
        ],
    )
    numbers = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    print_table(
        f"{numbers / 1e6:.2f} M parameters; GiB per process",
        ["weights", "gradients", "EMA", "AdamW state", "sum"],
        [("", [f"{x * size:.2f}" for x in (1, 1, 1, 2, 5)])],
    )
    if args.dry:
        print_presets()
        print("counted on fake tensors; nothing was computed (--dry)")
        return
    first = next(iter(ratios))
    ours, plain, plain_syncs = timed_loops(args, device, precision)
    rows = [
        (
            name,
            [
                f"{s:.3f}",
                f"{args.batch_size / s:.2f}",
                f"{per_image[0] * args.batch_size / s / 1e12:.3g}",
                f"{plain / s:.2f} x",
                str(syncs),
            ],
        )
        for name, s, syncs in (("plain loop", plain, plain_syncs), ("here", ours, count_step_syncs(args)))
    ]
    print_table(
        f"Whole step (draws, forward, backward, clip, AdamW, EMA); TFLOP/s as of mask ratio {first}; host syncs outside logging steps",
        ["seconds", "images/s", "TFLOP/s", "faster", "host syncs"],
        rows,
    )
    print(
        f"peak memory {dist.peak_memory_gib(device):.2f} GiB, both loops in one process; {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}"
    )


# ------------------------------------------------------------------------------------------------------------- the two loops

STEPS_PER_CALL = 3  # timed together, so that the one logging step among ours weighs little


def timed_loops(args: argparse.Namespace, device: torch.device, precision: str) -> tuple[float, float, int]:
    """Median seconds per step of the loop of engine_tokenbridge.py and of the plain loop, STEPS_PER_CALL of each in turn on the same moments with
    the same mask ratios; and the plain loop's host syncs in a step."""
    batch, counter = random_batch(args, device), OpCounter()
    plain_step = plain_loop(args, device, precision, batch, counter)
    ways = [our_loop(args, device, precision, batch), lambda: [plain_step() for _ in range(STEPS_PER_CALL)]]
    ours, plain = (seconds / STEPS_PER_CALL for seconds in timed(ways, args.repeats, device, ours=0))
    return ours, plain, sum(counter.syncs.values())


def random_batch(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moments (B, 2C, h, w) and labels (B,)."""
    grid = args.img_size // args.vae_stride
    generator = torch.Generator().manual_seed(args.seed)
    return (
        torch.randn(args.batch_size, 2 * args.vae_embed_dim, grid, grid, generator=generator).to(device),
        torch.arange(args.batch_size, device=device) % 1000,
    )


def small_vae(args: argparse.Namespace) -> torch.nn.Module:
    """Only its scale is used: the batches are moments."""
    from models.vae import AutoencoderKL

    return AutoencoderKL(embed_dim=args.vae_embed_dim, ch_mult=(1,), ch=8, num_res_blocks=1, norm_groups=4)


def our_loop(
    args: argparse.Namespace, device: torch.device, precision: str, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """STEPS_PER_CALL steps of the real loop per call; it logs once, at the last of them, as it does whenever it stops."""
    from engine_tokenbridge import TrainSettings, train_one_epoch
    from training.state import TrainState

    torch.manual_seed(args.seed)
    state = TrainState(
        build_model(args).to(device), weight_decay=0.02, ema_rate=0.9999, precision=precision, compiled=args.compile
    )
    settings = TrainSettings(
        batch_size=args.batch_size,
        epochs=10**6,
        steps_per_epoch=10**6,
        lr=1e-4,
        min_lr=0.0,
        lr_schedule="constant",
        warmup_epochs=0,
        grad_clip=3.0,
        seed=args.seed,
        precision=precision,
        log_freq=10**9,
    )
    vae = small_vae(args).to(device)

    def steps() -> None:
        train_one_epoch(
            state,
            vae,
            [batch] * (STEPS_PER_CALL + 1),
            settings,
            device,
            None,
            should_stop=lambda: state.step % STEPS_PER_CALL == 0,
        )

    return steps


def plain_head_logits(model: torch.nn.Module, z: Tensor, targets: Tensor) -> list[Tensor]:
    """The head of SPEC 5 written down op by op: z (N, D), targets (N, C) in head order -> logits (N, K) of each dimension."""
    h = model.condition_proj(z)  # (N, H)
    x = (
        torch.stack([h, *[table(targets[:, c]) for c, table in enumerate(model.token_embeddings)]], dim=1)
        + model.channel_embed
    )
    conditioning = h.unsqueeze(1) + model.timesteps_embeddings  # (N, C, H)

    def attention(attn: torch.nn.Module, x: Tensor) -> Tensor:
        # (N, heads, C, head_dim)
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.head_dim**-0.5 + model.channel_mask
        weights = F.dropout(scores.softmax(-1).to(v.dtype), attn.attn_dropout, model.training)
        return attn.proj_drop(attn.proj((weights @ v).transpose(1, 2).flatten(2)))

    for block in model.channel_blocks:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(conditioning).chunk(6, dim=-1)
        x = x + gate_a * attention(block.attn, block.norm1(x) * (1 + scale_a) + shift_a)
        x = x + gate_m * block.mlp(block.norm2(x) * (1 + scale_m) + shift_m)
    scale, shift = model.channel_final.adaLN_modulation(conditioning).chunk(2, dim=-1)
    x = model.channel_final.norm(model.channel_norm(x)) * (1 + scale) + shift
    return [head(x[:, c]) for c, head in enumerate(model.channel_heads)]


def plain_loss(model: torch.nn.Module, latents: Tensor, labels: Tensor, mask: Tensor, label_drop: Tensor) -> Tensor:
    """What TokenBridge.forward computes, by SPEC 4 and 5 literally: latents (B, C, h, w), labels (B,), mask (B, L) bool, label_drop (B,) bool."""
    indices = quantize_by_distance(
        model.patchify(latents), model.reconstruction_values, model.quant_min, model.quant_max
    )
    class_embedding = torch.where(label_drop.unsqueeze(1), model.fake_latent, model.class_emb(labels))
    z = plain_features(model, model.dequantize(indices), mask, int(mask[0].sum()), class_embedding)
    targets = indices[mask][:, model.to_head_order]  # (N, C)
    logits = plain_head_logits(model, z[mask], targets)
    return torch.stack([F.cross_entropy(x.float(), targets[:, c]) for c, x in enumerate(logits)]).mean()


def plain_loop(
    args: argparse.Namespace, device: torch.device, precision: str, batch: tuple[Tensor, Tensor], counter: OpCounter
) -> Callable[[], None]:
    """The same model as a first version would train it: operations as the SPEC has them, masks and ratio drawn on the host image by image,
    attention not fused, AdamW and EMA parameter by parameter, loss and norm fetched at every step.

    `counter` sees the first step, but for AdamW, whose count of steps is a tensor on the host.
    """
    import numpy as np

    from models.latent_space import DiagonalGaussian
    from models.tokenbridge import draw_mask_ratio, num_masked_tokens

    torch.manual_seed(args.seed)
    model, vae = build_model(args).to(device).train(), small_vae(args).to(device)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.attn.fused_attn = False
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
        ],
        lr=1e-4,
        betas=(0.9, 0.95),
        foreach=False,
    )
    ema, scaler = (
        [p.detach().clone() for p in parameters],
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
    )
    done = 0

    def gradients() -> None:
        moments, labels = batch
        latents = vae.scale(DiagonalGaussian(moments).sample())
        rng = np.random.default_rng([args.seed, done, 0])
        # as in draw_step
        masked = num_masked_tokens(draw_mask_ratio(model.mask_ratio_min, float(rng.random())), model.num_tokens)
        mask = np.zeros((len(latents), model.num_tokens), dtype=bool)
        for row in mask:
            row[rng.permutation(model.num_tokens)[:masked]] = True
        with dist.autocast(device, precision):
            loss = plain_loss(
                model,
                latents,
                labels,
                torch.from_numpy(mask).to(device),
                torch.rand(len(latents), device=device) < model.label_drop_prob,
            )
        if not np.isfinite(loss.item()):
            raise ValueError("loss is not finite")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 3.0, foreach=False).item()

    def step() -> None:
        nonlocal done
        with contextlib.nullcontext() if done else counter:
            gradients()
        done += 1
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for average, p in zip(ema, parameters, strict=True):
                average.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    return step


def count_step_syncs(args: argparse.Namespace) -> int | str:
    """Host syncs of one step of our loop outside logging steps: draws on the CPU, everything else but the backward pass on fake GPU tensors.

    (A backward pass on fake GPU tensors needs a CUDA build; the operations in it are no others than the forward pass's kind.)
    "-" where there are no fake GPU tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from engine_tokenbridge import TrainSettings, batch_latents, draw_step, optimizer_step, spoilt_if_not_finite
    from training.state import TrainState

    if no_fake_gpu():
        return "-"
    counter = OpCounter()
    settings = TrainSettings(
        batch_size=args.batch_size,
        epochs=1,
        steps_per_epoch=1,
        lr=1e-4,
        min_lr=0.0,
        lr_schedule="constant",
        warmup_epochs=0,
        grad_clip=3.0,
        seed=args.seed,
        precision="bf16",
    )
    with FakeTensorMode():
        model = build_model(args)
    with counter:
        draw_step(model, settings, 0, torch.device("cpu"))
    with FakeTensorMode(), torch.device("cuda"):
        model, vae = build_model(args).train(), small_vae(args)
        state = TrainState(model, weight_decay=0.02, ema_rate=0.9999, precision="bf16")
        b, grid = args.batch_size, model.grid_size
        moments, labels = torch.zeros(b, 2 * model.token_dim, grid, grid), torch.zeros(b, dtype=torch.long)
        mask, drop = torch.ones(b, model.num_tokens, dtype=torch.bool), torch.ones(b, dtype=torch.bool)
        noise = torch.zeros(b, model.token_dim, grid, grid)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with counter:
            with torch.autocast("cuda", torch.bfloat16):
                spoilt_if_not_finite(
                    model(
                        batch_latents(moments, vae, noise, model),
                        labels,
                        mask,
                        num_masked=model.num_tokens - 1,
                        label_drop=drop,
                    )
                )
            optimizer_step(state, list(model.parameters()), 3.0)
            state.ema.update()
    return sum(counter.syncs.values())


# ------------------------------------------------------------------------------------------------------------- what the presets need

IMAGENET = 1_281_167  # training images
ASSUMED_MFU = 0.4  # of the peak; what well-tuned transformers of this size reach, not measured here
DEVICES = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3"}


def saved_bytes(build: Callable[[], torch.nn.Module], masked: int, precision: str, batch_size: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out; on fake tensors."""
    with fake_mode():
        model = build().train()
        own = {id(p.untyped_storage()) for p in model.parameters()}
        kept: dict[int, tuple[object, int]] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if id(storage) not in own:
                kept[id(storage)] = storage, storage.nbytes()  # held, so that no other storage gets its id
            return x

        latents = torch.zeros(batch_size, model.token_dim, model.grid_size, model.grid_size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), dist.autocast(torch.device("cpu"), precision):
            model(latents, torch.zeros(batch_size, dtype=torch.long), num_masked=masked)
    return sum(size for _, size in kept.values())


def activation_bytes(builder: Callable[..., torch.nn.Module], masked: int, grad_checkpointing: bool) -> int:
    """Of one image, in bf16: what a second image adds, so that casts of the weights do not count.

    Without attention dropout: with it the CPU's kernel keeps the attention matrices, which a GPU's flash attention never does.
    """

    def build() -> torch.nn.Module:
        return builder(grad_checkpointing=grad_checkpointing, attn_dropout=0.0)

    return saved_bytes(build, masked, "bf16", 2) - saved_bytes(build, masked, "bf16", 1)


def print_presets() -> None:
    """Memory per GPU and GPU-hours of every training preset, from formulas and counts: computed, not measured."""
    from models import MODELS
    from models.tokenbridge import num_masked_tokens
    from training.flops import peak_tflops, step_flops
    from util.presets import load_preset, preset_names

    columns: dict[str, list[str]] = {}
    names = [
        "parameters, M",
        "GiB per GPU, DDP: weights, gradients, EMA, AdamW",
        "  the same with --fsdp on 8 GPUs",
        "  the same with --fsdp on 32 GPUs",
        "GiB of activations, bf16, batch 64",
        "  the same with --grad_checkpointing",
        "TFLOP per image (forward, backward)",
        "training, 10^21 FLOP",
        *[f"GPU-hours, {name}" for name in DEVICES],
        f"  days on 32 GPUs, {list(DEVICES)[0]}",
    ]
    presets = [load_preset(name) for name in preset_names()]
    for preset in presets:
        if preset.evaluates or not preset.published:
            continue
        builder, global_batch = MODELS[preset.flags["model"]], preset.global_batch
        with fake_mode():
            model = builder()
        masked = num_masked_tokens(mean_mask_ratio(model.mask_ratio_min), model.num_tokens)
        numbers = sum(p.numel() for p in model.parameters())
        state = 5 * 4 * numbers / 2**30
        # whole, twice
        largest = (
            max(sum(p.numel() for p in unit.parameters()) for unit in (*model.encoder_blocks, *model.channel_blocks))
            * 8
            / 2**30
        )
        kept = [64 * activation_bytes(builder, masked, checkpointing) / 2**30 for checkpointing in (False, True)]
        per_image = step_flops(model.config, masked)
        total = per_image * (IMAGENET // global_batch * global_batch) * preset.flags["epochs"]
        hours = [total / (peak_tflops(name, "bf16") * 1e12 * ASSUMED_MFU) / 3600 for name in DEVICES.values()]
        columns[preset.name] = [
            f"{numbers / 1e6:.2f}",
            f"{state:.2f}",
            f"{state / 8 + largest:.2f}",
            f"{state / 32 + largest:.2f}",
            f"{kept[0]:.1f}",
            f"{kept[1]:.1f}",
            f"{per_image / 1e12:.3f}",
            f"{total / 1e21:.3g}",
            *[f"{h:,.0f}" for h in hours],
            f"{hours[0] / 32 / 24:.1f}",
        ]
    print(f"\nPresets, computed: ImageNet, global batch {global_batch}, bf16, {ASSUMED_MFU:.0%} of the peak assumed")
    print(" " * 52 + "".join(f"{c:>12}" for c in columns))
    for i, name in enumerate(names):
        print(f"{name:<52}" + "".join(f"{column[i]:>12}" for column in columns.values()))


def check(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    check_model_flags(args)
    at_least(args, layers=1)
    if args.mask_ratio is not None and not 0 < args.mask_ratio <= 1:
        raise ValueError(f"--mask_ratio must be in (0, 1], got {args.mask_ratio}")


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    sub = add_command(commands, "train", bench_train, check, "training step: FLOPs, bytes, time", 3)
    sub.add_argument("--mask_ratio", type=float, default=None, help="count at one more mask ratio")
    sub.add_argument(
        "--layers", type=int, default=None, help="cut encoder and decoder to so many blocks each (for a CPU)"
    )
    sub.add_argument("--compile", action="store_true", help="time our loop with compiled blocks")
    add_model_flags(sub)
