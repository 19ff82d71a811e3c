"""What reconstruction.py prints and draws: its table beside the published figures, CSV file, plot and grids."""

from collections.abc import Sequence
from pathlib import Path

from evaluation.report import Column, text_line, title_line, write_csv
from util.files import replacing

# Published by (bits, range); None is the VAE alone. ImageNet, KL-16, 256 px.
FIDS_BY_BITS = {None: 1.11, (3, 5): 3.69, (4, 5): 1.33, (5, 5): 1.12, (6, 5): 1.11}
FIDS_BY_RANGE = {(6, 4): 1.13, (6, 3): 1.22, (6, 2): 2.26}
PUBLISHED = {
    "published_fid": FIDS_BY_BITS | FIDS_BY_RANGE,
    "published_inception_score": {(6, 5): 305.0},
    "published_rfid": {None: 0.53},
}
PUBLISHED_IS_ABOUT = {
    "published_fid": "FID of 50 reconstructed training images of each class against ADM's statistics, "
    "adm_in256_stats.npz, pixels truncated",
    "published_inception_score": "about 305, of the same images",
    "published_rfid": "FID of the validation images against their originals, VAE alone",
}
FOOTNOTES = (
    "* published, ImageNet, KL-16, 256 px: 50 reconstructed training images of each class against ADM's statistics; "
    "IS about 305",
    "+ published, ImageNet, KL-16, 256 px: the validation images against their originals, VAE alone",
)
TABLE = (
    Column("PSNR dB", "psnr", ".2f", ">9"),
    Column("SSIM", "ssim", ".4f", ">9"),
    Column("FID", "fid", ".3f", ">11"),
    Column("published*", "published_fid", ".2f", ">12"),
    Column("IS", "inception_score", ".2f", ">9"),
    Column("published*", "published_inception_score", ".0f", ">12"),
    Column("rFID", "rfid", ".3f", ">11"),
    Column("published+", "published_rfid", ".2f", ">12"),
    Column("LPIPS", "lpips", ".4f", ">9"),
    Column("clamped", "clamped_share", ".4%", ">11"),
    Column("bits/image", "bits_per_image", ".0f", ">12"),
    Column("entropy", "entropy_bits_per_image", ".0f", ">9"),
)
NAME, LEVELS_USED = Column("", "name", "", "<22"), Column("indices used", "levels_used", "", ">14")
IF_COMPUTED = ("fid", "lpips", *PUBLISHED)  # columns that only appear if some row has a value
CSV_KEYS = (
    *("name", "quantizer", "bits", "range", "pixels", "psnr", "ssim", "lpips", "fid", "published_fid"),
    *("inception_score", "inception_score_std", "published_inception_score", "rfid", "published_rfid"),
    *("clamped_share", "bits_per_image", "entropy_bits_per_image"),
    *("entropy_mean", "entropy_lowest", "entropy_highest", "indices_used"),
)


def published_figures(pair: tuple[int, float] | None, comparable: bool) -> dict[str, float | None]:
    """The published figures of (bits, range), None being the VAE alone; all None if ours are not comparable."""
    return {key: values.get(pair) if comparable else None for key, values in PUBLISHED.items()}


def reconstruction_table(rows: Sequence[dict]) -> str:
    """The rows as text, published figures beside ours if they are comparable; LPIPS and FID only if computed."""
    known = {key for row in rows for key in IF_COMPUTED if row.get(key) is not None}
    published = bool(known & PUBLISHED.keys())
    shown = {"fid", *known} if published else known
    table = [NAME, *(c for c in TABLE if c.key not in IF_COMPUTED or c.key in shown), LEVELS_USED]
    lines = [title_line(table)]
    for row in rows:
        used = None if row["bits"] is None else f"{row['indices_used']}/{2 ** row['bits']}"
        lines.append(text_line(row | {"levels_used": used}, table))
    return "\n".join([*lines, *(FOOTNOTES if published else ())])


def write_reconstruction_csv(path: Path, rows: Sequence[dict], pixels: str) -> None:
    """One line per variant; pixels: how values became bytes. Entropies per dimension are in results.json only."""

    def line(row: dict) -> dict:
        entropies = row["entropy_per_dimension"]
        if not entropies:
            return row | {"pixels": pixels}
        about = {"entropy_lowest": min(entropies), "entropy_highest": max(entropies)}
        return row | {"pixels": pixels, "entropy_mean": sum(entropies) / len(entropies)} | about

    write_csv(path, map(line, rows), CSV_KEYS)


def draw_rate_distortion(path: Path, rows: Sequence[dict]) -> None:
    """PSNR, and FID and rFID if known, over the entropy of the indices in bits per image.

    A line per quantizer and range; the VAE alone is dashed.
    """
    from matplotlib.figure import Figure  # slow to import

    alone, quantized = rows[0], [row for row in rows if row["bits"] is not None]
    titles = {"psnr": "PSNR, dB", "fid": "FID", "rfid": "rFID"}
    titles = {key: title for key, title in titles.items() if key == "psnr" or alone.get(key) is not None}
    figure = Figure(figsize=(4.8 * len(titles), 3.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        for kind, half_width in dict.fromkeys((row["quantizer"], row["range"]) for row in quantized):
            line = [row for row in quantized if (row["quantizer"], row["range"]) == (kind, half_width)]
            points = sorted((row["entropy_bits_per_image"], row[key], row["bits"]) for row in line)
            label = f"±{half_width:g}" + ("" if kind == "gaussian" else f", {kind}")
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label)
            for x, y, bits in points:
                axes.annotate(f"{bits}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.axhline(alone[key], color="gray", linestyle="--", label="VAE alone")
        axes.set(xlabel="entropy, bits per image (labels: bits per dimension)", ylabel=title)
        axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def worst_and_median(scores: dict[int, float], count: int) -> tuple[list[int], list[int]]:
    """Image numbers with the lowest scores, worst first, and those around the median; at most `count` of each."""
    order = sorted(scores, key=lambda number: (scores[number], number))
    middle = max(0, (len(order) - count) // 2)
    return order[:count], order[middle : middle + count]
