"""A checkpoint as safetensors + config.json in the layout of a hub folder, and back.

  python -m tools.export OUT/model --output_dir EXPORT [--dtype float16] [--push OWNER/REPOSITORY]
  python -m tools.export EXPORT --output_dir OUT/again            # a folder of safetensors becomes a checkpoint

The folder holds model.safetensors (one set of weights, the EMA unless --weights says otherwise, with the quantizer's
tables), config.json, vae.safetensors, vae.json and a model card, README.md. Every command takes it: --resume EXPORT,
generation.load("EXPORT"), --resume hf://....
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save

from checkpoints import hub
from checkpoints.build import describe, load_model, model_content, read_generator
from checkpoints.published import BUFFERS, WEIGHTS
from models.latent_space import LatentSpace
from models.tokenbridge import TokenBridge
from util.checkpoint import LAST, SAFE, atomic_save, find_file, read_file
from util.cli import check_writable, make_parser, run_cli
from util.files import replacing, write_json
from util.log import doing, get_logger
from util.options import ArgumentError, add_options, check_options, flag_names, option, read_options

logger = get_logger()

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = ("model.safetensors", "config.json", "vae.safetensors", "vae.json", "README.md")


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and where to. ArgumentError for values that do not fit."""

    vae_path: str = option("", "the model's VAE; by default the one that it was trained with")
    weights: str = option("ema", "which of the checkpoint's weights", choices=WEIGHTS)
    dtype: str = option("float32", "precision of the model's weights in the file", choices=DTYPES)
    push: str = option("", "OWNER/REPOSITORY on the hub to upload the folder to")
    output_dir: str = ""

    def __post_init__(self) -> None:
        check_options(self)
        if self.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ArgumentError("push", f"push takes OWNER/REPOSITORY, got {self.push!r}")


def as_safetensors(weights: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    """The content of a safetensors file, and its SHA-256: the format itself has no checksum."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    content = save(tensors, metadata={"format": "pt"})
    return content, hashlib.sha256(content).hexdigest()


def lowered(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in another precision; buffers stay float32. ArgumentError if a weight overflows."""
    result = {key: value if key in BUFFERS else value.to(dtype) for key, value in weights.items()}
    lost = [key for key, value in result.items() if key not in BUFFERS and not torch.isfinite(value).all()]
    if lost:
        name, first = str(dtype).removeprefix("torch."), ", ".join(lost[:3])
        message = f"dtype {name} cannot hold the weights {first}: they overflow; use float32 or bfloat16"
        raise ArgumentError("dtype", message)
    return result


def model_card(name: str, model: TokenBridge, vae: LatentSpace, which: str, dtype: str, about: dict) -> str:
    """README.md of the folder: the hub's metadata, what it is, how to use it, and no figure that was not measured."""
    c = model.config
    step = f", {about['step']} optimizer steps" if isinstance(about.get("step"), int) else ""
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    levels = f"{c.quant_levels.bit_length() - 1} bits each, {c.quant_min:g} to {c.quant_max:g}"
    return f"""---
license: mit
library_name: tokenbridge
pipeline_tag: unconditional-image-generation
tags: [image-generation, autoregressive, tokenbridge]
---
# {name}

Class-conditional image generation with TokenBridge ([arXiv 2503.16430](https://arxiv.org/abs/2503.16430)).

| | |
|---|---|
| model | {name}, {size}, {which} weights in {dtype}{step} |
| images | {c.img_size} x {c.img_size} pixels, {model.class_num} classes |
| tokens | {model.num_tokens} of {model.token_dim} dimensions, {levels} |
| VAE | {vae.embed_dim} channels at stride {vae.stride}, in vae.safetensors |
| head start | {model.head_start} |
| quality | not measured: run `main_tokenbridge.py --evaluate --resume THIS_FOLDER` and write the figures here |

```python
import generation
pipeline = generation.load("THIS_FOLDER")
images = pipeline.generate([0, 1], cfg=3.0, num_iter=64, seed=0)      # PIL images
```

What it was trained on, who may use it and what it must not be used for is for its author to say here.
"""


def to_folder(source: Path, options: ExportOptions) -> None:
    """Write the five files. ValueError or OSError for what does not fit; nothing is written then."""
    content = model_content(read_generator(source), str(source))
    model, vae, _ = load_model(source, options.vae_path or None, weights=options.weights)
    name, config = describe(content, str(source))[0], content.get("config") or {}
    step = {"step": content["step"]} if isinstance(content.get("step"), int) else {}
    arguments = (config.get("args") or {}).items()
    described = config | {
        "model_name": name,
        "model": model.config.to_dict(),
        "vae": vae.config,
        "vae_fingerprint": vae.latent_fingerprint(),
        "args": {key: value for key, value in arguments if "path" not in key and "dir" not in key},
    }
    state, sha256 = as_safetensors(lowered(model.state_dict(), DTYPES[options.dtype]))
    vae_state, vae_sha256 = as_safetensors(vae.state_dict())
    output = check_writable(options.output_dir, "--output_dir")
    about = {"model_type": "tokenbridge", "weights": options.weights, "dtype": options.dtype, "sha256": sha256}
    write_json(output / "vae.json", {"config": vae.config, "sha256": vae_sha256})
    write_json(output / "config.json", about | {"config": described} | step)
    card = model_card(name, model, vae, options.weights, options.dtype, step).encode()
    files = {"README.md": card, "vae.safetensors": vae_state, SAFE: state}  # last: what a folder is recognised by
    for file_name, content in files.items():
        with replacing(output / file_name, sync=True) as file:
            file.write(content)
    logger.info("wrote %s to %s", ", ".join(NAMES), output)


def to_checkpoint(source: Path, output: Path) -> None:
    """model.safetensors and the files beside it -> checkpoint-last.pth and vae.pth, in the published layout."""
    content = read_file(source)
    which = content.get("weights", "ema")
    model, vae, _ = load_model(source, weights=which)
    state = model.state_dict()
    check_writable(output, "--output_dir")
    atomic_save({"model": vae.state_dict(), "config": vae.config}, output / "vae.pth")
    ema = {"model_ema": {name: state[name] for name, _ in model.named_parameters()}} if which == "ema" else {}
    about = {key: content[key] for key in ("config", "step") if key in content}
    atomic_save({"model": state} | ema | about, output / LAST)
    logger.info("wrote %s and vae.pth to %s; it holds %s weights and no optimizer", LAST, output, which)


def push(folder: Path, repository: str) -> str:
    """Upload the folder's five files as one commit to a hub repository, made private if new; the commit's address."""
    api, names = HfApi(endpoint=os.environ.get("HF_ENDPOINT")), list(NAMES)
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="TokenBridge weights"
        )
    except hub.hub_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = f"the folder {folder} is complete, push it again once HF_TOKEN and the connection are right"
        raise OSError(f"cannot push to {repository} (--push): {reason}; {advice}") from error
    return commit.commit_url


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, export. ValueError or OSError for bad input."""
    parser = make_parser(__doc__)
    places = "checkpoint file or folder (or hf://...) to export; a model.safetensors goes the other way"
    parser.add_argument("checkpoint", help=places)
    parser.add_argument("--output_dir", required=True, help="folder to write to; it must not hold an export already")
    add_options(parser, ExportOptions)
    args = parser.parse_args(argv)
    with flag_names(parser):
        options = read_options(ExportOptions, args, output_dir=args.output_dir)
        output = Path(options.output_dir)
        existing = [name for name in (SAFE, LAST) if (output / name).exists()]
        if existing:
            raise ArgumentError("output_dir", f"{output} already holds {existing[0]}: choose another folder")
        export(find_file(hub.local_path(args.checkpoint, "checkpoint")), options)


@doing("exporting the model")
def export(source: Path, options: ExportOptions) -> None:
    """A checkpoint to a folder, or a folder's model.safetensors to a checkpoint."""
    if source.suffix != ".safetensors":
        vae_path = hub.local_path(options.vae_path, "--vae_path")
        to_folder(source, replace(options, vae_path=vae_path))
        if options.push:
            print(f"pushed to {push(Path(options.output_dir), options.push)}")
        return
    if options != ExportOptions(output_dir=options.output_dir):
        reason = "push, dtype, weights and vae_path are for the other way"
        raise ValueError(f"{source} is an export already and becomes a checkpoint: {reason}")
    to_checkpoint(source, Path(options.output_dir))


if __name__ == "__main__":
    sys.exit(run_cli(main))
