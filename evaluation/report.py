"""What evaluations print and draw: scores in words, tables, CSV files and plots."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.metrics import columns
from util.files import replacing


class Column(NamedTuple):
    """A column of a text table: its title, the key of a row, the value's format and the cell's alignment and width."""

    title: str
    key: str
    form: str
    width: str


def text_line(row: dict, table: Iterable[Column]) -> str:
    """One line of a table; "-" where the row has no value."""
    values = ((row.get(column.key), column) for column in table)
    return "".join(f"{'-' if value is None else format(value, c.form):{c.width}}" for value, c in values)


def title_line(table: Iterable[Column]) -> str:
    """The line of the titles."""
    return "".join(f"{column.title:{column.width}}" for column in table)


def write_csv(path: Path, rows: Iterable[dict], keys: Sequence[str]) -> None:
    """The rows' values of these keys, written atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


# ---- sweeps of --evaluate


def scores_in_words(record: dict) -> str:
    """The scores that were computed, with the standard deviations that there are, on one line."""
    words = []
    for key, title in columns().items():
        if title and record[key] is not None:
            spread = record.get(f"{key}_std")
            words.append(f"{title} {record[key]:.4g}" + ("" if spread is None else f" +- {spread:.2g}"))
    return "  ".join(words)


def sweep_table(records: Sequence[dict]) -> str:
    """One line per setting, a star at the lowest FID."""
    best = min(record["fid"] for record in records)
    table = [Column("cfg", "cfg", "g", ">7"), Column("temperature", "temperature", "g", ">13")]
    table += [Column(title, key, ".4g", ">11") for key, title in columns().items() if title]
    stars = ("  *" if record["fid"] == best else "" for record in records)
    return "\n".join([title_line(table), *(text_line(r, table) + star for r, star in zip(records, stars, strict=True))])


def write_sweep(records: Sequence[dict], output: Path) -> None:
    """eval_sweep.csv, and eval_sweep.png: FID and Inception Score against guidance, a line per temperature.

    If cfg is fixed, against temperature.
    """
    names = ["cfg", "temperature", *columns(), "num_images", "num_iter", "seed"]
    write_csv(output / "eval_sweep.csv", records, names)
    from matplotlib.figure import Figure  # slow to import

    varied, fixed = ("cfg", "temperature") if len({r["cfg"] for r in records}) > 1 else ("temperature", "cfg")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("fid", "inception_score"), strict=True):
        for value in dict.fromkeys(record[fixed] for record in records):
            points = sorted((r[varied], r[key]) for r in records if r[fixed] == value)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{fixed} {value:g}")
        axes.set(xlabel={"cfg": "guidance scale"}.get(varied, varied), ylabel=columns()[key])
        axes.legend()
    with replacing(output / "eval_sweep.png") as file:
        figure.savefig(file, dpi=120, format="png")
