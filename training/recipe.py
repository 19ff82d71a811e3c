"""The recipe of a resumed training: what it takes from its checkpoint, and which settings differ from it (SPEC 7)."""

import argparse
import math
from pathlib import Path

from checkpoints.build import BEHAVIOUR_FLAGS
from training.lr_sched import base_learning_rate
from training.state import BETAS, EPS, saved_hyper_parameters
from util.log import get_logger

logger = get_logger()

RECIPE = 2  # in a checkpoint's config; those of the first recipe have no such number, see `name_older_recipe`
# Flags that decide the course of a training: all may change when it is resumed, and the log names those that do.
RECIPE_FLAGS = (
    "epochs",
    "max_steps",
    "warmup_epochs",
    "min_lr",
    "lr_schedule",
    "batch_size",
    "accum_iter",
    "grad_clip",
    "ema_rate",
    "ema_warmup",
    "precision",
    "seed",
    "data_path",
    "use_cached",
    "cached_path",
    "no_flip",
)


def recorded_arguments(content: dict) -> dict:
    """The flags that a checkpoint was trained with, by name: of our config, or of the published files' `args`; {} if it does not say."""
    config, recorded = content.get("config"), content.get("args")
    found = (
        config.get("args")
        if isinstance(config, dict)
        else vars(recorded)
        if isinstance(recorded, argparse.Namespace)
        else recorded
    )
    return found if isinstance(found, dict) else {}


def take_optimizer_settings(
    args: argparse.Namespace, given: set[str], content: dict | None, source: Path | None
) -> dict:
    """weight_decay, betas and eps for AdamW: a flag that was given wins, otherwise the checkpoint's; the log names what differs.

    args.weight_decay is set to the value used, so that the recorded config holds it. ValueError if the checkpoint's cannot be read.
    """
    published = {"weight_decay": args.weight_decay, "betas": BETAS, "eps": EPS}
    saved = saved_hyper_parameters(content or {}, f"{source} (--resume)")
    used = published | saved
    if saved and saved["weight_decay"] != args.weight_decay:
        if "weight_decay" in given:
            used["weight_decay"] = args.weight_decay
            logger.warning(
                "--weight_decay: %g from now on, was %g in %s", args.weight_decay, saved["weight_decay"], source
            )
        else:
            logger.info(
                "weight decay %g as in %s; the default is %g (--weight_decay)",
                saved["weight_decay"],
                source,
                args.weight_decay,
            )
    for name in ("betas", "eps"):
        if used[name] != published[name]:
            logger.info("AdamW's %s %s as in %s, instead of %s", name, used[name], source, published[name])
    args.weight_decay = used["weight_decay"]
    return used


def recorded_peak_lr(content: dict, recorded: dict) -> float | None:
    """Peak learning rate that a checkpoint was trained with, None if it does not say."""
    batch = (content.get("data") or {}).get("global_batch")
    if recorded.get("lr") is None and (batch is None or recorded.get("blr") is None):
        return None
    return base_learning_rate(recorded.get("lr"), recorded.get("blr"), batch)


def warn_of_other_recipe(args: argparse.Namespace, content: dict, source: Path, lr: float) -> None:
    """Name in one line every recipe flag that differs from the checkpoint's; `lr` is the peak now. Flags that it does not record are left out.

    Flags of the model's behaviour (BEHAVIOUR_FLAGS) of our own checkpoints are named by `build_model`.
    """
    recorded = recorded_arguments(content)
    names = RECIPE_FLAGS if content.get("config") else RECIPE_FLAGS + BEHAVIOUR_FLAGS
    changed = [
        f"--{name} {getattr(args, name)}, was {recorded[name]}"
        for name in names
        if name in recorded and getattr(args, name) != recorded[name]
    ]
    before = recorded_peak_lr(content, recorded)
    if before is not None and not math.isclose(before, lr):
        changed.append(f"peak learning rate {lr:g}, was {before:g} (--lr, --blr)")
    if changed:
        logger.warning("settings that differ from those of %s: %s", source, "; ".join(changed))


def name_older_recipe(args: argparse.Namespace, content: dict, source: Path) -> None:
    """Log how a training begun with an earlier version of this code continues; `args` holds the model's rates."""
    if content.get("config") and "recipe" not in content["config"]:
        logger.info(
            "%s was begun without dropout in the head and with one mask ratio for all processes; it continues as published: --attn_dropout %g "
            "and --proj_dropout %g in the head too, a mask ratio for each micro-batch",
            source,
            args.attn_dropout,
            args.proj_dropout,
        )
