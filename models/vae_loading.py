"""A VAE from its files. A new one: a class as `LatentSpace` describes it, and a line in VAE_CLASSES."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from models.latent_space import LatentSpace, VaeDescription, find_description
from models.vae import AutoencoderKL, load_weights, read_vae_file
from models.vae_diffusers import load_diffusers_vae
from util.options import ArgumentError

# By the "class" in the config of a checkpoint file; where it names none, it is an AutoencoderKL.
VAE_CLASSES: dict[str, Callable[..., nn.Module]] = {"AutoencoderKL": AutoencoderKL}


def load_vae(path: str | Path, embed_dim: int | None = None, stride: int | None = None) -> LatentSpace:
    """A frozen VAE in eval mode from a checkpoint, or from a folder that diffusers wrote (models/vae_diffusers.py).

    Its shape comes from the file's "config", KL-16 where there is none; what its latents are like (scale, shift, order,
    range) from the JSON file beside it if there is one, see models/latent_space.py. embed_dim, stride: what the caller
    expects; ArgumentError for a contradiction, or a file that holds no VAE.
    """
    try:
        vae = load_diffusers_vae(path) if Path(path).is_dir() else load_checkpoint_vae(path, embed_dim)
        for name, expected, actual in (("vae_embed_dim", embed_dim, vae.embed_dim), ("vae_stride", stride, vae.stride)):
            if expected is not None and expected != actual:
                raise ArgumentError(name, f"{name} {expected} contradicts {path}, whose VAE has {actual}")
        description = find_description(path)
        if description is not None:
            vae.set_description(description)
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError("vae_path", str(error)) from error
    return vae.eval().requires_grad_(False)


def load_checkpoint_vae(path: str | Path, embed_dim: int | None = None) -> nn.Module:
    """The VAE of a checkpoint file with its weights; see `load_vae`."""
    content = read_vae_file(path)
    config = content.get("config")
    if config is None:
        config = {} if embed_dim is None else {"embed_dim": embed_dim}
    try:
        arguments = dict(config)
        vae = VAE_CLASSES[arguments.pop("class", "AutoencoderKL")](**arguments)
        if "description" in content:
            vae.set_description(VaeDescription(**content["description"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config does not describe a VAE of this code: {error}") from error
    if embed_dim in (None, vae.embed_dim):  # else load_vae names the contradiction
        load_weights(vae, path, content)
    return vae
