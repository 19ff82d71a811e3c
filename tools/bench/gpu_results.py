"""What the sections of `python -m tools.bench gpu` share: options, clock, results and their table."""

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models import MODELS
from tools.bench import train
from tools.bench.counting import print_table
from tools.bench.options import REPEATS, ModelOptions
from training.flops import peak_tflops
from util import dist
from util.cli import check_writable
from util.files import write_json
from util.log import first_line
from util.options import option


@dataclass
class GpuOptions(ModelOptions):
    """What is measured and for how long. On a CPU give a small model: the same code runs."""

    model: str = option("tokenbridge_large", choices=list(MODELS))
    repeats: int = option(2, REPEATS, lowest=1)
    others: tuple[str, ...] = option(
        ("tokenbridge_base", "tokenbridge_huge"), "models whose training is timed last", choices=list(MODELS), nargs="*"
    )
    batch_size: int = option(64, "of training", lowest=1)
    sampling_batch: int = option(256, "images sampled together", lowest=1)
    num_iter: tuple[int, ...] = option((256, 64), "sampling iterations", lowest=1, nargs="+")
    budget: float = option(360.0, "seconds", above=0)
    json: str = option("gpu_bench.json", "file of the results")
    no_compile: bool = option(False, "leave out what compiles")
    vae_width: int = option(128, "of the VAE with random weights; KL-16 has 128", lowest=8)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable(str(Path(self.json).absolute().parent), "--json")

    def of_model(self, name: str, batch_size: int, compile: bool = False) -> train.Options:
        """Options of `tools.bench train`."""
        sizes = ("img_size", "vae_stride", "vae_embed_dim", "buffer_size", "quant_bits", "seed")
        same = {key: getattr(self, key) for key in sizes}
        return train.Options(model=name, batch_size=batch_size, compile=compile, device=self.device, **same)


@dataclass
class Bench:
    """Device, clock and results. `rows` of the table: name, value, unit and what else is known."""

    options: GpuOptions
    device: torch.device
    precision: str
    started: float = field(default_factory=time.perf_counter)
    deadline: float = 0.0  # of the section, seconds after the start
    results: dict = field(default_factory=dict)

    def record(self, name: str, value: float, unit: str, **more: object) -> None:
        """One more row, in the file at once."""
        self.results["rows"].append({"name": name, "value": value, "unit": unit, **more})
        self.results["seconds"] = time.perf_counter() - self.started
        write_json(self.options.json, self.results)
        print(f"{self.results['seconds']:6.0f} s  {name}: {value:.4g} {unit}", flush=True)

    def left(self) -> float:
        """Seconds that the section has left."""
        return self.deadline - (time.perf_counter() - self.started)

    def attempt(self, name: str, expected: float, case: Callable[[], object]) -> None:
        """Run a case if it is expected to end in time; otherwise, or if it fails, name it with the reason."""
        reason = f"needs about {expected:.0f} s, {max(0, self.left()):.0f} s of its section were left"
        if self.left() >= expected:
            try:
                case()
                reason = ""
            except Exception as error:  # the cases after it are worth their time
                reason = f"{type(error).__name__}: {first_line(str(error))}"
            gc.collect()
            with contextlib.suppress(RuntimeError):  # after an error that the device keeps
                dist.reset_peak_memory(self.device)
        if reason:
            self.results["skipped"].append({"name": name, "reason": reason})
            write_json(self.options.json, self.results)
            print(f"        skipped {name}: {reason}", flush=True)

    @property
    def ceiling(self) -> float | None:
        """TFLOP/s of the measured matrix product."""
        return self.results.get("matmul_tflops")

    def speed(self, tflop: float, seconds: float) -> dict[str, float]:
        """TFLOP/s, and its share of the maker's peak (MFU) and of the measured ceiling."""
        rate, peak = tflop / seconds, peak_tflops(dist.device_name(self.device), self.precision)
        more = {"tflops": rate} | ({"mfu": rate / peak} if peak else {})
        return more | ({"of_ceiling": rate / self.ceiling} if self.ceiling else {})


def print_results(bench: Bench) -> None:
    """One table; what was skipped below it."""
    columns, rows = ["value", "unit", "plain loop", "ratio", "TFLOP/s", "MFU", "of ceiling"], []
    for row in bench.results["rows"]:
        plain, value = row.get("baseline"), row["value"]
        faster = "" if not plain else f"{(plain / value if row['unit'] in ('s', 'ms') else value / plain):.2f}x"
        cells = [f"{value:.4g}", row["unit"], f"{plain:.4g}" if plain else "", faster]
        cells += [f"{row['tflops']:.0f}" if "tflops" in row else ""]
        rows.append((row["name"], cells + [f"{row[key]:.0%}" if key in row else "" for key in ("mfu", "of_ceiling")]))
    r = bench.results
    print_table(f"{r['device']}, torch {r['torch']}, {r['precision']}", columns, rows, first_width=62, width=12)
    for entry in r["skipped"]:
        print(f"skipped: {entry['name']}: {entry['reason']}")
    notes = {note for row in r["rows"] for note in [row.get("note")] if note}
    print("\n".join(sorted(notes)))
