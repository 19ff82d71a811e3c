"""Checkpoint files of any known layout, read without running code, and which of their weights to use (SPEC 7; published layouts too).

A file becomes one dict, whatever its layout: `model` and `model_ema` (key -> tensor), `config` where the file says what it holds. Known are
checkpoints of training (published or ours), files of one set of weights (an EMA by itself, or a bare state dict), float16 copies of either,
and the safetensors + config.json that tools.export writes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger("tokenbridge")

LAST = "checkpoint-last.pth"
SAFE = "model.safetensors"
CHOICES = ("ema", "model")
TABLES = ("boundaries", "reconstruction_values")  # the quantizer's, float32 always
BUFFERS = (*TABLES, "channel_mask")  # all that a state dict of the model holds besides its parameters
ROOT_KEY = "class_emb.weight"  # a state dict without a dict around it is known by this


def find_file(path: str | Path) -> Path:
    """A folder means its checkpoint-last.pth, or its model.safetensors where it has only that; a file is taken as it is."""
    path = Path(path)
    if path.is_file():
        return path
    return path / SAFE if (path / SAFE).is_file() and not (path / LAST).is_file() else path / LAST


def read_file(path: str | Path, flag: str = "", mmap: bool = False) -> dict:
    """The dict in a checkpoint file, on the CPU. FileNotFoundError or ValueError naming file and flag; code in it is never run.

    mmap: read tensors from the disk when they are used, so that an optimizer's are never read; the file must not be rewritten meanwhile.
    """
    path, named = Path(path), f" ({flag})" if flag else ""
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}{named}: give a checkpoint file, or a folder with {LAST} or {SAFE}"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path, named)
    try:
        # published checkpoints keep their arguments in one
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class|type) ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path}{named} holds code ({code[1] or code[2]}), which is never run: a checkpoint of weights needs none; get it "
                "from its author as safetensors or a plain state dict"
            ) from error
        raise ValueError(
            f"{path}{named} cannot be read as a checkpoint; it is cut short, or another kind of file: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f'{path}{named} is not a checkpoint: it holds a {type(content).__name__}, not a dict with weights under "model"'
        )
    return {key: _detached(value) for key, value in content.items()}


def _detached(value: object) -> object:
    """A tensor, or a dict of tensors (one level), without autograd: the EMA of the published files consists of parameters."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: item.detach() if isinstance(item, Tensor) else item for key, item in value.items()}
    return value


def _read_safetensors(path: Path, named: str) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}{named} cannot be read as safetensors; it is cut short, or another kind of file: {error}"
        ) from error
    beside = path.with_name("config.json") if path.name == SAFE else path.with_suffix(".json")
    try:
        config = json.loads(beside.read_text()) if beside.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{beside}, the description of {path}{named}, is no JSON of tools.export: {error}") from error
    described = {key: config[key] for key in ("config", "weights", "step") if key in config}
    return {"model": weights} | described


def one_layout(content: dict, source: str) -> dict:
    """`content` with its weights under "model", and "weights" = "ema" or "model" where the file has one set only.

    ValueError if there are none: `source` says where the file is from.
    """
    if isinstance(content.get("model"), dict):
        return content
    if isinstance(content.get("model_ema"), dict):
        return content | {"model": content["model_ema"], "weights": "ema"}
    if ROOT_KEY in content:
        return {
            "model": {key: value for key, value in content.items() if isinstance(value, Tensor)},
            "weights": content.get("weights", "unnamed"),
        }
    raise ValueError(
        f'{source} has no weights under the key "model"; found {", ".join(map(str, list(content)[:8])) or "nothing"}'
    )


def generator_state(content: dict, model: nn.Module, which: str, source: str) -> dict:
    """The state dict to draw images with: the file's weights, or its EMA's for `which` = "ema", with the buffers that it lacks from `model`.

    ValueError if the file does not have those weights: an image of other weights than were asked for would be worse than none.
    """
    if which not in CHOICES:
        raise ValueError(f"weights {which!r} is unknown; choose from {', '.join(CHOICES)}")
    state, only = dict(content["model"]), content.get("weights")
    parameters = [name for name, _ in model.named_parameters()]
    if only is not None:
        if only in CHOICES and only != which:
            raise ValueError(f"{source} holds one set of weights, {only}: {which} is not there (--weights)")
        if only not in CHOICES:
            logger.info("%s holds one set of weights and does not say whether they are an EMA", source)
        for name in model.state_dict().keys() - set(parameters):
            state.setdefault(name, model.state_dict()[name])
    elif which == "ema":
        ema = content.get("model_ema")
        if not isinstance(ema, dict):
            raise ValueError(
                f'{source} has no model_ema; give --weights model (weights="model") to use the weights as they are'
            )
        lacking = [name for name in parameters if name not in ema]
        if lacking:
            raise ValueError(f"model_ema in {source} lacks {len(lacking)} parameters: {', '.join(lacking[:3])}")
        state.update({name: ema[name] for name in parameters})
    return state


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"no tensor but {type(value).__name__}"


def load_state(module: nn.Module, state: dict, source: str) -> None:
    """Strict load_state_dict whose ValueError names the file and the first keys that do not fit; NaN is refused too.

    Weights of another precision are converted; the quantizer's tables of a half-precision file are left as the module computed them.
    """
    own = module.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [
        f"{k}: file {_shape(state[k])}, model {_shape(own[k])}"
        for k in own
        if k in state and _shape(state[k]) != _shape(own[k])
    ]
    problems = [f"lacks {len(missing)} keys ({', '.join(missing[:3])})"] if missing else []
    problems += [f"has {len(extra)} unknown keys ({', '.join(extra[:3])})"] if extra else []
    problems += [f"has {len(wrong)} weights of another shape ({'; '.join(wrong[:3])})"] if wrong else []
    if problems:
        raise ValueError(
            f"{source} does not fit the model (--model, --img_size, --quant_bits, --buffer_size, --class_num): {' and '.join(problems)}"
        )
    not_finite = [k for k in own if k != "channel_mask" and not torch.isfinite(state[k]).all()]
    if not_finite:
        raise ValueError(f"{source} holds NaN or infinite weights, first: {', '.join(not_finite[:3])}")
    half = [
        k
        for k in TABLES
        if k in own
        and state[k].dtype in (torch.float16, torch.bfloat16)
        # other tables (--quantizer) are read, rounded as they are
        and torch.allclose(state[k].float(), own[k].float(), rtol=0, atol=0.02)
    ]
    if half:
        logger.info("%s is in half precision: the quantizer's tables are computed, not read", source)
    module.load_state_dict(state | {k: own[k] for k in half}, strict=True)


# ------------------------------------------------------------------------------------------------------------- told from shapes


def _depth(state: dict, prefix: str) -> int:
    found = {int(match[1]) for key in state if (match := re.match(rf"{prefix}\.(\d+)\.", key))}
    return max(found) + 1 if found else 0


def structure_from_shapes(state: dict, source: str) -> tuple[str, dict]:
    """The name in MODELS and the constructor arguments of weights that no config describes (the published ones), told from their shapes.

    img_size is for a VAE of stride 16. Ranges and dropout leave no trace in the shapes: they are the defaults. head_start is "official", as
    SPEC 5 asks. ValueError if these are another model's weights, or of a size that MODELS lacks.
    """
    from models import MODELS

    try:
        width, tokens = state["class_emb.weight"].shape[1], state["output_pos_embed"].shape[1]
        found = dict(
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
        )
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"{source} does not describe a TokenBridge model: it lacks {error}; is the file a VAE's?"
        ) from error
    for name, builder in MODELS.items():
        if all(builder.keywords[key] == value for key, value in found.items()):
            return name, builder.keywords | arguments | {"head_start": "official"}
    raise ValueError(
        f"{source} is of no known size: encoder {found['encoder_embed_dim']} x {found['encoder_depth']} blocks, decoder "
        f"{found['decoder_embed_dim']} x {found['decoder_depth']}, head {found['channel_embed_dim']} x {found['channel_depth']}; "
        f"known are {', '.join(MODELS)}"
    )
