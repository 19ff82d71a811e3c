"""From a checkpoint file and settings to a model: which file, which structure, which weights."""

import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.published import BUFFERS, ROOT_KEY, generator_state, one_layout, other_weights, structure_from_shapes
from models import MODELS
from models.config import TokenBridgeConfig
from models.latent_space import LatentSpace
from models.quantizer import MAX_BITS, check_range
from models.quantizer_tables import QUANTIZERS, build_quantizer
from models.tokenbridge import TokenBridge
from models.vae_loading import load_vae
from util import dist
from util.checkpoint import LAST, SAFE, check_shapes, find_file, fingerprint, load_state, read_file
from util.checkpoint_folder import load_latest, numbered
from util.ema import initial_share
from util.json_reader import check_schema
from util.log import get_logger
from util.options import ArgumentError, check_options, option, option_fields

logger = get_logger()

VAE_SAFE = "vae.safetensors"  # beside SAFE
KL16_PATH = "pretrained_models/vae/kl16.ckpt"
# How a model is trained, and with how much memory; a resumed training may change it. The other options of a model are
# fixed by its checkpoint.
RATES = ("label_drop_prob", "mask_ratio_min", "attn_dropout", "proj_dropout")
BEHAVIOUR = (*RATES, "grad_checkpointing", "head_chunk")
STRUCTURE = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "quant_min", "quant_max", "class_num")
STRUCTURE += ("buffer_size", "head")
FROM_SHAPES = (
    "model",
    "img_size",
    "vae_embed_dim",
    "quant_bits",
    "class_num",
    "buffer_size",
)  # see structure_from_shapes
# What the files of a model say of it (util.files.check_schema); published ones have no config.
ARGS = {"vae_path?": str, "quantizer?": str, "ema_rate?": (float, None), "ema_warmup?": bool}
CONFIG = {"model_name": str, "model": dict, "vae": dict, "vae_fingerprint": str, "args?": (ARGS, None)}
CONTENT = {"config?": (CONFIG | {"classes?": ([str], None)}, None), "step?": int}


def _config_option(name: str) -> dataclasses.Field:
    """The option of that name of TokenBridgeConfig: the same default, help and bounds."""
    field = option_fields(TokenBridgeConfig)[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass(frozen=True)
class StructureOptions:
    """The model and its VAE. ArgumentError for values out of their bounds."""

    model: str = option("tokenbridge_large", "size of the transformer", choices=MODELS, check=False)
    img_size: int = _config_option("img_size")
    vae_path: str = option(KL16_PATH, 'VAE checkpoint (weights under "model"), or a folder of diffusers')
    vae_embed_dim: int = _config_option("vae_embed_dim")
    vae_stride: int = _config_option("vae_stride")
    patch_size: int = _config_option("patch_size")
    quant_bits: int = option(6, f"bits per latent dimension, 1 to {MAX_BITS}", lowest=1, highest=MAX_BITS)
    quant_min: float = _config_option("quant_min")
    quant_max: float = _config_option("quant_max")
    quantizer: str = option("gaussian", "how its levels are chosen; the checkpoint keeps them", choices=QUANTIZERS)
    quantizer_tables: str = option("", "quantizer lloyd: file with its levels (python -m tools.vae_stats writes it)")
    use_quantized_value: bool = option(False, "accepted; the encoder always takes dequantized values")
    class_num: int = _config_option("class_num")
    reset_classes: bool = option(
        False,
        "fine-tune --resume on other classes (--class_num may differ): a new run with its weights, but a newly "
        "initialised class embedding",
    )
    buffer_size: int = _config_option("buffer_size")
    head: str = _config_option("head")
    label_drop_prob: float = _config_option("label_drop_prob")
    mask_ratio_min: float = _config_option("mask_ratio_min")
    attn_dropout: float = _config_option("attn_dropout")
    proj_dropout: float = _config_option("proj_dropout")
    grad_checkpointing: str = _config_option("grad_checkpointing")
    head_chunk: int | None = _config_option("head_chunk")

    def __post_init__(self) -> None:
        check_options(self)
        check_range(self.quant_min, self.quant_max)

    def arguments(self) -> dict:
        """Constructor arguments of TokenBridge."""
        return {name: getattr(self, name) for name in STRUCTURE + BEHAVIOUR} | {"quant_levels": 2**self.quant_bits}

    def recorded(self, name: str, config: TokenBridgeConfig, **values: object) -> "StructureOptions":
        """These options with the values of a model that exists."""
        found = {field: getattr(config, field) for field in STRUCTURE + BEHAVIOUR}
        bits = config.quant_levels.bit_length() - 1
        return dataclasses.replace(self, model=name, quant_bits=bits, **(found | values))


def continues_run_in(output_dir: str | Path, resume: str | Path) -> bool:
    """Whether `resume` is the folder `output_dir`, or the checkpoint-last.pth in it."""

    def same(one: Path, other: Path) -> bool:
        return one.exists() and other.exists() and one.samefile(other)

    if not resume:
        return False
    return same(find_file(resume), Path(output_dir) / LAST) or same(Path(resume), Path(output_dir))


def refuse_other_run(folder: Path) -> None:
    """ArgumentError if the folder holds checkpoints, which a run that does not continue them would replace."""
    there = [path.name for path in numbered(folder)]
    names = f"a {LAST}" if os.path.lexists(folder / LAST) else ", ".join(there[:3] + ["..."] * (len(there) > 3))
    if names:
        advice = f"continue it with --resume {folder}, or choose another folder"
        raise ArgumentError("output_dir", f"{folder} already holds {names}: {advice}")


def read_checkpoint(
    resume: str, output_dir: str, *, trains: bool, reset_classes: bool = False
) -> tuple[Path | None, dict | None]:
    """The checkpoint to resume, and its content; with reset_classes, to take weights from for a new run.

    None if training starts from random weights: `resume` is empty, or a folder without a checkpoint. ArgumentError if
    training would overwrite another run's checkpoint, or the file is none of this model's.
    """
    if trains and not continues_run_in(output_dir, resume):
        refuse_other_run(Path(output_dir))
    if reset_classes and (not trains or continues_run_in(output_dir, resume)):
        reason = f"trains a new run from the weights of {resume}: leave it out to continue, evaluate or sample"
        raise ArgumentError("reset_classes", f"reset_classes {reason}")
    if trains and not resume and not reset_classes:
        logger.info("nothing to resume: training starts from random weights")
        return None, None
    if not resume:
        advice = f"give a checkpoint or a folder with {LAST}"
        what = "reset_classes needs" if trains else "evaluation and sampling need"
        raise ArgumentError("resume", f"{what} trained weights: {advice}")
    path, is_folder = find_file(resume), Path(resume).suffix not in (".pth", ".pt", ".ckpt")
    if trains and not reset_classes and is_folder and not path.is_file() and not numbered(Path(resume)):
        logger.info("no %s in %s: training starts from random weights", LAST, resume)
        return None, None
    path, content = load_latest(resume) if trains else (path, read_generator(path, "resume"))
    return path, _checked_content(content, path, trains and not reset_classes)


def _checked_content(content: dict, path: Path, continues: bool) -> dict:
    """The content in one layout. ArgumentError if training cannot continue from it, or its config is not a model's."""
    try:
        content = model_content(content, str(path))
    except ValueError as error:
        raise ArgumentError("resume", str(error)) from error
    if continues and "weights" in content:
        reason = "it generates images, but a training cannot be continued from it"
        raise ArgumentError("resume", f"{path} holds one set of weights only: {reason}")
    return content


def read_generator(path: Path, argument: str = "") -> dict:
    """A checkpoint to generate images with: its optimizer state stays on the disk, unread."""
    return read_file(path, argument, mmap=True, unchecked=["optimizer"])


def model_content(content: dict, source: str) -> dict:
    """`one_layout` of a file of a TokenBridge model. ValueError, which names `source`, for weights of another model."""
    content = one_layout(content, source)
    if other := other_weights(content["model"]):
        raise ValueError(f"{source} holds the weights of {other}")
    try:
        check_schema(content, CONTENT, "the file")
    except ValueError as error:
        raise ValueError(f"{source} does not describe a TokenBridge model: {error}") from error
    return content


def class_names(content: dict) -> list[str]:
    """The names of the classes by number, as training recorded them; none for a published file."""
    config = content.get("config")
    names = config.get("classes") if isinstance(config, dict) else None
    return list(map(str, names)) if isinstance(names, (list, tuple)) else []


def describe(content: dict, source: str, vae: LatentSpace | None = None) -> tuple[str, TokenBridgeConfig]:
    """Name and config of the model in a file, from the file's config, or from the shapes of its weights.

    vae: decides the stride and the channel order of a file without a config. ValueError, which names `source`, if it is
    no model of this code.
    """
    config = content.get("config")
    if config is None:
        name, arguments = structure_from_shapes(content["model"], source)
        if vae is not None:
            img_size = arguments["img_size"] // 16 * vae.stride
            arguments |= dict(img_size=img_size, vae_stride=vae.stride, channel_order=vae.channel_order)
        name, config = name, TokenBridgeConfig(**arguments)
    else:
        try:
            name, config = config["model_name"], TokenBridgeConfig(**config["model"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} does not describe a TokenBridge model of this code: {error}") from error
    with torch.device("meta"):  # before memory is allocated: the sizes in a config may be absurd
        own = TokenBridge(config).state_dict()
    parameters = {key: value for key, value in own.items() if key not in BUFFERS}  # which some files lack
    check_shapes(parameters, content["model"], source, others=True)
    return name, config


def build_model(
    options: StructureOptions,
    given: Collection[str],
    vae: LatentSpace,
    content: dict | None = None,
    source: Path | None = None,
    *,
    trains: bool = True,
) -> tuple[TokenBridge, StructureOptions]:
    """The model of a checkpoint, or of the options if there is none; and the options with the values used.

    On the CPU, with random weights. given: the names of the options that the user set; ArgumentError if one of them, or
    the VAE, contradicts the checkpoint. Training may change the model's behaviour (BEHAVIOUR).
    """
    if content is None:
        return _fresh_model(options, given, vae)
    if content.get("config") is None:
        return _model_of_shapes(options, given, vae, content, source)
    name, config = describe(content, str(source))
    quantizer = (content["config"].get("args") or {}).get("quantizer", "gaussian")  # its tables are among the weights
    recorded = options.recorded(name, config, quantizer=quantizer)
    changes = {}
    for field in ("model", "quant_bits", "quantizer", *STRUCTURE, *BEHAVIOUR):
        value, before = getattr(options, field), getattr(recorded, field)
        if field not in given or value == before:
            continue
        if not trains or field not in BEHAVIOUR + ("class_num",) * options.reset_classes:
            reason = f"which was trained with {field} {before}; leave the argument out"
            reason += ", or fine-tune with reset_classes" if trains and field == "class_num" else ""
            raise ArgumentError(field, f"{field} {value} contradicts {source}, {reason}")
        logger.info("%s: %s from now on, was %s", field, value, before)
        changes[field] = value
    _check_vae(vae, content["config"], options.vae_path, source)
    return TokenBridge(config.changed(**changes)), dataclasses.replace(recorded, **changes)


def with_new_classes(content: dict, model: TokenBridge, source: Path) -> dict:
    """What fine-tuning on other classes starts from: the weights of a checkpoint, but for the model's class embedding.

    The run that they are of is left out: its optimizer state, steps and class names.
    """
    own = model.state_dict()
    states = {key: dict(content[key]) | {ROOT_KEY: own[ROOT_KEY]} for key in ("model", "model_ema") if key in content}
    states["model"] = {key: own[key] for key in BUFFERS} | states["model"]
    config = {key: value for key, value in (content.get("config") or {}).items() if key not in ("classes", "run")}
    message = "%s: its weights, with a newly initialised class embedding of %d classes; optimizer and steps begin again"
    logger.info(message, source, model.class_num)
    return states | ({"config": config} if config else {})


def _fresh_model(
    options: StructureOptions, given: Collection[str], vae: LatentSpace
) -> tuple[TokenBridge, StructureOptions]:
    """A model of the options; the VAE's own quantizer settings hold unless they are given."""
    if options.model not in MODELS:
        raise ArgumentError("model", f"model {options.model!r} is unknown; choose from {', '.join(MODELS)}")
    settings = {name: value for name, value in vae.quantizer_settings().items() if name not in given}
    options = dataclasses.replace(options, vae_embed_dim=vae.embed_dim, vae_stride=vae.stride, **settings)
    model = MODELS[options.model](**options.arguments(), channel_order=vae.channel_order)
    if options.quantizer != "gaussian" or options.quantizer_tables:  # gaussian tables are there already
        limits = model.config.quant_min, model.config.quant_max
        tables = build_quantizer(options.quantizer, options.quant_bits, *limits, options.quantizer_tables)
        model.boundaries.copy_(tables.boundaries)
        model.reconstruction_values.copy_(tables.reconstruction_values)
    return model, options


def _model_of_shapes(
    options: StructureOptions, given: Collection[str], vae: LatentSpace, content: dict, source: Path
) -> tuple[TokenBridge, StructureOptions]:
    """The model of weights without a config; what the shapes do not show is as the options say."""
    name, config = describe(content, str(source), vae)
    found = options.recorded(name, config)
    for field in FROM_SHAPES:
        value, actual = getattr(options, field), getattr(found, field)
        if field in given and value != actual and not (field == "class_num" and options.reset_classes):
            reason = f"from the shapes of its weights, {field} is {actual}; leave the argument out"
            raise ArgumentError(field, f"{field} {value} contradicts {source}: {reason}")
    _check_fit(vae, config, source)
    if options.reset_classes and "class_num" in given:
        config = config.changed(class_num=options.class_num)
    config = config.changed(**{key: getattr(options, key) for key in ("quant_min", "quant_max", "head", *BEHAVIOUR)})
    logger.info(
        "%s has no config: from the shapes of its weights it is %s, %d classes, %d bits, and it samples as published "
        "(head_start official)",
        source,
        name,
        config.class_num,
        found.quant_bits,
    )
    return TokenBridge(config), found.recorded(name, config)


def _check_vae(vae: LatentSpace, config: dict, vae_path: str, source: Path) -> None:
    """ArgumentError unless the VAE is the one that the checkpoint was trained with."""
    differs = [key for key, value in vae.config.items() if config["vae"].get(key) != value]
    if differs or config["vae_fingerprint"] != vae.latent_fingerprint():
        reasons = [f"{key} {vae.config[key]} instead of {config['vae'].get(key)}" for key in differs]
        reason = ", ".join(reasons) or "other encoder weights"
        raise ArgumentError("vae_path", f"{vae_path} is not the VAE that {source} was trained with: {reason}")


def _check_fit(vae: LatentSpace, config: TokenBridgeConfig, source: Path) -> None:
    """ArgumentError unless the VAE's latents have the model's channels and stride."""
    needed = config.vae_embed_dim, config.vae_stride
    if (vae.embed_dim, vae.stride) != needed:
        has = f"the VAE has {vae.embed_dim} channels at stride {vae.stride}"
        raise ArgumentError("vae_path", f"{has}, the model of {source} needs {needed[0]} at {needed[1]}; give vae_path")


def load_generator_weights(model: TokenBridge, content: dict, source: Path, which: str) -> None:
    """Load the weights to generate images with: `which` is "model", or "ema" for the parameters of the EMA.

    ArgumentError or ValueError if they are absent or do not fit.
    """
    state = generator_state(content, model, which, str(source))
    config = content.get("config")
    trained = (config or {}).get("args") or {}
    rate, step = trained.get("ema_rate"), content.get("step")
    share = initial_share(rate, bool(trained.get("ema_warmup")), step) if rate and step is not None else 0.0
    if which == "ema" and share > 0.1:
        logger.warning(
            "the EMA of %s (rate %g) still holds %.0f %% of the random initial weights after %d steps: images will be "
            "noise or black; --weights model shows the weights themselves",
            source,
            rate,
            100 * share,
            step,
        )
    load_state(model, state, f"{source} ({which} weights)")
    logger.info("loaded the %s weights of %s", which, source)


def loaded_weights(model: TokenBridge, vae: LatentSpace, source: Path, vae_path: str | Path) -> dict[str, str]:
    """SHA-256 of the weights as they were loaded. ValueError unless all processes have the same; all must call it."""
    hashes = {"weights_sha256": fingerprint(model.state_dict()), "vae_weights_sha256": fingerprint(vae.state_dict())}
    dist.check_same(hashes, f"{source} (--resume) or {vae_path} (--vae_path)")
    return hashes


def load_model(
    path: str | Path,
    vae_path: str | Path | None = None,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
) -> tuple[TokenBridge, LatentSpace, dict]:
    """The model of a checkpoint and its VAE, both frozen and in eval mode, and what the file says of them.

    That is "name" (of the size), "weights", "source" (the file), and "step" and "config", where the file has them.

    path: a file, or a folder with checkpoint-last.pth or model.safetensors. vae_path: by default where training had it,
    else beside the checkpoint, else pretrained_models/vae/kl16.ckpt; a VAE that the model was not trained with is
    refused. weights: "ema" or "model". device: the CPU unless given. Published checkpoints, which hold no config, are
    recognised by their shapes and sample as published. FileNotFoundError or ValueError, which name the file.
    """
    path = find_file(path)
    content = model_content(read_generator(path), str(path))
    described = content.get("config") is not None
    if described:
        name, config = describe(content, str(path))  # before the VAE is looked for: the file may be a VAE's
    vae = find_vae(path, content["config"] if described else {}, vae_path)
    if not described:
        name, config = describe(content, str(path), vae)
    _check_fit(vae, config, path)
    model = TokenBridge(config)
    load_generator_weights(model, content, path, weights)
    about = {key: content[key] for key in ("step", "config") if content.get(key) is not None}
    about |= {"name": name, "weights": weights, "source": str(path)}
    return model.eval().requires_grad_(False).to(device), vae.to(device), about


def find_vae(checkpoint: Path, config: dict, vae_path: str | Path | None = None) -> LatentSpace:
    """The VAE that the checkpoint was trained with; see `load_model` for where it is looked for."""
    trained_with = (config.get("args") or {}).get("vae_path")
    folder = checkpoint.resolve().parent
    if vae_path is not None:
        places = [vae_path]
    else:
        # (not of the resolved path: in the hub's cache the files of a folder are links to another one)
        places = [checkpoint.parent / VAE_SAFE] if checkpoint.name == SAFE else []
        places += [trained_with] if trained_with else []
        places += [folder / "vae.pth", folder.parent / "vae" / "vae.pth", folder.parent.parent / "vae" / "kl16.ckpt"]
        places.append(KL16_PATH)
    existing = [place for place in map(Path, places) if place.exists()]  # a file, or a folder of diffusers
    if not existing:
        raise FileNotFoundError(f"no VAE for {checkpoint}: looked at {', '.join(map(str, places))}; give vae_path")
    for place in existing:
        vae = load_vae(place)
        if config.get("vae_fingerprint") in (None, vae.latent_fingerprint()):
            return vae
    tried = ", ".join(map(str, existing))
    raise ArgumentError("vae_path", f"{tried}: not the VAE that {checkpoint} was trained with; give vae_path")
