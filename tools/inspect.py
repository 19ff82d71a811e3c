"""What is in a checkpoint: `python -m tools.inspect CKPT` prints model, size, step, quantizer, EMA and what is wrong.

Reads any layout that checkpoints/published.py knows, and VAE files; nothing is written, no code in the file is run.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import hub
from checkpoints.build import describe as describe_model
from checkpoints.content import class_names, model_content
from checkpoints.published import BUFFERS, TABLES, WEIGHTS, one_layout
from dataset.classes import labels_in_words, misleading_numbers
from models.tokenbridge import TokenBridge
from models.vae_loading import VAE_CLASSES, load_vae
from util.checkpoint import find_file, read_file
from util.cli import make_parser, run_cli
from util.ema import initial_share
from util.log import doing

TRAINED_WITH = ("lr", "blr", "batch_size", "epochs", "ema_rate", "ema_warmup", "data_path")


def count_values(weights: Mapping[str, object]) -> dict[str, int]:
    """{dtype: number of values} over the tensors."""
    counts = Counter()
    for value in weights.values():
        if isinstance(value, Tensor):
            counts[str(value.dtype).removeprefix("torch.")] += value.numel()
    return dict(counts)


def not_finite(weights: Mapping[str, object]) -> list[str]:
    """Keys of floating tensors with NaN or infinite values, without channel_mask, which holds -inf."""
    floating = {k: v for k, v in weights.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return [key for key, value in floating.items() if key != "channel_mask" and not torch.isfinite(value).all()]


def ema_distance(weights: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> float | None:
    """||ema - weights|| / ||weights|| over the parameters that both have, in float64; None if there are none.

    Buffers are left out: a whole state dict as EMA (MAR's layout) holds channel_mask, whose -inf would give NaN.
    """
    pairs = [(weights.get(key), value) for key, value in ema.items() if key not in BUFFERS]
    pairs = [(w, e) for w, e in pairs if isinstance(w, Tensor) and isinstance(e, Tensor) and w.shape == e.shape]
    apart = math.fsum(float((e.double() - w.double()).square().sum()) for w, e in pairs)
    norm = math.fsum(float(w.double().square().sum()) for w, _ in pairs)
    return math.sqrt(apart / norm) if norm else None


def describe(path: Path) -> dict:
    """Everything that is printed, by name. FileNotFoundError or ValueError naming the file if it is no checkpoint."""
    content = read_file(path, mmap=True)
    facts: dict[str, object] = {"file": str(path), "bytes": path.stat().st_size, "keys": sorted(map(str, content))[:12]}
    content = one_layout(content, str(path))
    weights = content["model"]
    facts |= vae_facts(path) if holds_vae(content) else model_facts(path, model_content(content, str(path)))
    facts |= {"values": count_values(weights), "not finite": not_finite(weights)[:5]}
    if isinstance(content.get("model_ema"), dict) and "weights" not in content:
        facts["EMA distance"] = ema_distance(weights, content["model_ema"])
        facts["EMA not finite"] = not_finite(content["model_ema"])[:5]
    return facts | {k: content[k] for k in ("step", "epoch", "steps_per_epoch") if isinstance(content.get(k), int)}


def holds_vae(content: dict) -> bool:
    """Whether a checkpoint is a VAE's: its config names a class of VAE_CLASSES, or it has AutoencoderKL's weights."""
    config = content.get("config")
    named = isinstance(config, dict) and (config.get("class") in VAE_CLASSES or "diffusers" in config)
    return named or "encoder.conv_in.weight" in content["model"]


def vae_facts(path: Path) -> dict:
    """What is printed about a VAE."""
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


def model_facts(path: Path, content: dict) -> dict:
    """What is printed about a TokenBridge model."""
    (name, c), names = describe_model(content, str(path)), class_names(content)
    model = TokenBridge(c)
    tables = {key: content["model"].get(key) for key in TABLES}
    tables = {k: v for k, v in tables.items() if v is not None and v.shape == getattr(model, k).shape}
    errors = [float((value.double() - getattr(model, key).double()).abs().max()) for key, value in tables.items()]
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    unknown_range = "" if config else " (the range is the default: a file without config does not say it)"
    facts = {
        "kind": "TokenBridge",
        "model": name,
        "described by": "its config" if config else "its shapes (no config: a published file?)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "image": f"{c.img_size} px, {c.num_tokens} tokens x {c.vae_embed_dim}",
        "classes": c.class_num,
        "class names": names,
        "head start": c.head_start,
        "EMA": ema_in_words(content),
        "quantizer": f"{int(math.log2(c.quant_levels))} bits, {c.quant_min:g} to {c.quant_max:g}{unknown_range}",
        "quantizer tables off by": max(errors, default=None),
    }
    if config:
        arguments = config.get("args") or {}
        facts["trained with"] = {key: value for key, value in arguments.items() if key in TRAINED_WITH}
        facts["VAE fingerprint"] = config.get("vae_fingerprint")
    return facts


def ema_in_words(content: dict) -> str:
    """Where the EMA of a file is."""
    if content.get("weights") in WEIGHTS:
        return "these weights are the EMA" if content["weights"] == "ema" else "none"
    return "of its own" if isinstance(content.get("model_ema"), dict) else "none"


def verdict(facts: dict) -> list[str]:
    """What is wrong or unusual, a line each; empty if nothing is."""
    bad = {key: facts[key] for key in ("not finite", "EMA not finite") if facts.get(key)}
    lines = [f"{key}: NaN or infinite values in {', '.join(names)}" for key, names in bad.items()]
    trained, step = facts.get("trained with") or {}, facts.get("step")
    rate = trained.get("ema_rate")
    share = initial_share(rate, bool(trained.get("ema_warmup")), step) if rate and step is not None else 0.0
    if share > 0.1:
        held = f"still holds {100 * share:.0f} % of the random initial weights after {step} steps"
        lines.append(f"the EMA (rate {rate:g}) {held}")
    if facts.get("EMA distance") == 0 and facts.get("step", 1):
        lines.append("the EMA equals the weights: was it ever updated?")
    if warning := misleading_numbers(facts.get("class names") or ()):
        lines.append(warning)
    error = facts.get("quantizer tables off by")
    if error is not None and error > 1e-3:
        reason = f"differ from the Gaussian ones by {error:.2g}: another quantizer?"
        lines.append(f"the quantizer's tables in the file {reason}")
    return lines


def without_nan(value: object) -> object:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_words(value: object) -> object:
    """A fact as it is printed."""
    if value in (None, []):
        return "-"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    form = {int: ",", float: ".4g"}.get(type(value))
    return format(value, form) if form else value


@doing("describing the file")
def main(argv: Sequence[str] | None = None) -> None:
    """Print the facts. OSError or ValueError if it is no checkpoint; ValueError if it holds NaN, for scripts."""
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    places = "a file, a folder with checkpoint-last.pth or model.safetensors"
    parser.add_argument("checkpoint", help=f"{places}, or hf://OWNER/REPOSITORY/PATH")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    args = parser.parse_args(argv)
    facts = describe(find_file(hub.local_path(args.checkpoint, "checkpoint")))
    facts["verdict"] = verdict(facts) or ["nothing wrong was found"]
    if args.json:
        print(json.dumps(without_nan(facts), indent=1))
    else:
        if names := facts.get("class names"):
            facts |= {"class names": labels_in_words(range(len(names)), names)}
        print("\n".join(f"{key:<24}{in_words(value)}" for key, value in facts.items()))
    if facts["not finite"] or facts.get("EMA not finite"):
        raise ValueError(f"{facts['file']} holds NaN or infinite weights; go back to an earlier checkpoint")


if __name__ == "__main__":
    sys.exit(run_cli(main))
