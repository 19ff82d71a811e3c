"""A trained model and its VAE from files, ready to generate images."""

from pathlib import Path

import torch

from checkpoints.weights import (
    SAFE,
    find_file,
    generator_state,
    load_state,
    one_layout,
    read_file,
    structure_from_shapes,
)
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from models.vae_loading import load_vae

VAE_SAFE = "vae.safetensors"


def load_model(
    path: str | Path,
    vae_path: str | Path | None = None,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
) -> tuple[TokenBridge, AutoencoderKL]:
    """The model of a checkpoint (a file, or a folder with checkpoint-last.pth or model.safetensors) and its VAE, both frozen and in eval mode.

    vae_path: by default where training had it, else beside the checkpoint, else pretrained_models/vae/kl16.ckpt; a VAE that the model was not
    trained with is refused. weights: the EMA's, or the model's as they are. device: the CPU unless given. Published checkpoints, which hold no
    config, are recognised by their shapes and sample as published. FileNotFoundError or ValueError naming the file for what does not fit.
    """
    for place in (path, vae_path):
        if str(place).startswith("hf://"):
            raise ValueError(
                f"{place} is not on this machine; checkpoints.download.local_path({str(place)!r}) fetches it and returns its path"
            )
    path = find_file(path)
    content = one_layout(read_file(path, mmap=True), str(path))
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    vae = None if config else find_vae(path, config, vae_path)  # a config is looked at first: the file may be a VAE's
    model = build(content, config, vae, str(path))
    vae = vae or find_vae(path, config, vae_path)
    if vae.embed_dim != model.token_dim or vae.stride != model.config.vae_stride:
        raise ValueError(
            f"the VAE has {vae.embed_dim} channels at stride {vae.stride}, the model of {path} needs {model.token_dim} at "
            f"{model.config.vae_stride}; give vae_path"
        )
    load_state(model, generator_state(content, model, weights, str(path)), f"{path} ({weights} weights)")
    return model.eval().requires_grad_(False).to(device), vae.to(device)


def build(content: dict, config: dict, vae: AutoencoderKL | None, source: str) -> TokenBridge:
    """The model that a file's config describes, or its shapes where it has none; random weights still. ValueError naming the file."""
    if not config:
        arguments = structure_from_shapes(content["model"], source)[1]
        if vae is not None:
            arguments |= dict(
                img_size=arguments["img_size"] // 16 * vae.stride,
                vae_stride=vae.stride,
                channel_order=vae.channel_order,
            )
        return TokenBridge(**arguments)
    try:
        return TokenBridge(**config["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} does not describe a TokenBridge model: {error}; is the file a VAE's?") from error


def find_vae(checkpoint: Path, config: dict, vae_path: str | Path | None) -> AutoencoderKL:
    """The VAE that the checkpoint was trained with; see `load_model` for where it is looked for."""
    arguments = config.get("args")
    trained_with = arguments.get("vae_path") if isinstance(arguments, dict) else None
    folder = checkpoint.resolve().parent
    places = (
        [vae_path]
        if vae_path is not None
        else [
            *([folder / VAE_SAFE] if checkpoint.name == SAFE else []),
            *([trained_with] if trained_with else []),
            folder / "vae.pth",
            folder.parent / "vae" / "vae.pth",
            folder.parent.parent / "vae" / "kl16.ckpt",
            Path("pretrained_models/vae/kl16.ckpt"),
        ]
    )
    found = [place for place in map(Path, places) if place.exists()]  # a file, or a folder of diffusers
    if not found:
        raise FileNotFoundError(f"no VAE for {checkpoint}: looked at {', '.join(map(str, places))}; give vae_path")
    for place in found:
        vae = load_vae(place)
        if "vae_fingerprint" not in config or config["vae_fingerprint"] == vae.latent_fingerprint():
            return vae
    raise ValueError(f"{', '.join(map(str, found))}: not the VAE that {checkpoint} was trained with; give vae_path")
