"""A model and its VAE as a folder in the layout of a hub repository: safetensors, their descriptions, a model card."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save

from checkpoints.content import class_names
from checkpoints.published import BUFFERS, WEIGHTS
from models.latent_space import LatentSpace
from models.tokenbridge import TokenBridge
from util.checkpoint import SAFE, fingerprint
from util.files import replacing, write_json
from util.json_reader import read_lines
from util.options import ArgumentError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = (SAFE, "config.json", "vae.safetensors", "vae.json", "README.md")
SCORES = {"fid": "FID", "inception_score": "IS", "sfid": "sFID", "precision": "precision", "recall": "recall"}
SETTINGS = ("num_images", "cfg", "temperature", "num_iter", "fid_stats")


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


def check_free(folder: Path, *names: str) -> None:
    """ArgumentError if the folder holds one of the files already."""
    existing = [name for name in names if (folder / name).exists()]
    if existing:
        raise ArgumentError("output_dir", f"{folder} already holds {existing[0]}: choose another folder")


def read_scores(model: TokenBridge, about: Mapping) -> dict | None:
    """The record with the lowest FID of these weights in eval.jsonl beside their file; None if there is none."""
    lines, best = Path(about.get("source", "")).parent / "eval.jsonl", None
    if "source" not in about or not lines.is_file():
        return None
    digest = fingerprint(model.state_dict())
    for record in read_lines(lines, {"weights_sha256": str, "fid": float}):
        if record["weights_sha256"] == digest and (best is None or record["fid"] < best["fid"]):
            best = record | {"fid": float(record["fid"])}
    return best


def quality_row(scores: dict | None) -> str:
    """What a model card says of the measured quality, and under which settings."""
    if scores is None:
        return "not measured: `main_tokenbridge.py --evaluate --resume THIS_FOLDER` measures it"
    found = ", ".join(
        f"{words} {scores[key]:.4g}" for key, words in SCORES.items() if isinstance(scores.get(key), float)
    )
    settings = ", ".join(f"{key} {Path(str(scores[key])).name}" for key in SETTINGS if scores.get(key) is not None)
    return f"{found} ({settings})"


def model_card(model: TokenBridge, vae: LatentSpace, about: Mapping, dtype: str) -> str:
    """README.md of the folder: the hub's metadata, what it is, how to load it, and no figure that was not measured."""
    c, name, names = model.config, about["name"], class_names(about)
    which = f"{about['weights']} " if about["weights"] in WEIGHTS else ""
    step = f", {about['step']} optimizer steps" if isinstance(about.get("step"), int) else ""
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    levels = f"{c.quant_levels.bit_length() - 1} bits each, {c.quant_min:g} to {c.quant_max:g}"
    classes = f": {', '.join(names[:10])}{', ...' * (len(names) > 10)}".replace("|", r"\|") if names else ""
    tags = ["image-generation", "autoregressive", "tokenbridge"]
    data = ModelCardData(
        license="mit", library_name="tokenbridge", pipeline_tag="unconditional-image-generation", tags=tags
    )
    return f"""---
{data.to_yaml()}
---
# {name}

Class-conditional image generation with TokenBridge ([arXiv 2503.16430](https://arxiv.org/abs/2503.16430)).

| | |
|---|---|
| model | {name}, {size}, {which}weights in {dtype}{step} |
| images | {c.img_size} x {c.img_size} pixels, {model.class_num} classes{classes} |
| tokens | {model.num_tokens} of {model.token_dim} dimensions, {levels} |
| VAE | {vae.embed_dim} channels at stride {vae.stride}, in vae.safetensors |
| head start | {model.head_start} |
| quality | {quality_row(read_scores(model, about))} |
| licence | MIT, as the code; the training data may restrict the use of the weights |

The whole configuration is in config.json. From a checkout of the code:

```python
from generation import Pipeline
pipeline = Pipeline.from_pretrained("THIS_FOLDER")                    # or OWNER/REPOSITORY on the hub
images = pipeline.generate([0, 1], cfg=3.0, num_iter=64, seed=0)      # PIL images
```

What it was trained on, who may use it and what it must not be used for is for its author to say here.
"""


def write_folder(folder: Path, model: TokenBridge, vae: LatentSpace, about: Mapping, dtype: str = "float32") -> None:
    """Write the files of NAMES. ArgumentError, before anything is written, if a weight overflows `dtype`.

    about: as `load_model` returns it, or empty.
    """
    about = {"name": "tokenbridge", "weights": "unnamed"} | dict(about)
    config = about.get("config") or {}
    arguments = (config.get("args") or {}).items()
    described = config | {
        "model_name": about["name"],
        "model": model.config.to_dict(),
        "vae": vae.config,
        "vae_fingerprint": vae.latent_fingerprint(),
        "args": {key: value for key, value in arguments if "path" not in key and "dir" not in key},
    }
    step = {"step": about["step"]} if isinstance(about.get("step"), int) else {}
    state, sha256 = as_safetensors(lowered(model.state_dict(), DTYPES[dtype]))
    vae_state, vae_sha256 = as_safetensors(vae.state_dict())
    facts = {"model_type": "tokenbridge", "weights": about["weights"], "dtype": dtype, "sha256": sha256}
    write_json(folder / "vae.json", {"config": vae.config, "sha256": vae_sha256})
    write_json(folder / "config.json", facts | {"config": described} | step)
    card = model_card(model, vae, about, dtype).encode()
    files = {"README.md": card, "vae.safetensors": vae_state, SAFE: state}  # last: what a folder is recognised by
    for name, content in files.items():
        with replacing(folder / name, sync=True) as file:
            file.write(content)
