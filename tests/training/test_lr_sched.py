"""training/lr_sched.py (docs/spec.md 7): hand-worked values."""

import math

import pytest

from training.lr_sched import base_learning_rate, learning_rate
from training.settings import TrainSettings

COSINE = dict(peak=0.8, min_lr=0.2, schedule="cosine", warmup_epochs=10, epochs=30)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0),
        (0.5, 0.04),
        (5, 0.4),
        (9.999, 0.79992),  # linear warm-up, per iteration
        (10, 0.8),
        (15, 0.2 + 0.3 * (1 + math.sqrt(0.5))),
        (20, 0.5),
        (25, 0.2 + 0.3 * (1 - math.sqrt(0.5))),
        (30, 0.2),
        (31, 0.2),
        (1000, 0.2),  # never beyond the end of the cosine
    ],
)
def test_cosine(epoch, expected):
    assert learning_rate(epoch, **COSINE) == pytest.approx(expected, abs=1e-12)


def test_cosine_falls_steadily_after_the_warm_up():
    values = [learning_rate(10 + i / 10, **COSINE) for i in range(201)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0), (2.5, 0.2), (10, 0.8), (10.1, 0.8), (400, 0.8)])
def test_constant(epoch, expected):
    assert learning_rate(epoch, **(COSINE | dict(schedule="constant"))) == pytest.approx(expected)


def test_without_warm_up_or_without_anything_after_it():
    assert learning_rate(0, peak=1, min_lr=0, schedule="cosine", warmup_epochs=0, epochs=10) == 1
    assert learning_rate(5, peak=1, min_lr=0, schedule="cosine", warmup_epochs=10, epochs=10) == 0.5
    assert learning_rate(10, peak=1, min_lr=0, schedule="cosine", warmup_epochs=10, epochs=10) == 1
    # a run shorter than its warm-up
    assert learning_rate(4, peak=1, min_lr=0, schedule="cosine", warmup_epochs=8, epochs=5) == 0.5


def test_base_rate():
    """The published recipe: blr 5e-5 at batch 2048 is 4e-4; --lr, even 0, goes before."""
    assert base_learning_rate(None, 5e-5, 2048) == pytest.approx(4e-4)
    assert base_learning_rate(None, 1e-4, 64) == pytest.approx(2.5e-5)
    assert base_learning_rate(3e-4, 5e-5, 2048) == 3e-4 and base_learning_rate(0.0, 5e-5, 2048) == 0


def test_unknown_schedules_list_the_choices():
    with pytest.raises(ValueError, match="'step'.*cosine, constant"):
        learning_rate(0, **(COSINE | dict(schedule="step")))


def test_odd_schedules_are_named() -> None:
    def said(**changes: object) -> list[str]:
        settings = TrainSettings(**(dict(lr=1e-3, warmup_epochs=1, epochs=3, steps_per_epoch=4) | changes))
        return settings.schedule_warnings()

    assert said() == said(min_lr=1, lr_schedule="constant") == []
    late = "warmup_epochs 100 is no shorter than the run of 3 epochs: the learning rate ends at 3 % of 0.001"
    assert said(warmup_epochs=100) == [late]
    assert "of 0.5 epochs: the learning rate ends at 50 % of 0.001" in said(max_steps=2)[0]
    assert said(min_lr=1) == ["min_lr 1 is above lr 0.001: the learning rate rises after the warm-up"]
