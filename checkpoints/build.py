"""From the content of a checkpoint (checkpoints/content.py) and settings to a model: its structure, its weights."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.published import BUFFERS, ROOT_KEY, generator_state, structure_from_shapes
from models import MODELS
from models.config import TokenBridgeConfig
from models.latent_space import LatentSpace
from models.quantizer import MAX_BITS, check_range
from models.quantizer_tables import QUANTIZERS, build_quantizer
from models.tokenbridge import TokenBridge
from util import dist
from util.checkpoint import check_shapes, fingerprint, load_state
from util.ema import initial_share
from util.log import get_logger
from util.options import ArgumentError, check_options, option, option_fields

logger = get_logger()

KL16_PATH = "pretrained_models/vae/kl16.ckpt"
# How a model is trained, and with how much memory; a resumed training may change it. The other options of a model are
# fixed by its checkpoint.
RATES = ("label_drop_prob", "mask_ratio_min", "attn_dropout", "proj_dropout")
BEHAVIOUR = (*RATES, "grad_checkpointing", "head_chunk")
STRUCTURE = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "quant_min", "quant_max", "class_num")
STRUCTURE += ("buffer_size", "head")
# Those that structure_from_shapes infers.
FROM_SHAPES = ("model", "img_size", "vae_embed_dim", "quant_bits", "class_num", "buffer_size")


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
    check_fit(vae, config, source)
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
        config = TokenBridgeConfig(**arguments)
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


def _check_vae(vae: LatentSpace, config: dict, vae_path: str, source: Path) -> None:
    """ArgumentError unless the VAE is the one that the checkpoint was trained with."""
    differs = [key for key, value in vae.config.items() if config["vae"].get(key) != value]
    if differs or config["vae_fingerprint"] != vae.latent_fingerprint():
        reasons = [f"{key} {vae.config[key]} instead of {config['vae'].get(key)}" for key in differs]
        reason = ", ".join(reasons) or "other encoder weights"
        raise ArgumentError("vae_path", f"{vae_path} is not the VAE that {source} was trained with: {reason}")


def check_fit(vae: LatentSpace, config: TokenBridgeConfig, source: Path) -> None:
    """ArgumentError unless the VAE's latents have the model's channels and stride."""
    needed = config.vae_embed_dim, config.vae_stride
    if (vae.embed_dim, vae.stride) != needed:
        has = f"the VAE has {vae.embed_dim} channels at stride {vae.stride}"
        raise ArgumentError("vae_path", f"{has}, the model of {source} needs {needed[0]} at {needed[1]}; give vae_path")


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
