"""training/posthoc_ema.py: the fit against numbers computed otherwise, snapshots of stopped runs, the command."""

import json
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import engine_tokenbridge
import generation
import main_tokenbridge
from tests.helpers import REPO, Argv, argv_of, assert_same, skip_unless_shardable
from tests.processes.forked import run_processes
from tools import inspect
from tools.posthoc_ema import main
from training.ema import SIGMA_RELS, PowerEma, power_exponent
from training.posthoc_ema import SnapshotWriter, add_up, fit, inner_product, snapshot_files

# ---- the fit


def profile(tau: np.ndarray, step: float, sigma_rel: float) -> np.ndarray:
    g = power_exponent(sigma_rel)
    return np.where(tau < step, (g + 1) / step * (tau / step) ** g, 0)


def test_inner_products_by_numeric_integration() -> None:
    tau = (np.arange(400_000) + 0.5) / 4000  # to 100
    for (t_a, s_a), (t_b, s_b) in (((40, 0.05), (100, 0.1)), ((100, 0.05), (40, 0.1)), ((70, 0.08), (70, 0.2))):
        exact = inner_product(np.float64(t_a), power_exponent(s_a), np.float64(t_b), power_exponent(s_b))
        assert exact == pytest.approx((profile(tau, t_a, s_a) * profile(tau, t_b, s_b)).sum() / 4000, rel=1e-4)


def test_the_fit_is_the_best_sum_of_profiles() -> None:
    """Its residual is that of the profiles themselves; no other weights with sum 1 do better; more snapshots do."""
    steps, sigma_rels, tau = np.repeat([25, 50, 75, 100], 2), SIGMA_RELS * 4, (np.arange(100_000) + 0.5) / 1000
    parts = np.stack([profile(tau, t, s) for t, s in zip(steps, sigma_rels, strict=True)])
    weights, residuals = fit(steps, sigma_rels, 100, [0.07, 0.15])
    assert np.allclose(weights.sum(0), 1) and weights.shape == (8, 2)
    rng = np.random.default_rng(0)
    for x, residual, sigma_rel in zip(weights.T, residuals, (0.07, 0.15), strict=True):
        target = profile(tau, 100, sigma_rel)

        def off(w: np.ndarray, target: np.ndarray = target) -> float:
            return float(np.linalg.norm(w @ parts - target) / np.linalg.norm(target))

        assert off(x) == pytest.approx(residual, rel=1e-3)
        changes = rng.standard_normal((20, 8)) * 0.01
        assert all(off(x + change - change.mean()) > residual for change in changes)
        many = np.repeat(np.arange(5, 101, 5), 2)
        assert fit(many, SIGMA_RELS * 20, 100, [sigma_rel])[1][0] < 0.2 * residual


def test_what_was_kept_is_found_again() -> None:
    weights, residuals = fit(np.repeat([50, 100], 2), SIGMA_RELS * 2, 100, SIGMA_RELS)
    assert np.allclose(weights, [[0, 0], [0, 0], [1, 0], [0, 1]], atol=1e-6) and residuals.max() < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15])
def test_a_length_that_was_also_tracked(tmp_path: Path, sigma_rel: float) -> None:
    """A random walk of 1,000 steps, snapshots in float16 every 50: the error is under 2 % of the nearest average's."""
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    kept, tracked = [PowerEma(model, s) for s in SIGMA_RELS], PowerEma(model, sigma_rel)
    writer = SnapshotWriter(tmp_path, "walk", 0)
    for step in range(1000):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn(p.shape)
        for average in (*kept, tracked):
            average.update(step)
        if (step + 1) % 50 == 0:
            writer.take(step + 1, kept, sharded=False)
    writer.close()
    files = snapshot_files(tmp_path)
    weights, (residual,) = fit(np.repeat(list(files), 2), SIGMA_RELS * 20, 1000, [sigma_rel])
    found = add_up(list(files.values()), "walk", weights.reshape(20, 2), dict(model.named_parameters()))
    wanted, nearest = tracked.state_dict(), kept[0].state_dict()

    def flat(average: dict) -> torch.Tensor:
        return torch.cat([average[name].flatten() for name in wanted])

    error = (flat(found) - flat(wanted)).norm()
    assert residual < 0.01 and error < 1e-3 * flat(wanted).norm()
    assert error < 0.02 * (flat(nearest) - flat(wanted)).norm()


# ---- toy runs


@pytest.fixture(scope="module")
def flags(toy_flags: Argv) -> Argv:
    """A training of 7 steps, 3 per epoch, a checkpoint after each epoch, snapshots every 2 steps."""
    return partial(toy_flags, ema_rate=None, save_last_freq=1, max_steps=7, posthoc_ema_freq=2)


@pytest.fixture(scope="module")
def trained(flags: Argv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    main_tokenbridge.main(flags(out))
    return out


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_snapshots_and_checkpoint_of_a_run(trained: Path) -> None:
    """Every second step and the last; float16 of the checkpoint's averages, which are float32."""
    files, content = snapshot_files(trained), load(trained / "checkpoint-last.pth")
    assert list(files) == [2, 4, 6, 7] and not list((trained / "posthoc_ema").glob(".*"))
    last = load(files[7])
    assert content["posthoc_ema"].keys() == {"0.05", "0.1"}
    assert last["step"] == content["step"] == 7 and last["run"] == content["config"]["run"]
    for sigma_rel, average in content["posthoc_ema"].items():
        assert average.keys() == content["model_ema"].keys()
        assert {value.dtype for value in average.values()} == {torch.float32}
        assert_same(last["averages"][sigma_rel], {name: value.half() for name, value in average.items()})
    assert not torch.equal(content["posthoc_ema"]["0.05"]["mask_token"], content["posthoc_ema"]["0.1"]["mask_token"])


def test_off_it_leaves_no_trace(trained: Path, flags: Argv, tmp_path: Path) -> None:
    main_tokenbridge.main(flags(tmp_path / "run", posthoc_ema_freq=0))
    plain, content = load(tmp_path / "run" / "checkpoint-last.pth"), load(trained / "checkpoint-last.pth")
    assert content.keys() - plain.keys() == {"posthoc_ema"}
    assert content["config"].keys() - plain["config"].keys() == {"run"}
    assert not (tmp_path / "run" / "posthoc_ema").exists()
    assert_same(plain["model"], content["model"])


def test_a_resumed_run_keeps_the_same_averages(
    trained: Path, flags: Argv, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after checkpoint of step 3 and the snapshot of step 4: that snapshot goes, and all end alike."""
    real, out = engine_tokenbridge.train_one_epoch, tmp_path / "run"

    def killed(state, vae, loader, settings, device, log, **more) -> bool:
        if state.step >= 3:
            real(state, vae, loader, replace(settings, max_steps=4), device, log, **more)
            raise KeyboardInterrupt
        return real(state, vae, loader, settings, device, log, **more)

    monkeypatch.setattr(engine_tokenbridge, "train_one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        main_tokenbridge.main(flags(out))
    assert load(out / "checkpoint-last.pth")["step"] == 3 and list(snapshot_files(out)) == [2, 4]
    with pytest.raises(ValueError, match=r"--step 4: .* has no snapshot of that step, it has 2"):
        main([str(out), "--sigma_rel", "0.05", "--step", "4"])  # later than the checkpoint: of no course yet
    monkeypatch.setattr(engine_tokenbridge, "train_one_epoch", real)
    main_tokenbridge.main(flags(out, resume=out))
    assert any("step-00000004.pth is later than step 3, where training goes on: removed" in line for line in messages)
    assert_same(*(load(folder / "checkpoint-last.pth")["posthoc_ema"] for folder in (out, trained)))
    assert list(snapshot_files(out)) == [2, 4, 6, 7]
    for step, path in snapshot_files(out).items():
        assert_same(load(path)["averages"], load(snapshot_files(trained)[step])["averages"])


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_write_the_same_snapshots(flags: Argv, tmp_path: Path, sharded: bool) -> None:
    """As one process with two micro-batches; stopped and resumed. Another run's snapshots end both processes."""
    if sharded:
        skip_unless_shardable()
    same = dict(batch_size=2, lr_schedule="constant")
    one, two = tmp_path / "one", tmp_path / "two"
    main_tokenbridge.main(flags(one, accum_iter=2, **same))
    more = dict(resume=two) | ({"fsdp": True} if sharded else {})

    def run(**changes: object) -> subprocess.CompletedProcess:
        argv = flags(two, **(same | more | changes))
        return run_processes([REPO / "main_tokenbridge.py", *argv], nproc=2, timeout=240)

    for steps in (3, 7):
        result = run(max_steps=steps)
        assert result.returncode == 0, result.stderr[-2000:]
    assert list(snapshot_files(two)) == [2, 3, 4, 6, 7]  # 3 was the last step once
    for step, path in snapshot_files(one).items():
        mine, other = load(snapshot_files(two)[step])["averages"], load(path)["averages"]
        assert mine.keys() == other.keys()
        assert all(
            torch.allclose(value.float(), other[key][name].float(), rtol=1e-3, atol=2e-4)
            for key in mine
            for name, value in mine[key].items()
            if not name.endswith(("k_norm.bias", "qkv.bias"))
        )
    main([str(two), "--sigma_rel", "0.08"])
    (two / "checkpoint-last.pth").unlink()
    result = run(seed=4)
    assert result.returncode != 0 and result.stderr.count("belongs to another run") >= 2, result.stderr[-2000:]


def test_a_run_without_averages_cannot_take_them_up(
    trained: Path, flags: Argv, tmp_path: Path, messages: list[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    main_tokenbridge.main(flags(out, resume=out, posthoc_ema_freq=0, max_steps=8))
    assert any("without it they end here and cannot be taken up again" in line for line in messages)
    words = r"posthoc_ema_freq needs averages .*checkpoint-last\.pth has none: leave it out.*--posthoc_ema_freq"
    with pytest.raises(ValueError, match=words):
        main_tokenbridge.main(flags(out, resume=out, max_steps=9))
    with pytest.raises(ValueError, match="has those of step 7, and training continues at step 12"):
        main_tokenbridge.main(flags(tmp_path / "new", resume=trained, max_steps=20, batch_size=2))


def test_snapshots_of_another_run_are_refused(trained: Path, flags: Argv, tmp_path: Path) -> None:
    """By a new training in their folder; but the same command, started again before its first checkpoint, goes on."""
    out = tmp_path / "run"
    (out / "posthoc_ema").mkdir(parents=True)
    shutil.copy(snapshot_files(trained)[4], out / "posthoc_ema")
    words = r"step-00000004\.pth belongs to another run .*: move that run's posthoc_ema away"
    with pytest.raises(ValueError, match=words):
        main_tokenbridge.main(flags(out))
    assert list(snapshot_files(out)) == [4]
    (out / "posthoc_ema" / "step-00000004.pth").unlink()
    main_tokenbridge.main(flags(out, max_steps=2))
    (out / "checkpoint-last.pth").unlink()
    main_tokenbridge.main(flags(out, max_steps=2, num_workers=1))
    assert list(snapshot_files(out)) == [2]


# ---- the command


def test_the_command_and_its_file(
    trained: Path, flags: Argv, toy_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture, messages: list[str]
) -> None:
    """Its average is the fitted sum of the snapshots; --sample and generation.load use it, no training does."""
    main([str(trained), "--sigma_rel", "0.08", "--output", str(tmp_path / "ema.pth")])
    said, content, files = capsys.readouterr().out, load(tmp_path / "ema.pth"), snapshot_files(trained)
    assert said.startswith("sigma_rel 0.08 at step 7 from 4 snapshots: relative error of the profile 0.0")
    assert str(tmp_path / "ema.pth") in said and content["step"] == 7
    weights, (residual,) = fit(np.repeat(list(files), 2), SIGMA_RELS * 4, 7, [0.08])
    assert content["fit"] == {"sigma_rel": 0.08, "residual": pytest.approx(residual), "snapshots": 4}
    parts = [load(path)["averages"][key] for path in files.values() for key in ("0.05", "0.1")]
    for name, value in content["model_ema"].items():
        by_hand = sum(float(w) * part[name].double() for w, part in zip(weights[:, 0], parts, strict=True))
        assert torch.allclose(value.double(), by_hand, rtol=1e-5, atol=1e-6)
    last = load(trained / "checkpoint-last.pth")
    assert_same(content["model"], last["model"] | content["model_ema"])

    drawn = dict(sample=True, vae_path=toy_vae, classes=0, num_images=1, num_iter=2, device="cpu")
    sample = argv_of(**drawn, output_dir=tmp_path / "out")
    main_tokenbridge.main([*sample, "--resume", str(tmp_path / "ema.pth")])
    assert list((tmp_path / "out").rglob("*.png")) and not any("still holds" in line for line in messages)
    inspect.main([str(tmp_path / "ema.pth"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["EMA"] == "these weights are the EMA" and facts["verdict"] == ["nothing wrong was found"]
    loaded = generation.load(tmp_path / "ema.pth").model
    assert torch.equal(loaded.mask_token, content["model_ema"]["mask_token"])
    with pytest.raises(ValueError, match="holds one set of weights, ema: model is not there"):
        main_tokenbridge.main([*sample, "--resume", str(tmp_path / "ema.pth"), "--weights", "model"])
    with pytest.raises(ValueError, match="a training cannot be continued from it"):
        main_tokenbridge.main(flags(tmp_path / "new", resume=tmp_path / "ema.pth"))


def test_earlier_steps_and_the_name_by_default(trained: Path) -> None:
    main([str(trained), "--sigma_rel", "0.1", "--step", "4"])
    content, kept = load(trained / "ema-0.1-00000004.pth"), load(snapshot_files(trained)[4])["averages"]["0.1"]
    assert content["step"] == 4 and content["fit"]["snapshots"] == 2 and content["fit"]["residual"] < 1e-6
    assert all(torch.allclose(value, kept[name].float(), atol=1e-5) for name, value in content["model_ema"].items())


def test_what_the_command_refuses(trained: Path, tmp_path: Path) -> None:
    """(tests/bad_inputs.yaml has more.)"""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = sorted(path.name for path in run.rglob("*"))
    for more, words in (
        (["--sigma_rel", "0.25"], r"0\.25 cannot be fitted with the 4 snapshots up to .* from 0\.0\d+ to 0\.1\d+"),
        (["--sigma_rel", "0.01"], r"the profile would be off by \d+ %"),
        (["--sigma_rel", "0.1", "--step", "5"], r"--step 5: .* has no snapshot of that step, it has 2, 4, 6, 7"),
        (["--sigma_rel", "0.1", "--output", str(run / "checkpoint-last.pth")], r"\(--output\) exists already"),
    ):
        with pytest.raises(ValueError, match=words):
            main([str(run), *more])
    path = snapshot_files(run)[4]
    content = load(path)
    overflow = {key: value | {"mask_token": value["mask_token"] / 0} for key, value in content["averages"].items()}
    for changes, words in (
        ({"run": "other"}, r"step-00000004\.pth belongs to another run"),
        ({"averages": {}}, "is no snapshot of --posthoc_ema_freq"),
        ({"averages": content["averages"] | {"0.1": {}}}, r"step-00000004\.pth lacks or misshapes \d+ parameters"),
        ({"averages": overflow}, "NaN or values too large for float16, first in mask_token"),
    ):
        torch.save(content | changes, path)
        with pytest.raises(ValueError, match=words):
            main([str(run), "--sigma_rel", "0.08"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000004\.pth cannot be read as a checkpoint"):
        main([str(run), "--sigma_rel", "0.08"])
    assert sorted(path.name for path in run.rglob("*")) == before
