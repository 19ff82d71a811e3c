"""Evaluating a model by the images it makes: FID, Inception Score and their relatives, resumable, over many processes. No parsing.

Images are made in batches that are always the same, batch b by process b mod (number of processes); each batch's features go to a shard on the disk
and into float64 sums, which merge exactly. So one process and eight give the same scores, and a killed run continues.

Letters: B images of a batch, N of all, S their side in pixels.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import download
from dataset.images import to_uint8
from evaluation.metrics import (
    SPATIAL_DIM,
    FeatureStatistics,
    InceptionFeatures,
    InceptionScoreSums,
    fetch_inception_weights,
    fid,
    fid_infinity,
    file_sha256,
    kid,
    precision_recall,
    psnr,
)
from evaluation.published import comparison
from evaluation.reference import Reference, load_reference_stats, load_references
from evaluation.store import SUSPICIOUS_SHARE, EvalStore, batches_of, image_flaws
from generation.pipeline import GenerationSettings, generate_batches, generation_settings
from generation.sample import balanced_labels
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.cli import check_writable
from util.files import replacing, write_json
from util.log import get_logger
from util.presets import load_preset

logger = get_logger()
FEW_IMAGES = 10_000  # with fewer, FID is visibly too high
ROUNDTRIP_PSNR = 15.0  # dB; a VAE that fits its latents gives 25 and more
ROUNDTRIP_STD = (0.25, 4.0)  # of scaled latents, which are made to have 1


def spread_of_labels(labels: Sequence[int], class_num: int) -> str:
    """In words, how many images each class gets."""
    each, rest = divmod(len(labels), class_num)
    if not rest:
        return f"{each} of each of {class_num} classes"
    if not each:
        return f"one of each of the first {rest} of {class_num} classes, none of the others"
    return f"{each} of each of {class_num} classes and one more of each of the first {rest}"


# ------------------------------------------------------------------------------------------------------------- scores of one set of images


class Scores:
    """Sums over the images of all processes, and what they come to; the features themselves are kept only if a score needs them."""

    def __init__(
        self, num_images: int, reference: Reference, with_infinity: bool = False, device: torch.device | None = None
    ):
        self.reference, self.with_infinity, self.num_images = reference, with_infinity, num_images
        self.device = device or torch.device("cpu")  # where the distances of all pairs of images are computed
        self.pool = FeatureStatistics(len(reference.mu))
        self.spatial = FeatureStatistics(SPATIAL_DIM) if reference.spatial is not None else None
        self.classes = InceptionScoreSums(num_images)
        self.kept: dict[int, Tensor] | None = {} if with_infinity or reference.features is not None else None
        self.flaws = torch.zeros(3, dtype=torch.float64)  # images, near constant, saturated

    def add(self, numbers: Sequence[int], found: dict[str, Tensor]) -> None:
        """A batch's features and flaws (`EvalStore` has the same keys)."""
        self.pool.update(found["2048"])
        if self.spatial is not None:
            self.spatial.update(found["spatial"])
        self.classes.update(numbers, found["logits_unbiased"])
        if self.kept is not None:
            self.kept[numbers[0]] = found["2048"].cpu()
        self.flaws += torch.tensor(
            [len(numbers), *(float(found[key].sum()) for key in ("near_constant", "saturated"))], dtype=torch.float64
        )

    def finish(self) -> dict | None:
        """The scores, on rank 0 (None elsewhere); every process must call it."""
        for sums in (self.pool, self.classes, *([self.spatial] if self.spatial is not None else [])):
            sums.merge()
        images, near_constant, saturated = dist.all_reduce_sum(self.flaws).tolist()
        parts = dist.gather_to_main(self.kept) if self.kept is not None else None
        if not dist.is_main():
            return None
        if images != self.num_images:
            raise RuntimeError(f"{images:.0f} images were scored instead of {self.num_images}")
        score, spread = self.classes.score()
        scores = {
            "fid": fid(self.pool.as_dict(), self.reference.pool),
            "inception_score": score,
            "inception_score_std": spread,
            "sfid": None if self.spatial is None else fid(self.spatial.as_dict(), self.reference.spatial),
            "precision": None,
            "recall": None,
            "kid": None,
            "kid_std": None,
            "fid_infinity": None,
            "near_constant_share": near_constant / images,
            "saturated_share": saturated / images,
        }
        if parts is not None:
            features = torch.empty(self.num_images, len(self.reference.mu))
            for one in parts:  # one process holds its own batches only: freed as they are copied
                while one:
                    first, part = one.popitem()
                    features[first : first + len(part)] = part
            self.kept = None
            if self.reference.features is not None:
                scores["precision"], scores["recall"] = precision_recall(
                    features.to(self.device), self.reference.features.to(self.device)
                )
                scores["kid"], scores["kid_std"] = kid(features, self.reference.features)
            if self.with_infinity:
                scores["fid_infinity"] = fid_infinity(features, self.reference.pool)
        return scores


def warn_of_flaws(scores: dict) -> None:
    """Say so if many images show nothing."""
    for key, what in (
        ("near_constant_share", "show next to nothing (black, grey or one colour)"),
        ("saturated_share", "are saturated (nearly all values 0 or 255)"),
    ):
        if scores[key] > SUSPICIOUS_SHARE:
            logger.warning(
                "%.0f %% of the images %s: a broken or untrained model, the EMA of a short run (--weights model), or another VAE's latents",
                100 * scores[key],
                what,
            )


def evaluate(
    model: TokenBridge,
    vae: AutoencoderKL,
    labels: Sequence[int],
    settings: GenerationSettings,
    features: InceptionFeatures,
    reference: Reference,
    device: torch.device,
    *,
    store: EvalStore | None = None,
    with_infinity: bool = False,
) -> dict | None:
    """Generate len(labels) images over all processes and score them; the scores on rank 0, None on the others.

    store: what is there already is not made again, what is made is written there. ValueError if an image's logits or pixels are not finite.
    """
    mine = batches_of(len(labels), settings.batch_size)[dist.rank() :: dist.world_size()]
    scores, roundtrip = Scores(len(labels), reference, with_infinity, device), None
    pending = {batch for batch in mine if store is None or store.read(batch) is None}
    total, left = sum(map(len, mine)), sum(map(len, pending))
    if left < total:
        logger.info("%d of %d images of this process were made before", total - left, total)
    started, made = time.perf_counter(), 0
    for batch in mine:  # in their order: the sums of a resumed run are those of any other, to the last bit
        found = None if batch in pending else store.read(batch)
        if found is not None:
            scores.add(batch, found)
            continue
        ((_, images),) = generate_batches(model, vae, labels, batch, settings, device)
        if roundtrip is None:
            roundtrip = vae_roundtrip(vae, images, model.quant_min, model.quant_max)
        found = features(images) | image_flaws(images)
        if store is not None:
            store.write(batch, images, found)
        scores.add(batch, found)
        made += len(batch)
        rate = made / (time.perf_counter() - started)
        logger.info(
            "generated %d/%d images  %.2f images/s  ETA %.0f s",
            (total - left + made) * dist.world_size(),
            len(labels),
            rate * dist.world_size(),
            (left - made) / rate,
        )
    result = scores.finish()
    if result is not None:
        warn_of_flaws(result)
        result |= {
            "vae_roundtrip": roundtrip,
            "images_per_s": made * dist.world_size() / max(time.perf_counter() - started, 1e-9) if made else None,
        }
        if store is not None:
            store.write_archive(labels, settings.batch_size)
    return result


@torch.no_grad()
def vae_roundtrip(
    vae: AutoencoderKL, images: Tensor, quant_min: float, quant_max: float, count: int = 8
) -> dict[str, float]:
    """Encode and decode some of the generated images (B, 3, S, S): PSNR in dB, the scaled latents' standard deviation and share out of range.

    A VAE, a scale or a range that does not belong to the model shows here; then a warning is logged.
    """
    images = images[:count]
    latents = vae.scale(vae.encode(images.to(next(vae.parameters()).device).float() / 127.5 - 1).mode())
    again = to_uint8(vae.decode(vae.unscale(latents)))
    found = {
        "psnr": psnr(again, images.to(again.device)).mean().item(),
        "latent_std": latents.std().item(),
        "out_of_range": ((latents < quant_min) | (latents > quant_max)).float().mean().item(),
    }
    if found["psnr"] < ROUNDTRIP_PSNR or not ROUNDTRIP_STD[0] < found["latent_std"] < ROUNDTRIP_STD[1]:
        logger.warning(
            "the VAE does not reproduce the generated images (PSNR %.1f dB, expected over %g; latents' standard deviation %.2f, expected "
            "about 1): is --vae_path the model's VAE, and is its scale right?",
            found["psnr"],
            ROUNDTRIP_PSNR,
            found["latent_std"],
        )
    return found


# ------------------------------------------------------------------------------------------------------------- a run of --evaluate


def provide_references(args: argparse.Namespace, img_size: int) -> None:
    """Fetch the published references that --fid_stats and --pr_reference name, if they are missing; refuse what is
    still missing afterwards.
    """
    for flag in ("fid_stats", "pr_reference"):
        path = getattr(args, flag)
        if path and img_size == download.PUBLISHED_SIZE:
            download.provide(path, f"--{flag}", args.no_download)
        if path and not Path(path).exists():
            load_reference_stats(path, f"--{flag}")  # says what to do, before Inception's weights are asked for
    if args.no_download:
        fetch_inception_weights(args.inception_weights, download=False)


def described(flag: str, path: str | None) -> dict[str, str | None]:
    """What a record says of a reference: its path and, of a file, its hash."""
    return {flag: path and str(path), f"{flag}_sha256": file_sha256(path) if path and Path(path).is_file() else None}


def sweep_values(args: argparse.Namespace) -> list[tuple[float, float]]:
    """All pairs (guidance scale, temperature) of --cfg and --temperature; the flags then hold the first of each, one number.

    ValueError if several are given where only one makes sense.
    """
    values = {
        name: list(dict.fromkeys(value)) if isinstance(value := getattr(args, name), list) else [value]
        for name in ("cfg", "temperature")
    }
    for name, several in values.items():
        modes = ["evaluate", "online_eval"] + (["sample"] if name == "cfg" else [])
        if len(several) > 1 and (args.sample and name != "cfg" or not any(getattr(args, mode) for mode in modes)):
            raise ValueError(f"--{name} takes several values with {' and '.join(f'--{mode}' for mode in modes)} only")
        for value in several:
            if not math.isfinite(value):
                raise ValueError(f"--{name} must be finite, got {value}")
            if name == "temperature" and value < 0:
                raise ValueError(f"--temperature must be at least 0, got {value}")
        setattr(args, name, several[0])
    return list(itertools.product(values["cfg"], values["temperature"]))


def online_pairs(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The evaluations of --online_eval, (guidance scale, temperature): first without guidance, then at every --cfg that is neither 1 nor 0."""
    temperatures = list(dict.fromkeys(temperature for _, temperature in pairs))
    return [(1.0, temperature) for temperature in temperatures] + [
        (cfg, temperature) for cfg, temperature in pairs if cfg not in (0, 1)
    ]


def plain(settings: GenerationSettings) -> dict:
    """The settings for a record; the arithmetic's precision by another name, since a score is called so too."""
    found = asdict(settings)
    return found | {"arithmetic": found.pop("precision")}


@dataclass
class Evaluator:
    """Scores of a model's images; what it needs is read, and refused if wrong, when it is made (`Evaluator.prepare`)."""

    args: argparse.Namespace
    device: torch.device
    settings: GenerationSettings
    features: InceptionFeatures
    reference: Reference
    output: Path
    inputs: dict  # what the scores depend on besides the sampler's settings

    @classmethod
    def prepare(cls, args: argparse.Namespace, device: torch.device, img_size: int | None = None) -> "Evaluator":
        """Read the Inception weights and the references; every process calls it. ValueError or OSError for what does
        not fit.
        """
        img_size = img_size or args.img_size
        provide_references(args, img_size)
        settings, features = generation_settings(args, device), InceptionFeatures(args.inception_weights, device)
        reference = load_references(
            args.fid_stats,
            args.pr_reference,
            features,
            img_size,
            batch_size=args.eval_bsz,
            num_workers=args.num_workers,
        )
        output = check_writable(args.output_dir, "--output_dir")
        inputs = {
            "num_images": args.num_images,
            **described("fid_stats", args.fid_stats),
            **described("pr_reference", args.pr_reference),
            "inception_sha256": features.sha256,
        }
        if reference.features is None and dist.is_main():
            logger.info(
                "%s (--fid_stats) holds statistics alone, so precision, recall and KID are not computed: %s",
                args.fid_stats,
                download.PRECISION_RECALL_HINT
                if img_size == download.PUBLISHED_SIZE
                else "they need images or features (--pr_reference)",
            )
        if args.num_images < FEW_IMAGES and dist.is_main():
            logger.warning(
                "%d images make FID too high: compare with runs of as many only, or add --fid_infinity; published numbers use 50,000",
                args.num_images,
            )
        return cls(args, device, settings, features, reference, output, inputs)

    def __call__(
        self,
        model: TokenBridge,
        vae: AutoencoderKL,
        *,
        settings: GenerationSettings | None = None,
        store: EvalStore | None = None,
        **about: object,
    ) -> dict | None:
        """Scores of one setting, logged and appended to OUT/eval.jsonl with everything they depend on; rank 0 returns that record."""
        settings = settings or self.settings
        labels, started = balanced_labels(self.args.num_images, range(model.class_num)), time.perf_counter()
        logger.info("%d images: %s", len(labels), spread_of_labels(labels, model.class_num))
        scores = evaluate(
            model,
            vae,
            labels,
            settings,
            self.features,
            self.reference,
            self.device,
            store=store,
            with_infinity=self.args.fid_infinity,
        )
        if scores is None:
            return None
        record = (
            scores
            | plain(settings)
            | self.inputs
            | about
            | {
                "model": self.args.model,
                "img_size": model.config.img_size,
                "vae_path": str(self.args.vae_path),
                "head_start": model.head_start,
                "class_num": model.class_num,
                "quant_bits": model.config.quant_levels.bit_length() - 1,
                "quant_min": model.quant_min,
                "quant_max": model.quant_max,
                "world_size": dist.world_size(),
                "device": str(self.device),
                "tf32": dist.allows_tf32(self.device),
                "torch": torch.__version__,
                "seconds": time.perf_counter() - started,
                "time": time.time(),
            }
        )
        with (self.output / "eval.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info(
            "cfg %g, temperature %g, %d iterations: %s",
            settings.cfg,
            settings.temperature,
            settings.num_iter,
            in_words(record),
        )
        return record

    def during_training(
        self, pairs: Sequence[tuple[float, float]], model: TokenBridge, vae: AutoencoderKL, step: int
    ) -> None:
        """--online_eval: score the averaged model at each of `online_pairs(pairs)`; one line of eval.jsonl each."""
        for cfg, temperature in online_pairs(pairs):
            self(
                model, vae, settings=replace(self.settings, cfg=cfg, temperature=temperature), step=step, weights="ema"
            )

    def run(
        self, model: TokenBridge, vae: AutoencoderKL, source: Path, pairs: Sequence[tuple[float, float]]
    ) -> list[dict]:
        """--evaluate: every pair of guidance scale and temperature, each in a folder of its own; table, CSV and plot if there are several."""
        hashes = [None]
        if dist.is_main():
            hashes = [{"checkpoint_sha256": file_sha256(source), "vae_sha256": file_sha256(self.args.vae_path)}]
        about = {
            "checkpoint": str(source),
            "weights": self.args.weights,
            "vae_config": vae.config,
            **dist.broadcast_from_main(hashes[0]),
        }
        records = []
        for cfg, temperature in pairs:
            settings = replace(self.settings, cfg=cfg, temperature=temperature)
            key = plain(settings) | self.inputs | about
            key = {
                name: value
                for name, value in key.items()
                if name != "checkpoint" and not name.startswith(("fid_stats", "pr_reference"))
            }
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
            folder = self.output / "eval" / f"cfg{cfg:g}-t{temperature:g}-{digest}"
            if dist.is_main():
                write_json(folder / "settings.json", key)
            logger.info(
                "cfg %g, temperature %g: features%s in %s",
                cfg,
                temperature,
                "" if self.args.save_images == "none" else " and images",
                folder,
            )
            record = self(
                model,
                vae,
                settings=settings,
                store=EvalStore(folder, self.args.save_images),
                folder=str(folder),
                **about,
            )
            records += [record] if record is not None else []
        dist.barrier()
        if len(records) > 1:
            print(sweep_table(records))
            write_sweep(records, self.output)
            logger.info("wrote %s and %s", self.output / "eval_sweep.csv", self.output / "eval_sweep.png")
        preset = load_preset(self.args.preset) if self.args.preset else None
        for record in records if preset and preset.evaluates else []:
            print(comparison(preset, record))
        return records


# ------------------------------------------------------------------------------------------------------------- reports

COLUMNS = {
    "fid": "FID",
    "inception_score": "IS",
    "sfid": "sFID",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "fid_infinity": "FID inf.",
}


def in_words(record: dict) -> str:
    """The scores that there are, on one line."""
    spread = {"inception_score": f" +- {record['inception_score_std']:.2f}"}
    return "  ".join(
        f"{name} {record[key]:.4g}{spread.get(key, '')}" for key, name in COLUMNS.items() if record[key] is not None
    )


def sweep_table(records: Sequence[dict]) -> str:
    """One line per setting, a star at the lowest FID."""
    best = min(record["fid"] for record in records)
    lines = [f"{'cfg':>7}{'temperature':>13}" + "".join(f"{name:>11}" for name in COLUMNS.values())]
    for record in records:
        cells = "".join(f"{'-' if record[key] is None else format(record[key], '.4g'):>11}" for key in COLUMNS)
        lines.append(f"{record['cfg']:>7g}{record['temperature']:>13g}{cells}{'  *' if record['fid'] == best else ''}")
    return "\n".join(lines)


def write_sweep(records: Sequence[dict], output: Path) -> None:
    """eval_sweep.csv, and eval_sweep.png: FID and Inception Score against guidance, a line per temperature (against temperature if cfg is fixed)."""
    names = ["cfg", "temperature", *COLUMNS, "inception_score_std", "kid_std", "num_images", "num_iter", "seed"]
    text = io.StringIO()
    table = csv.DictWriter(text, names, extrasaction="ignore")
    table.writeheader()
    table.writerows(records)
    with replacing(output / "eval_sweep.csv") as file:
        file.write(text.getvalue().encode())
    from matplotlib.figure import Figure  # slow to import

    across, lines = ("cfg", "temperature") if len({r["cfg"] for r in records}) > 1 else ("temperature", "cfg")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("fid", "inception_score"), strict=True):
        for value in dict.fromkeys(record[lines] for record in records):
            points = sorted((r[across], r[key]) for r in records if r[lines] == value)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{lines} {value:g}")
        axes.set(xlabel={"cfg": "guidance scale"}.get(across, across), ylabel=COLUMNS[key])
        axes.legend()
    with replacing(output / "eval_sweep.png") as file:
        figure.savefig(file, dpi=120, format="png")
