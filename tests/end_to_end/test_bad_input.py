"""main_tokenbridge.py refuses bad input before any work: an error whose words name the flag or the file, and nothing written or overwritten."""

import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from main_tokenbridge import main
from models.vae_loading import load_vae
from tests.helpers import Explosive, tiny_vae, write_image_folder
from util.checkpoint import LAST

SIZE = 32  # pixels, with a VAE of stride 16: 2x2 tokens of 16 channels
BAD = (ValueError, OSError)  # what run_cli turns into one line and exit status 2
MODES = {"train": {}, "evaluate": dict(evaluate=True), "sample": dict(sample=True, classes="0", num_iter=1)}


def save_vae(path: Path, seed: int | None = None) -> Path:
    """The tiny VAE's file; with a seed, another VAE of the same shape."""
    vae = tiny_vae()
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for parameter in vae.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
    torch.save({"model": vae.state_dict(), "config": vae.config}, path)
    return path


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("bad_input_vae") / "vae.pth")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two images. Read only."""
    return write_image_folder(tmp_path_factory.mktemp("bad_input_pictures"), per_class=2, size=(40, 36))


@pytest.fixture(scope="session")
def trained(vae_file: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step. Read only."""
    out = tmp_path_factory.mktemp("bad_input_run")
    main(arguments(vae_file, pictures, out))
    return out


def arguments(vae_file: Path, pictures: Path, out: Path, /, **changes: object) -> list[str]:
    """A training of one step with good flags, changed; None leaves a flag out, True gives it alone."""
    flags = (
        dict(
            model="tokenbridge_digits",
            img_size=SIZE,
            class_num=2,
            buffer_size=4,
            vae_path=vae_file,
            data_path=pictures,
            output_dir=out,
            batch_size=4,
            max_steps=1,
            warmup_epochs=0,
            num_workers=0,
            device="cpu",
        )
        | changes
    )
    return [
        part
        for name, value in flags.items()
        if value is not None
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


@pytest.fixture
def call(vae_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """call(name=value, ...) runs main with those flags changed; an optimizer step or a generated image would fail the test."""

    def no_work(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was begun before the input was refused")

    for name in ("training.run.train_one_epoch", "generation.sample.write_images", "evaluation.evaluator.evaluate"):
        monkeypatch.setattr(name, no_work)
    return lambda **changes: main(arguments(vae_file, pictures, tmp_path / "out", **changes))


def assert_nothing_written(tmp_path: Path) -> None:
    """The output folder is absent, or made and empty."""
    assert not snapshot(tmp_path / "out")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_checkpoint(trained: Path, path: Path, change: Callable[[dict], object]) -> Path:
    """A copy of the trained checkpoint after change(content)."""
    content = torch.load(trained / LAST, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_the_flags_that_are_changed_below_are_good(trained: Path, vae_file: Path) -> None:
    """Without this every refusal could have another reason."""
    content = torch.load(trained / LAST, weights_only=True)
    assert content["step"] == 1 and content["config"]["vae_fingerprint"] == load_vae(vae_file).latent_fingerprint()
    assert len((trained / "log.jsonl").read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- flags alone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(quant_bits=0), "--quant_bits must be from 1 to 12, got 0"),
        (dict(quant_bits=13), "--quant_bits must be from 1 to 12, got 13"),
        (dict(quant_min=2, quant_max=2), r"quant_min < quant_max, got \[2\.0, 2\.0\] \(--quant_min\)"),
        (dict(quant_min=5, quant_max=-5), r"quant_min < quant_max, got \[5\.0, -5\.0\] \(--quant_min\)"),
        (dict(quant_max=math.nan), r"quant_min < quant_max, got \[-5\.0, nan\] \(--quant_min\)"),
        (dict(img_size=40), r"img_size 40 is not a multiple of the VAE's stride 16 \(--img_size\)"),
        (dict(img_size=0), "--img_size must be at least 1, got 0"),
        (dict(patch_size=2), r"patch_size 2: the head .*\(--patch_size\)"),
        (dict(class_num=0), "--class_num must be at least 1, got 0"),
        (dict(class_num=1), r"train \(--data_path\) has 2 class folders, more than --class_num 1"),
        (dict(buffer_size=0), r"buffer_size must be at least 1, got 0 \(--buffer_size\)"),
        (dict(label_drop_prob=1.5), r"got 1\.5 \(--label_drop_prob\)"),
        (dict(mask_ratio_min=0), r"got 0\.0 \(--mask_ratio_min\)"),
        (dict(batch_size=0), "--batch_size must be at least 1, got 0"),
        (dict(batch_size=5), "the data set has 4 samples, fewer than .*lower --batch_size"),
        (dict(accum_iter=2), r"the data set has 4 samples, fewer than .*--accum_iter 2\)"),
        (dict(epochs=0), "--epochs must be at least 1, got 0"),
        (dict(max_steps=0), "--max_steps must be at least 1, got 0"),
        (dict(lr=math.inf), "--lr must be finite, got inf"),
        (dict(num_workers=-1), "--num_workers must be at least 0, got -1"),
        (dict(num_iter=0), "--num_iter must be at least 1, got 0"),
        (dict(num_images=0), "--num_images must be at least 1, got 0"),
        (dict(temperature=-1), r"--temperature must be at least 0, got -1\.0"),
        (dict(temperature=math.nan), "--temperature must be finite, got nan"),
        (dict(cfg=math.nan), "--cfg must be finite, got nan"),
        (dict(cfg=math.inf), "--cfg must be finite, got inf"),
        (dict(device="tpu"), "--device 'tpu' is not one of"),
        (dict(evaluate=True, sample=True, classes="0"), "--evaluate and --sample are two different things"),
        (dict(sample=True), r"sampling needs classes.*\(--classes\)"),
        (dict(vae_embed_dim=8), r"vae_embed_dim 8 contradicts .*vae\.pth, whose VAE has 16 \(--vae_embed_dim\)"),
        (dict(vae_stride=8), r"vae_stride 8 contradicts .*vae\.pth, whose VAE has 16 \(--vae_stride\)"),
        (dict(online_eval=True, fid_stats="absent.npz"), r"no FID reference statistics at absent\.npz \(--fid_stats\)"),
    ],
)
def test_values_out_of_range(call: Callable[..., None], tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(BAD, match=words):
        call(**changes)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("flag", "value", "choices"),
    [
        ("--model", "tokenbridge_giant", ["tokenbridge_base", "tokenbridge_large", "tokenbridge_huge"]),
        ("--cfg_schedule", "step", ["linear", "constant"]),
        ("--lr_schedule", "step", ["constant", "cosine"]),
        ("--precision", "fp8", ["fp32", "bf16", "fp16"]),
        ("--weights", "best", ["ema", "model"]),
        ("--on_bad_image", "ignore", ["error", "skip"]),
    ],
)
def test_unknown_choices_are_refused_with_the_list(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture, flag: str, value: str, choices: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(**{flag.removeprefix("--"): value})
    error = capsys.readouterr().err.split("error: ")[1]  # the line after the usage, which lists choices too
    assert stop.value.code == 2 and flag in error and value in error and all(choice in error for choice in choices)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("quant_bit", 6), ("batchsize", 4), ("temprature", 1.0), ("evalute", True)]
)
def test_misspelt_and_shortened_flags_are_refused(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture, name: str, value: object
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(**{name: value})
    assert stop.value.code == 2 and f"unrecognized arguments: --{name}" in capsys.readouterr().err
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("num_iter", "many"), ("cfg", "3,1"), ("img_size", "256px")])
def test_values_that_are_not_numbers(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture, name: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(**{name: value})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"argument --{name}" in error and repr(value) in error
    assert_nothing_written(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(call: Callable[..., None], tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"--device {device} was asked for, but this machine has no CUDA device"):
        call(device=device)
    assert_nothing_written(tmp_path)


# ------------------------------------------------------------------------------------------------------- no checkpoint to start from


@pytest.mark.parametrize("mode", ["evaluate", "sample"])
def test_images_are_never_made_with_random_weights(call: Callable[..., None], tmp_path: Path, mode: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--evaluate and --sample need trained weights: give --resume"):
        call(**MODES[mode])
    for folder in ("empty", "absent"):
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint at .*{folder}.checkpoint-last\.pth \(--resume\)"):
            call(resume=tmp_path / folder, **MODES[mode])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth.*\(--resume\)"):
        call(resume=tmp_path / "absent.pth", **MODES[mode])
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_training_says_when_it_starts_from_random_weights(
    vae_file: Path, pictures: Path, tmp_path: Path, messages: list[str], folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    main(arguments(vae_file, pictures, tmp_path / "out", resume=tmp_path / folder))
    assert any(
        line == f"no {LAST} in {tmp_path / folder} (--resume): training starts from random weights" for line in messages
    )
    assert torch.load(tmp_path / "out" / LAST, weights_only=True)["step"] == 1 and not list(
        (tmp_path / "empty").iterdir()
    )


def test_training_does_not_take_an_absent_file_for_a_fresh_start(call: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth.*\(--resume\)"):
        call(resume=tmp_path / "absent.pth")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("resume", [None, "empty", "absent", "other"])
def test_no_run_overwrites_the_checkpoint_of_another(
    call: Callable[..., None], trained: Path, tmp_path: Path, resume: str | None
) -> None:
    for folder in ("out", "other"):
        shutil.copytree(trained, tmp_path / folder)
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path / "out")
    with pytest.raises(
        ValueError,
        match=rf"out \(--output_dir\) already holds a checkpoint-last\.pth: continue it with --resume {tmp_path / 'out'}",
    ):
        call(resume=None if resume is None else tmp_path / resume)
    assert snapshot(tmp_path / "out") == before and LAST in before


# ------------------------------------------------------------------------------------------------------- files that are no checkpoint


def write_truncated(path: Path, trained: Path, share: float = 0.7) -> None:
    whole = (trained / LAST).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


CANNOT_BE_READ = r"cannot be read as a checkpoint; it is cut short, or another kind of file"
HOLDS_CODE = r"holds code \([\w.]+\), which is never run"
NO_CHECKPOINTS = {
    "truncated": (write_truncated, CANNOT_BE_READ),
    "cut to its first bytes": (lambda path, trained: write_truncated(path, trained, 1e-4), CANNOT_BE_READ),
    "empty": (lambda path, trained: path.write_bytes(b""), CANNOT_BE_READ),
    "text": (lambda path, trained: path.write_text("not a checkpoint\n" * 100), CANNOT_BE_READ),
    "a list": (lambda path, trained: torch.save([1, 2], path), "is not a checkpoint: it holds a list, not a dict"),
    "no weights": (
        lambda path, trained: torch.save({"state_dict": {}, "epoch": 3}, path),
        'has no weights under the key "model"; found state_dict, epoch',
    ),
    "a VAE": (lambda path, trained: save_vae(path), "has a config that is no TokenBridge model's"),
    "code, torch.save": (
        lambda path, trained: torch.save({"model": Explosive(path.with_name("ran"))}, path),
        HOLDS_CODE,
    ),
    "code, pickle": (
        lambda path, trained: path.write_bytes(pickle.dumps({"model": Explosive(path.with_name("ran"))}, protocol=2)),
        HOLDS_CODE,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoint(
    call: Callable[..., None], trained: Path, tmp_path: Path, kind: str, mode: str
) -> None:
    write, words = NO_CHECKPOINTS[kind]
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / LAST, trained)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"checkpoint-last\.pth \(--resume\) {words}"):
        call(resume=tmp_path / "out", **MODES[mode])
    # and the file that the code would have made is not there
    assert snapshot(tmp_path / "out") == before and set(before) == {LAST}


def drop_head(content: dict) -> None:
    for part in ("model", "model_ema"):
        del content[part]["mask_token"]


def spoil(content: dict) -> None:
    for part in ("model", "model_ema"):
        content[part]["mask_token"].fill_(math.nan)


def reshape(content: dict) -> None:
    for part in ("model", "model_ema"):
        content[part]["mask_token"] = torch.zeros(1, 1, 5)


@pytest.mark.parametrize("mode", ["train", "evaluate", "sample"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_head, r"lacks 1 (keys \(|parameters: )mask_token"),
        (spoil, "holds NaN or infinite weights, first: mask_token"),
        (reshape, r"has 1 weights of another shape \(mask_token: file \(1, 1, 5\), model \(1, 1, 128\)\)"),
    ],
)
def test_weights_that_do_not_fit_the_model(
    call: Callable[..., None], trained: Path, tmp_path: Path, change: Callable[[dict], None], words: str, mode: str
) -> None:
    path = changed_checkpoint(trained, tmp_path / "changed.pth", change)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"changed\.pth.*{words}"):
        call(resume=path, **MODES[mode])
    assert path.read_bytes() == before
    assert_nothing_written(tmp_path)


def test_a_checkpoint_without_ema_says_how_to_use_it(call: Callable[..., None], trained: Path, tmp_path: Path) -> None:
    path = changed_checkpoint(trained, tmp_path / "plain.pth", lambda content: content.pop("model_ema"))
    with pytest.raises(ValueError, match=r"plain\.pth has no model_ema; give weights .model. .*\(--weights\)"):
        call(resume=path, **MODES["sample"])
    assert_nothing_written(tmp_path)


# ------------------------------------------------------------------------------------------------------- flags that contradict a checkpoint


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("quant_bits", 5, r"--quant_bits 5 contradicts .*checkpoint-last\.pth, whose model has quant_levels = 64"),
        ("quant_max", 4.0, r"--quant_max 4\.0 contradicts .*checkpoint-last\.pth, whose model has quant_max = 5\.0"),
        ("img_size", 64, r"--img_size 64 contradicts .*checkpoint-last\.pth, whose model has img_size = 32"),
        ("class_num", 3, r"--class_num 3 contradicts .*checkpoint-last\.pth, whose model has class_num = 2"),
        ("buffer_size", 64, r"--buffer_size 64 contradicts .*checkpoint-last\.pth, whose model has buffer_size = 4"),
        (
            "model",
            "tokenbridge_base",
            r"--model tokenbridge_base contradicts .*checkpoint-last\.pth, which holds a tokenbridge_digits",
        ),
    ],
)
def test_flags_that_contradict_the_checkpoint(
    call: Callable[..., None], trained: Path, tmp_path: Path, name: str, value: object, words: str, mode: str
) -> None:
    before = snapshot(trained)
    with pytest.raises(ValueError, match=words):
        call(resume=trained, **MODES[mode], **{name: value})
    assert snapshot(trained) == before
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_another_vae_than_the_checkpoint_was_trained_with(
    call: Callable[..., None], trained: Path, tmp_path: Path, mode: str
) -> None:
    other = save_vae(tmp_path / "other.pth", seed=1)
    with pytest.raises(
        ValueError,
        match=r"other\.pth \(--vae_path\) is not the VAE that .*checkpoint-last\.pth was trained with: other encoder weights",
    ):
        call(resume=trained, vae_path=other, **MODES[mode])
    assert_nothing_written(tmp_path)


# ------------------------------------------------------------------------------------------------------- the VAE's file

CONV = "encoder.conv_in.weight"


def change_vae(path: Path, vae_file: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(vae_file, weights_only=True)
    change(content["model"])
    torch.save(content, path)


BAD_VAES = {
    "a key less": (
        lambda path, good: change_vae(path, good, lambda w: w.pop(CONV)),
        rf"lacks 1 of the VAE's \d+ keys, first: {CONV}",
    ),
    "another shape": (
        lambda path, good: change_vae(path, good, lambda w: w.update({CONV: w[CONV][:4]})),
        rf"has 1 weights of another shape: {CONV}: file \(4, 3, 3, 3\), VAE \(8, 3, 3, 3\)",
    ),
    "NaN": (
        lambda path, good: change_vae(path, good, lambda w: w[CONV].fill_(math.nan)),
        rf"holds NaN or infinite weights, first: {CONV}",
    ),
    "cut short": (lambda path, good: path.write_bytes(good.read_bytes()[:5000]), "cannot be read as a checkpoint"),
    "text": (lambda path, good: path.write_text("not a VAE"), "cannot be read as a checkpoint"),
    "code": (lambda path, good: torch.save({"model": Explosive(path.with_name("ran"))}, path), HOLDS_CODE),
    "no weights": (lambda path, good: torch.save({"state_dict": {}}, path), 'has no weights under the key "model"'),
    "not this VAE's config": (
        lambda path, good: torch.save({"model": {}, "config": {"width": 3}}, path),
        "its config does not describe a VAE",
    ),
}


@pytest.mark.parametrize("kind", BAD_VAES)
def test_files_that_are_not_the_vae(call: Callable[..., None], vae_file: Path, tmp_path: Path, kind: str) -> None:
    write, words = BAD_VAES[kind]
    write(tmp_path / "bad.pth", vae_file)
    with pytest.raises(ValueError, match=rf"bad\.pth:? {words}.*\(--vae_path\)"):
        call(vae_path=tmp_path / "bad.pth")
    assert_nothing_written(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_transformer_is_not_a_vae(call: Callable[..., None], trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint-last\.pth: its config does not describe a VAE .*\(--vae_path\)"):
        call(vae_path=trained / LAST)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_vae_file_absent(call: Callable[..., None], trained: Path, tmp_path: Path, mode: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no VAE weights at absent\.ckpt"):
        call(vae_path="absent.ckpt", resume=trained, **MODES[mode])
    assert_nothing_written(tmp_path)


# ------------------------------------------------------------------------------------------------------- the output folder


@pytest.mark.parametrize("below", [".", "deeper"])
@pytest.mark.parametrize("mode", ["train", "sample"])
def test_output_dir_that_is_a_file(
    call: Callable[..., None], trained: Path, tmp_path: Path, mode: str, below: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=rf"cannot write to {tmp_path / 'file' / below} \(--output_dir\)"):
        call(output_dir=tmp_path / "file" / below, resume=trained if mode == "sample" else None, **MODES[mode])
    assert (tmp_path / "file").read_text() == "not a folder"
