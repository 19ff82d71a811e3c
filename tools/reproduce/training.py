"""The first steps of the published training beside a recorded loss (a band), or recorded as one."""

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dataset.record import read_record
from tools.plot import Expected, read_columns
from tools.reproduce.figures import Figure
from tools.reproduce.machine import describe_machine
from training.published import cache_in_words
from util import dist
from util.checkpoint import LAST, read_file
from util.files import write_json
from util.json_reader import read_lines
from util.presets import Preset, differences

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the run, where the loss is compared
WINDOWS, NARROWEST = 40, 5  # the loss is averaged over a 40th of the run, over 5 steps at least
LOWEST_TOLERANCE, SPREADS = 0.02, 4
BAND_REASON = "recorded run; another order of the data and other masks: four standard errors of the mean, at least 0.02"


def describe_data(model: str, cache: Path, global_batch: int, steps: int) -> dict[str, object]:
    """What a band belongs to: model, data, VAE, and the length of the run."""
    record = read_record(cache) or {}
    data = {name: record.get(name) for name in ("images", "latent_fingerprint", "mode")}
    classes = record.get("classes")
    return data | {
        "model": model,
        "classes": len(classes) if isinstance(classes, list) else classes,
        "global_batch": global_batch,
        "steps": steps,
    }


def band_file(folder: Path, about: Mapping[str, object]) -> Path:
    """Where the band of a model and its data is."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
    return folder / f"{about['model']}-{digest}.json"


def band_of(steps: np.ndarray, losses: np.ndarray, about: Mapping[str, object], run: str) -> Expected:
    """The band that a run records: means of windows that end at SHARES of it."""
    width = max(NARROWEST, len(losses) // WINDOWS)
    at = sorted({max(width, round(share * int(steps[-1]))) for share in SHARES})
    windows = [losses[(steps > step - width) & (steps <= step)] for step in at]
    spread = max(float(window.std()) for window in windows) / math.sqrt(width)
    tolerance = round(max(LOWEST_TOLERANCE, SPREADS * spread), 4)
    return Expected(at, [round(float(w.mean()), 5) for w in windows], width, tolerance, dict(about) | {"run": run})


def read_speed(log: Path) -> dict[str, float | None]:
    """Median images/s and MFU of the steps after the first tenth; None where the log has none."""
    lines = list(read_lines(log, {"images_per_s": float, "mfu?": float}))
    late = lines[len(lines) // 10 :]
    values = {name: [line[name] for line in late if name in line] for name in ("images_per_s", "mfu")}
    return {name: statistics.median(numbers) if numbers else None for name, numbers in values.items()}


def read_training(
    out: Path, cache: Path, bands: Path, preset: Preset, processes: int, device: str
) -> dict[str, object]:
    """Loss at some steps beside the band (which is recorded if there is none), images/s, MFU, settings that differ."""
    columns, args = read_columns(out), read_file(out / LAST, mmap=True)["config"]["args"]
    batch = args["batch_size"] * args["accum_iter"] * processes
    about = describe_data(args["model"], cache, batch, args["max_steps"])
    run = hashlib.sha256(columns["loss"].tobytes()).hexdigest()
    ours, path = band_of(columns["step"], columns["loss"], about, run), band_file(bands, about)
    if not path.is_file():
        write_json(path, asdict(ours) | {"about": ours.about | describe_machine(device)})
    band = Expected.read(path, "--bands")
    means = [columns["loss"][(columns["step"] > s - band.width) & (columns["step"] <= s)].mean() for s in band.steps]
    speed = read_speed(out / "log.jsonl")
    settings = args | {"global_batch": batch, "cache": cache_in_words(read_record(cache))}
    precision = dist.pick_precision(args["precision"], dist.pick_device(device))
    settings |= {"device": device, "processes": processes, "precision": precision}
    return {
        "steps": band.steps,
        "expected": band.loss,
        "losses": [float(mean) for mean in means],
        "width": band.width,
        "tolerance": band.tolerance,
        "band": str(path),
        "recorded": band.about.get("run") == run,
        "differs": differences(settings, preset.decisive | preset.neutral),
    } | speed


def training_figures(name: str, measured: Mapping[str, object]) -> list[Figure]:
    """The lines of the report: loss beside the band, speed."""
    note = f"band {measured['band']}" + (", recorded by this run" if measured["recorded"] else "")
    figures = [
        Figure(
            f"{name}: loss, mean of {measured['width']} steps up to step {step}",
            *(expected, loss),
            *((None, "") if measured["recorded"] else (measured["tolerance"], BAND_REASON)),
            note=note,
        )
        for step, expected, loss in zip(measured["steps"], measured["expected"], measured["losses"], strict=True)
    ]
    speeds = {"images_per_s": "training images/s, all devices", "mfu": "MFU"}
    return figures + [Figure(f"{name}: {what}", None, measured[key], clock=True) for key, what in speeds.items()]
