"""The demo: its data, its judge, its stages at toy size end to end, and that finished stages are kept."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset.images import read_image
from demo import digits
from demo.run import Stage, run_stages
from tests.helpers import REPO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    assert digits.write_image_folder(root) == {"train": 1617, "val": 180}
    return root


def test_every_digit_is_written_once(folder: Path) -> None:
    parts = digits.split()
    together = np.concatenate([parts[name][0].reshape(-1, 64) for name in ("train", "val")])
    assert len(together) == 1797
    for part in ("train", "val"):
        files = sorted((folder / part).glob("*/*.png"))
        assert len(files) == len(parts[part][1])
        assert sorted(int(file.parent.name) for file in files) == sorted(parts[part][1].tolist())
        assert {read_image(file).size for file in files[:20]} == {(32, 32)}


def test_the_judge_knows_real_digits_and_nothing_else(folder: Path) -> None:
    judge, files = digits.fit_judge(folder / "train"), sorted((folder / "val").glob("*/*.png"))
    labels = [int(file.parent.name) for file in files]
    assert digits.accuracy(judge, files, labels) > 0.97
    assert digits.accuracy(judge, files, [(label + 1) % 10 for label in labels]) < 0.03


class Counter:
    """Stages that count how often each ran and write a file."""

    def __init__(self, out: Path):
        self.out, self.runs = out, []

    def stages(self, flag: str = "1", fails: bool = False) -> list[Stage]:
        def work(name: str) -> None:
            self.runs.append(name)
            (self.out / name).mkdir(exist_ok=True)
            (self.out / name / "mark").touch()
            if name == "c" and fails:
                raise ValueError("stage c broke")

        return [
            Stage(
                name,
                ["true", flag if name == "b" else "-"],
                self.out / name,
                lambda: "done",
                "done",
                work=lambda name=name: work(name),
            )
            for name in "abc"
        ]


def test_finished_stages_are_kept_and_an_interrupted_one_runs_again(tmp_path: Path) -> None:
    counter = Counter(tmp_path)
    with pytest.raises(ValueError, match="stage c broke"):
        run_stages(counter.stages(fails=True), tmp_path)
    assert counter.runs == ["a", "b", "c"]
    (tmp_path / "c" / "half").touch()
    rows = run_stages(counter.stages(), tmp_path)
    assert counter.runs == ["a", "b", "c", "c"] and (tmp_path / "c" / "half").exists()  # continued, not begun anew
    assert [row[0] for row in rows] == ["a", "b", "c"] and all(row[1] >= 0 for row in rows)
    run_stages(counter.stages(), tmp_path)
    assert counter.runs == ["a", "b", "c", "c"]


def test_another_command_runs_the_stage_and_all_after_it_from_nothing(tmp_path: Path) -> None:
    counter = Counter(tmp_path)
    run_stages(counter.stages(), tmp_path)
    for name in "abc":
        (tmp_path / name / "old").touch()
    run_stages(counter.stages(flag="2"), tmp_path)
    assert counter.runs == ["a", "b", "c", "b", "c"]
    assert [(tmp_path / name / "old").exists() for name in "abc"] == [True, False, False]


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    stage = Stage("x", ["false"], tmp_path / "x", lambda: "never", "never")
    with pytest.raises(ValueError, match=r"stage 1 \(x\) ended with exit code 1"):
        run_stages([stage], tmp_path)
    assert "finished" not in json.loads((tmp_path / "stages" / "1-x.json").read_text())


@pytest.mark.slow
def test_all_stages_at_toy_size(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "demo.run",
        "--toy",
        "--output_dir",
        str(tmp_path / "out"),
        "--pictures",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    for picture in ("samples.png", "reconstruction.png", "loss.png"):
        assert read_image(tmp_path / picture).size[0] > 100
    assert (
        "judge right on 99." in result.stdout and "1617 latents" in result.stdout and "of 10 samples" in result.stdout
    )
    stamps = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "stages").iterdir())]
    assert len(stamps) == 6 and all(stamp["seconds"] > 0 for stamp in stamps)
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == 6
    assert str(REPO) not in "".join(json.dumps(stamp["command"]) for stamp in stamps)
