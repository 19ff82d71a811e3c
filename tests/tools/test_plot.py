"""tools/plot.py: reads what training wrote, says what is missing, writes a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.plot import draw, main, read_columns, smooth


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A log of 10 steps, one of them skipped, details at every fifth, three damaged lines."""
    lines = [{"step": i, "lr": i * 1e-4, "loss": 4 - i / 10, "grad_norm": 1.0 + i} for i in range(1, 11)]
    for line in lines[4::5]:
        line["loss_per_dim"] = [3.0, 1.0]
    lines.append(lines[0] | {"loss": "x"})
    lines[3] = {"step": 4, "lr": 4e-4, "skipped": True}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '5\n{"step": 11, "lo')
    return tmp_path


def test_columns(run: Path) -> None:
    c = read_columns(run)
    assert c["step"].tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10] and c["skipped"][0] == 1
    assert c["loss"][0] == 3.9 and c["loss_per_dim"].shape == (9, 2)
    assert np.isnan(c["loss_per_dim"][:3]).all() and c["loss_per_dim"][3].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("width, expected", [(2, [1, 2, 4, 6]), (9, [1, 2, 3, 4])])
def test_smoothing_by_hand(width: int, expected: list[float]) -> None:
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), width).tolist() == expected


def test_the_curves_are_those_of_the_log(run: Path) -> None:
    loss, rate, norm, dims = draw([run], width=1).axes
    assert loss.lines[0].get_ydata().tolist() == pytest.approx(read_columns(run)["loss"].tolist())
    assert rate.lines[0].get_ydata()[-1] == pytest.approx(1e-3) and norm.lines[0].get_ydata()[-1] == pytest.approx(11)
    assert [line.get_ydata().tolist() for line in dims.lines] == [[3, 3], [1, 1]]


def test_the_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(run), str(run), "--output", str(tmp_path / "x.png"), "--smooth", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 800


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no log at .*log.jsonl"):
        main([str(tmp_path)])
    (tmp_path / "log.jsonl").write_text('{"step": 1, "skipped": true}\n')
    with pytest.raises(ValueError, match="no step with a loss yet"):
        main([str(tmp_path)])
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (3.4, "loss as expected at 2 steps; 1 later steps not reached"),
        (3.0, "step 7: loss 3.350, expected 3.00 +- 0.1"),
    ],
)
def test_the_expected_range(run: Path, capsys: pytest.CaptureFixture, later: float, said: str) -> None:
    """Means of two steps by hand: 3.85 at step 2, (3.4 + 3.3) / 2 = 3.35 at step 7; step 20 is not reached yet."""
    expected = dict(steps=[2, 7, 20], loss=[3.8, later, 1.0], width=2, tolerance=0.1)
    (run / "expected.json").write_text(json.dumps(expected))
    main([str(run), "--expected", str(run / "expected.json")])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "{}", '{"steps": []}'])
def test_what_is_no_expected_range(run: Path, text: str) -> None:
    (run / "expected.json").write_text(text)
    with pytest.raises(ValueError, match="expected.json .*--expected"):
        main([str(run), "--expected", str(run / "expected.json")])
