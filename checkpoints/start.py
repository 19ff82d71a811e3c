"""What a command starts from: model and VAE of its flags and of the checkpoint that it resumes."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoints import download, hub
from checkpoints.build import StructureOptions, build_model, load_generator_weights, with_new_classes
from checkpoints.content import read_checkpoint
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from util import seeds
from util.log import doing


@dataclass(frozen=True)
class Start:
    """Models, and the checkpoint's path and content, None without one.

    structure: the options with the values of the model that was built. resume: the option, as a local path. The VAE is
    on the device, and so is a model that is to generate.
    """

    model: TokenBridge
    vae: AutoencoderKL
    source: Path | None
    content: dict | None
    structure: StructureOptions
    resume: str
    device: torch.device


@doing("reading the checkpoint and the VAE")
def load_start(
    options: StructureOptions,
    given: Collection[str],
    device: torch.device,
    *,
    resume: str,
    output_dir: str,
    seed: int,
    weights: str = "",
    no_download: bool = False,
) -> Start:
    """Read, check and build; the random numbers of initial weights are those of `seed`.

    given: names of the options that the user set. weights: "ema" or "model", of a model that is to generate, which
    then has them and is on the device; "" for training, whose model stays on the CPU. Published files are fetched for
    generation unless no_download. ValueError or OSError.
    """
    if weights:
        download.provide(options.vae_path, "--vae_path", no_download)
        download.provide(resume, "--resume", no_download)
    resume = hub.local_path(resume, "--resume")
    source, content = read_checkpoint(resume, output_dir, trains=not weights, reset_classes=options.reset_classes)
    options = replace(options, vae_path=hub.local_path(options.vae_path, "--vae_path"))
    shape = (getattr(options, name) if name in given else None for name in ("vae_embed_dim", "vae_stride"))
    vae = load_vae(options.vae_path, *shape)
    seeds.seed_generators(seed)  # initial weights, the same on every process
    model, structure = build_model(options, given, vae, content, source, trains=not weights)
    if options.reset_classes:
        content = with_new_classes(content, model, source)
    if weights:
        load_generator_weights(model, content, source, weights)
        model = model.to(device)
    return Start(model, vae.to(device), source, content, structure, resume, device)
