"""What a resumed training takes from its checkpoint, and which settings differ from it (docs/spec.md 7)."""

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints.build import RATES
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from training.lr_sched import base_learning_rate
from training.settings import TrainSettings
from training.state import TrainState, changes, saved_hyper_parameters
from util.log import get_logger, warn_once
from util.options import ArgumentError

logger = get_logger()

RECIPE = 2  # in a checkpoint's config; those of the first recipe have no such number, see `log_older_recipe`
# Settings that decide the course of a training: all may change when it is resumed, and the log names those that do.
RECIPE_NAMES = (
    *("epochs", "max_steps", "warmup_epochs", "min_lr", "lr_schedule", "batch_size", "accum_iter", "grad_clip"),
    *("ema_rate", "ema_warmup", "precision", "seed", "data_path", "use_cached", "cached_path", "no_flip"),
)


def recorded_arguments(content: Mapping) -> dict:
    """The arguments that a checkpoint was trained with: our config's, or the published files' `args`; {} if absent."""
    config, recorded = content.get("config"), content.get("args")
    if isinstance(config, dict):
        recorded = config.get("args")
    elif isinstance(recorded, argparse.Namespace):  # the published script's own
        recorded = vars(recorded)
    return recorded if isinstance(recorded, dict) else {}


def optimizer_settings(
    settings: TrainSettings, given: Collection[str], content: dict | None, source: Path | None
) -> TrainSettings:
    """The settings with AdamW's of the checkpoint, except for a weight decay that was given; logs what differs.

    ValueError if the checkpoint's cannot be read.
    """
    saved, own = saved_hyper_parameters(content or {}, str(source)), settings.weight_decay
    if saved and saved["weight_decay"] != own:
        if "weight_decay" in given:
            warn_once("weight_decay: %g from now on, was %g in %s", own, saved["weight_decay"], source)
            saved["weight_decay"] = own
        else:
            logger.info("weight_decay %g as in %s; the default is %g", saved["weight_decay"], source, own)
    for name in ("betas", "eps") if saved else ():
        if saved[name] != getattr(settings, name):
            logger.info("AdamW's %s %s as in %s, instead of %s", name, saved[name], source, getattr(settings, name))
    return replace(settings, **saved)


def resume(
    state: TrainState, settings: TrainSettings, content: dict, source: Path, *, data: dict, arguments: Mapping
) -> None:
    """Load the state of a checkpoint and log how the run goes on.

    data: what decides the order of the data. arguments: all of the command line's, by name, as checkpoints record them.
    """
    state.load_state_dict(content, settings.steps_per_epoch, str(source))
    before, total = content.get("step", state.step), settings.total_steps
    if before < total <= state.step and total < settings.epochs * settings.steps_per_epoch:
        raise ArgumentError(
            "max_steps",
            f"max_steps {total} cannot be reached: with other batches (or data) than those of {source}, its "
            f"step {before} is step {state.step} here, {settings.steps_per_epoch} per epoch; give a higher max_steps, "
            "or the batch_size of before",
        )
    epoch, done = divmod(state.step, settings.steps_per_epoch)
    where = (source, state.step, epoch, done, settings.steps_per_epoch)
    logger.info("resumed from %s at step %d: epoch %d, %d of its %d steps done", *where)
    if isinstance(content.get("data"), dict) and (other := changes(data, content["data"])):
        warn_once("%s was trained with other data or another order of it: %s", source, "; ".join(other))
    warn_of_other_recipe(arguments, content, source, settings.lr)
    log_older_recipe(arguments, content, source)


def checkpoint_config(
    model: TokenBridge, vae: AutoencoderKL, classes: Sequence[str], arguments: Mapping, settings: TrainSettings
) -> dict:
    """What a checkpoint says of its model and of its training."""
    return {
        "recipe": RECIPE,
        "model_name": arguments["model"],
        "model": model.config.to_dict(),
        "vae": vae.config,
        "vae_fingerprint": vae.latent_fingerprint(),
        "classes": classes,
        "args": dict(arguments),
        "optimizer": settings.optimizer,
    }


def recorded_peak_lr(content: dict) -> float | None:
    """Peak learning rate that a checkpoint was trained with, None if it does not say."""
    recorded, batch = recorded_arguments(content), (content.get("data") or {}).get("global_batch")
    lr, blr = recorded.get("lr"), recorded.get("blr")
    return None if lr is None and (batch is None or blr is None) else base_learning_rate(lr, blr, batch)


def warn_of_other_recipe(arguments: Mapping, content: dict, source: Path, lr: float) -> None:
    """Log in one line every argument of the recipe that differs from the checkpoint's; `lr` is the peak now.

    Rates of the model's behaviour are included for published files only: `build_model` logs those of our own.
    """
    names = RECIPE_NAMES if content.get("config") else RECIPE_NAMES + RATES
    changed = changes(arguments, recorded_arguments(content), names)
    before = recorded_peak_lr(content)
    if before is not None and not math.isclose(before, lr):
        changed.append(f"peak learning rate {lr:g}, was {before:g} (lr, blr)")
    if changed:
        warn_once("settings that differ from those of %s: %s", source, "; ".join(changed))


def log_older_recipe(arguments: Mapping, content: dict, source: Path) -> None:
    """Log how a training begun with an earlier version of this code continues; `arguments` holds the model's rates."""
    if content.get("config") and "recipe" not in content["config"]:
        logger.info(
            "%s was begun without dropout in the head and with one mask ratio for all processes; it continues as "
            "published: attn_dropout %g and proj_dropout %g in the head too, a mask ratio for each micro-batch",
            source,
            arguments["attn_dropout"],
            arguments["proj_dropout"],
        )
