"""models/quantizer.py (docs/spec.md 3): golden tables, independent quantiles, nearest value by brute force."""

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import truncnorm

from models import quantizer
from models.quantizer import GaussianQuantizer, check_tables, gaussian_tables
from models.quantizer_tables import build_quantizer, lloyd_tables, read_quantizer, uniform_tables
from models.tokenbridge import TokenBridge
from tests.helpers import RecordOps, golden_arrays, tiny_model

GOLDEN = golden_arrays("quantizer")
CASES = sorted({key.rsplit("_", 1)[0] for key in GOLDEN if key != "x"})
ALL_BITS = range(1, 13)


def parse_case(case: str) -> tuple[int, float, float]:
    bits, low, high = case[1:].split("_")
    return int(bits), float(low), float(high)


def near_midpoint(x: np.ndarray, levels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where x, mapped to +-3, is within 1e-6 K of a midpoint, where float32 may go either way (golden/README.md)."""
    unit = np.clip((x.astype(np.float64) - low) * 6 / (high - low) - 3, -3, 3)
    levels = levels.astype(np.float64)
    midpoints = (levels[1:] + levels[:-1]) / 2
    return np.abs(unit[:, None] - midpoints[None]).min(1) <= 1e-6 * len(levels)


def test_golden_has_the_seven_cases():
    assert CASES == ["b1_-5_5", "b4_-5_5", "b5_-5_5", "b6_-3_3", "b6_-5_5", "b8_-5_5", "b9_-5_5"]


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    """Of the quantizer, and of a model with its bits and range."""
    bits, low, high = parse_case(case)
    expected = {key: GOLDEN[f"{case}_{key}"] for key in ("indices", "values", "reconstruction", "boundaries")}
    num_levels = 2**bits
    q, model = GaussianQuantizer(bits, low, high), tiny_model(quant_levels=num_levels, quant_min=low, quant_max=high)
    for tables in (q, model):
        boundaries, levels = tables.boundaries, tables.reconstruction_values
        assert boundaries.dtype == levels.dtype == torch.float32
        np.testing.assert_allclose(boundaries.numpy(), expected["boundaries"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(levels.numpy(), expected["reconstruction"], rtol=0, atol=5e-7 * num_levels)

    x = torch.from_numpy(GOLDEN["x"]).view(5, 7, 11, 13)
    for indices, values in ((q.quantize(x), q(x)), model.quantize(x)):
        assert indices.dtype == torch.int64 and indices.shape == values.shape == x.shape
        differs = indices.flatten().numpy() != expected["indices"]
        assert not (differs & ~near_midpoint(GOLDEN["x"], expected["reconstruction"], low, high)).any()
        assert differs.sum() <= (2 if bits == 9 else 0)
        same = values.flatten().numpy()[~differs]
        np.testing.assert_allclose(same, expected["values"][~differs], rtol=0, atol=1e-6 * num_levels)
        assert torch.equal(q.dequantize(indices), values)


def test_one_bit_by_hand():
    """Levels +-(phi(0) - phi(3)) / (1/2 - Phi(-3)) = 0.3945105 / 0.4986501; on +-5 that is 5/3 as much."""
    q = GaussianQuantizer(1, -5, 5)
    assert q.boundaries.tolist() == [-3, 0, 3]
    expected = 0.39451044 / 0.49865010
    assert q.reconstruction_values.tolist() == pytest.approx([-expected, expected], abs=1e-6)
    outer = expected * 5 / 3
    assert q(torch.tensor([-7.0, -0.1, 0.1, 7.0])).tolist() == pytest.approx([-outer, -outer, outer, outer], abs=1e-6)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_tables_are_finite_float64_and_strictly_increasing(bits):
    boundaries, levels = gaussian_tables(bits)
    assert boundaries.dtype == levels.dtype == np.float64
    assert boundaries.shape == (2**bits + 1,) and levels.shape == (2**bits,)
    assert np.isfinite(boundaries).all() and np.isfinite(levels).all()
    assert (np.diff(boundaries) > 0).all() and (np.diff(levels) > 0).all()
    assert (boundaries[:-1] < levels).all() and (levels < boundaries[1:]).all()
    assert boundaries[0] == pytest.approx(-3, abs=1e-12) and boundaries[-1] == pytest.approx(3, abs=1e-12)
    np.testing.assert_array_equal(levels, -levels[::-1])
    q = GaussianQuantizer(bits)  # float32 keeps them apart too
    assert (q.reconstruction_values.diff() > 0).all() and (q.boundaries.diff() > 0).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_boundaries_are_quantiles(bits):
    """Up to 9 bits the normal's own, clamped; from 10 bits on those of the normal truncated to +-3."""
    share = np.arange(1, 2**bits) / 2**bits
    expected = np.array([NormalDist().inv_cdf(p) for p in share]) if bits < 10 else truncnorm(-3, 3).ppf(share)
    np.testing.assert_allclose(gaussian_tables(bits)[0][1:-1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_levels_are_conditional_means(bits):
    """E[x | b_i < x < b_i+1] by numerical integration, over at most 40 cells, the outermost among them."""
    boundaries, levels = gaussian_tables(bits)
    density = NormalDist().pdf
    for i in {*np.linspace(0, 2**bits - 1, 40).astype(int).tolist()}:
        low, high = boundaries[i], boundaries[i + 1]
        middle = (low + high) / 2  # integrate around it: the cells are narrow
        mass = quad(density, low, high, epsabs=0, epsrel=1e-12)[0]
        offset = quad(lambda t, middle=middle: (t - middle) * density(t), low, high, epsabs=1e-18, epsrel=1e-10)[0]
        assert levels[i] == pytest.approx(middle + offset / mass, abs=1e-9)


def test_all_levels_are_used_equally_by_normal_latents():
    """On +-3 each of 16 indices gets about 1/16 of normal numbers (cells of equal width: 0.001 to 0.15)."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(160_000).astype(np.float32))
    counts = torch.bincount(GaussianQuantizer(4, -3, 3).quantize(x), minlength=16).double() / len(x)
    assert counts.min() > 0.035 and counts.max() < 0.085  # nearest-level cells are not exactly the quantile cells


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(("low", "high"), [(-5, 5), (-3.5, 3.5), (-2, 6)])
def test_nearest_by_brute_force(bits, low, high):
    x = np.random.default_rng(bits).uniform(low - 1, high + 1, 3000).astype(np.float32)
    q = GaussianQuantizer(bits, low, high)
    levels = q.reconstruction_values.double().numpy()
    unit = np.clip((x.astype(np.float64) - low) * 6 / (high - low) - 3, -3, 3)
    nearest = np.abs(unit[:, None] - levels[None]).argmin(1)  # numpy too takes the lowest index on a tie
    found = q.quantize(torch.from_numpy(x)).numpy()
    differs = found != nearest
    assert not (differs & ~near_midpoint(x, levels, low, high)).any()
    assert np.abs(found - nearest).max() <= 1
    assert differs.sum() <= 3  # and of 3,000 numbers hardly one is in those strips


def test_ties_take_the_lowest_index():
    """A table of dyadic numbers, so that the midpoints -1.5, -0.25 and 1.25 and everything else is exact."""
    table = torch.tensor([-2.0, -1.0, 0.5, 2.0])
    x = torch.tensor([-3.0, -1.5, -1.25, -0.25, 0.0, 1.25, 1.5, 3.0])
    assert quantizer.quantize(x, table, -3.0, 3.0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_levels_quantize_to_themselves(bits):
    """And 0, a tie between the two middle levels, to the lower one."""
    q, indices = GaussianQuantizer(bits, -4, 4), torch.arange(2**bits)
    assert torch.equal(q.quantize(q.dequantize(indices)), indices)
    assert q.quantize(torch.zeros(3)).tolist() == [2**bits // 2 - 1] * 3


def test_infinity_clamps_to_the_outer_levels():
    q = GaussianQuantizer(6)
    assert q.quantize(torch.tensor([-math.inf, -1e30, 1e30, math.inf])).tolist() == [0, 0, 63, 63]
    assert q(torch.tensor([-math.inf, math.inf])).tolist() == q.dequantize(torch.tensor([0, 63])).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_strides_and_dtypes(dtype):
    q = GaussianQuantizer(6)
    x = torch.linspace(-6, 6, 120).view(2, 3, 4, 5).to(dtype)
    by_numbers = [[q.quantize(torch.tensor(float(v))).item()] for v in x.flatten()]
    assert q.quantize(x).flatten().unsqueeze(1).tolist() == by_numbers
    assert torch.equal(q.quantize(x.permute(3, 1, 0, 2)), q.quantize(x).permute(3, 1, 0, 2))
    assert q(x).dtype == torch.float32
    assert q.quantize(x[:0]).shape == (0, 3, 4, 5)


def test_nan_shows():
    """A NaN has no index; the values must not hide it as a plausible latent."""
    x = torch.tensor([0.5, math.nan, -0.5])
    assert GaussianQuantizer(6)(x).isnan().tolist() == [False, True, False]
    assert tiny_model().quantize(x)[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bits", [6, 12])
def test_no_distance_tensor(bits):
    """Nothing larger than the input (or the tables) is ever made; a distance tensor would be 2^bits times as large."""
    x = torch.randn(2, 16, 8, 8)
    q = GaussianQuantizer(bits)
    with RecordOps() as ops:
        q(x)
    assert ops.names and ops.largest <= max(x.numel(), 2**bits)


@pytest.mark.parametrize("bits", [0, 13, -1, 2.5, True])
def test_bits_outside_1_to_12_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 12, got"):
        GaussianQuantizer(bits)


@pytest.mark.parametrize(("low", "high"), [(5, 5), (5, -5), (math.nan, 5), (-math.inf, 5), (-5, math.inf)])
def test_ranges_that_are_none_are_refused(low, high):
    with pytest.raises(ValueError, match="quant_min < quant_max"):
        GaussianQuantizer(6, low, high)
    with pytest.raises(ValueError, match="quant_min < quant_max"), torch.device("meta"):
        TokenBridge(quant_min=low, quant_max=high)


@pytest.mark.parametrize("bits", [1, 3, 6, 9, 12])
def test_uniform_tables(bits):
    boundaries, values = uniform_tables(bits)
    np.testing.assert_allclose(np.diff(boundaries), 6 / 2**bits, rtol=1e-9)
    np.testing.assert_allclose(values, (boundaries[:-1] + boundaries[1:]) / 2, atol=1e-12)
    check_tables(boundaries, values)


def test_lloyd_of_a_few_values_finds_them():
    """Four values, two bits: each is its own level and the error is 0; the range maps them to [-3, 3]."""
    x = np.repeat([-2.0, -0.5, 0.25, 1.5], [10, 20, 5, 7])
    boundaries, values = lloyd_tables(x, 2, -5.0, 5.0)
    np.testing.assert_allclose(values, x[[0, 10, 30, 35]] * 0.6, atol=1e-3)
    q = build_quantizer("lloyd", 2, -5, 5, latents=x)
    torch.testing.assert_close(q(torch.from_numpy(x)).double(), torch.from_numpy(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("kind", "bits"), [("spike", 2), ("spike", 6), ("heavy", 6), ("outside", 6), ("heavy", 12)])
def test_lloyd_tables_of_odd_latents_are_tables(kind, bits):
    """Fewer values than levels, heavy tails, all out of range: increasing, and no worse than the Gaussian levels."""
    rng = np.random.default_rng(0)
    x = {"spike": np.zeros(50), "heavy": rng.standard_cauchy(2000), "outside": rng.normal(9, 0.1, 500)}[kind]
    boundaries, values = lloyd_tables(x, bits, -5.0, 5.0)
    check_tables(boundaries, values)
    latents = torch.from_numpy(x)
    quantizers = (build_quantizer(kind, bits, -5, 5, latents=x) for kind in ("lloyd", "gaussian"))
    lloyd, gaussian = ((q(latents) - latents).square().mean().item() for q in quantizers)
    assert lloyd <= gaussian + 1e-6


TWO_LEVELS = dict(kind="x", boundaries=[-3, 0, 3], reconstruction_values=[-1, 1], min=-5, max=5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "does not describe a quantizer"),
        ("[]", "does not describe a quantizer"),
        ('{"kind": "lloyd"}', "does not describe a quantizer"),
        (TWO_LEVELS | dict(reconstruction_values=[1, -1]), "no quantizer's tables"),
        (TWO_LEVELS | dict(min=5, max=-5), "quant_min < quant_max"),
        (TWO_LEVELS | dict(reconstruction_values=[-1, math.nan]), "is nan, expected a finite number"),
    ],
)
def test_files_that_hold_no_tables(tmp_path, content, words):
    (tmp_path / "q.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_quantizer(tmp_path / "q.json")
    with pytest.raises(FileNotFoundError, match="no quantizer tables at .*absent"):
        read_quantizer(tmp_path / "absent")


def test_a_description_is_read_back(tmp_path):
    q = build_quantizer("uniform", 5, -4, 3)
    (tmp_path / "q.json").write_text(json.dumps(q.description()))
    again = read_quantizer(tmp_path / "q.json")
    assert again.description() == q.description()
    assert (again.kind, again.bits, again.min_value, again.max_value) == ("uniform", 5, -4.0, 3.0)
