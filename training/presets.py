"""Published recipes by name: `--preset large` sets the flags below, prints all of them, and lets any flag of the command line win."""

import argparse
from collections.abc import Collection, Mapping

import torch

from util import dist
from util.log import get_logger

logger = get_logger()

GLOBAL_BATCH = 2048  # of the published training: 4 nodes x 8 GPUs x 64 images
KL16 = "pretrained_models/vae/kl16.ckpt"

_TRAINING = dict(
    img_size=256,
    vae_embed_dim=16,
    vae_stride=16,
    patch_size=1,
    quant_bits=6,
    quant_min=-5.0,
    quant_max=5.0,
    class_num=1000,
    buffer_size=64,
    label_drop_prob=0.1,
    mask_ratio_min=0.7,
    attn_dropout=0.1,
    proj_dropout=0.1,
    batch_size=64,
    blr=5e-5,
    min_lr=0.0,
    lr_schedule="cosine",
    weight_decay=0.02,
    grad_clip=3.0,
    ema_rate=0.9999,
)

PRESETS: dict[str, dict[str, object]] = {
    # the repository's command for training (SPEC 10)
    "large": dict(model="tokenbridge_large", epochs=400, warmup_epochs=100, **_TRAINING),
    # the paper's final models were trained twice as long (SPEC 7)
    "huge": dict(model="tokenbridge_huge", epochs=800, warmup_epochs=200, **_TRAINING),
}
# The rest of the published training, by the flags' names: what decides which model comes out ...
_REST = dict(
    precision="fp16",
    lr=None,
    vae_path=KL16,
    head="autoregressive",
    quantizer="gaussian",
    no_flip=False,
    on_bad_image="error",
    ema_warmup=False,
    max_steps=None,
    start_epoch=0,
    global_batch=GLOBAL_BATCH,
    cache="float32 moments",
    device="cuda",
    tf32=False,
)
# ... and what only decides its random numbers, or the speed.
_NEUTRAL = dict(seed=1, processes=32, accum_iter=1, compile=False, fsdp=False)


def apply_preset(args: argparse.Namespace, given: set[str], processes: int) -> None:
    """Set the flags of --preset that are not on the command line, and count them as given; print every one.

    Training presets also keep the published global batch: --accum_iter makes up for fewer processes, unless batch or accumulation were given.
    """
    if not args.preset:
        return
    wanted = dict(PRESETS[args.preset])
    if (
        "batch_size" in wanted
        and not {"batch_size", "accum_iter"} & given
        and GLOBAL_BATCH % (wanted["batch_size"] * processes) == 0
    ):
        wanted["accum_iter"] = GLOBAL_BATCH // (wanted["batch_size"] * processes)
    won = [name for name in wanted if name in given and getattr(args, name) != wanted[name]]
    for name in wanted.keys() - given:
        setattr(args, name, wanted[name])
    given.update(wanted)
    logger.info("--preset %s: %s", args.preset, command_line(args, wanted))
    if won:
        logger.info(
            "given on the command line instead of the preset's: %s",
            ", ".join(f"--{name} (preset {wanted[name]})" for name in won),
        )
    if "batch_size" in wanted and args.batch_size * args.accum_iter * processes != GLOBAL_BATCH:
        logger.warning(
            "the global batch is %d, the published one %d (%d processes x --batch_size %d x --accum_iter %d); the learning rate follows it",
            args.batch_size * args.accum_iter * processes,
            GLOBAL_BATCH,
            processes,
            args.batch_size,
            args.accum_iter,
        )


def flag_text(name: str, value: object) -> str:
    """A flag as one would type it."""
    return f"--{name}" if value is True else f"--{name} {value}"


def command_line(args: argparse.Namespace, names: Collection[str]) -> str:
    """The flags of these names as one would type them; a switch that is off is left out."""
    return " ".join(flag_text(name, getattr(args, name)) for name in names if getattr(args, name) is not False)


# ------------------------------------------------------------------------------------------------------------- what differs


def differences(settings: Mapping[str, object], published: Mapping[str, object]) -> list[str]:
    """ "name value instead of value" for every published setting that is another one in `settings`; names absent there are left out."""
    return [
        f"{name} {settings[name]} instead of {value}"
        for name, value in published.items()
        if name in settings and settings[name] != value
    ]


def cache_in_words(record: Mapping[str, object] | None) -> str:
    """What a latent cache stores, from its cache.json; a tree of .npz files without one is as published: "float32 moments"."""
    record = record or {}
    kind = (
        "quantized indices"
        if record.get("mode") == "indices"
        else f"{record.get('dtype', 'float32')} {record.get('mode', 'moments')}"
    )
    crops = record.get("crops", 1)
    return kind if crops == 1 else f"{kind} of {crops} crops"


def training_differences(
    args: argparse.Namespace, device: torch.device, cache: Mapping[str, object] | None = None
) -> list[str]:
    """One or two lines that name every setting in which a run of --preset differs from the published training; none without --preset.

    args: after all presets and checkpoints were applied. cache: cache.json of --cached_path, used with --use_cached only.
    """
    if not args.preset:
        return []
    processes = dist.world_size()
    settings = vars(args) | {
        "precision": dist.pick_precision(args.precision, device),
        "processes": processes,
        "device": device.type,
        "tf32": dist.allows_tf32(device),
        "global_batch": args.batch_size * args.accum_iter * processes,
    }
    if args.use_cached:
        settings["cache"] = cache_in_words(cache)
    decisive, neutral = differences(settings, PRESETS[args.preset] | _REST), differences(settings, _NEUTRAL)
    lines = [
        f"--preset {args.preset} differs from the published training: {'; '.join(decisive)}"
        if decisive
        else f"--preset {args.preset}: settings are the published ones"
    ]
    if neutral:
        lines.append(f"differs, but the training draws from the same distributions: {'; '.join(neutral)}")
    return lines
