"""The demos: their data and classifiers, all stages at toy size, and that finished stages are skipped."""

import json
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
from tests.helpers import REPO, contents
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
    assert [stage.name for stage in stages] == list(COMMANDS) and not stages[0].command
    for stage in stages[1:]:
        assert stage.command[0] in ("python", "torchrun") and str(stage.folder) in stage.command
        assert not any("{" in word for word in stage.command) and stage.expected
    training = stages[4].command
    assert training[training.index("--max_steps") + 1] == "6" and "--nproc_per_node=2" in training
    assert training[training.index("--preset") + 1] == name
    vae = stages[1].command
    assert "--width" in vae and vae[vae.index("--img_size") + 1] == str(DEMOS[name].img_size)


@pytest.mark.parametrize("name", [stage.folder.name for stage in build_stages(DIGITS, Path("out"), Path(), TOY)])
def test_folders_that_the_demo_did_not_make_are_refused(tmp_path: Path, name: str) -> None:
    """Row 1: a folder of the user's, of any stage, stays, and nothing is begun."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "my-file.pth").write_bytes(b"precious")
    with pytest.raises(ValueError, match=rf"{name} was not made by this command .*choose another --output_dir"):
        main(["--toy", "--output_dir", str(tmp_path), "--pictures", str(tmp_path / "pictures")])
    assert contents(tmp_path) == {f"{name}/my-file.pth": b"precious"}


@pytest.mark.parametrize("name", ["samples.png", "reconstruction.png", "loss.png"])
def test_pictures_of_others_are_refused(tmp_path: Path, name: str) -> None:
    pictures, own = tmp_path / "pictures", tmp_path / "own.json"
    pictures.mkdir()
    refuse_others([pictures / name], own, "--pictures")
    (pictures / name).write_bytes(b"precious")
    with pytest.raises(ValueError, match=rf"{name} \(--pictures\) was not written by this command"):
        main(["--toy", "--output_dir", str(tmp_path / "out"), "--pictures", str(pictures)])
    assert not contents(tmp_path / "out") and (pictures / name).read_bytes() == b"precious"
    for damaged in ("[]", '{"a', json.dumps({name: ""})):
        own.write_text(damaged)
        with pytest.raises(ValueError, match="was not written by this command"):
            refuse_others([pictures / name], own, "--pictures")
    record_own([pictures / name], own)
    refuse_others([pictures / name], own, "--pictures")


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
