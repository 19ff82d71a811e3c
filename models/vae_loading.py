"""A VAE from its files. A new one: a class as `LatentSpace` describes it, and a line in VAE_CLASSES."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from models.latent_space import LatentSpace, VaeDescription, find_description
from models.vae import THE_VAE, AutoencoderKL, load_weights, read_vae_file
from models.vae_diffusers import build_diffusers_vae, load_diffusers_vae
from util.checkpoint import check_shapes
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
    config = content.get("config", {} if embed_dim is None else {"embed_dim": embed_dim})

    def build() -> nn.Module:
        try:
            arguments = dict(config)
            make = VAE_CLASSES[arguments.pop("class", "AutoencoderKL")]
            vae = build_diffusers_vae(config) if "diffusers" in config else make(**arguments)
            if "description" in content:
                vae.set_description(VaeDescription(**content["description"]))
            return vae
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its config does not describe a VAE of this code: {error}") from error

    # before memory is allocated: the sizes in a config may be absurd
    with contextlib.suppress(NotImplementedError), torch.device("meta"):  # of a class that computes with its weights
        check_shapes(build().state_dict(), content["model"], str(path), THE_VAE, others=True)
    vae = build()
    load_weights(vae, path, content)
    return vae
