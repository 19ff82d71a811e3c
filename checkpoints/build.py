"""From a checkpoint file and the command line to a model: which file, which structure, which weights. Training and sampling share it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoints import download
from checkpoints.weights import generator_state, one_layout, structure_from_shapes
from models import MODELS
from models.quantizer_tables import build_quantizer
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import checkpoint
from util.ema import initial_share
from util.log import get_logger

logger = get_logger()

# Flags that say what the model is: fixed by a checkpoint's config. And those that only say how it is trained: a resumed run may change them.
STRUCTURE_FLAGS = (
    "img_size",
    "vae_stride",
    "patch_size",
    "vae_embed_dim",
    "quant_bits",
    "quant_min",
    "quant_max",
    "class_num",
    "buffer_size",
    "head",
)
BEHAVIOUR_FLAGS = ("label_drop_prob", "mask_ratio_min", "attn_dropout", "proj_dropout", "grad_checkpointing")
# of a checkpoint's config: what the model is built from
CONFIG_PARTS = {"model_name": str, "model": dict, "vae": dict, "vae_fingerprint": str}


def read_checkpoint(args: argparse.Namespace) -> tuple[Path | None, dict | None]:
    """The checkpoint of --resume. None only when training may start anew: no --resume, or a folder that holds none.

    ValueError if training would overwrite another run's checkpoint, or the file is none of this script's.
    """
    args.resume = download.local_path(args.resume, "--resume")
    training, path, last = (
        not (args.evaluate or args.sample),
        checkpoint.resolve(args.resume),
        Path(args.output_dir) / checkpoint.LAST,
    )
    if not training and not args.resume:
        raise ValueError(
            "--evaluate and --sample need trained weights: give --resume, a checkpoint or a folder with checkpoint-last.pth"
        )
    continued = bool(args.resume) and (
        path.is_file()
        and last.exists()
        and path.samefile(last)
        or Path(args.resume).is_dir()
        and Path(args.output_dir).is_dir()
        and Path(args.resume).samefile(args.output_dir)
    )
    if training and last.exists() and not continued:
        raise ValueError(
            f"{args.output_dir} (--output_dir) already holds a {checkpoint.LAST}: continue it with --resume {args.output_dir}, "
            "or choose another folder"
        )
    if not args.resume:
        logger.info("no --resume: training starts from random weights")
        return None, None
    if (
        not path.is_file()
        and training
        and Path(args.resume).suffix not in (".pth", ".pt", ".ckpt")
        and not checkpoint.numbered(Path(args.resume))
    ):
        logger.info("no %s in %s (--resume): training starts from random weights", checkpoint.LAST, args.resume)
        return None, None
    path, content = checkpoint.load_latest(args.resume) if training else (path, checkpoint.load_file(path, mmap=True))
    content = one_layout(content, f"{path} (--resume)")
    if training and "weights" in content:
        raise ValueError(
            f"{path} (--resume) holds one set of weights only: it makes images, but a training cannot be continued from it"
        )
    config = content.get("config")
    wanted = {} if config is None else CONFIG_PARTS
    lacking = [
        key for key, kind in wanted.items() if not (isinstance(config, dict) and isinstance(config.get(key), kind))
    ]
    if lacking:
        raise ValueError(
            f"{path} (--resume) has a config that is no TokenBridge model's, it lacks {', '.join(lacking)}; is the file a VAE's?"
        )
    return path, content


def flag_values(args: argparse.Namespace, names: Sequence[str]) -> dict:
    """Constructor arguments of TokenBridge from the flags of these names."""
    values = {name: getattr(args, name) for name in names}
    if "quant_bits" in values:
        values["quant_levels"] = 2 ** values.pop("quant_bits")
    return values


def take_structure_from_shapes(args: argparse.Namespace, given: set[str], content: dict, source: Path) -> None:
    """Set --model and the structure flags from weights without a config. ValueError if one that was given says otherwise."""
    name, found = structure_from_shapes(content["model"], f"{source} (--resume)")
    found |= dict(
        model=name,
        quant_bits=found["quant_levels"].bit_length() - 1,
        img_size=found["img_size"] // 16 * args.vae_stride,
    )
    for flag in ("model", "img_size", "vae_embed_dim", "quant_bits", "class_num", "buffer_size"):
        if flag in given and getattr(args, flag) != found[flag]:
            raise ValueError(
                f"--{flag} {getattr(args, flag)} contradicts {source}: from the shapes of its weights, {flag} is {found[flag]}; "
                "leave the flag out"
            )
        setattr(args, flag, found[flag])
    logger.info(
        "%s has no config: from the shapes of its weights it is %s, %d classes, %d bits, and it samples as published (head_start official)",
        source,
        name,
        args.class_num,
        args.quant_bits,
    )


def build_model(
    args: argparse.Namespace, given: set[str], vae: AutoencoderKL, content: dict | None, source: Path | None
) -> TokenBridge:
    """The model of the checkpoint's config, or of the flags where there is none (a fresh run, or published weights).

    On the CPU, with random weights still. ValueError if a flag on the command line, or the VAE, contradicts the config.
    """
    config = (content or {}).get("config")
    if config is None:
        args.vae_embed_dim, args.vae_stride = vae.embed_dim, vae.stride
        if content is not None:
            take_structure_from_shapes(args, given, content, source)
        else:
            vars(args).update({k: v for k, v in vae.quantizer_settings().items() if k not in given})
        model = MODELS[args.model](
            **flag_values(args, STRUCTURE_FLAGS + BEHAVIOUR_FLAGS),
            channel_order=vae.channel_order,
            head_start="trained" if content is None else "official",
        )
        if content is None:
            set_quantizer(model, args)
        return model
    trained_with = (config.get("args") or {}).get("quantizer", "gaussian")
    if "quantizer" in given and args.quantizer != trained_with:
        raise ValueError(
            f"--quantizer {args.quantizer} contradicts {source}, which was trained with {trained_with}; leave the flag out"
        )
    args.quantizer = trained_with  # its tables are among the weights
    arguments = {"head": "autoregressive"} | config["model"]  # the configs of older checkpoints do not name it
    if "model" in given and args.model != config["model_name"]:
        raise ValueError(f"--model {args.model} contradicts {source}, which holds a {config['model_name']}")
    free = BEHAVIOUR_FLAGS if not (args.evaluate or args.sample) else ()
    for name in STRUCTURE_FLAGS + BEHAVIOUR_FLAGS:
        ((key, value),) = flag_values(args, [name]).items()
        if name not in given or arguments.get(key) == value:
            continue
        if name not in free:
            raise ValueError(
                f"--{name} {getattr(args, name)} contradicts {source}, whose model has {key} = {arguments.get(key)}; leave the flag out"
            )
        logger.info("--%s: %s from now on, was %s", name, value, arguments.get(key))
        arguments[key] = value
    differs = [key for key, value in vae.config.items() if config["vae"].get(key) != value]
    if differs or config["vae_fingerprint"] != vae.latent_fingerprint():
        what = (
            ", ".join(f"{key} {vae.config[key]} instead of {config['vae'].get(key)}" for key in differs)
            or "other encoder weights"
        )
        raise ValueError(f"{args.vae_path} (--vae_path) is not the VAE that {source} was trained with: {what}")
    try:
        model = TokenBridge(**arguments)
    except TypeError as error:
        raise ValueError(f"{source} (--resume): its config does not describe a model of this code: {error}") from error
    args.model = config["model_name"]
    record_model_flags(args, model)
    return model


def record_model_flags(args: argparse.Namespace, model: TokenBridge) -> None:
    """Set the flags of structure and behaviour to what the model was built with, so that the recorded config holds the values used."""
    c = model.config
    for name in STRUCTURE_FLAGS + BEHAVIOUR_FLAGS:
        setattr(args, name, c.quant_levels.bit_length() - 1 if name == "quant_bits" else getattr(c, name))


def set_quantizer(model: TokenBridge, args: argparse.Namespace) -> None:
    """Give a fresh model the tables of --quantizer, in the buffers that every checkpoint carries; gaussian tables it has already."""
    if args.quantizer == "gaussian" and not args.quantizer_tables:
        return
    bits = model.config.quant_levels.bit_length() - 1
    tables = build_quantizer(args.quantizer, bits, model.quant_min, model.quant_max, args.quantizer_tables)
    model.boundaries.copy_(tables.boundaries)
    model.reconstruction_values.copy_(tables.reconstruction_values)


def load_generator_weights(model: TokenBridge, content: dict, source: Path, which: str) -> None:
    """Weights to make images with: `model`, or its parameters replaced by the EMA's. ValueError if they are absent or do not fit."""
    state = generator_state(content, model, which, str(source))
    trained, step = (content.get("config") or {}).get("args") or {}, content.get("step")
    rate = trained.get("ema_rate")
    share = initial_share(rate, bool(trained.get("ema_warmup")), step) if rate and step is not None else 0.0
    if which == "ema" and share > 0.1:
        logger.warning(
            "the EMA of %s (rate %g) still holds %.0f %% of the random initial weights after %d steps: images will be noise or black; "
            "--weights model shows the weights themselves",
            source,
            rate,
            100 * share,
            step,
        )
    checkpoint.load_state(model, state, f"{source} ({which} weights)")
    logger.info("loaded the %s weights of %s", which, source)
