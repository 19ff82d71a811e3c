"""main_tokenbridge.py at toy size: training from images and from a cache, checkpoints, exact resume, sampling,
evaluation.
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import engine_tokenbridge
import main_cache
from checkpoints.build import load_generator_weights
from dataset.images import read_image
from evaluation.evaluator import Evaluator
from evaluation.inception import write_random_inception
from main_tokenbridge import main
from models.config import TokenBridgeConfig
from models.tokenbridge import TokenBridge
from models.vae_loading import load_vae
from tests.helpers import REPO, Argv, argv_of, assert_same, log_of
from tests.processes.forked import run_processes
from training.recipe import RECIPE
from training.sharding import cannot_shard
from util import checkpoint, checkpoint_folder, dist

SIZE = 32  # pixels, with a VAE of stride 8: 4x4 tokens


@pytest.fixture(scope="module")
def flags(toy_flags: Argv) -> Argv:
    """Two epochs of 3 steps, with a checkpoint after each."""
    return partial(toy_flags, class_num=3, log_freq=2, save_last_freq=1, epochs=2)


@pytest.fixture(scope="module")
def trained(flags: Argv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    main(flags(out))
    return out


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


# ---- training


def test_a_checkpoint_has_the_published_layout_and_says_what_it_is(trained: Path, toy_vae: Path) -> None:
    content = load(trained)
    assert {"model", "model_ema", "optimizer", "epoch", "step", "config"} <= content.keys() and "scaler" not in content
    assert content["epoch"] == 1 and content["step"] == 6
    buffers = {"channel_mask", "boundaries", "reconstruction_values"}
    assert buffers == content["model"].keys() - content["model_ema"].keys()
    assert content["model_ema"].keys() < content["model"].keys()
    assert all(value.dtype == torch.float32 for value in content["model_ema"].values())
    config, model = content["config"], content["config"]["model"]
    assert (model["head_start"], model["vae_embed_dim"]) == ("trained", 4) and config["classes"] == ["china", "flower"]
    assert config["vae_fingerprint"] == load_vae(toy_vae).latent_fingerprint() and config["args"]["seed"] == 3
    assert [line["step"] for line in log_of(trained)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_the_run_never_stopped(
    trained: Path, flags: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped after step `stop`, whose last checkpoint is of step 3: weights, EMA, optimizer and log are equal bit for
    bit.
    """
    real, out = engine_tokenbridge.train_one_epoch, tmp_path / "run"

    def killed(state, vae, loader, settings, device, log, **more) -> bool:
        if state.step >= 3:
            if stop > 3:
                real(state, vae, loader, replace(settings, max_steps=stop), device, log, **more)
            raise KeyboardInterrupt
        return real(state, vae, loader, settings, device, log, **more)

    monkeypatch.setattr(engine_tokenbridge, "train_one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        main(flags(out))
    assert load(out)["step"] == 3 and not torch.equal(
        load(out)["model"]["class_emb.weight"], load(trained)["model"]["class_emb.weight"]
    )
    monkeypatch.setattr(engine_tokenbridge, "train_one_epoch", real)
    torch.manual_seed(99)
    main(flags(out, resume=out))
    mine, whole = load(out), load(trained)
    for key in ("model", "model_ema", "optimizer", "epoch", "step"):
        assert_same(mine[key], whole[key])
    assert log_of(out) == log_of(trained)


def test_a_finished_run_has_nothing_to_do(trained: Path, flags: Argv, messages: list[str]) -> None:
    before = (trained / "checkpoint-last.pth").read_bytes()
    main(flags(trained, resume=trained))
    assert any("nothing to do: 6 of 6 steps are done" in line for line in messages)
    assert (trained / "checkpoint-last.pth").read_bytes() == before


def test_a_cache_trains_as_images_do(
    trained: Path, flags: Argv, toy_vae: Path, image_root: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    source = dict(vae_path=toy_vae, data_path=image_root, img_size=SIZE, cached_path=cache)
    main_cache.main(argv_of(**source, num_workers=0, device="cpu", batch_size=4))
    main(flags(tmp_path / "run", use_cached=True, cached_path=cache, data_path=tmp_path / "none"))
    cached, images = log_of(tmp_path / "run"), log_of(trained)
    assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in images], abs=2e-3)
    assert cached[0]["loss"] == pytest.approx(images[0]["loss"], abs=1e-4)


def test_published_layout_without_our_keys_resumes_after_its_epoch(
    trained: Path, flags: Argv, tmp_path: Path, messages: list[str]
) -> None:
    content = {key: load(trained)[key] for key in ("model", "model_ema", "optimizer", "epoch")}
    (tmp_path / "old").mkdir()
    torch.save(content, tmp_path / "old" / "checkpoint-last.pth")
    main(flags(tmp_path / "new", resume=tmp_path / "old", epochs=3))
    assert [line["step"] for line in log_of(tmp_path / "new")] == [7, 8, 9]
    said = "has no config: from the shapes of its weights it is tokenbridge_digits"
    assert any(said in line and "(head_start official)" in line for line in messages)
    assert load(tmp_path / "new")["config"]["model"]["head_start"] == "official"


@pytest.mark.parametrize("layout", ["ours", "published", "EMA alone"])
def test_fine_tuning_on_other_classes(
    trained: Path, flags: Argv, tmp_path: Path, messages: list[str], layout: str
) -> None:
    """A new run with all weights but the class embedding, which is drawn from --seed; a file of one set of weights
    serves too. Nothing of the old run continues, and the new one is resumed without --reset_classes.
    """
    content, out, base = load(trained), tmp_path / "run", tmp_path / "base.pth"
    published = ("model", "model_ema", "optimizer", "epoch")
    kept = {"ours": content.keys(), "published": published, "EMA alone": ["model_ema"]}
    torch.save({key: content[key] for key in kept[layout]}, base)
    started = dict(reset_classes=True, class_num=5, resume=base, max_steps=1)
    main(flags(out, lr=0, **started))  # so that the weights are those at the start
    tuned = load(out)
    assert tuned["step"] == 1 and tuned["config"]["model"]["class_num"] == 5 and len(log_of(out)) == 1
    before = content["model_ema" if layout == "EMA alone" else "model"]
    for key, value in tuned["model"].items():
        if key == "class_emb.weight":
            assert value.shape == (5, 64) and 0.015 < value.std() < 0.025
        elif key in before:
            assert torch.equal(value, before[key]), key
    assert any("with a newly initialised class embedding of 5 classes" in line for line in messages)
    words = r"trains a new run from the weights of .*run: leave it out.*\(--reset_classes\)"
    with pytest.raises(ValueError, match=words):
        main(flags(out, **started | dict(resume=out, max_steps=2)))
    main(flags(out, resume=out, class_num=5, max_steps=2))
    assert load(out)["step"] == 2


def test_a_run_begun_without_dropout_in_the_head_continues_with_it_and_says_so(
    trained: Path, flags: Argv, tmp_path: Path, messages: list[str]
) -> None:
    def said() -> list[str]:
        return [line for line in messages if "was begun without dropout in the head" in line]

    content = load(trained)
    assert content["config"].pop("recipe") == RECIPE
    (tmp_path / "old").mkdir()
    torch.save(content, tmp_path / "old" / "checkpoint-last.pth")
    main(flags(tmp_path / "new", resume=tmp_path / "old", epochs=3, proj_dropout=0.05))
    (line,), config = said(), load(tmp_path / "new")["config"]
    assert "attn_dropout 0.1 and proj_dropout 0.05 in the head too, a mask ratio for each micro-batch" in line
    assert config["recipe"] == RECIPE and config["model"]["proj_dropout"] == 0.05
    main(flags(tmp_path / "new", resume=tmp_path / "new", epochs=4))
    assert len(said()) == 1 and load(tmp_path / "new")["step"] == 12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(flags: Argv, tmp_path: Path, precision: str) -> None:
    main(flags(tmp_path / "run", precision=precision, max_steps=3, batch_size=2))  # fp16 may skip the first steps
    content = load(tmp_path / "run")
    assert math.isfinite(log_of(tmp_path / "run")[-1]["loss"])
    assert all(value.dtype == torch.float32 for value in content["model"].values() if value.is_floating_point())
    assert ("scaler" in content) == (precision == "fp16") and content.get("scaler", {"scale": 1.0})["scale"] > 0


def test_the_parallel_head_trains_and_samples(flags: Argv, toy_vae: Path, tmp_path: Path) -> None:
    """--head is recorded in the checkpoint, which then samples without it; naming the other head is an error."""
    main(flags(tmp_path / "run", head="parallel", max_steps=1))
    content = load(tmp_path / "run")
    assert content["config"]["model"]["head"] == "parallel"
    assert not [key for key in content["model"] if key.startswith("token_embeddings")]
    assert len(sampled(tmp_path / "run", toy_vae, tmp_path / "samples")) == 6
    with pytest.raises(ValueError, match="head autoregressive contradicts .*--head"):
        sampled(tmp_path / "run", toy_vae, tmp_path / "other", "--head", "autoregressive")


def test_what_a_run_shows(flags: Argv, tmp_path: Path, messages: list[str]) -> None:
    """One line with everything, the details of logging steps in the log and in tensorboard, a grid of samples that
    repeats.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.flops import step_flops

    for name in ("one", "two"):
        main(flags(tmp_path / name, sample_freq=1, num_iter=2, peak_tflops=0.5, ema_warmup=True, epochs=1, cfg=2))
    out = tmp_path / "one"
    line = next(line for line in messages if line.startswith("epoch 0 step 2/3"))
    numbers = "loss |lr |grad norm | images/s| TFLOP/s|MFU | bits/dim|accuracy |data wait |memory |ETA 0:00:"
    assert not [part for part in numbers.split("|") if part not in line]
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    start = math.log(64) + 0.5  # head 64 wide, 64 levels: variance 1 of xavier logits
    said = f"chance level is ln 64 = 4.159; the loss of an untrained model is about {start:.2f}"
    assert any(said in line for line in messages) and abs(lines[0]["loss"] - start) < 0.25
    detailed = lines[1]
    assert len(detailed["loss_per_dim"]) == len(detailed["accuracy_per_dim"]) == 4 and "loss_per_dim" not in lines[0]
    assert sum(detailed["loss_per_dim"]) / 4 == pytest.approx(detailed["loss"], abs=1e-4)
    assert detailed["bits_per_dim"] == pytest.approx(detailed["loss"] / math.log(2), abs=1e-3)
    assert 0 <= detailed["token_accuracy"] <= 1
    config = TokenBridgeConfig(**load(out)["config"]["model"])
    low, high = step_flops(config, 12) / 1e12, step_flops(config, 16) / 1e12
    assert low <= detailed["tflops"] / detailed["images_per_s"] <= high
    assert detailed["mfu"] == pytest.approx(detailed["tflops"] / 0.5)
    board = EventAccumulator(str(out)).Reload()
    assert board.Scalars("loss")[1].value == pytest.approx(detailed["loss"])
    assert len(board.Scalars("loss_per_dim/03")) == 1
    assert [image.step for image in board.Images("samples")] == [3]
    grids = [np.asarray(read_image(tmp_path / name / "samples" / "step-00000003.png")) for name in ("one", "two")]
    assert grids[0].shape[0] > 2 * SIZE and (grids[0] == grids[1]).all()


def test_sharding_on_a_cpu_is_refused_where_torch_cannot(
    flags: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms", raising=False)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"fsdp on a CPU needs torch 2\.8 or later, this is .*: leave it out.*--fsdp"):
        main(flags(tmp_path / "run", fsdp=True, batch_size=2))
    assert not list((tmp_path / "run").glob("*")) and cannot_shard(torch.device("cuda")) == ""


# ---- sampling and evaluation


def sampled(trained: Path, toy_vae: Path, out: Path, *more: object) -> dict[str, np.ndarray]:
    drawn = dict(sample=True, resume=trained, vae_path=toy_vae, classes="2,0", num_images=5, num_iter=4, cfg=2)
    main([*argv_of(**drawn, device="cpu", num_workers=0, output_dir=out), *map(str, more)])
    return {path.name: np.asarray(read_image(path)) for path in sorted(out.glob("*.png"))}


def test_samples_are_pictures_of_their_seed(trained: Path, toy_vae: Path, tmp_path: Path) -> None:
    one = sampled(trained, toy_vae, tmp_path / "one")
    assert list(one) == [f"{i:06d}.png" for i in range(5)] + ["grid.png"]
    assert one["000000.png"].shape == (SIZE, SIZE, 3) and one["grid.png"].shape[1] > SIZE
    record = json.loads((tmp_path / "one" / "samples.json").read_text())
    assert record["labels"] == [2, 2, 2, 0, 0] and record["seed"] == 1 and record["cfg"] == 2
    again = sampled(trained, toy_vae, tmp_path / "two", "--eval_bsz", 2)
    other = sampled(trained, toy_vae, tmp_path / "three", "--seed", 8)
    for name, picture in one.items():
        assert np.abs(picture.astype(int) - again[name]).max() <= 1
    assert any((picture != other[name]).any() for name, picture in one.items())


def test_the_ema_is_what_makes_images(trained: Path, toy_vae: Path, tmp_path: Path, messages: list[str]) -> None:
    ema = sampled(trained, toy_vae, tmp_path / "ema")
    plain = sampled(trained, toy_vae, tmp_path / "plain", "--weights", "model")
    said = "still holds 53 % of the random initial weights after 6 steps"
    assert any("the EMA of" in line and said in line for line in messages)
    assert any((ema[name] != plain[name]).any() for name in ema)


@pytest.mark.parametrize(
    ("warmup", "rate", "steps", "share"), [(True, 0.9999, 6, None), (False, 0.9999, 6, 100), (True, 0.9, 0, 100)]
)
def test_the_warning_of_an_ema_that_lags_knows_the_warm_up(
    trained: Path, tmp_path: Path, messages: list[str], warmup: bool, rate: float, steps: int, share: int | None
) -> None:
    """After 6 steps of warm-up 1/5005 of the random weights is left, at a rate of 0.9999 nearly all."""
    content = load(trained)
    content["config"]["args"] |= {"ema_warmup": warmup, "ema_rate": rate}
    load_generator_weights(
        TokenBridge(**content["config"]["model"]), content | {"step": steps}, tmp_path / "a.pth", "ema"
    )
    found, said = [line for line in messages if "of the random initial weights" in line], f"after {steps} steps"
    assert len(found) == (share is not None)
    assert all(f"still holds {share} % of the random initial weights {said}" in line for line in found)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Seeded Inception weights in the real format, and a statistics file with the keys of ADM's."""
    folder = tmp_path_factory.mktemp("inception")
    rng = np.random.default_rng(0)
    np.savez(folder / "stats.npz", mu=rng.random(2048), sigma=np.diag(rng.random(2048)))
    return write_random_inception(folder / "inception.pth"), folder / "stats.npz"


@pytest.mark.slow
def test_online_evaluation_leaves_training_as_it_is(
    trained: Path, flags: Argv, judges: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluated = dict(online_eval=True, eval_freq=1, num_images=10, num_iter=2)
    main(flags(tmp_path / "run", **evaluated, inception_weights=judges[0], fid_stats=judges[1]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and all(math.isfinite(line["fid"]) for line in lines)
    for key in ("model", "model_ema", "optimizer"):
        assert_same(load(tmp_path / "run")[key], load(trained)[key])


@pytest.mark.parametrize(("cfg", "scales"), [(("2", "1", "0", "3"), (1, 2, 3)), (("1",), (1,)), (("0",), (1,))])
def test_checkpoints_and_evaluations_are_due_as_published(
    flags: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cfg: tuple, scales: tuple
) -> None:
    """Epochs 0, N, 2N, ... and the last one; at cfg 1 and then at each --cfg that is neither 1 nor 0. Three steps are
    an epoch.
    """
    saved, scored = [], []

    class Recorder(Evaluator):
        def __call__(self, model, vae, *, settings, step, weights, **more) -> None:
            scored.append((step, settings.cfg, settings.temperature, weights))

    def prepare(options, settings, device, output_dir, **_) -> Evaluator:
        return Recorder(options, settings, device, None, None, tmp_path, {})

    monkeypatch.setattr(Evaluator, "prepare", prepare)
    monkeypatch.setattr(
        checkpoint_folder.CheckpointWriter,
        "save",
        lambda writer, content: saved.append((content["step"], content["epoch"])),
    )
    due = dict(online_eval=True, eval_freq=4, save_last_freq=3, epochs=6)
    main(flags(tmp_path / "run", **due, temperature=0.9, cfg=cfg))
    assert saved == [(3, 0), (12, 3), (18, 5)]
    assert scored == [(step, scale, 0.9, "ema") for step in (3, 15, 18) for scale in scales]


def test_two_processes_train(flags: Argv, tmp_path: Path) -> None:
    result = run_processes([REPO / "main_tokenbridge.py", *flags(tmp_path / "run", batch_size=2)], nproc=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert checkpoint.read_file(tmp_path / "run" / "checkpoint-last.pth")["step"] == 6
    assert len(log_of(tmp_path / "run")) == 6
