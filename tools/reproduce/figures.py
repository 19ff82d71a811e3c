"""The paper's figures, how far a repetition may be from them and why, and how ours are read from what stages wrote."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from checkpoints import build
from evaluation.published import reference_differences, run_settings
from evaluation.reconstruction_report import FIDS_BY_BITS, FIDS_BY_RANGE
from models.tokenbridge import TokenBridge
from tools.bench.gpu_sampling import PAPER_HEAD
from util.checkpoint import find_file, read_file
from util.json_reader import read_json, read_lines
from util.presets import differences, load_preset

SEEDS = "another seed moves FID of 50,000 images by about 2 % (as EDM's authors report); rounding of the published one"
TOLERANCES = {  # share of the published value, absolute part, reason
    "FID": (0.03, 0.005, SEEDS + "; the VAE decodes in float32"),
    "Inception Score": (0.02, 0.05, "another seed, the shuffle before its 10 splits: assumed to stay below 2 %"),
    "precision": (0.0, 0.02, "published to two decimals; features of torch-fidelity's network instead of ADM's graph"),
    "recall": (0.0, 0.02, "published to two decimals; features of torch-fidelity's network instead of ADM's graph"),
    "reconstruction FID": (0.02, 0.01, "posterior samples of another seed; rounding of the published one; TF32"),
    "reconstruction IS": (0.0, 5.0, 'published as "about 305"'),
    "rFID": (0.02, 0.01, "posterior samples of another seed; rounding of the published one; TF32"),
    "parameters, M": (0.0, 1.0, "published in whole millions, not rounded up: 486 for 486.89"),
}
PARAMETERS = {"large": 486, "huge": 910}  # M
HEAD_ROW = "head alone, 256 tokens, eager"  # of python -m tools.bench gpu
# Settings of results.json that the published reconstruction has.
RECONSTRUCTION = {"images_per_class": 50, "img_size": 256, "mode": False, "pixels": "truncate", "num_images": None}


@dataclass(frozen=True)
class Figure:
    """A line of the report. within: None if it is compared with nothing; clock: depends on machine and moment."""

    name: str
    published: float | None
    measured: float | None
    tolerance: float | None = None
    reason: str = ""
    note: str = ""
    clock: bool = False

    @property
    def difference(self) -> float | None:
        """Measured less published, where they are compared."""
        missing = None in (self.published, self.measured, self.tolerance)
        return None if missing else self.measured - self.published

    @property
    def within(self) -> bool | None:
        """Whether the difference is within the tolerance."""
        return None if self.difference is None else abs(self.difference) <= self.tolerance + 1e-9

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"difference": self.difference, "within": self.within}


def tolerance(kind: str, published: float) -> tuple[float, str]:
    """(largest difference, reason) of a kind of figure."""
    share, absolute, reason = TOLERANCES[kind]
    return share * published + absolute, reason


@dataclass(frozen=True)
class Wanted:
    """A figure of the catalogue: its stage and key there, its name, and what is published."""

    stage: str
    key: str
    name: str
    kind: str = ""  # of TOLERANCES
    published: float | None = None
    note: str = ""
    clock: bool = False

    def figure(self, measured: Mapping[str, object], comparable: bool) -> Figure:
        """With what the stage measured; without tolerance unless it is comparable."""
        value, limits = measured.get(self.key), (None, "")
        if comparable and self.published is not None and self.kind:
            limits = tolerance(self.kind, self.published)
        return Figure(self.name, self.published, value, *limits, note=self.note, clock=self.clock)


def pair_key(bits: int | None, half_width: float | None) -> str:
    """Key of a reconstruction's FID."""
    return "fid VAE alone" if bits is None else f"fid {bits:g} {half_width:g}"


def catalogue(iterations: tuple[int, int] = (256, 64), fid_infinity: bool = False) -> list[Wanted]:
    """Every figure, in the report's order. iterations: of the evaluation, and of the stage "speed"."""
    found = [Wanted("reconstruction", "fid VAE alone", "reconstruction, VAE alone: FID", "reconstruction FID", 1.11)]
    for (bits, width), fid in {k: v for k, v in (FIDS_BY_BITS | FIDS_BY_RANGE).items() if k is not None}.items():
        stage = "reconstruction" if (bits, width) == (6, 5) else "bits" if width == 5 else "ranges"
        name = f"reconstruction, {bits} bits, ±{width}: FID"
        found.append(Wanted(stage, pair_key(bits, width), name, "reconstruction FID", fid))
    found += [
        Wanted("reconstruction", "is", "reconstruction, 6 bits, ±5: IS", "reconstruction IS", 305.0),
        Wanted("validation", "rfid", "validation images, VAE alone: rFID", "rFID", 0.53),
        Wanted("validation", "rfid 6 5", "validation images, 6 bits, ±5: rFID"),
    ]
    for model, millions in PARAMETERS.items():
        for name, value in load_preset(f"{model}_eval").expected.items():
            kind = name if name in TOLERANCES else ""
            found.append(Wanted(model, name.lower().replace(" ", "_"), f"{model}: {name}", kind, value))
        if fid_infinity:
            found.append(Wanted(model, "fid_infinity", f"{model}: FID∞", note="an estimate, extrapolated"))
        found.append(Wanted(f"parameters-{model}", "millions", f"{model}: parameters, M", "parameters, M", millions))
    for stage, steps in zip(("large", "speed"), iterations, strict=True):
        name, note = f"large: images/s, {steps} iterations", "all devices, VAE and Inception included; not published"
        found.append(Wanted(stage, "images_per_s", name, note=note, clock=True))
    return [*found, Wanted("head", "ms", f"large: {HEAD_ROW}, ms", note=PAPER_HEAD, clock=True)]


# ---- reading what the stages wrote


def read_reconstruction(folder: Path, script: bool = True) -> dict[str, object]:
    """FID, rFID and IS of results.json; if the published script measures them, the settings that differ from its."""
    record = read_json(folder / "results.json", {"rows": [dict], "settings": dict, "pixels": str})
    found: dict[str, object] = {}
    for row in record["rows"]:
        key = pair_key(row["bits"], row["range"])
        found |= {key: row["fid"], key.replace("fid", "rfid"): row["rfid"]}
        if (row["bits"], row["range"]) == (6, 5):
            found["is"] = row["inception_score"]
    settings = record["settings"] | {"pixels": record["pixels"]}
    differs = differences(settings, RECONSTRUCTION if script else {}) + reference_differences(
        {name: value for name, value in record.items() if name in ("fid_stats", "inception_sha256") and value}
    )
    return found | {"rfid": found["rfid VAE alone"], "differs": differs}


def read_records(folder: Path) -> list[dict]:
    """The lines of eval.jsonl; the last one may be incomplete after a kill."""
    return list(read_lines(folder / "eval.jsonl", {"fid": float, "cfg": float, "num_iter": int}))


def read_evaluation(folder: Path, preset: str, cfg: float) -> dict[str, object]:
    """The scores of the last record of eval.jsonl at that guidance, and the settings that differ from the preset's."""
    records = [record for record in read_records(folder) if record["cfg"] == cfg]
    if not records:
        raise ValueError(f"{folder / 'eval.jsonl'} has no record with cfg {cfg:g}")
    record, published = records[-1], load_preset(preset)
    machine = ("folder", "world_size")  # a run that resumes a finished one generates nothing, and has no rate
    same = [r for r in records if r.get("images_per_s") and all(r.get(name) == record.get(name) for name in machine)]
    settings = run_settings(record)
    differs = differences(settings, published.decisive | published.neutral) + reference_differences(record)
    keys = ("fid", "inception_score", "inception_score_std", "precision", "recall", "fid_infinity")
    scores = {key: record.get(key) for key in keys}
    return scores | {
        "images_per_s": same[-1]["images_per_s"] if same else None,
        "num_iter": record["num_iter"],
        "differs": differs,
    }


def read_guidance(folder: Path, scales: Iterable[float]) -> dict[str, object]:
    """FID at each guidance scale, of the last record with it."""
    records = read_records(folder)
    return {f"{cfg:g}": [r["fid"] for r in records if r["cfg"] == cfg][-1] for cfg in scales}


def count_parameters(path: str | Path) -> dict[str, object]:
    """Millions of parameters of a checkpoint's model."""
    file = find_file(path)
    config = build.describe(read_file(file, mmap=True), str(file))[1]
    with torch.device("meta"):
        return {"millions": sum(p.numel() for p in TokenBridge(config).parameters()) / 1e6}


def read_head(path: Path) -> dict[str, object]:
    """Milliseconds of the head from the results of tools.bench gpu; ValueError with its reason if it has none."""
    results = read_json(path, {"rows": [{"name": str, "value": float}], "skipped": [{"name": str, "reason": str}]})
    for row in results["rows"]:
        if row["name"] == HEAD_ROW:
            return {"ms": row["value"]}
    raise ValueError(f"{path} has no row {HEAD_ROW!r}: {[entry['reason'] for entry in results['skipped']]}")
