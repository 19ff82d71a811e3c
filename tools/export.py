"""A checkpoint as safetensors + config.json in the layout of a hub folder, and back.

  python -m tools.export OUT/model --output_dir EXPORT [--dtype float16] [--push OWNER/REPOSITORY]
  python -m tools.export EXPORT --output_dir OUT/again            # a folder of safetensors becomes a checkpoint

The folder holds model.safetensors (one set of weights, the EMA unless --weights says otherwise, with the quantizer's
tables), config.json, vae.safetensors, vae.json and a model card, README.md. Every command takes it: --resume EXPORT,
generation.load("EXPORT"), --resume hf://....
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi

from checkpoints import hub
from checkpoints.folder import DTYPES, NAMES, check_free, write_folder
from checkpoints.load import load_model
from checkpoints.published import WEIGHTS
from util.checkpoint import LAST, SAFE, atomic_save, find_file, read_file
from util.cli import check_writable, make_parser, run_cli
from util.log import doing, first_line, get_logger
from util.options import ArgumentError, add_options, check_options, flag_names, option, read_options

logger = get_logger()


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


def to_folder(source: Path, options: ExportOptions) -> None:
    """Write the five files. ValueError or OSError for what does not fit; nothing is written then."""
    model, vae, about = load_model(source, options.vae_path or None, weights=options.weights)
    write_folder(check_writable(options.output_dir, "--output_dir"), model, vae, about, options.dtype)
    logger.info("wrote %s to %s", ", ".join(NAMES), options.output_dir)


def to_checkpoint(source: Path, output: Path) -> None:
    """model.safetensors and the files beside it -> checkpoint-last.pth and vae.pth, in the published layout."""
    content = read_file(source)
    which = content["weights"]
    model, vae, _ = load_model(source, weights=which if which in WEIGHTS else "model")
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
        advice = f"the folder {folder} is complete, push it again once HF_TOKEN and the connection are right"
        raise OSError(f"cannot push to {repository} (--push): {first_line(error)}; {advice}") from error
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
        check_free(Path(options.output_dir), SAFE, LAST)
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
