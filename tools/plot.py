"""Curves of training runs, from their log.jsonl: `python -m tools.plot OUT [OTHER ...]` writes OUT/curves.png.

--expected FILE draws the expected range of the loss and names the steps where a run leaves it; the demo's is
demo/expected_loss.json.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from util.cli import make_parser, run_cli
from util.files import replacing
from util.json_reader import conforms, read_json, read_lines
from util.log import doing

# A line of a step that was not skipped; others of a log are of other commands, or damaged.
LINE = {"step": int, "loss": float, "lr": float, "grad_norm": float, "loss_per_dim?": [float]}


def read_columns(folder: Path) -> dict[str, np.ndarray]:
    """{name: values (N,)} of OUT/log.jsonl, loss_per_dim (N, C), with NaN where a line lacks it.

    Skipped steps are left out; their number is under "skipped". Damaged lines, such as the last one after a kill, are
    ignored. ValueError or FileNotFoundError naming the file if it has no losses.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no log at {path}; give the --output_dir of a training run")
    lines, skipped = [], 0
    for line in read_lines(path):
        skipped += line.get("skipped") is True
        if conforms(line, LINE):
            lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no step with a loss yet")
    columns = {name: np.array([line[name] for line in lines], dtype=float) for name in LINE if "?" not in name}
    details = [line["loss_per_dim"] for line in lines if line.get("loss_per_dim")]
    if details:
        missing = [np.nan] * len(details[0])
        rows = [line.get("loss_per_dim", missing) for line in lines]
        columns["loss_per_dim"] = np.array([row if len(row) == len(missing) else missing for row in rows])
    return columns | {"skipped": np.array([skipped])}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the width - 1 before it; of fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


@dataclass
class Expected:
    """Expected course of the loss: its mean over `width` steps up to each of `steps`, within `tolerance`.

    about: which run it was recorded from.
    """

    steps: list[int]
    loss: list[float]
    width: int
    tolerance: float
    about: dict[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, flag: str = "--expected") -> "Expected":
        """From a JSON file with these names. ValueError or FileNotFoundError naming it."""
        try:
            numbers = {"steps": [int], "loss": [float], "width": int, "tolerance": float}
            return cls(**read_json(path, numbers | {"about?": dict}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} ({flag}) must hold steps, loss, width and tolerance: {error}") from error

    def report(self, columns: dict[str, np.ndarray]) -> str:
        """A line for each step where the run's loss is out of range; if there is none, how many steps were compared."""
        compared, lines = 0, []
        for step, expected in zip(self.steps, self.loss, strict=True):
            window = columns["loss"][(columns["step"] > step - self.width) & (columns["step"] <= step)]
            if columns["step"][-1] < step or not len(window):
                continue
            compared += 1
            if not abs(window.mean() - expected) <= self.tolerance:
                lines.append(f"step {step}: loss {window.mean():.3f}, expected {expected:.2f} +- {self.tolerance:g}")
        later = len(self.steps) - compared
        rest = f"; {later} later steps not reached" if later else ""
        return "\n".join(lines) or f"loss as expected at {compared} steps{rest}"


def draw(folders: Sequence[Path], width: int | None = None, expected: Expected | None = None) -> Figure:
    """Loss, learning rate and gradient norm of the runs over steps; of the first run the loss of each dimension too."""
    figure, runs = Figure(figsize=(12, 8), layout="constrained"), [read_columns(folder) for folder in folders]
    (loss, rate), (norm, dims) = figure.subplots(2, 2)
    for folder, c in zip(folders, runs, strict=True):
        window = width or max(1, len(c["loss"]) // 50)
        label = str(folder) + (f" ({c['skipped'][0]} steps skipped)" if c["skipped"][0] else "")
        (line,) = loss.plot(c["step"], smooth(c["loss"], window), label=label)
        loss.plot(c["step"], c["loss"], color=line.get_color(), alpha=0.25, linewidth=0.7)
        rate.plot(c["step"], c["lr"])
        norm.plot(c["step"], smooth(c["grad_norm"], window))
    loss.set(title=f"cross-entropy per dimension (nats), mean of {window} steps", xlabel="step")
    rate.set(title="learning rate", xlabel="step")
    norm.set(title="gradient norm before clipping", xlabel="step", yscale="log")
    if expected is not None:
        low, high = (np.array(expected.loss) + sign * expected.tolerance for sign in (-1, 1))
        loss.fill_between(expected.steps, low, high, color="green", alpha=0.15, label="expected")
    loss.legend()
    dims.set(title=f"loss of each dimension in head order: {folders[0]}", xlabel="step")
    if "loss_per_dim" in runs[0]:
        curves, steps = runs[0]["loss_per_dim"], runs[0]["step"]  # (N, C), (N,)
        logged = ~np.isnan(curves[:, 0])
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, curves.shape[1]))
        for i, (curve, colour) in enumerate(zip(curves[logged].T, colours, strict=True)):
            dims.plot(steps[logged], curve, color=colour, label=f"{i} (leading)" if i == 0 else str(i))
        dims.legend(ncols=2, fontsize="x-small")
    return figure


@doing("drawing the curves")
def main(argv: Sequence[str] | None = None) -> None:
    """Draw to a PNG. ValueError or OSError for a folder that holds no log."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="+", help="--output_dir of training runs")
    parser.add_argument("--output", default="", help="PNG to write; default: curves.png in the first folder")
    parser.add_argument(
        "--smooth", type=int, default=None, help="steps to average over; default: a fiftieth of the run"
    )
    parser.add_argument(
        "--expected", default="", help="JSON file with the expected loss, such as demo/expected_loss.json"
    )
    args = parser.parse_args(argv)
    if args.smooth is not None and args.smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {args.smooth} (--smooth)")
    folders = [Path(folder) for folder in args.folders]
    expected = Expected.read(args.expected) if args.expected else None
    path = Path(args.output) if args.output else folders[0] / "curves.png"
    figure = draw(folders, args.smooth, expected)
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    print(path)
    for folder in folders if expected is not None else ():
        print(f"{folder}: {expected.report(read_columns(folder))}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
