"""What reconstruction.py prints and draws: the table with the published numbers beside ours, a CSV, rate against distortion, worst and median images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from util.files import replacing

# Published by (bits, range); None is the VAE alone. ImageNet, KL-16, 256 px.
PUBLISHED_FID = {
    None: 1.11,
    (3, 5.0): 3.69,
    (4, 5.0): 1.33,
    (5, 5.0): 1.12,
    (6, 5.0): 1.11,
    (6, 4.0): 1.13,
    (6, 3.0): 1.22,
    (6, 2.0): 2.26,
}

PUBLISHED_INCEPTION_SCORE = {(6, 5.0): 305.0}
PUBLISHED_RFID = {None: 0.53}
PUBLISHED_IS_ABOUT = {
    "published_fid": "FID of 50 reconstructed training images of each class against ADM's statistics, "
    "adm_in256_stats.npz, pixels truncated",
    "published_inception_score": "about 305, of the same images",
    "published_rfid": "FID of the validation images against their originals, VAE alone",
}

# Column title, key of a row, format, width; shown where a row has a value, or always
TABLE = (
    ("PSNR dB", "psnr", ".2f", 9),
    ("SSIM", "ssim", ".4f", 9),
    ("FID", "fid", ".3f", 11),
    ("published*", "published_fid", ".2f", 12),
    ("IS", "inception_score", ".2f", 9),
    ("published*", "published_inception_score", ".0f", 12),
    ("rFID", "rfid", ".3f", 11),
    ("published+", "published_rfid", ".2f", 12),
    ("LPIPS", "lpips", ".4f", 9),
    ("clamped", "clamped_share", ".4%", 11),
    ("bits/image", "bits_per_image", ".0f", 12),
    ("entropy", "entropy_bits_per_image", ".0f", 9),
)
ALWAYS = ("psnr", "ssim", "rfid", "inception_score", "clamped_share", "bits_per_image", "entropy_bits_per_image")
CSV_KEYS = (
    "name",
    "quantizer",
    "bits",
    "range",
    "pixels",
    "psnr",
    "ssim",
    "lpips",
    "fid",
    "published_fid",
    "inception_score",
    "inception_score_std",
    "published_inception_score",
    "rfid",
    "published_rfid",
    "clamped_share",
    "bits_per_image",
    "entropy_bits_per_image",
    "entropy_mean",
    "entropy_lowest",
    "entropy_highest",
    "indices_used",
)


def published_figures(pair: tuple[int, float] | None, comparable: bool) -> dict[str, float | None]:
    """The published figures of a row, (bits, range) or None for the VAE alone; None where there is none, or ours are
    not comparable.
    """
    tables = {
        "published_fid": PUBLISHED_FID,
        "published_inception_score": PUBLISHED_INCEPTION_SCORE,
        "published_rfid": PUBLISHED_RFID,
    }
    return {key: values.get(pair) if comparable else None for key, values in tables.items()}


def table(rows: Sequence[dict]) -> str:
    """The rows as text, published figures beside ours where they are comparable; LPIPS and FID only where they were
    computed.
    """
    published = any(row.get(key) is not None for row in rows for key in PUBLISHED_IS_ABOUT)
    columns = [
        column
        for column in TABLE
        if column[1] in ALWAYS
        or published
        and column[1] == "fid"
        or any(row.get(column[1]) is not None for row in rows)
    ]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [f"{'':<22}" + "".join(f"{title:>{width}}" for title, _, _, width in columns) + f"{'indices used':>14}"]
    for row in rows:
        used = "-" if row["bits"] is None else f"{row['indices_used']}/{2 ** row['bits']}"
        lines.append(
            f"{row['name']:<22}"
            + "".join(f"{cell(row.get(key), form):>{width}}" for _, key, form, width in columns)
            + f"{used:>14}"
        )
    if published:
        lines.append(
            "* published, ImageNet, KL-16, 256 px: 50 reconstructed training images of each class against ADM's statistics; "
            "IS about 305"
        )
        lines.append("+ published, ImageNet, KL-16, 256 px: the validation images against their originals, VAE alone")
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[dict], pixels: str) -> None:
    """One line per variant; pixels: how their values became bytes. The entropies of the single dimensions are in
    results.json.
    """
    text = io.StringIO()
    out = csv.DictWriter(text, CSV_KEYS, extrasaction="ignore")
    out.writeheader()
    for row in rows:
        entropies = row["entropy_per_dimension"]
        about = ("entropy_mean", "entropy_lowest", "entropy_highest")
        out.writerow(
            row
            | {"pixels": pixels}
            | (
                dict(zip(about, (sum(entropies) / len(entropies), min(entropies), max(entropies)), strict=True))
                if entropies
                else {}
            )
        )
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def draw_rate_distortion(path: Path, rows: Sequence[dict]) -> None:
    """PSNR, and FID and rFID where they are known, over the entropy of the indices in bits per image: a line per
    quantizer and range, the VAE alone dashed.
    """
    from matplotlib.figure import Figure  # slow to import

    alone, quantized = rows[0], [row for row in rows if row["bits"] is not None]
    titles = {"psnr": "PSNR, dB", "fid": "FID", "rfid": "rFID"}
    keys = {key: title for key, title in titles.items() if key == "psnr" or alone.get(key) is not None}
    figure = Figure(figsize=(4.8 * len(keys), 3.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys.items(), strict=True):
        for name in dict.fromkeys((row["quantizer"], row["range"]) for row in quantized):
            points = sorted(
                (row["entropy_bits_per_image"], row[key], row["bits"])
                for row in quantized
                if (row["quantizer"], row["range"]) == name
            )
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
