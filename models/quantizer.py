"""Post-training, dimension-wise quantizer (SPEC 3; paper section 3.1): every scalar of a latent becomes one of K levels by itself.

Nothing is learned. The levels are those of a unit normal cut into K cells of equal probability, so a latent that is close to
normal uses all indices about equally often. Other tables (equal widths; fitted to latents) are for comparison, and fit the same buffers.

Letters: K levels, b boundaries, r reconstruction values; x is any tensor of latents.
"""

import json
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

# the paper's; cells of equal width; fitted to latents. Training takes the first unless told
QUANTIZERS = ("gaussian", "uniform", "lloyd")
STD_RANGE = 3.0  # the tables live on [-3, 3] standard deviations; [min_value, max_value] is mapped there
MAX_BITS = 12
TRUNCATED_FROM_BITS = 10  # from here on i/K < Phi(-3), so clamping the plain quantiles would merge the outer boundaries


def _normal_pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)


def check_bits(bits: int) -> None:
    """ValueError unless bits is a whole number from 1 to 12."""
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"quantizer bits must be a whole number from 1 to {MAX_BITS}, got {bits} (--quant_bits / --bits)"
        )


def gaussian_tables(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries (K+1,) and reconstruction values (K,) for K = 2^bits, float64, strictly increasing (SPEC 3).

    b_i is the i/K quantile of N(0, 1) clamped to +-3 (published; up to 9 bits) or of the normal truncated to +-3 (from 10
    bits on); r_i = E[x | b_i < x < b_{i+1}]. Raises ValueError for bits outside 1 to 12.
    """
    check_bits(bits)
    num_levels = 2 ** int(bits)
    share = np.arange(num_levels + 1, dtype=np.float64) / num_levels
    if bits >= TRUNCATED_FROM_BITS:
        tail = ndtr(-STD_RANGE)
        share = tail + share * (1 - 2 * tail)
    boundaries = np.clip(ndtri(share), -STD_RANGE, STD_RANGE)  # (K+1,)
    boundaries = (boundaries - boundaries[::-1]) / 2  # exact symmetry
    lower, upper = boundaries[:-1], boundaries[1:]
    values = (_normal_pdf(lower) - _normal_pdf(upper)) / (ndtr(upper) - ndtr(lower))  # (K,)
    return boundaries, (values - values[::-1]) / 2


def check_range(min_value: float, max_value: float) -> None:
    """ValueError unless min_value < max_value, both finite."""
    if not (np.isfinite(min_value) and np.isfinite(max_value) and min_value < max_value):
        raise ValueError(
            f"quantizer range must satisfy quant_min < quant_max, got [{min_value}, {max_value}] "
            "(--quant_min, --quant_max / --range)"
        )


def quantize(x: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """Index of the nearest reconstruction value, lowest index on a tie: x of any shape -> int64 of the same shape.

    Binary search on the K-1 midpoints; memory is that of the result, never (..., K).
    """
    # divide first: the golden arrays' rounding
    x = (x.float() - min_value).div_(max_value - min_value).mul_(2 * STD_RANGE).sub_(STD_RANGE)
    midpoints = (values[:-1] + values[1:]) / 2  # all inside the range: no clamp is needed
    return torch.bucketize(x.contiguous(), midpoints)  # x == midpoint goes to the lower cell


def dequantize(indices: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """Reconstruction values of the indices, mapped from [-3, 3] back to [min_value, max_value]; float32, same shape."""
    scaled = (values + STD_RANGE) * ((max_value - min_value) / (2 * STD_RANGE)) + min_value  # (K,)
    return scaled[indices]


def keep_nan(values: Tensor, x: Tensor) -> Tensor:
    """`values` with NaN wherever x is NaN: a NaN has no index, and must not come out as a plausible latent."""
    return torch.where(x.isnan(), x.to(values.dtype), values)


class TableQuantizer(nn.Module):
    """A quantizer as a module with buffers `boundaries` (K+1) and `reconstruction_values` (K), both float32 on [-3, 3].

    kind: where its tables come from. Raises ValueError for tables that are no quantizer's, or min_value >= max_value.
    """

    boundaries: Tensor
    reconstruction_values: Tensor

    def __init__(
        self, kind: str, boundaries: np.ndarray, values: np.ndarray, min_value: float = -5.0, max_value: float = 5.0
    ):
        super().__init__()
        check_range(min_value, max_value)
        check_tables(boundaries, values)
        self.kind, self.bits, self.min_value, self.max_value = (
            kind,
            len(values).bit_length() - 1,
            float(min_value),
            float(max_value),
        )
        self.register_buffer("boundaries", torch.tensor(np.asarray(boundaries).tolist(), dtype=torch.float32))
        self.register_buffer("reconstruction_values", torch.tensor(np.asarray(values).tolist(), dtype=torch.float32))

    def quantize(self, x: Tensor) -> Tensor:
        """Latents of any shape -> int64 indices in [0, K) of the same shape."""
        return quantize(x, self.reconstruction_values, self.min_value, self.max_value)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Indices in [0, K) of any shape -> float32 values in [min_value, max_value] of the same shape."""
        return dequantize(indices, self.reconstruction_values, self.min_value, self.max_value)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest representable value of every scalar (NaN for NaN): what a latent becomes after the trip through its indices."""
        return keep_nan(self.dequantize(self.quantize(x)), x)

    def description(self) -> dict:
        """Kind, bits, range and tables, JSON-able; `read_quantizer` takes it back."""
        return {
            "kind": self.kind,
            "bits": self.bits,
            "min": self.min_value,
            "max": self.max_value,
            "boundaries": self.boundaries.tolist(),
            "reconstruction_values": self.reconstruction_values.tolist(),
        }

    def extra_repr(self) -> str:
        return f"{self.kind}, bits={self.bits}, range=[{self.min_value}, {self.max_value}]"


class GaussianQuantizer(TableQuantizer):
    """The paper's quantizer: the tables of `gaussian_tables`. Paper defaults: 6 bits, +-5. Raises ValueError for bits outside 1 to 12."""

    def __init__(self, bits: int = 6, min_value: float = -5.0, max_value: float = 5.0):
        super().__init__("gaussian", *gaussian_tables(bits), min_value, max_value)


# ------------------------------------------------------------------------------------------------------------- other tables


def check_tables(boundaries: np.ndarray, values: np.ndarray) -> None:
    """ValueError unless there are 2^bits increasing values, one in each of as many increasing cells, all on [-3, 3]."""
    boundaries, values = np.asarray(boundaries, np.float64), np.asarray(values, np.float64)
    k = len(values)
    good = (
        k >= 2
        and k & (k - 1) == 0
        and k <= 2**MAX_BITS
        and boundaries.shape == (k + 1,)
        and np.isfinite([*boundaries, *values]).all()
    )
    if good:
        inside = (boundaries[:-1] <= values + 1e-6).all() and (values <= boundaries[1:] + 1e-6).all()
        good = (
            inside
            and (np.diff(values) > 0).all()
            and (np.diff(boundaries) > 0).all()
            and abs(boundaries).max() <= STD_RANGE + 1e-6
        )
    if not good:
        raise ValueError(
            f"these are no quantizer's tables: 2^bits increasing values on [-3, 3], each in its cell, are needed (found {k})"
        )


def uniform_tables(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries (K+1,) and values (K,) of K = 2^bits cells of equal width on [-3, 3], the value in the middle of each."""
    check_bits(bits)
    boundaries = np.linspace(-STD_RANGE, STD_RANGE, 2**bits + 1)
    return boundaries, (boundaries[:-1] + boundaries[1:]) / 2


def lloyd_tables(
    x: np.ndarray, bits: int, min_value: float, max_value: float, bins: int = 2**16, rounds: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries (K+1,) and values (K,) on [-3, 3] with the least mean square error for the latents x (any shape), clipped to the range.

    Lloyd (1982), Max (1960): each value is the mean of its cell, each boundary lies between two values; iterated on a histogram of `bins` bins
    from the Gaussian tables. A cell without latents keeps its middle as its value. ValueError for bits outside 1 to 12 or x without numbers.
    """
    check_range(min_value, max_value)
    x = np.asarray(x, np.float64).ravel()
    if not x.size or not np.isfinite(x).all():
        raise ValueError("fitting a quantizer (--quantizer lloyd) needs latents, all finite")
    scaled = np.clip((x - min_value) / (max_value - min_value) * 2 * STD_RANGE - STD_RANGE, -STD_RANGE, STD_RANGE)
    counts, edges = np.histogram(scaled, bins, (-STD_RANGE, STD_RANGE))
    sums = np.histogram(scaled, bins, (-STD_RANGE, STD_RANGE), weights=scaled)[0]
    total, moment = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, sums))
    values = gaussian_tables(bits)[1]
    for _ in range(rounds):
        boundaries = np.concatenate([[-STD_RANGE], (values[:-1] + values[1:]) / 2, [STD_RANGE]])  # (K+1,)
        mass, mean = np.diff(np.interp(boundaries, edges, total)), np.diff(np.interp(boundaries, edges, moment))
        middle = (boundaries[:-1] + boundaries[1:]) / 2
        updated = np.where(mass > 1e-9, mean / np.maximum(mass, 1e-9), middle).clip(boundaries[:-1], boundaries[1:])
        updated = np.where(np.diff(updated, prepend=-np.inf) > 1e-9, updated, middle)  # two may meet at a spike
        moved, values = np.abs(updated - values).max(), updated
        if moved < 1e-7:
            break
    return np.concatenate([[-STD_RANGE], (values[:-1] + values[1:]) / 2, [STD_RANGE]]), values


def read_quantizer(path: str | Path) -> TableQuantizer:
    """The quantizer in a JSON file (a `description`). FileNotFoundError, or ValueError naming the file if it holds none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no quantizer tables at {path} (--quantizer_tables): python -m tools.vae_stats writes them"
        )
    try:
        found = json.loads(path.read_text())
        return TableQuantizer(
            str(found["kind"]), found["boundaries"], found["reconstruction_values"], found["min"], found["max"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} (--quantizer_tables) does not describe a quantizer: {error}") from error


def build_quantizer(
    kind: str, bits: int, min_value: float, max_value: float, tables: str | Path = "", latents: np.ndarray | None = None
) -> TableQuantizer:
    """A quantizer of QUANTIZERS. lloyd: from the file `tables`, which must be of these bits and range, or fitted to scaled `latents`.

    ValueError if lloyd has neither, or the file is of another kind, size or range.
    """
    if tables:
        found = read_quantizer(tables)
        asked = (kind, bits, float(min_value), float(max_value))
        if (found.kind, found.bits, found.min_value, found.max_value) != asked:
            raise ValueError(
                f"{tables} (--quantizer_tables) is {found.kind}, {found.bits} bits on [{found.min_value}, {found.max_value}]; the flags say "
                f"{kind}, {bits} bits on [{float(min_value)}, {float(max_value)}]"
            )
        return found
    if kind == "gaussian":
        return GaussianQuantizer(bits, min_value, max_value)
    if kind == "uniform":
        return TableQuantizer(kind, *uniform_tables(bits), min_value, max_value)
    if kind != "lloyd":
        raise ValueError(f"--quantizer {kind!r} is not one of {', '.join(QUANTIZERS)}")
    if latents is None:
        raise ValueError(
            "--quantizer lloyd is fitted to latents: give --quantizer_tables, a file that python -m tools.vae_stats writes"
        )
    return TableQuantizer(kind, *lloyd_tables(latents, bits, min_value, max_value), min_value, max_value)
