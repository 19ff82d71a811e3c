"""What is in a checkpoint: `python -m tools.inspect CKPT` prints its model, size, step, quantizer, EMA and whether its weights are sound.

Reads any layout that checkpoints/weights.py knows, and VAE files; nothing is written, no code in the file is run.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import download
from util.cli import make_parser
from util.ema import initial_share
from util.log import run_cli


def counts(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """{dtype: number of values} over the tensors."""
    found: dict[str, int] = {}
    for value in weights.values():
        if isinstance(value, Tensor):
            found[str(value.dtype).removeprefix("torch.")] = (
                found.get(str(value.dtype).removeprefix("torch."), 0) + value.numel()
            )
    return found


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Keys of floating tensors with NaN or infinite values; channel_mask, which holds -inf, apart."""
    return [
        key
        for key, value in weights.items()
        if key != "channel_mask"
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and not torch.isfinite(value).all()
    ]


def ema_distance(weights: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> float | None:
    """||ema - weights|| / ||weights|| over the parameters that both have, in float64; None if there are none.

    Buffers are left out: a whole state dict as EMA (MAR's layout) holds channel_mask, whose -inf would give NaN.
    """
    from checkpoints.weights import BUFFERS

    both = [
        key
        for key, value in ema.items()
        if key not in BUFFERS
        and isinstance(value, Tensor)
        and isinstance(weights.get(key), Tensor)
        and weights[key].shape == value.shape
    ]
    apart = math.fsum(float((ema[key].double() - weights[key].double()).square().sum()) for key in both)
    norm = math.fsum(float(weights[key].double().square().sum()) for key in both)
    return math.sqrt(apart / norm) if norm else None


def describe(path: Path) -> dict:
    """Everything that is printed, by name. FileNotFoundError or ValueError naming the file if it is no checkpoint."""
    from checkpoints.weights import one_layout, read_file

    content = read_file(path, mmap=True)
    facts: dict[str, object] = {"file": str(path), "bytes": path.stat().st_size, "keys": sorted(map(str, content))[:12]}
    content = one_layout(content, str(path))
    weights, config = content["model"], content.get("config") if isinstance(content.get("config"), dict) else {}
    facts |= describe_vae(path) if "encoder.conv_in.weight" in weights else describe_model(path, content, config)
    facts["values"], bad = counts(weights), not_finite(weights)
    facts["not finite"] = bad[:5]
    if isinstance(content.get("model_ema"), dict) and "weights" not in content:
        facts["EMA distance"] = ema_distance(weights, content["model_ema"])
        facts["EMA not finite"] = not_finite(content["model_ema"])[:5]
    for key in ("step", "epoch", "steps_per_epoch"):
        if isinstance(content.get(key), int):
            facts[key] = content[key]
    return facts


def describe_vae(path: Path) -> dict:
    from models.vae_loading import load_vae

    vae = load_vae(path)
    return {
        "kind": "VAE",
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent channels": vae.embed_dim,
        "stride": vae.stride,
        "scale": vae.scale_factor,
        "shift": vae.shift,
        "channel order": vae.channel_order,
        "fingerprint": vae.latent_fingerprint(),
    }


def describe_model(path: Path, content: dict, config: dict) -> dict:
    from checkpoints.weights import CHOICES, TABLES, structure_from_shapes
    from generation.loading import build

    name = config.get("model_name") if config else structure_from_shapes(content["model"], str(path))[0]
    model = build(content, config, None, str(path))
    c = model.config
    ema = "of its own" if isinstance(content.get("model_ema"), dict) else "none"
    if content.get("weights") in CHOICES:
        ema = "these weights are the EMA" if content["weights"] == "ema" else "none"
    tables = [content["model"][t] for t in TABLES if t in content["model"]]
    off = max(
        (
            float((mine.double() - getattr(model, t).double()).abs().max())
            for t, mine in zip(TABLES, tables, strict=False)
            if mine.shape == getattr(model, t).shape
        ),
        default=None,
    )
    facts = {
        "kind": "TokenBridge",
        "model": name,
        "described by": "its config" if config else "its shapes (no config: a published file?)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "image": f"{c.img_size} px, {model.num_tokens} tokens x {model.token_dim}",
        "classes": model.class_num,
        "head start": model.head_start,
        "EMA": ema,
        "quantizer": f"{int(math.log2(c.quant_levels))} bits, {c.quant_min:g} to {c.quant_max:g}"
        + ("" if config else " (the range is the default: a file without config does not say it)"),
        "quantizer tables off by": off,
    }
    if config:
        told = ("lr", "blr", "batch_size", "epochs", "ema_rate", "ema_warmup", "data_path")
        facts |= {
            "trained with": {key: value for key, value in (config.get("args") or {}).items() if key in told},
            "VAE fingerprint": config.get("vae_fingerprint"),
        }
    return facts


def verdict(facts: dict) -> list[str]:
    """What is wrong or strange, a line each; empty if nothing is."""
    lines = [
        f"{key}: NaN or infinite values in {', '.join(facts[key])}"
        for key in ("not finite", "EMA not finite")
        if facts.get(key)
    ]
    trained, step = facts.get("trained with") or {}, facts.get("step")
    rate = trained.get("ema_rate")
    share = initial_share(rate, bool(trained.get("ema_warmup")), step) if rate and step is not None else 0.0
    if share > 0.1:
        lines.append(
            f"the EMA (rate {rate:g}) still holds {100 * share:.0f} % of the random initial weights after {step} steps"
        )
    if facts.get("EMA distance") == 0 and facts.get("step", 1):
        lines.append("the EMA equals the weights: was it ever updated?")
    if facts.get("quantizer tables off by") is not None and facts["quantizer tables off by"] > 1e-3:
        lines.append(
            f"the quantizer's tables in the file differ from the Gaussian ones by {facts['quantizer tables off by']:.2g}: another quantizer?"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the description. ValueError if the weights hold NaN, so that scripts can tell; OSError or ValueError if it is no checkpoint."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "checkpoint",
        help="a file, a folder with checkpoint-last.pth or model.safetensors, or hf://OWNER/REPOSITORY/PATH",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    args = parser.parse_args(argv)
    from checkpoints.weights import find_file

    facts = describe(find_file(download.local_path(args.checkpoint, "checkpoint")))
    facts["verdict"] = verdict(facts) or ["nothing wrong was found"]
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            shown = (
                "; ".join(map(str, value))
                if isinstance(value, list)
                else f"{value:,}"
                if isinstance(value, int)
                else f"{value:.4g}"
                if isinstance(value, float)
                else value
            )
            print(f"{key:<24}{shown if value not in (None, []) else '-'}")
    if facts["not finite"] or facts.get("EMA not finite"):
        raise ValueError(f"{facts['file']} holds NaN or infinite weights; go back to an earlier checkpoint")


if __name__ == "__main__":
    sys.exit(run_cli(main))
