"""A finished evaluation beside the published figures, with every setting in which the two differ."""

from collections.abc import Mapping
from pathlib import Path

from checkpoints.download import PRECISION_RECALL_HINT, PUBLISHED
from checkpoints.transfer import file_hash
from util.presets import Preset, differences

FID_STATS, PR_REFERENCE = PUBLISHED["stats"].target, PUBLISHED["adm_batch"].target  # ADM's
STATS_BLOB = PUBLISHED["stats"].git_blob
INCEPTION_SHA256 = "6726825d"  # torch-fidelity's weights: the beginning, as in their file name
RENAMED = {"arithmetic": "precision", "batch_size": "eval_bsz", "world_size": "processes"}


def run_settings(record: Mapping[str, object]) -> dict[str, object]:
    """The settings of a record of eval.jsonl under the flags' names; device without its number."""
    scores = RENAMED.values()  # "precision" of a record is the score of that name
    settings = {name: value for name, value in record.items() if name not in scores}
    settings = {
        RENAMED.get(name, name): list(value) if isinstance(value, tuple) else value for name, value in settings.items()
    }
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


def comparison(preset: Preset, record: Mapping[str, object]) -> str:
    """A table of the preset's figures beside those of `record` (a line of eval.jsonl), and the settings that differ."""
    lines = [f"{'--preset ' + preset.name:<22}{'published':>11}{'here':>11}{'difference':>12}"]
    for name, published in preset.expected.items():
        here = record.get(name.lower().replace(" ", "_"))
        known = isinstance(here, (int, float))
        shown = f"{here:>11.4g}{here - published:>+12.4g}" if known else f"{'-':>11}{'not computed':>14}"
        lines.append(f"{name:<22}{published:>11.4g}{shown}")
    settings = run_settings(record)
    decisive = differences(settings, preset.decisive) + reference_differences(record)
    neutral = differences(settings, preset.neutral)
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
