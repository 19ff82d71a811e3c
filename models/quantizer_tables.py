"""Quantizer tables for comparison with the paper's Gaussian ones: cells of equal width; fitted to latents; from a file.

They fill the same buffers of a checkpoint. Letters: K levels, b boundaries, r reconstruction values.
"""

from pathlib import Path

import numpy as np

from models.quantizer import STD_RANGE, GaussianQuantizer, TableQuantizer, check_bits, check_range, gaussian_tables
from util.json_reader import read_json
from util.options import ArgumentError

QUANTIZERS = ("gaussian", "uniform", "lloyd")  # the paper's; cells of equal width; fitted to latents
DESCRIPTION = {"kind": str, "boundaries": [float], "reconstruction_values": [float], "min": float, "max": float}


def uniform_tables(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries (K+1,) and values (K,) of K = 2^bits cells of equal width on [-3, 3], each value in the middle."""
    check_bits(bits)
    boundaries = np.linspace(-STD_RANGE, STD_RANGE, 2**bits + 1)
    return boundaries, (boundaries[:-1] + boundaries[1:]) / 2


def cells_around(values: np.ndarray) -> np.ndarray:
    """Boundaries (K+1,) of the cells of points that are nearest to each of the values (K,) on [-3, 3]."""
    return np.concatenate([[-STD_RANGE], (values[:-1] + values[1:]) / 2, [STD_RANGE]])


def lloyd_tables(
    x: np.ndarray, bits: int, min_value: float, max_value: float, bins: int = 2**16, rounds: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries (K+1,) and values (K,) on [-3, 3] with the least mean square error for the latents x (any shape).

    Lloyd (1982), Max (1960): at the optimum each value is the mean of its cell and each boundary lies halfway between
    two values; the two conditions are applied in turn, from the Gaussian tables on. Cell means come from cumulative
    sums over a histogram of `bins` bins, so a round costs O(K), whatever the number of latents. x is clipped to the
    range. ValueError for bits outside 1 to 12 or x without numbers.
    """
    check_range(min_value, max_value)
    x = np.asarray(x, np.float64).ravel()
    if not x.size or not np.isfinite(x).all():
        raise ArgumentError("quantizer", "fitting a quantizer (lloyd) needs latents, all finite")
    scaled = np.clip((x - min_value) / (max_value - min_value) * 2 * STD_RANGE - STD_RANGE, -STD_RANGE, STD_RANGE)
    counts, edges = np.histogram(scaled, bins, (-STD_RANGE, STD_RANGE))
    sums = np.histogram(scaled, bins, (-STD_RANGE, STD_RANGE), weights=scaled)[0]
    total, moment = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, sums))
    values = gaussian_tables(bits)[1]
    for _ in range(rounds):
        boundaries = cells_around(values)  # (K+1,)
        mass, mean = np.diff(np.interp(boundaries, edges, total)), np.diff(np.interp(boundaries, edges, moment))
        middle = (boundaries[:-1] + boundaries[1:]) / 2
        # A cell without latents keeps its middle as its value; so does one whose mean meets the one below, at a spike.
        updated = np.where(mass > 1e-9, mean / np.maximum(mass, 1e-9), middle).clip(boundaries[:-1], boundaries[1:])
        updated = np.where(np.diff(updated, prepend=-np.inf) > 1e-9, updated, middle)
        moved, values = np.abs(updated - values).max(), updated
        if moved < 1e-7:
            break
    return cells_around(values), values


def read_quantizer(path: str | Path) -> TableQuantizer:
    """The quantizer in a JSON file (a `description`). FileNotFoundError, or ArgumentError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no quantizer tables at {path}: python -m tools.vae_stats writes them")
    try:
        content = read_json(path, DESCRIPTION)
        tables = (content["boundaries"], content["reconstruction_values"])
        return TableQuantizer(content["kind"], *tables, content["min"], content["max"])
    except ValueError as error:
        raise ArgumentError("quantizer_tables", f"{path} does not describe a quantizer: {error}") from error


def build_quantizer(
    kind: str, bits: int, min_value: float, max_value: float, tables: str | Path = "", latents: np.ndarray | None = None
) -> TableQuantizer:
    """A quantizer of QUANTIZERS. lloyd: from the file `tables`, of these bits and range, or fitted to scaled `latents`.

    ArgumentError if lloyd has neither, or the file is of another kind, size or range.
    """
    if tables:
        quantizer = read_quantizer(tables)
        found = (quantizer.kind, quantizer.bits, quantizer.min_value, quantizer.max_value)
        expected = (kind, bits, float(min_value), float(max_value))
        if found != expected:
            in_file, in_arguments = (f"{k}, {b} bits on [{low}, {high}]" for k, b, low, high in (found, expected))
            raise ArgumentError("quantizer_tables", f"{tables} is {in_file}; the arguments say {in_arguments}")
        return quantizer
    if kind == "gaussian":
        return GaussianQuantizer(bits, min_value, max_value)
    if kind == "uniform":
        return TableQuantizer(kind, *uniform_tables(bits), min_value, max_value)
    if kind != "lloyd":
        raise ArgumentError("quantizer", f"quantizer {kind!r} is not one of {', '.join(QUANTIZERS)}")
    if latents is None:
        message = "quantizer lloyd is fitted to latents: give a file of tables, which python -m tools.vae_stats writes"
        raise ArgumentError("quantizer_tables", message)
    return TableQuantizer(kind, *lloyd_tables(latents, bits, min_value, max_value), min_value, max_value)
