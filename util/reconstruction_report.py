"""What reconstruction.py prints and draws: the table with the published numbers beside ours, a CSV, rate against distortion, worst and median images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from util.files import replacing

# Published rFID by (bits, range); None is the VAE alone. ImageNet, KL-16, 256 px, 50 training images of each class (SPEC 3, 9).
PUBLISHED_RFID = {None: 1.11, (3, 5.0): 3.69, (4, 5.0): 1.33, (5, 5.0): 1.12, (6, 5.0): 1.11, (6, 4.0): 1.13, (6, 3.0): 1.22, (6, 2.0): 2.26}

# Column title -> (key of a row, format, width)
TABLE = {"PSNR dB": ("psnr", ".2f", 9), "SSIM": ("ssim", ".4f", 9), "rFID": ("rfid", ".3f", 9), "published*": ("published_rfid", ".2f", 12),
         "IS": ("inception_score", ".2f", 9), "LPIPS": ("lpips", ".4f", 9), "FID": ("fid", ".3f", 9), "clamped": ("clamped_share", ".4%", 11),
         "bits/image": ("bits_per_image", ".0f", 12), "entropy": ("entropy_bits_per_image", ".0f", 9)}
ALWAYS = ("PSNR dB", "SSIM", "rFID", "published*", "IS", "clamped", "bits/image", "entropy")
CSV_KEYS = ("name", "quantizer", "bits", "range", "psnr", "ssim", "lpips", "rfid", "fid", "published_rfid", "inception_score", "inception_score_std",
            "clamped_share", "bits_per_image", "entropy_bits_per_image", "entropy_mean", "entropy_lowest", "entropy_highest", "indices_used")


def table(rows: Sequence[dict]) -> str:
    """The rows as text, with the published rFID beside ours; LPIPS and FID only where they were computed."""
    columns = {title: spec for title, spec in TABLE.items() if title in ALWAYS or rows[0].get(spec[0]) is not None}

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)
    lines = [f"{'':<22}" + "".join(f"{title:>{width}}" for title, (_, _, width) in columns.items()) + f"{'indices used':>14}"]
    for row in rows:
        used = "-" if row["bits"] is None else f"{row['indices_used']}/{2 ** row['bits']}"
        lines.append(f"{row['name']:<22}" + "".join(f"{cell(row.get(key), form):>{width}}" for key, form, width in columns.values()) + f"{used:>14}")
    return "\n".join([*lines, "* rFID published, ImageNet, KL-16: 256 px, 50 training images of each class"])


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """One line per variant; the entropies of the single dimensions are in results.json."""
    text = io.StringIO()
    out = csv.DictWriter(text, CSV_KEYS, extrasaction="ignore")
    out.writeheader()
    for row in rows:
        entropies = row["entropy_per_dimension"]
        about = ("entropy_mean", "entropy_lowest", "entropy_highest")
        out.writerow(row | (dict(zip(about, (sum(entropies) / len(entropies), min(entropies), max(entropies)), strict=True)) if entropies else {}))
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def draw_rate_distortion(path: Path, rows: Sequence[dict]) -> None:
    """PSNR, and rFID where it is known, over the entropy of the indices in bits per image: a line per quantizer and range, the VAE alone dashed."""
    from matplotlib.figure import Figure  # slow to import
    alone, quantized = rows[0], [row for row in rows if row["bits"] is not None]
    keys = {"psnr": "PSNR, dB"} | ({"rfid": "rFID"} if alone["rfid"] is not None else {})
    figure = Figure(figsize=(4.8 * len(keys), 3.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys.items(), strict=True):
        for name in dict.fromkeys((row["quantizer"], row["range"]) for row in quantized):
            points = sorted((row["entropy_bits_per_image"], row[key], row["bits"]) for row in quantized if (row["quantizer"], row["range"]) == name)
            label = f"±{name[1]:g}" + ("" if name[0] == "gaussian" else f", {name[0]}")
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=label)
            for x, y, bits in points:
                axes.annotate(f"{bits}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.axhline(alone[key], color="gray", linestyle="--", label="VAE alone")
        axes.set(xlabel="entropy of the indices, bits per image (labels: bits per dimension)", ylabel=title)
        axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def worst_and_median(scores: dict[int, float], count: int) -> tuple[list[int], list[int]]:
    """Image numbers with the lowest scores, worst first, and those around the median, `count` of each (fewer if there are not so many)."""
    order = sorted(scores, key=lambda number: (scores[number], number))
    middle = max(0, (len(order) - count) // 2)
    return order[:count], order[middle : middle + count]
