"""Which settings of a training differ from those of the published one."""

from collections.abc import Mapping

import torch

from util import dist
from util.presets import Preset, differences


def cache_in_words(record: Mapping[str, object] | None) -> str:
    """What a latent cache stores, from its cache.json; .npz files without one are as published: "float32 moments"."""
    record = record or {}
    mode = record.get("mode", "moments")
    kind = "quantized indices" if mode == "indices" else f"{record.get('dtype', 'float32')} {mode}"
    crops = record.get("crops", 1)
    return kind if crops == 1 else f"{kind} of {crops} crops"


def training_differences(
    preset: Preset, flags: Mapping[str, object], device: torch.device, cache: Mapping[str, object] | None = None
) -> list[str]:
    """One or two lines that name every setting in which a run differs from the published training of the preset.

    flags: all flags by name, after presets and checkpoints were applied. cache: cache.json of --cached_path, used with
    --use_cached only. No line for a preset without published settings.
    """
    if not preset.published:
        return []
    processes = dist.world_size()
    settings = dict(flags) | {
        "precision": dist.pick_precision(flags["precision"], device),
        "processes": processes,
        "device": device.type,
        "tf32": dist.allows_tf32(device),
        "global_batch": flags["batch_size"] * flags["accum_iter"] * processes,
    }
    if flags["use_cached"]:
        settings["cache"] = cache_in_words(cache)
    decisive, neutral = differences(settings, preset.decisive), differences(settings, preset.neutral)
    lines = [f"--preset {preset.name}: settings are the published ones"]
    if decisive:
        lines = [f"--preset {preset.name} differs from the published training: {'; '.join(decisive)}"]
    if neutral:
        lines.append(f"differs, but the training draws from the same distributions: {'; '.join(neutral)}")
    return lines
