"""`model, vae = load("OUT/model")`: a trained model and its VAE from files, ready to draw images."""

import argparse
import math
from pathlib import Path

import torch

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, load_vae

CHECKPOINT = "checkpoint-last.pth"
WEIGHTS = ("ema", "model")


def load(path: str | Path, vae_path: str | Path | None = None, *, weights: str = "ema",
         device: torch.device | str | None = None) -> tuple[TokenBridge, AutoencoderKL]:
    """The model of a checkpoint (a file, or a folder with checkpoint-last.pth) and its VAE, both frozen and in eval mode.

    vae_path: by default where training had it, else beside the checkpoint, else pretrained_models/vae/kl16.ckpt; a VAE that the model was not
    trained with is refused. weights: the EMA's, or the model's as they are. device: the CPU unless given. Published checkpoints, which hold no
    config, are recognised by their shapes and sample as published. FileNotFoundError or ValueError naming the file for what does not fit.
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    content = _read(path)
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    try:
        arguments = config["model"] if config else published_arguments(content["model"])
        model = TokenBridge(**arguments)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} does not describe a TokenBridge model: {error}; is the file a VAE's?") from error
    vae = find_vae(path, config, vae_path)
    if vae.embed_dim != model.token_dim or vae.stride != model.config["vae_stride"]:
        raise ValueError(f"the VAE has {vae.embed_dim} channels at stride {vae.stride}, the model of {path} needs {model.token_dim} at "
                         f"{model.config['vae_stride']}; give vae_path")
    state = generator_state(content, model, weights, path)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its model: {error}") from error
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{path} holds NaN or infinite weights, first: {', '.join(bad[:3])}")
    return model.eval().requires_grad_(False).to(device), vae.to(device)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give a checkpoint file, or a folder with {CHECKPOINT}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):       # published checkpoints keep their arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint; it is cut short, another kind of file, or holds code") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{path} is no TokenBridge checkpoint: it has no weights under the key "model"')
    return content


def published_arguments(state: dict) -> dict:
    """Constructor arguments of the published model with these weights, told from their shapes. KeyError if it is another model's file."""
    from models import MODELS
    width, tokens = state["class_emb.weight"].shape[1], state["output_pos_embed"].shape[1]
    sizes = {builder.keywords["encoder_embed_dim"]: builder.keywords for name, builder in MODELS.items()}
    if width not in sizes:
        raise KeyError(f"no model has width {width} ({', '.join(MODELS)})")
    return sizes[width] | dict(img_size=16 * math.isqrt(tokens), class_num=len(state["class_emb.weight"]), vae_embed_dim=state["channel_embed"].shape[1],
                               quant_levels=len(state["reconstruction_values"]), buffer_size=state["encoder_pos_embed_learned"].shape[1] - tokens,
                               head_start="official")


def generator_state(content: dict, model: TokenBridge, weights: str, path: Path) -> dict:
    """The state dict to draw images with: the checkpoint's, its parameters replaced by the EMA's unless `weights` is "model"."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is unknown; choose from {', '.join(WEIGHTS)}")
    state = dict(content["model"])
    if weights == "model":
        return state
    ema = content.get("model_ema")
    lacking = [name for name, _ in model.named_parameters() if not isinstance(ema, dict) or name not in ema]
    if lacking:
        raise ValueError(f"{path} has no complete EMA (it lacks {lacking[0]} and {len(lacking) - 1} more); use weights=\"model\"")
    return state | {name: ema[name] for name, _ in model.named_parameters()}


def find_vae(checkpoint: Path, config: dict, vae_path: str | Path | None) -> AutoencoderKL:
    """The VAE that the checkpoint was trained with; see `load` for where it is looked for."""
    arguments = config.get("args")
    trained_with = arguments.get("vae_path") if isinstance(arguments, dict) else None
    folder = checkpoint.resolve().parent
    places = [vae_path] if vae_path is not None else [
        *([trained_with] if trained_with else []), folder / "vae.pth", folder.parent / "vae" / "vae.pth", folder.parent.parent / "vae" / "kl16.ckpt",
        Path("pretrained_models/vae/kl16.ckpt")]
    found = [place for place in map(Path, places) if place.is_file()]
    if not found:
        raise FileNotFoundError(f"no VAE for {checkpoint}: looked at {', '.join(map(str, places))}; give vae_path")
    for place in found:
        vae = load_vae(place)
        if "vae_fingerprint" not in config or config["vae_fingerprint"] == vae.latent_fingerprint():
            return vae
    raise ValueError(f"{', '.join(map(str, found))}: not the VAE that {checkpoint} was trained with; give vae_path")
