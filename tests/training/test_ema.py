"""training/ema.py (docs/spec.md 7; arXiv 2312.02696): against the plain formulas, number by number."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import tiny_model
from training.ema import ModelEma, PowerEma, power_exponent
from util.ema import initial_share


def test_the_plain_formula():
    """ema = rate * ema + (1 - rate) * weight after each of 20 steps, in float64 by hand."""
    model = nn.Linear(3, 2)
    ema = ModelEma(model, 0.9)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += torch.randn(p.shape, generator=generator)
                expected[name] = 0.9 * expected[name] + 0.1 * p.double()
        ema.update()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)


def one_weight(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_published_rate_moves_slowly_but_moves():
    """0.9999 in float32: after 1,000 steps at weight 1 from 0 the average is 1 - 0.9999^1000 = 0.0952."""
    model = one_weight(0)
    ema = ModelEma(model, 0.9999)
    nn.init.ones_(model.weight)
    for _ in range(1000):
        ema.update()
    assert ema.state_dict()["weight"].item() == pytest.approx(1 - 0.9999**1000, abs=1e-5)


def test_it_has_every_parameter_in_float32_and_no_buffer():
    model = tiny_model()
    state = ModelEma(model, 0.9).state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert "boundaries" not in state and all(not value.requires_grad for value in state.values())
    half = ModelEma(nn.Linear(2, 2).to(torch.bfloat16), 0.9).state_dict()
    assert {value.dtype for value in half.values()} == {torch.float32}


def test_saved_and_loaded():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = {name: value.clone() for name, value in ModelEma(first, 0.9).state_dict().items()}
    ema = ModelEma(second, 0.9)
    ema.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in ema.state_dict().items())
    with torch.no_grad():
        second.weight.fill_(1)
    ema.update()  # goes on from what was loaded, which stays as it was
    torch.testing.assert_close(ema.state_dict()["weight"], 0.9 * first.weight.detach() + 0.1)
    assert torch.equal(saved["weight"], first.weight)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 2)}, r"in a\.pth lacks or misshapes 1 parameters: bias"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(2)}, "misshapes 1 parameters: weight"),
        ({"weight": "text", "bias": torch.zeros(2)}, "misshapes 1 parameters: weight"),
        ({"weight": torch.full((2, 2), math.nan), "bias": torch.zeros(2)}, "NaN.*weight"),
    ],
)
def test_states_that_do_not_fit(state, message):
    ema = ModelEma(nn.Linear(2, 2), 0.9)
    before = ema.state_dict()["weight"].clone()
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state, "a.pth")
    assert torch.equal(ema.state_dict()["weight"], before)


@pytest.mark.parametrize("rate", [1.0, -0.1, 2, math.nan])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match="ema_rate must be"):
        ModelEma(nn.Linear(1, 1), rate)


def test_warm_up_by_hand():
    """Rates 1/10, 2/11, 3/12 ... until the rate itself; from 1 with the weight at 5: 1 * 0.1 + 5 * 0.9 = 4.6, ..."""
    model = one_weight(1)
    ema = ModelEma(model, 0.99, warmup=True)
    nn.init.constant_(model.weight, 5)
    ema.update(0)
    assert ema.state_dict()["weight"].item() == pytest.approx(4.6)
    ema.update(1)
    assert ema.state_dict()["weight"].item() == pytest.approx((4.6 * 2 + 5 * 9) / 11)
    assert [ema.rate_at(step) for step in (0, 1, 2)] == [0.1, 2 / 11, 0.25] and ema.rate_at(10**6) == 0.99
    assert ModelEma(model, 0.99).rate_at(0) == 0.99


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_the_share_of_the_initial_weights(warmup: bool, steps: int) -> None:
    """What is left of a weight that was 1 at first and 0 ever after."""
    model = one_weight(1)
    ema = ModelEma(model, 0.9, warmup)
    nn.init.zeros_(model.weight)
    for step in range(steps):
        ema.update(step)
    assert initial_share(0.9, warmup, steps) == pytest.approx(ema.state_dict()["weight"].item(), rel=1e-5)


# ---- power-function profiles


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_exponents_of_the_paper(sigma_rel: float, gamma: float) -> None:
    """The values of section 3.1; and the profile's standard deviation, integrated numerically, is sigma_rel."""
    g = power_exponent(sigma_rel)
    assert g == pytest.approx(gamma, abs=0.005)
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = (g + 1) * tau**g / 200_000
    assert np.sqrt((p * tau**2).sum() - (p * tau).sum() ** 2) == pytest.approx(sigma_rel, rel=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, math.nan])
def test_lengths_that_no_profile_has(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be in \(0, 0\.2887\]"):
        power_exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_power_function_average_by_its_closed_form(sigma_rel: float) -> None:
    """Weights 1, 4, 9 ... after steps 1, 2, 3 ..., from 1000: sum of s^2 (s^(g+1) - (s-1)^(g+1)) / t^(g+1)."""
    model = one_weight(1000)
    average, g = PowerEma(model, sigma_rel), power_exponent(sigma_rel)
    for t in range(1, 301):
        nn.init.constant_(model.weight, t**2)
        average.update(t - 1)
        s = np.arange(1, t + 1, dtype=np.float64)
        exact = (s**2 * ((s / t) ** (g + 1) - ((s - 1) / t) ** (g + 1))).sum()
        assert average.state_dict()["weight"].item() == pytest.approx(exact, rel=2e-6)
    assert average.state_dict()["weight"].dtype == torch.float32
