"""`--preset large_eval` and `huge_eval`: the published evaluations, with the numbers to expect, logged at the start and compared at the end."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from checkpoints.download import PRECISION_RECALL_HINT, PUBLISHED, file_hash
from training.presets import KL16, differences, flag_text
from util import dist
from util.log import get_logger

logger = get_logger()

_PUBLISHED = dict(
    evaluate=True,
    num_images=50000,
    num_iter=256,
    cfg_schedule="linear",
    quant_bits=6,
    eval_bsz=256,
    weights="ema",
    precision="fp16",
)
_FOLDER = "pretrained_models/tokenbridge"

EVAL_PRESETS: dict[str, dict[str, object]] = {
    "large_eval": dict(
        model="tokenbridge_large", resume=f"{_FOLDER}/tokenbridge_large", cfg=3.1, temperature=0.96, **_PUBLISHED
    ),
    "huge_eval": dict(
        model="tokenbridge_huge", resume=f"{_FOLDER}/tokenbridge_huge", cfg=3.45, temperature=0.91, **_PUBLISHED
    ),
}
# ImageNet 256 x 256, published (SPEC 9)
EXPECTED: dict[str, dict[str, float]] = {
    "large_eval": {"fid": 1.76, "inception_score": 294.8, "precision": 0.80, "recall": 0.63},
    "huge_eval": {"fid": 1.55, "inception_score": 313.3, "precision": 0.80, "recall": 0.65},
}
NAMES = {"fid": "FID", "inception_score": "Inception Score", "precision": "precision", "recall": "recall"}

# The rest of the published evaluation, by the names of a record in eval.jsonl: what decides the distribution of the images ...
_REST = dict(
    vae_path=KL16,
    img_size=256,
    class_num=1000,
    quant_min=-5.0,
    quant_max=5.0,
    head_start="official",
    order="random",
    mask_schedule="cosine",
    temperature_schedule="constant",
    channel_temperature=[],
    top_k=0,
    top_p=1.0,
    reuse_features=1,
    reuse_guidance=1,
    device="cuda",
    tf32=False,
)
# ... and what only decides which images are drawn from it, or how fast.
_NEUTRAL = dict(seed=1, eval_bsz=256, processes=8, compile=False)
FID_STATS, PR_REFERENCE, STATS_BLOB = (
    PUBLISHED["stats"].target,
    PUBLISHED["adm_batch"].target,
    PUBLISHED["stats"].git_blob,
)  # ADM's
INCEPTION_SHA256 = "6726825d"  # torch-fidelity's weights: the beginning, as in their file name


def apply_eval_preset(args: argparse.Namespace, given: set[str]) -> None:
    """Set the flags of --preset that are not on the command line, and count them as given; log all of them, and what to expect.

    On a CPU, --precision is fp32 unless given: fp16 arithmetic is slow there, and nothing published used it.
    """
    published = EVAL_PRESETS[args.preset]
    chosen = dict(published)
    if "precision" not in given and dist.pick_device(args.device).type == "cpu":
        chosen["precision"] = "fp32"
        logger.info(
            "--preset %s on a CPU: --precision fp32, the published evaluation uses fp16 autocast on a GPU", args.preset
        )
    for name in chosen.keys() - given:
        setattr(args, name, chosen[name])
    won = [
        name for name in published if name in given and getattr(args, name) not in (published[name], [published[name]])
    ]
    given.update(chosen)
    logger.info("--preset %s: %s", args.preset, " ".join(flag_text(name, value) for name, value in chosen.items()))
    if won:
        logger.info(
            "given on the command line instead of the preset's: %s",
            ", ".join(f"--{name} (preset {published[name]})" for name in won),
        )
    logger.info(
        "expected (published): %s%s",
        ", ".join(f"{NAMES[key]} {value:g}" for key, value in EXPECTED[args.preset].items()),
        "; with other settings than the preset's the figures are not comparable" if won else "",
    )


def published_settings(preset: str) -> dict[str, object]:
    """Every setting of the published evaluation that decides the distribution of its images, by the names of `run_settings`."""
    flags = {key: value for key, value in EVAL_PRESETS[preset].items() if key not in ("evaluate", "resume", *_NEUTRAL)}
    return flags | {"checkpoint": f"{EVAL_PRESETS[preset]['resume']}/checkpoint-last.pth"} | _REST


def run_settings(record: Mapping[str, object]) -> dict[str, object]:
    """The settings of a record of eval.jsonl under the flags' names; device without its number."""
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}
    settings.pop("precision", None)  # the score of that name
    for old, new in (("arithmetic", "precision"), ("batch_size", "eval_bsz"), ("world_size", "processes")):
        if old in settings:
            settings[new] = settings.pop(old)
    if "device" in settings:
        settings["device"] = str(settings["device"]).partition(":")[0]
    return settings


def reference_differences(record: Mapping[str, object]) -> list[str]:
    """What of the record's references and Inception weights is not the published evaluation's, in words."""
    found, path = [], Path(str(record.get("fid_stats", FID_STATS)))
    if path.name != Path(FID_STATS).name:
        found.append(f"fid_stats {path} instead of {FID_STATS}")
    elif path.is_file() and file_hash(path, STATS_BLOB) != STATS_BLOB:
        found.append(f"fid_stats {path} has another content than the published file")
    other = record.get("pr_reference")
    if other and Path(str(other)).name != Path(PR_REFERENCE).name:
        found.append(f"pr_reference {other} instead of {PR_REFERENCE}")
    if not str(record.get("inception_sha256", INCEPTION_SHA256)).startswith(INCEPTION_SHA256):
        found.append("inception_weights other than torch-fidelity's")
    return found


def comparison(preset: str, record: Mapping[str, object]) -> str:
    """A table of the published figures beside those of `record` (a line of eval.jsonl), and every setting in which the run differs."""
    lines = [f"{'--preset ' + preset:<22}{'published':>11}{'here':>11}{'difference':>12}"]
    for key, published in EXPECTED[preset].items():
        here = record.get(key)
        lines.append(
            f"{NAMES[key]:<22}{published:>11.4g}"
            + (
                f"{here:>11.4g}{here - published:>+12.4g}"
                if isinstance(here, (int, float))
                else f"{'-':>11}{'not computed':>14}"
            )
        )
    settings = run_settings(record)
    decisive = differences(settings, published_settings(preset)) + reference_differences(record)
    neutral = differences(settings, _NEUTRAL)
    lines.append(
        f"differs from the published run, figures are not comparable: {'; '.join(decisive)}"
        if decisive
        else "settings are the published ones"
    )
    if neutral:
        lines.append(f"differs, but the images are drawn from the same distribution: {'; '.join(neutral)}")
    lines.append("always different (docs/differences.md): the random numbers, and the VAE decodes in float32")
    if any(record.get(key) is None for key in ("precision", "recall")):
        lines.append(PRECISION_RECALL_HINT)
    return "\n".join(lines)
