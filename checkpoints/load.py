"""A model and its VAE from a checkpoint alone, for generation.load and the tools."""

from pathlib import Path

import torch

from checkpoints.build import KL16_PATH, check_fit, describe, load_generator_weights
from checkpoints.content import model_content, read_generator
from models.latent_space import LatentSpace
from models.tokenbridge import TokenBridge
from models.vae_loading import load_vae
from util.checkpoint import SAFE, find_file
from util.options import ArgumentError

VAE_SAFE = "vae.safetensors"  # beside SAFE


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
    check_fit(vae, config, path)
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
