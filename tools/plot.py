"""Curves of training runs, from their log.jsonl: `python -m tools.plot OUT [OTHER ...]` writes OUT/curves.png.

--expected FILE lays the band of a healthy run under the loss and says where a run leaves it; demo/expected_loss.json is the demo's.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from util.cli import at_least, make_parser
from util.files import replacing
from util.log import run_cli

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def read_columns(folder: Path) -> dict[str, np.ndarray]:
    """{name: values (N,)} of OUT/log.jsonl, NaN where a line lacks the name; lists become (N, C). ValueError or FileNotFoundError by name.

    Skipped steps are left out; their number is under "skipped". A last line cut short by a kill is passed over.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no log at {path}; give the --output_dir of a training run")
    lines, skipped = [], 0
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "loss" in line:
            lines.append(line)
        skipped += bool(line.get("skipped"))
    if not lines:
        raise ValueError(f"{path} has no step with a loss yet")
    columns: dict[str, np.ndarray] = {"skipped": np.array([skipped])}
    for name in {key for line in lines for key in line}:
        example = next(line[name] for line in lines if name in line)
        lacking = [np.nan] * len(example) if isinstance(example, list) else np.nan
        columns[name] = np.array([line.get(name, lacking) for line in lines], dtype=float)
    return columns


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the width - 1 before it; of as many as there are at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


@dataclass
class Expected:
    """How a healthy run's loss goes: the mean over `width` steps up to each of `steps`, and how far from it is still healthy."""

    steps: list[int]
    loss: list[float]
    width: int
    tolerance: float

    @classmethod
    def read(cls, path: str) -> "Expected":
        """From a JSON file with these names. ValueError or FileNotFoundError naming it."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} (--expected) must hold steps, loss, width and tolerance: {error}") from error

    def departures(self, c: dict[str, np.ndarray]) -> tuple[int, list[str]]:
        """How many of the steps the run has reached, and a line for each of them where it is outside the band."""
        reached, lines = 0, []
        for step, wanted in zip(self.steps, self.loss, strict=True):
            seen = c["loss"][(c["step"] > step - self.width) & (c["step"] <= step)]
            if c["step"][-1] < step or not len(seen):
                continue
            reached += 1
            if not abs(seen.mean() - wanted) <= self.tolerance:
                lines.append(
                    f"step {step}: loss {seen.mean():.3f}, a healthy run has {wanted:.2f} +- {self.tolerance:g}"
                )
        return reached, lines


def draw(folders: Sequence[Path], width: int | None = None, expected: Expected | None = None) -> plt.Figure:
    """Loss, learning rate and gradient norm of the runs over steps; of the first run the loss of each dimension too."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    (loss, rate), (norm, dims) = axes
    for folder in folders:
        c = read_columns(folder)
        over = width or max(1, len(c["loss"]) // 50)
        label = str(folder) + (f" ({c['skipped'][0]} steps skipped)" if c["skipped"][0] else "")
        (line,) = loss.plot(c["step"], smooth(c["loss"], over), label=label)
        loss.plot(c["step"], c["loss"], color=line.get_color(), alpha=0.25, linewidth=0.7)
        rate.plot(c["step"], c["lr"], label=str(folder))
        norm.plot(c["step"], smooth(c["grad_norm"], over), label=str(folder))
    loss.set(title=f"cross-entropy per dimension (nats), mean of {over} steps", xlabel="step")
    rate.set(title="learning rate", xlabel="step")
    norm.set(title="gradient norm before clipping", xlabel="step", yscale="log")
    if expected is not None:
        centre = np.array(expected.loss)
        loss.fill_between(
            expected.steps,
            centre - expected.tolerance,
            centre + expected.tolerance,
            color="green",
            alpha=0.15,
            label="healthy",
        )
    loss.legend()
    first = read_columns(folders[0])
    dims.set(title=f"loss of each dimension in head order: {folders[0]}", xlabel="step")
    if "loss_per_dim" in first:
        known = ~np.isnan(first["loss_per_dim"][:, 0])
        colours = plt.get_cmap("viridis")(np.linspace(0, 1, first["loss_per_dim"].shape[1]))
        for i, (curve, colour) in enumerate(zip(first["loss_per_dim"][known].T, colours, strict=True)):
            dims.plot(first["step"][known], curve, color=colour, label=f"{i} (leading)" if i == 0 else str(i))
        dims.legend(ncols=2, fontsize="x-small")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw to a PNG. ValueError or OSError for a folder that holds no log."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="+", help="--output_dir of training runs")
    parser.add_argument("--output", default="", help="PNG to write; default: curves.png in the first folder")
    parser.add_argument(
        "--smooth", type=int, default=None, help="steps to average over; default: a fiftieth of the run"
    )
    parser.add_argument(
        "--expected", default="", help="JSON file with the course of a healthy run, such as demo/expected_loss.json"
    )
    args = parser.parse_args(argv)
    at_least(args, smooth=1)
    folders = [Path(folder) for folder in args.folders]
    expected = Expected.read(args.expected) if args.expected else None
    figure = draw(folders, args.smooth, expected)
    path = Path(args.output) if args.output else folders[0] / "curves.png"
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    print(path)
    for folder in folders if expected is not None else ():
        reached, departures = expected.departures(read_columns(folder))
        print(
            f"{folder}: "
            + (
                "\n".join(departures)
                if departures
                else f"healthy at all {reached} of {len(expected.steps)} places that it has reached"
            )
        )


if __name__ == "__main__":
    sys.exit(run_cli(main))
