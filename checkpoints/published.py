"""What checkpoint files of TokenBridge hold, published layouts included, and which of their weights to use.

Known are checkpoints of training (published or ours), files of one set of weights (an EMA by itself, or a bare state
dict), float16 copies of either, and the safetensors + config.json that tools.export writes.
"""

import math
import re

from torch import Tensor, nn

from models import MODELS
from models.vae import OF_DIFFUSERS
from models.vae import ROOT_KEY as VAE_KEY
from util.checkpoint import plain_keys
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()

WEIGHTS = ("ema", "model")  # the sets of weights that a checkpoint can hold
TABLES = ("boundaries", "reconstruction_values")  # the quantizer's, always float32
BUFFERS = (*TABLES, "channel_mask")  # all that a state dict of the model holds besides its parameters
ROOT_KEY = "class_emb.weight"  # a state dict without a dict around it is recognised by this key


def one_layout(content: dict, source: str) -> dict:
    """`content` with its weights under "model", and "weights" = "ema" or "model" if the file has one set only.

    Their keys are those of the bare model (`plain_keys`). ValueError, which names `source`, if there are no weights.
    """
    states = {key: plain_keys(content[key]) for key in ("model", "model_ema") if isinstance(content.get(key), dict)}
    if "model" in states:
        return content | states
    if states:
        return content | states | {"model": states["model_ema"], "weights": "ema"}
    inner = content.get("state_dict")
    for state in (inner if isinstance(inner, dict) else {}, content):
        weights = plain_keys({key: value for key, value in state.items() if isinstance(value, Tensor)})
        if ROOT_KEY in weights or other_weights(weights):
            return {"model": weights, "weights": content.get("weights", "unnamed")}
    found = ", ".join(map(str, list(content)[:8])) or "nothing"
    raise ValueError(f'{source} has no weights under the key "model"; found {found}')


def other_weights(state: dict) -> str:
    """What the weights of another model are, and where they belong; "" if they are not known."""
    if any(str(key).startswith("diffloss.") for key in state):
        return "MAR, whose head is a diffusion model: of MAR's files only the VAE can be used, kl16.ckpt (vae_path)"
    if OF_DIFFUSERS in state:
        return "a VAE of diffusers: give its folder as vae_path"
    return "a VAE: give them as vae_path" if VAE_KEY in state else ""


def generator_state(content: dict, model: nn.Module, which: str, source: str) -> dict:
    """The state dict to generate images with: the file's weights, or for `which` = "ema" its EMA's.

    Buffers that a file of one set of weights lacks are the model's. ArgumentError if the file does not have the weights
    that were asked for.
    """
    if which not in WEIGHTS:
        raise ArgumentError("weights", f"weights {which!r} is unknown; choose from {', '.join(WEIGHTS)}")
    state, only = dict(content["model"]), content.get("weights")
    parameters = [name for name, _ in model.named_parameters()]
    if only is not None:
        if only in WEIGHTS and only != which:
            raise ArgumentError("weights", f"{source} holds one set of weights, {only}: {which} is not there")
        if only not in WEIGHTS:
            logger.info("%s holds one set of weights and does not say whether they are an EMA", source)
        buffers = {key: value for key, value in model.state_dict().items() if key not in parameters}
        return buffers | state
    if which == "ema":
        ema = content.get("model_ema")
        if not isinstance(ema, dict):
            raise ArgumentError(
                "weights", f'{source} has no model_ema; give weights "model" to use the weights as they are'
            )
        missing = [name for name in parameters if name not in ema]
        if missing:
            raise ValueError(f"model_ema in {source} lacks {len(missing)} parameters: {', '.join(missing[:3])}")
        state |= {name: ema[name] for name in parameters}
    return state


def _depth(state: dict, prefix: str) -> int:
    """Number of blocks prefix.0, prefix.1, ..."""
    return max((int(match[1]) + 1 for key in state if (match := re.match(rf"{prefix}\.(\d+)\.", key))), default=0)


def structure_from_shapes(state: dict, source: str) -> tuple[str, dict]:
    """The name in MODELS and the constructor arguments of weights without a config (the published ones).

    img_size is for a VAE of stride 16. Ranges and dropout leave no trace in the shapes: they are the defaults.
    head_start is "official", see docs/spec.md 5. ValueError if the weights are another model's, or of an unknown size.
    """
    try:
        width, tokens = state["class_emb.weight"].shape[1], state["output_pos_embed"].shape[1]
        sizes = dict(
            encoder_embed_dim=width,
            encoder_depth=_depth(state, "encoder_blocks"),
            decoder_embed_dim=state["mask_token"].shape[-1],
            decoder_depth=_depth(state, "decoder_blocks"),
            channel_embed_dim=state["channel_embed"].shape[-1],
            channel_depth=_depth(state, "channel_blocks"),
        )
        arguments = dict(
            img_size=16 * math.isqrt(tokens),
            class_num=len(state["class_emb.weight"]),
            vae_embed_dim=state["channel_embed"].shape[1],
            quant_levels=len(state["channel_heads.0.weight"]),
            buffer_size=state["encoder_pos_embed_learned"].shape[1] - tokens,
            head_start="official",
        )
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{source} does not describe a TokenBridge model: it lacks {error}") from error
    for name, builder in MODELS.items():
        if all(builder.keywords[key] == value for key, value in sizes.items()):
            return name, builder.keywords | arguments
    parts = ("encoder {encoder_embed_dim} x {encoder_depth} blocks", "decoder {decoder_embed_dim} x {decoder_depth}")
    text = ", ".join((*parts, "head {channel_embed_dim} x {channel_depth}")).format(**sizes)
    raise ValueError(f"{source} is of no known size: {text}; known are {', '.join(MODELS)}")
