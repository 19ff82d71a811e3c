"""The demos: their data and classifiers, all stages at toy size, and that finished stages are skipped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset.images import read_image
from demo import digits, photos
from demo.definition import frechet, list_images
from demo.digits import DIGITS
from demo.photos import PHOTOS
from demo.run import COMMANDS, DEMOS, TOY, build_stages, main
from demo.stages import Stage, run_stages
from tests.helpers import REPO
from util.files import record_own, refuse_others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    assert digits.write_image_folder(root) == {"train": 1617, "val": 180}
    return root


def test_every_digit_is_written_once(folder: Path) -> None:
    parts = digits.split()
    assert len(np.concatenate([parts[name][0].reshape(-1, 64) for name in ("train", "val")])) == 1797
    for part, (_, labels) in parts.items():
        files = sorted((folder / part).glob("*/*.png"))
        assert sorted(int(file.parent.name) for file in files) == sorted(labels.tolist())
        assert {read_image(file).size for file in files[:20]} == {(32, 32)}


def test_the_classifier_knows_real_digits_and_nothing_else(folder: Path) -> None:
    """One margin per pair of the ten classes; the distance to real images is small, of a set to itself 0."""
    classifier, (files, labels) = DIGITS.fit_classifier(folder / "train"), list_images(folder / "val")
    assert classifier.score(files, labels)[0] > 0.97 and classifier.score(files, labels)[1] < 0.2
    assert classifier.score(files, [(label + 1) % 10 for label in labels])[0] < 0.03
    margins = classifier.real_margins
    assert margins.shape == (1617, 45) and abs(frechet(margins, margins)) < 1e-6
    assert frechet(margins, margins + 1) == pytest.approx(45, rel=1e-6)


@pytest.fixture
def few_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "CROPS", {"train": 20, "val": 2})


def test_training_and_validation_photos_share_no_row(tmp_path: Path, few_photos: None) -> None:
    """Every crop is somewhere within its part's rows of one of its class's pictures."""
    assert photos.write_image_folder(tmp_path) == {"train": 200, "val": 20}
    for name, sources in photos.PICTURES.items():
        train, val = (range(*photos.rows_of(name, part)) for part in ("train", "val"))
        assert not {*train} & {*val} and {*train} | {*val} == {*range(photos.HEIGHT)} and len(val) >= photos.SIZE
        pictures = [photos.read_picture(source) for source in sources]
        for part, rows in (("train", train), ("val", val)):
            for file in sorted((tmp_path / part / name).iterdir())[:2]:
                crop = np.asarray(read_image(file))
                windows = [np.lib.stride_tricks.sliding_window_view(p[rows][:, :, 0], (64, 64)) for p in pictures]
                corners = [(w[..., 0, :] == crop[0, :, 0]).all(-1) for w in windows]
                assert any((w[c] == crop[..., 0]).all((1, 2)).any() for w, c in zip(windows, corners, strict=True))
    classifier = PHOTOS.fit_classifier(tmp_path / "train")
    assert classifier.score(*list_images(tmp_path / "train"))[0] > 0.98
    assert classifier.score(*list_images(tmp_path / "val"))[0] > 0.6  # 94 % with all crops, docs/demos.md


def test_a_package_without_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(photos, "PICTURES", {"dog": ("skimage.data/dog.png",)})
    with pytest.raises(FileNotFoundError, match=r"dog.png is missing: the installed scikit-image .* no such picture"):
        photos.write_image_folder(tmp_path)


@pytest.mark.parametrize("name", DEMOS)
def test_the_commands_of_the_stages(tmp_path: Path, name: str) -> None:
    """Folders with blanks stay one word; every size is filled in; training runs two processes."""
    stages = build_stages(DEMOS[name], tmp_path / "a b", tmp_path, TOY)
    assert [stage.name for stage in stages] == list(COMMANDS) and stages[0].command is None
    for stage in stages[1:]:
        assert stage.command[0] == sys.executable and str(stage.folder) in stage.command
        assert not any("{" in word for word in stage.command) and stage.expected
    training = stages[4].command
    assert training[training.index("--max_steps") + 1] == "6" and "--nproc_per_node=2" in training
    assert training[training.index("--preset") + 1] == name
    vae = stages[1].command
    assert "--width" in vae and vae[vae.index("--img_size") + 1] == str(DEMOS[name].img_size)


class Recorded:
    """Stages a, b, c that record that they ran and write a file."""

    def __init__(self, out: Path):
        self.out, self.runs = out, []

    def run(self, flag: str = "1", fails: bool = False) -> list[dict]:
        def work(name: str) -> None:
            self.runs.append(name)
            (self.out / name).mkdir(exist_ok=True)
            (self.out / name / "mark").touch()
            if name == "c" and fails:
                raise ValueError("stage c broke")

        def stage(name: str) -> Stage:
            command = ["true", flag if name == "b" else "-"]
            return Stage(name, command, self.out / name, lambda: "done", "done", work=lambda: work(name))

        return run_stages([stage(name) for name in "abc"], self.out)


def test_finished_stages_are_skipped_and_an_interrupted_one_runs_again(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    with pytest.raises(ValueError, match="stage c broke"):
        recorded.run(fails=True)
    assert recorded.runs == ["a", "b", "c"]
    (tmp_path / "c" / "half").touch()
    rows = recorded.run()
    assert recorded.runs == ["a", "b", "c", "c"] and (tmp_path / "c" / "half").exists()  # resumed
    assert [row["skipped"] for row in rows] == [True, True, False] and all(row["seconds"] >= 0 for row in rows)
    assert all(row["skipped"] for row in recorded.run()) and recorded.runs == ["a", "b", "c", "c"]
    old = tmp_path / "stages" / "3-c.json"  # as earlier versions wrote it
    old.write_text(old.read_text().replace('"result"', '"figure"'))
    recorded.run()
    assert recorded.runs == ["a", "b", "c", "c", "c"]


def test_another_command_runs_the_stage_and_all_after_it_from_nothing(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.run()
    for name in "abc":
        (tmp_path / name / "old").touch()
    recorded.run(flag="2")
    assert recorded.runs == ["a", "b", "c", "b", "c"]
    assert [(tmp_path / name / "old").exists() for name in "abc"] == [True, False, False]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [stage.folder.name for stage in build_stages(DIGITS, Path("out"), Path(), TOY)])
def test_folders_that_the_demo_did_not_make_are_refused(tmp_path: Path, name: str) -> None:
    """Row 1: a folder of the user's, of any stage, stays, and nothing is begun."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "my-file.pth").write_bytes(b"precious")
    with pytest.raises(ValueError, match=rf"{name} was not made by this demo .*choose another --output_dir"):
        main(["--toy", "--output_dir", str(tmp_path), "--pictures", str(tmp_path / "pictures")])
    assert everything(tmp_path) == {f"{name}/my-file.pth": b"precious"}


def test_a_folder_that_replaced_the_demos_is_refused(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.run()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_bytes(b"precious")
    before = everything(tmp_path)
    assert all(row["skipped"] for row in recorded.run())
    with pytest.raises(ValueError, match=r"b was not made by this demo"):
        recorded.run(flag="2")
    assert everything(tmp_path) == before and recorded.runs == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["samples.png", "reconstruction.png", "loss.png"])
def test_pictures_of_others_are_refused(tmp_path: Path, name: str) -> None:
    pictures, own = tmp_path / "pictures", tmp_path / "own.json"
    pictures.mkdir()
    refuse_others([pictures / name], own, "--pictures")
    (pictures / name).write_bytes(b"precious")
    with pytest.raises(ValueError, match=rf"{name} \(--pictures\) was not written by this command"):
        main(["--toy", "--output_dir", str(tmp_path / "out"), "--pictures", str(pictures)])
    assert not everything(tmp_path / "out") and (pictures / name).read_bytes() == b"precious"
    for damaged in ("[]", '{"a', json.dumps({name: ""})):
        own.write_text(damaged)
        with pytest.raises(ValueError, match="was not written by this command"):
            refuse_others([pictures / name], own, "--pictures")
    record_own([pictures / name], own)
    refuse_others([pictures / name], own, "--pictures")


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    stage = Stage("x", ["false"], tmp_path / "x", lambda: "never", "never")
    with pytest.raises(ValueError, match=r"\[1/1\] x failed with exit code 1"):
        run_stages([stage], tmp_path)
    assert "finished" not in json.loads((tmp_path / "stages" / "1-x.json").read_text())


@pytest.mark.slow
def test_all_stages_at_toy_size(tmp_path: Path) -> None:
    folders = ["--output_dir", str(tmp_path / "out"), "--pictures", str(tmp_path)]
    command = [sys.executable, "-m", "demo.run", "--toy", *folders]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    for picture in ("samples.png", "reconstruction.png", "loss.png"):
        assert read_image(tmp_path / picture).size[0] > 100
    for words in ("held-out ones (SVM): 99.", "1617 latents", "class accuracy of 10 generated images"):
        assert words in result.stdout
    stamps = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "stages").iterdir())]
    assert len(stamps) == 6 and all(stamp["seconds"] > 0 for stamp in stamps)
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("finished before") == 6
    assert "6 stages, 0 of them in this run (0 s)" in again.stdout
    assert str(REPO) not in "".join(json.dumps(stamp["command"]) for stamp in stamps)


@pytest.mark.slow
def test_photos_at_toy_size(tmp_path: Path, few_photos: None, capfd: pytest.CaptureFixture) -> None:
    """The same stages with the other data: one row of the table and one file per stage, and its own pictures."""
    main(["photos", "--toy", "--output_dir", str(tmp_path / "out"), "--pictures", str(tmp_path)])
    printed = capfd.readouterr().out
    for words in ("200 + 20 real images", "200 latents", "class accuracy of 10 generated images", "6 stages"):
        assert words in printed
    for picture in ("samples.png", "reconstruction.png", "loss.png", "rate_distortion.png"):
        assert read_image(tmp_path / f"photos_{picture}").size[0] > 100
    rows = json.loads((tmp_path / "out" / "photos" / "reconstruction" / "results.json").read_text())["rows"]
    assert len(rows) == 1 + 6 * 4
