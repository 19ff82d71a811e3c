"""What a training leaves in its folder when something goes wrong: the last good files, and no other run's are touched.

main_tokenbridge.py and main_vae.py at toy size, in this process.
"""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import engine_tokenbridge
import main_tokenbridge
import main_vae
from models.tokenbridge import TokenBridge
from tests.helpers import Argv, argv_of, contents
from training import vae as training_vae
from util import checkpoint_folder, dist
from util.checkpoint import LAST, read_file
from util.cli import run_cli
from util.files import CannotWrite
from util.locks import folder_lock


@pytest.fixture(scope="module")
def flags(toy_flags: Argv) -> Argv:
    """Up to 5 steps, 3 per epoch, a checkpoint after each step."""
    return lambda output, **changes: toy_flags(
        output, **(dict(save_every_steps=1, max_steps=5, epochs=100, max_bad_steps=2) | changes)
    )


@pytest.fixture(scope="module")
def vae_flags(image_root: Path) -> Argv:
    shape = dict(img_size=16, vae_embed_dim=4, width=32, ch_mult="1,1", num_res_blocks=1, no_attention=True)
    run = dict(batch_size=4, lr=1e-3, max_steps=5, max_bad_steps=2, save_freq=1, num_workers=0, device="cpu")
    return lambda output, **changes: argv_of(**(shape | run | dict(data_path=image_root, output_dir=output) | changes))


SLOW = pytest.mark.slow
LIGHT = [pytest.param("tokenbridge", marks=SLOW), "vae"]  # of what both trainings share, the cheaper one in `make test`
COMMANDS = {"tokenbridge": (main_tokenbridge.main, LAST), "vae": (main_vae.main, "vae_state.pth")}


@pytest.fixture(params=COMMANDS)
def train(request: pytest.FixtureRequest, flags: Argv, vae_flags: Argv) -> Callable[..., None]:
    """train(folder, name=value, ...) runs one of the two trainings; `train.file` is the name of its checkpoint."""
    main, name = COMMANDS[request.param]
    argv = flags if request.param == "tokenbridge" else vae_flags

    def run(folder: Path, **changes: object) -> None:
        main(argv(folder, **changes))

    run.file, run.name, run.main, run.argv = name, request.param, main, argv
    return run


def after_each_step(monkeypatch: pytest.MonkeyPatch, name: str, what: Callable[[object, int], None]) -> None:
    """Call what(state, step) with gradients computed and before the optimizer takes them; step counts from 1."""
    module = engine_tokenbridge if name == "tokenbridge" else training_vae
    real = module.optimizer_step

    def step(state: object, parameters: list, grad_clip: float) -> torch.Tensor:
        what(state, state.step + 1)
        return real(state, parameters, grad_clip)

    monkeypatch.setattr(module, "optimizer_step", step)


def spoil(steps: range, stop_at: int | None = None) -> Callable[[object, int], None]:
    """Gradients of these steps are NaN; after stop_at, SIGTERM."""

    def change(state: object, step: int) -> None:
        if step in steps:
            next(iter(state.optimizer.param_groups[0]["params"])).grad.fill_(float("nan"))
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    return change


def finite(content: dict) -> bool:
    return not any(value.isnan().any() for value in content["model"].values())  # boundaries of levels are infinite


# ---- no broken checkpoint over a good one


def test_nothing_is_written_while_steps_are_skipped(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """Step 2 bad, 3 good, from 4 on bad: the file is that of step 3, and the error says so."""
    bad = spoil(range(4, 99))
    after_each_step(monkeypatch, train.name, lambda state, step: bad(state, 4 if step == 2 else step))
    words = r"2 steps in a row .* stopped at step 5 .* files written so far are as they were"
    with pytest.raises(ValueError, match=words):
        train(tmp_path, max_steps=20)
    content = read_file(tmp_path / train.file)
    assert content["step"] == 3 and finite(content)
    held = [line.partition(": ")[2] for line in messages if line.startswith("no checkpoint at step ")]
    assert held[0] == "the last 1 steps were skipped; that of step 1 stays"
    assert held[-1].endswith("that of step 3 stays") and not (tmp_path / "vae.pth").exists()


@pytest.mark.parametrize(
    ("bad", "saved"), [(range(1, 6), None), (range(4, 6), 3), (range(5, 6), 5), (range(1, 6, 2), 5)]
)
@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_a_run_that_ends_with_skipped_steps(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], bad: range, saved: int | None
) -> None:
    """Two or more at its end, though fewer than max_bad_steps, are an error; one changed nothing, and is named. A run
    that skipped several says how many.
    """
    after_each_step(monkeypatch, train.name, spoil(bad))
    code = run_cli(lambda: train(tmp_path, max_bad_steps=100))
    assert code == (0 if saved == 5 else 2)
    last = "the last step, 5, was skipped (its loss or gradient was not finite): the weights are those of step 4"
    assert (last in messages) == (saved == 5)
    counted = "3 of 5 steps (60 %) were skipped: their loss or gradient was not finite"
    assert (counted in messages) == (len(bad) == 3)
    assert (read_file(tmp_path / train.file)["step"] if (tmp_path / train.file).exists() else None) == saved


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_a_run_of_one_step_without_a_loss_is_an_error(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight is changed, although backpropagation through the loss itself gives finite gradients."""
    model = TokenBridge if train.name == "tokenbridge" else training_vae.Objective
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda self, *inputs, **more: real(self, *inputs, **more) + float("inf"))
    norms: list[float] = []

    def gradients(state: object, step: int) -> None:
        norms.extend(float(p.grad.norm()) for group in state.optimizer.param_groups for p in group["params"])

    after_each_step(monkeypatch, train.name, gradients)
    with pytest.raises(ValueError, match=r"1 steps in a row had a loss .* not finite; stopped at step 1"):
        train(tmp_path, max_steps=1)
    assert not (tmp_path / train.file).exists() and norms and all(map(math.isnan, norms))


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_weights_that_are_not_finite_are_not_written(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of step 2 are finite, its weights are not."""

    def break_weight(state: object, step: int) -> None:
        if step == 2:
            state.optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    after_each_step(monkeypatch, train.name, break_weight)
    with pytest.raises(ValueError, match=r"\d weights are NaN or infinite at step 2 with lr \S+, first: .*\(--lr\)"):
        train(tmp_path)
    content = read_file(tmp_path / train.file)
    assert content["step"] == 1 and finite(content)


# ---- stopping


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_a_signal_saves_and_the_run_continues_as_if_never_stopped(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    sparse = dict(save_every_steps=None) if train.name == "tokenbridge" else dict(save_freq=100)
    train(tmp_path / "whole", **sparse)
    with monkeypatch.context() as patch:
        after_each_step(patch, train.name, spoil(range(0), stop_at=3))
        train(tmp_path / "run", **sparse)
    again = f"the same command with --resume {tmp_path / 'run'} continues"
    assert f"stopped by a signal after step 3 of 5; {again}" in messages
    assert read_file(tmp_path / "run" / train.file)["step"] == 3 and not (tmp_path / "run" / "vae.pth").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(tmp_path / "run", resume=tmp_path / "run", **sparse)
    mine, other = (read_file(tmp_path / name / train.file)["model"] for name in ("run", "whole"))
    assert all(torch.equal(value, other[key]) for key, value in mine.items())


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_a_signal_while_steps_are_skipped_keeps_the_checkpoint_before(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    after_each_step(monkeypatch, train.name, spoil(range(3, 99), stop_at=3))
    train(tmp_path)
    assert read_file(tmp_path / train.file)["step"] == 2
    where = f"the same command with --resume {tmp_path} continues from the checkpoint of step 2"
    assert f"stopped by a signal after step 3 of 5; {where}" in messages


# ---- several nodes


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_processes_without_a_shared_disk_all_stop(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node has other data, or does not see the checkpoint: an error, where the ranks would wait for ever."""
    train(tmp_path, max_steps=1)
    before, real = contents(tmp_path), dist.check_same
    for named in ("the training data (--data_path, --cached_path)", f"{tmp_path} (--resume)"):

        def check(value: object, what: str, named: str = named) -> None:
            with mock.patch.object(dist, "gather_objects", lambda here: [here, None if what == named else here]):
                real(value, what)

        monkeypatch.setattr(dist, "check_same", check)
        with pytest.raises(ValueError, match=f"different contents of {re.escape(named)}: is it on a disk that all"):
            train(tmp_path, resume=tmp_path)
    assert contents(tmp_path) == before


# ---- other runs' files


def test_a_folder_in_use_is_refused(train: Callable, tmp_path: Path) -> None:
    with folder_lock(tmp_path, "--output_dir"):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=r"\(--output_dir\) is in use by this process"):
            train(tmp_path)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_the_log_of_another_run_is_set_aside(train: Callable, tmp_path: Path, messages: list[str]) -> None:
    """Row 52: a killed run's lines never become this run's, whether it is fresh or continues another folder's."""
    log = "log.jsonl" if train.name == "tokenbridge" else "vae_log.jsonl"
    train(tmp_path / "one", max_steps=2)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / log).write_text('{"step": 1, "epoch": 0, "loss": 7}\n')
    train(tmp_path / "two", resume=tmp_path / "one" / train.file, max_steps=4)
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / log).write_text('{"step": 1, "epoch": 0, "loss": 7}\n')
    train(tmp_path / "three", max_steps=2)
    for folder, steps in (("two", [3, 4]), ("three", [1, 2])):
        lines = [json.loads(line) for line in (tmp_path / folder / log).read_text().splitlines()]
        assert [line["step"] for line in lines] == steps
        aside = log.replace(".jsonl", ".1.jsonl")
        assert json.loads((tmp_path / folder / aside).read_text())["loss"] == 7
        assert f"{tmp_path / folder / log} is the log of another run: it is now {aside}" in messages


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_a_bad_byte_in_the_log_stops_nothing(train: Callable, tmp_path: Path) -> None:
    log = tmp_path / ("log.jsonl" if train.name == "tokenbridge" else "vae_log.jsonl")
    train(tmp_path, max_steps=3)
    first, second, third = log.read_bytes().splitlines()
    log.write_bytes(
        b"\n".join([first, second[:20] + b"\xff" + second[20:], b"5", b'{"step": "x"}', b"[" * 10**5, third])
    )
    train(tmp_path, resume=tmp_path, max_steps=4)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3, 4]


@pytest.mark.parametrize("train", LIGHT, indirect=True)
def test_temporary_files_of_earlier_versions_go_with_the_run_that_continues(train: Callable, tmp_path: Path) -> None:
    """Regular files of those names only; in another run's folder they stay."""
    train(tmp_path / "run", max_steps=1)
    for folder in ("run", "new"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f".{train.file}.tmp").write_text("half a file")
        (tmp_path / folder / ".other.tmp").write_text("of somebody else")
    train(tmp_path / "run", resume=tmp_path / "run", max_steps=2)
    train(tmp_path / "new", resume=tmp_path / "run" / train.file, max_steps=3)
    assert not (tmp_path / "run" / f".{train.file}.tmp").exists() and (tmp_path / "run" / ".other.tmp").exists()
    assert (tmp_path / "new" / f".{train.file}.tmp").read_text() == "half a file"


def test_numbered_checkpoints_of_another_run_are_refused_at_the_start(flags: Argv, tmp_path: Path) -> None:
    """Row 5: without checkpoint-last.pth too, and whichever other run is resumed; with --resume they are continued."""
    out = tmp_path / "run"
    main_tokenbridge.main(flags(out, max_steps=3, keep_last=2))
    (out / LAST).unlink()
    (tmp_path / "empty").mkdir()
    before = contents(out)
    words = (
        r"already holds checkpoint-00000002\.pth, checkpoint-00000003\.pth: continue it with --resume .*--output_dir"
    )
    for resume in (None, tmp_path / "empty", out / "checkpoint-00000003.pth"):
        with pytest.raises(ValueError, match=words):
            main_tokenbridge.main(flags(out, keep_last=2, resume=resume))
    assert contents(out) == before
    main_tokenbridge.main(flags(out, max_steps=4, keep_last=2, resume=out))
    assert read_file(out / LAST)["step"] == 4


# ---- another batch size


def test_another_batch_size_keeps_the_log_of_the_epochs_before(flags: Argv, tmp_path: Path) -> None:
    """Four steps at batch 4 (3 per epoch), then batch 12: one epoch done, so the next step is the second."""
    main_tokenbridge.main(flags(tmp_path, max_steps=4))
    main_tokenbridge.main(flags(tmp_path, resume=tmp_path, batch_size=12, max_steps=3))
    main_tokenbridge.main(flags(tmp_path, resume=tmp_path, batch_size=12, max_steps=4))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3), (3, 4)]


@SLOW
def test_max_steps_that_another_batch_size_has_passed_is_an_error(flags: Argv, tmp_path: Path) -> None:
    """Row 61: 3 steps of batch 12 are 9 of batch 4; "--max_steps 6" is neither done nor reachable."""
    main_tokenbridge.main(flags(tmp_path, max_steps=3, batch_size=12))
    before = contents(tmp_path)
    words = r"max_steps 6 cannot be reached: .* its step 3 is step 9 here, 3 per epoch.*\(--max_steps\)"
    with pytest.raises(ValueError, match=words):
        main_tokenbridge.main(flags(tmp_path, resume=tmp_path, max_steps=6))
    assert contents(tmp_path) == before


# ---- a full disk


def test_a_full_disk_ends_training_at_the_next_step(
    flags: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Not only at the next checkpoint; the last good file stays."""
    real = checkpoint_folder.atomic_save

    def full(content: dict, path: Path) -> None:
        if content["step"] >= 3:
            raise CannotWrite(path, OSError(28, "No space left on device"))
        real(content, path)

    monkeypatch.setattr(checkpoint_folder, "atomic_save", full)
    after_each_step(monkeypatch, "tokenbridge", lambda state, step: None)
    assert (
        run_cli(lambda: main_tokenbridge.main(flags(tmp_path, save_every_steps=3, save_last_freq=100, max_steps=50)))
        == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: cannot write {tmp_path / LAST}: disk full (No space left on device)"
    assert not (tmp_path / LAST).exists()
    steps = [json.loads(text)["step"] for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(steps) <= 6
