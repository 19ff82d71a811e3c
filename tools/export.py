"""A checkpoint as safetensors + config.json in the layout of a hub folder, and back.

  python -m tools.export OUT/model --output_dir EXPORT [--dtype float16] [--push OWNER/REPOSITORY]
  python -m tools.export EXPORT --output_dir OUT/again            # a folder of safetensors becomes a checkpoint

The folder holds model.safetensors (one set of weights, the EMA unless --weights says otherwise, with the quantizer's tables), config.json,
vae.safetensors, vae.json and a model card, README.md. Every command takes it: --resume EXPORT, generation.load("EXPORT"), --resume hf://....
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoints import download
from util.checkpoint import LAST, atomic_save
from util.cli import check_writable, make_parser
from util.files import replacing, write_json
from util.log import get_logger, run_cli

if TYPE_CHECKING:
    from models.tokenbridge import TokenBridge
    from models.vae import AutoencoderKL

logger = get_logger()

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = ("model.safetensors", "config.json", "vae.safetensors", "vae.json", "README.md")


def write_safetensors(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Written whole or not at all."""
    from safetensors.torch import save

    with replacing(path, sync=True) as file:
        file.write(
            save({key: value.detach().cpu().contiguous() for key, value in weights.items()}, metadata={"format": "pt"})
        )


def lowered(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in another precision; the quantizer's tables and the mask stay float32. ValueError if one does not fit into it."""
    from checkpoints.weights import TABLES

    kept = (*TABLES, "channel_mask")
    result = {key: value if key in kept else value.to(dtype) for key, value in weights.items()}
    lost = [key for key, value in result.items() if key not in kept and not torch.isfinite(value).all()]
    if lost:
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')} cannot hold the weights {', '.join(lost[:3])}: they overflow; "
            "use float32 or bfloat16"
        )
    return result


def model_card(name: str, model: "TokenBridge", vae: "AutoencoderKL", which: str, dtype: str, about: dict) -> str:
    """README.md of the folder: the hub's metadata, what it is, how to use it, and no figure that was not measured."""
    c = model.config
    step = f", {about['step']} optimizer steps" if isinstance(about.get("step"), int) else ""
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
| model | {name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {which} weights in {dtype}{step} |
| images | {c.img_size} x {c.img_size} pixels, {model.class_num} classes |
| tokens | {model.num_tokens} of {model.token_dim} dimensions, {c.quant_levels.bit_length() - 1} bits each, {c.quant_min:g} to {c.quant_max:g} |
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


def to_folder(source: Path, output: Path, vae_path: str | None, weights: str, dtype: str) -> None:
    """Write the five files. ValueError or OSError for what does not fit; nothing is written then."""
    from checkpoints.weights import one_layout, read_file, structure_from_shapes
    from generation.loading import load_model

    content = one_layout(read_file(source, mmap=True), str(source))
    model, vae = load_model(source, vae_path, weights=weights)
    config = content.get("config") if isinstance(content.get("config"), dict) else None
    name = config["model_name"] if config else structure_from_shapes(content["model"], str(source))[0]
    step = {"step": content["step"]} if isinstance(content.get("step"), int) else {}
    described = (config or {}) | {
        "model_name": name,
        "model": model.config.to_dict(),
        "vae": vae.config,
        "vae_fingerprint": vae.latent_fingerprint(),
    }
    described["args"] = {
        key: value for key, value in (described.get("args") or {}).items() if "path" not in key and "dir" not in key
    }
    state = lowered(model.state_dict(), DTYPES[dtype])
    check_writable(output, "--output_dir")
    write_safetensors(output / "vae.safetensors", vae.state_dict())  # the model last: it is what a folder is known by
    write_json(output / "vae.json", {"config": vae.config})
    write_json(
        output / "config.json",
        {"model_type": "tokenbridge", "weights": weights, "dtype": dtype, "config": described} | step,
    )
    with replacing(output / "README.md") as file:
        file.write(model_card(name, model, vae, weights, dtype, step).encode())
    write_safetensors(output / "model.safetensors", state)
    logger.info("wrote %s to %s", ", ".join(NAMES), output)


def to_checkpoint(source: Path, output: Path) -> None:
    """model.safetensors and what lies beside it -> checkpoint-last.pth and vae.pth, which the published scripts' layout reads too."""
    from checkpoints.weights import read_file
    from generation.loading import load_model

    content = read_file(source)
    model, vae = load_model(source, weights=content.get("weights", "ema"))
    state, which = model.state_dict(), content.get("weights", "ema")
    described = {"config": content["config"]} if "config" in content else {}
    check_writable(output, "--output_dir")
    atomic_save({"model": vae.state_dict(), "config": vae.config}, output / "vae.pth")
    ema = {"model_ema": {name: state[name] for name, _ in model.named_parameters()}} if which == "ema" else {}
    step = {key: content[key] for key in ("step",) if key in content}
    atomic_save({"model": state} | ema | described | step, output / LAST)
    logger.info("wrote %s and vae.pth to %s; it holds %s weights and no optimizer", LAST, output, which)


def push(folder: Path, repository: str) -> str:
    """Upload the folder's five files as one commit to a hub repository, made private if it is new; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(NAMES), commit_message="TokenBridge weights"
        )
    except download.hub_errors() as error:
        raise OSError(
            f"cannot push to {repository} (--push): {(str(error).splitlines() or [type(error).__name__])[0]}; the folder {folder} is complete, "
            "push it again once HF_TOKEN and the connection are right"
        ) from error
    return commit.commit_url


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "checkpoint", help="checkpoint file or folder (or hf://...) to export; a model.safetensors goes the other way"
    )
    parser.add_argument("--output_dir", required=True, help="folder to write to; it must not hold an export already")
    parser.add_argument("--vae_path", default="", help="the model's VAE; by default the one that it was trained with")
    parser.add_argument("--weights", default="ema", choices=("ema", "model"))
    parser.add_argument(
        "--dtype", default="float32", choices=list(DTYPES), help="precision of the model's weights in the file"
    )
    parser.add_argument("--push", default="", help="OWNER/REPOSITORY on the hub to upload the folder to")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, export. ValueError or OSError for bad input."""
    from checkpoints.weights import SAFE, find_file

    args = build_parser().parse_args(argv)
    output = Path(args.output_dir)
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise ValueError(f"--push takes OWNER/REPOSITORY, got {args.push!r}")
    there = [name for name in (SAFE, LAST) if (output / name).exists()]
    if there:
        raise ValueError(f"{output} (--output_dir) already holds {there[0]}: choose another folder")
    source = find_file(download.local_path(args.checkpoint, "checkpoint"))
    if source.suffix == ".safetensors":
        if args.push or args.dtype != "float32" or args.weights != "ema" or args.vae_path:
            raise ValueError(
                f"{source} is an export already and becomes a checkpoint: --push, --dtype, --weights and --vae_path are for the other way"
            )
        to_checkpoint(source, output)
        return
    to_folder(source, output, download.local_path(args.vae_path, "--vae_path") or None, args.weights, args.dtype)
    if args.push:
        print(f"pushed to {push(output, args.push)}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
