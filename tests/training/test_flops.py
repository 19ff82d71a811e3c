"""training/flops.py: closed formulas against torch's counter; peaks by device name."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.tokenbridge import TokenBridge, draw_mask_ratio
from tests.helpers import tiny_batch, tiny_config
from tools.bench.counting import fake_mode
from training.flops import forward_flops, mean_mask_ratio, peak_tflops, step_flops

WIDE = dict(
    encoder_embed_dim=48,
    encoder_depth=3,
    encoder_num_heads=4,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
    channel_embed_dim=24,
    channel_depth=2,
    channel_heads=3,
    mlp_ratio=3.0,
    quant_levels=32,
    buffer_size=5,
)


@pytest.mark.parametrize("changes", [{}, WIDE])
@pytest.mark.parametrize("masked", [12, 16])
def test_the_formula_is_what_torch_counts(changes: dict, masked: int) -> None:
    with fake_mode():
        model = TokenBridge(**tiny_config(**changes))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*(torch.zeros(3, 16, 4, 4), torch.zeros(3, dtype=torch.long)), num_masked=masked)
    assert forward_flops(model.config, masked) * 3 == counter.get_total_flops()


def test_a_step_is_three_forward_passes_but_for_the_inputs() -> None:
    """Backward: two products for each of forward's, less those whose input needs no gradient (z_proj)."""
    model = TokenBridge(**tiny_config())
    with FlopCounterMode(display=False) as counter:
        model(*tiny_batch(2), num_masked=14).backward()
    assert counter.get_total_flops() / 2 == pytest.approx(step_flops(model.config, 14), rel=0.03)


@pytest.mark.parametrize("lowest", [0.7, 0.5, 0.95])
def test_mean_mask_ratio_is_the_mean_of_the_draws(lowest: float) -> None:
    uniform = (np.arange(20000) + 0.5) / 20000
    assert mean_mask_ratio(lowest) == pytest.approx(np.mean([draw_mask_ratio(lowest, u) for u in uniform]), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10G", "bf16", 70),
        ("cpu", "fp32", None),
        ("a device nobody knows", "bf16", None),
    ],
)
def test_peaks_by_device_name(name: str, precision: str, expected: float | None) -> None:
    assert peak_tflops(name, precision) == expected
