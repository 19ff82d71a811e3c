"""Published recipes by name: `--preset large` sets the flags below, prints all of them, and lets any flag of the command line win."""

import argparse
from collections.abc import Collection

from util.log import get_logger

logger = get_logger()

GLOBAL_BATCH = 2048         # of the published training: 4 nodes x 8 GPUs x 64 images

_TRAINING = dict(img_size=256, vae_embed_dim=16, vae_stride=16, patch_size=1, quant_bits=6, quant_min=-5.0, quant_max=5.0, class_num=1000,
                 buffer_size=64, label_drop_prob=0.1, mask_ratio_min=0.7, attn_dropout=0.1, proj_dropout=0.1, batch_size=64, blr=5e-5, min_lr=0.0,
                 lr_schedule="cosine", weight_decay=0.02, grad_clip=3.0, ema_rate=0.9999)

PRESETS: dict[str, dict[str, object]] = {
    # the repository's command for training (SPEC 10)
    "large": dict(model="tokenbridge_large", epochs=400, warmup_epochs=100, **_TRAINING),
    # the paper's final models were trained twice as long (SPEC 7)
    "huge": dict(model="tokenbridge_huge", epochs=800, warmup_epochs=200, **_TRAINING),
}


def apply_preset(args: argparse.Namespace, given: set[str], processes: int) -> None:
    """Set the flags of --preset that are not on the command line, and count them as given; print every one.

    Training presets also keep the published global batch: --accum_iter makes up for fewer processes, unless batch or accumulation were given.
    """
    if not args.preset:
        return
    wanted = dict(PRESETS[args.preset])
    if "batch_size" in wanted and not {"batch_size", "accum_iter"} & given and GLOBAL_BATCH % (wanted["batch_size"] * processes) == 0:
        wanted["accum_iter"] = GLOBAL_BATCH // (wanted["batch_size"] * processes)
    won = [name for name in wanted if name in given and getattr(args, name) != wanted[name]]
    for name in wanted.keys() - given:
        setattr(args, name, wanted[name])
    given.update(wanted)
    logger.info("--preset %s: %s", args.preset, command_line(args, wanted))
    if won:
        logger.info("given on the command line instead of the preset's: %s", ", ".join(f"--{name} (preset {wanted[name]})" for name in won))
    if "batch_size" in wanted and args.batch_size * args.accum_iter * processes != GLOBAL_BATCH:
        logger.warning("the global batch is %d, the published one %d (%d processes x --batch_size %d x --accum_iter %d); the learning rate follows it",
                       args.batch_size * args.accum_iter * processes, GLOBAL_BATCH, processes, args.batch_size, args.accum_iter)


def command_line(args: argparse.Namespace, names: Collection[str]) -> str:
    """The flags of these names as one would type them; a switch that is off is left out."""
    parts = []
    for name in names:
        value = getattr(args, name)
        if value is not False:
            parts.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(parts)
