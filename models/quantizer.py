"""Post-training, dimension-wise quantizer (docs/spec.md 3; paper section 3.1): each scalar becomes one of K levels.

Nothing is learned. The levels are those of a unit normal divided into K cells of equal probability, so a latent that is
close to normal uses all indices about equally often. Other tables are in quantizer_tables.py.

Letters: K levels, b boundaries, r reconstruction values; x is any tensor of latents.
"""

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from util.options import ArgumentError

LARGEST_VALUE = 1e4  # of a range: scaled latents are of order 1
STD_RANGE = 3.0  # the tables live on [-3, 3] standard deviations; [min_value, max_value] is mapped there
MAX_BITS = 12
TRUNCATED_FROM_BITS = 10  # from here on i/K < Phi(-3), so clamping the plain quantiles would merge the outer boundaries


def check_bits(bits: int) -> None:
    """ArgumentError unless bits is a whole number from 1 to 12."""
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= MAX_BITS:
        raise ArgumentError("bits", f"quantizer bits must be a whole number from 1 to {MAX_BITS}, got {bits}")


def check_range(min_value: float, max_value: float) -> None:
    """ArgumentError unless min_value < max_value, both of at most LARGEST_VALUE."""
    if not -LARGEST_VALUE <= min_value < max_value <= LARGEST_VALUE:
        limits = f"got [{min_value}, {max_value}], and at most {LARGEST_VALUE:g}"
        message = f"quantizer range must satisfy quant_min < quant_max, {limits}"
        raise ArgumentError("quant_min", message)


def _normal_pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)


def gaussian_tables(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries (K+1,) and reconstruction values (K,) for K = 2^bits, float64, strictly increasing (docs/spec.md 3).

    b_i is the i/K quantile of N(0, 1) clamped to +-3 (published; up to 9 bits) or of the normal truncated to +-3 (from
    10 bits on). r_i = E[x | b_i < x < b_{i+1}] = (pdf(b_i) - pdf(b_{i+1})) / (cdf(b_{i+1}) - cdf(b_i)), since the
    derivative of the normal density is -x times it. ArgumentError for bits outside 1 to 12.
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


def quantize(x: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """Index of the nearest reconstruction value, lowest index on a tie: x of any shape -> int64 of the same shape.

    Binary search on the K-1 midpoints; memory is that of the result, never (..., K).
    """
    unit = (x.float() - min_value).div_(max_value - min_value)  # divide first: the golden arrays' rounding
    scaled = unit.mul_(2 * STD_RANGE).sub_(STD_RANGE)
    midpoints = (values[:-1] + values[1:]) / 2  # all inside the range: no clamp is needed
    return torch.bucketize(scaled.contiguous(), midpoints)  # a midpoint itself goes to the lower cell


def dequantize(indices: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """Reconstruction values of the indices, mapped from [-3, 3] back to [min_value, max_value]; float32, same shape."""
    scaled = (values + STD_RANGE) * ((max_value - min_value) / (2 * STD_RANGE)) + min_value  # (K,)
    return scaled[indices]


def keep_nan(values: Tensor, x: Tensor) -> Tensor:
    """`values` with NaN wherever x is NaN: a NaN has no index, and must not come out as a plausible latent."""
    return torch.where(x.isnan(), x.to(values.dtype), values)


def check_tables(boundaries: np.ndarray, values: np.ndarray) -> None:
    """ValueError unless there are 2^bits increasing values, one in each of as many increasing cells, all on [-3, 3]."""
    boundaries, values = np.asarray(boundaries, np.float64), np.asarray(values, np.float64)
    k, margin = len(values), 1e-6
    sizes = 2 <= k <= 2**MAX_BITS and k & (k - 1) == 0 and boundaries.shape == (k + 1,)
    if not (
        sizes
        and np.isfinite([*boundaries, *values]).all()
        and (np.diff(values) > 0).all()
        and (np.diff(boundaries) > 0).all()
        and abs(boundaries).max() <= STD_RANGE + margin
        and (boundaries[:-1] <= values + margin).all()
        and (values <= boundaries[1:] + margin).all()
    ):
        expected = "2^bits increasing values on [-3, 3], each in its cell, are needed"
        raise ValueError(f"these are no quantizer's tables: {expected} (found {k})")


class TableQuantizer(nn.Module):
    """A quantizer as a module with buffers `boundaries` (K+1) and `reconstruction_values` (K), float32 on [-3, 3].

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
        self.kind, self.bits = kind, len(values).bit_length() - 1
        self.min_value, self.max_value = float(min_value), float(max_value)
        # through lists: a default dtype or device of the caller plays no part until the buffers are made
        self.register_buffer("boundaries", torch.tensor(np.asarray(boundaries).tolist(), dtype=torch.float32))
        self.register_buffer("reconstruction_values", torch.tensor(np.asarray(values).tolist(), dtype=torch.float32))

    def quantize(self, x: Tensor) -> Tensor:
        """Latents of any shape -> int64 indices in [0, K) of the same shape."""
        return quantize(x, self.reconstruction_values, self.min_value, self.max_value)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Indices in [0, K) of any shape -> float32 values in [min_value, max_value] of the same shape."""
        return dequantize(indices, self.reconstruction_values, self.min_value, self.max_value)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest representable value of every scalar (NaN for NaN), same shape, float32."""
        return keep_nan(self.dequantize(self.quantize(x)), x)

    def description(self) -> dict:
        """Kind, bits, range and tables, JSON-able; quantizer_tables.read_quantizer reads it."""
        tables = {name: getattr(self, name).tolist() for name in ("boundaries", "reconstruction_values")}
        return {"kind": self.kind, "bits": self.bits, "min": self.min_value, "max": self.max_value} | tables

    def extra_repr(self) -> str:
        """For print(module)."""
        return f"{self.kind}, bits={self.bits}, range=[{self.min_value}, {self.max_value}]"


class GaussianQuantizer(TableQuantizer):
    """The paper's quantizer (6 bits on +-5 by default), with `gaussian_tables`.

    ArgumentError for bits outside 1 to 12.
    """

    def __init__(self, bits: int = 6, min_value: float = -5.0, max_value: float = 5.0):
        super().__init__("gaussian", *gaussian_tables(bits), min_value, max_value)
