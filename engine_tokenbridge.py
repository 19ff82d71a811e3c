"""The loops: `train` over epochs, `train_one_epoch` over steps (training/step.py), `evaluate` over sampler settings."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from checkpoints.build import loaded_weights
from dataset.images import read_image, save_grid, to_tensor
from dataset.loader import GlobalBatchSampler, build_loader
from dataset.training_set import DataOptions, build_dataset
from evaluation.evaluator import Evaluator
from evaluation.published import comparison
from evaluation.report import sweep_table, write_sweep
from generation.pipeline import GenerationSettings, generate_batches
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from training import posthoc_ema, recipe
from training.flops import step_flops
from training.guard import check_same_start, stop_message
from training.outputs import RunOutputs
from training.preempt import StopRequest
from training.progress import Progress
from training.settings import RunSettings, TrainSettings, due, initial_loss
from training.sharding import check_sharding
from training.state import TrainState
from training.step import accumulate, draw_step, optimizer_step, set_learning_rate
from util import checkpoint, dist
from util.log import JsonlLog, get_logger, warn_once
from util.options import ArgumentError
from util.presets import Preset

logger = get_logger()


def train(
    model: TokenBridge,
    vae: AutoencoderKL,
    data: DataOptions,
    device: torch.device,
    settings: TrainSettings,
    run: RunSettings,
    samples: GenerationSettings,
    *,
    arguments: Mapping,
    resumed: tuple[dict | None, Path | None] = (None, None),
    make_evaluator: Callable[[Sequence[str]], Callable] | None = None,
) -> None:
    """Train to the last step of the settings; writes checkpoint-last.pth, log.jsonl and tensorboard events.

    arguments: the command line's, recorded in checkpoints. resumed: content and path of the checkpoint that is
    continued. make_evaluator: for run.online_eval, called with the class names before any work; what it returns is
    called with (model, vae, step). SIGTERM and SIGUSR1 end the run after a step, with a checkpoint.
    """
    trained_classes = ((resumed[0] or {}).get("config") or {}).get("classes")
    dataset = build_dataset(data, model, vae, model.config.img_size, trained_classes)
    check_same_start(dataset, resumed[0], run.resume)
    sampler = GlobalBatchSampler(len(dataset), settings.batch_size, dist.rank(), dist.world_size(), settings.seed)
    settings = settings.prepared(steps_in_epoch(len(dataset), len(sampler), settings), device)
    check_sharding(settings.fsdp, device)
    score = make_evaluator(dataset.classes) if run.online_eval else None
    samples.check(model.token_dim)
    vae.to(memory_format=torch.channels_last)  # faster convolutions; for images only, a cache needs no VAE
    state, outputs = start(model, vae, dataset, device, settings, run, arguments, resumed)
    stop, stopped = StopRequest(), False
    with outputs, stop.listening():
        announce(arguments["model"], settings, len(dataset), state)
        loader = build_loader(dataset, sampler, settings.num_workers, settings.pin_memory)
        while state.step < settings.total_steps and not stopped:
            epoch, done = divmod(state.step, settings.steps_per_epoch)
            sampler.set_epoch(epoch, done * settings.accum_iter)
            stopped = train_one_epoch(
                state, vae, loader, settings, device, outputs.log, outputs=outputs, should_stop=stop.agreed
            )
            end_of_epoch(state, vae, settings, samples, outputs, score, epoch=epoch, stopped=stopped)
    if stopped:
        logger.info("%s", stop_message(state.step, settings.total_steps, outputs.saved, outputs.folder))
    state.skipped.warn(state.step, finished=not stopped)


def start(
    model: TokenBridge,
    vae: AutoencoderKL,
    dataset: Dataset,
    device: torch.device,
    settings: TrainSettings,
    run: RunSettings,
    arguments: Mapping,
    resumed: tuple[dict | None, Path | None],
) -> tuple[TrainState, RunOutputs]:
    """The state of a new or resumed run, and its outputs; nothing is written yet."""
    content, source = resumed
    if content is not None:
        checkpoint.load_state(model, content["model"], str(source))
    state = TrainState(model, settings, device)
    data = {"samples": len(dataset), "seed": settings.seed, "global_batch": settings.images_per_step}
    if content is not None:
        recipe.resume(state, settings, content, source, data=data, arguments=arguments)
    else:
        state.step = run.start_epoch * settings.steps_per_epoch
    config = recipe.checkpoint_config(model, vae, dataset.classes, arguments, settings)
    if state.power_emas:
        config["run"] = posthoc_ema.choose_run(run.output_dir, config, data, content)
    return state, RunOutputs(run, settings, state, config=config, data=data)


def train_one_epoch(
    state: TrainState,
    vae: AutoencoderKL,
    loader: Iterable,
    settings: TrainSettings,
    device: torch.device,
    log: JsonlLog | None = None,
    *,
    outputs: RunOutputs | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from `state.step`, whose first micro-batch the loader starts with, to the end of its epoch or of the run.

    A step whose loss or gradient is not finite is skipped on every process alike; max_bad_steps in a row are an error
    that names step, lr and gradient norm. should_stop() is asked after each step, by every process, all of which get
    the same answer; returns True if it was to stop.
    """
    s, model = settings, state.model.train()
    last = min((state.step // s.steps_per_epoch + 1) * s.steps_per_epoch, s.total_steps)
    progress = Progress(s, device, log, peak_tflops=s.peak_tflops)
    batches, parameters, stop = dist.prefetch(iter(loader), device), list(model.parameters()), False
    while state.step < last and not stop:
        draws = draw_step(model, s, state.step, device)
        lr = s.learning_rate(state.step)
        set_learning_rate(state.optimizer, lr)
        window, detailed = progress.window, (state.step + 1) % s.log_freq == 0
        loss, window.details = accumulate(state, vae, batches, draws, s, window, detailed)
        norm = optimizer_step(state, parameters, s.grad_clip)
        state.update_averages()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1

        window.add(loss, norm, lr)
        window.flops += s.batch_size * sum(step_flops(model.config, count) for count in draws.counts)
        stop = should_stop()
        save_now = outputs is not None and outputs.due()
        if stop or save_now or state.step == last or progress.due(state.step, norm):
            progress.flush(state.step, state.skipped)
        if outputs is not None:
            outputs.after_step()
    return stop


def end_of_epoch(
    state: TrainState,
    vae: AutoencoderKL,
    settings: TrainSettings,
    samples: GenerationSettings,
    outputs: RunOutputs,
    score: Callable | None,
    *,
    epoch: int,
    stopped: bool,
) -> None:
    """Checkpoint, evaluation and sample grid of epoch number `epoch`, where they are due; a stopped run saves only."""
    run, finished = outputs.run, state.step >= settings.total_steps
    if finished:
        outputs.save_averages()
    if stopped or finished or due(epoch, run.save_last_freq):
        outputs.save_checkpoint()
    if stopped:
        return
    if score is not None and (finished or due(epoch, run.eval_freq)):
        score(state.averaged_model(), vae, state.step)
    ended = state.step % settings.steps_per_epoch == 0
    if run.sample_freq and (finished or ended and (epoch + 1) % run.sample_freq == 0):
        grid = sample_grid(state.averaged_model(), vae, samples, outputs.sample_path(), state.device)
        outputs.log_image("samples", grid)


def evaluate(
    evaluator: Evaluator,
    model: TokenBridge,
    vae: AutoencoderKL,
    pairs: Sequence[tuple[float, float]],
    *,
    checkpoint: Path,
    weights: str,
    preset: Preset | None = None,
) -> list[dict]:
    """--evaluate: scores at each pair of guidance scale and temperature, each of which resumes where it was killed.

    Appends a line each to OUT/eval.jsonl; of several, a table, CSV and plot. weights: "ema" or "model", which were
    loaded from `checkpoint`. preset: an evaluation whose figures are printed beside these. The records on rank 0.
    """
    hashes = loaded_weights(model, vae, checkpoint, evaluator.about["vae_path"])
    about = {"checkpoint": str(checkpoint), "weights": weights, "vae_config": vae.config} | hashes
    records = []
    for cfg, temperature in pairs:
        settings = replace(evaluator.settings, cfg=cfg, temperature=temperature)
        store = evaluator.store(model, settings, about)
        record = evaluator(model, vae, settings=settings, store=store, folder=str(store.folder), **about)
        records += [record] if record is not None else []
    dist.barrier()
    if len(records) > 1:
        print(sweep_table(records))
        write_sweep(records, evaluator.output)
        logger.info("wrote %s and %s", evaluator.output / "eval_sweep.csv", evaluator.output / "eval_sweep.png")
    for record in records if preset is not None and preset.evaluates else ():
        print(comparison(preset, record))
    return records


def steps_in_epoch(samples: int, micro_batches: int, settings: TrainSettings) -> int:
    """Optimizer steps in an epoch; ArgumentError if there is not one."""
    steps = micro_batches // settings.accum_iter
    if steps == 0:
        needed = f"{settings.batch_size} x {dist.world_size()} processes x accum_iter {settings.accum_iter}"
        message = f"the data set has {samples} samples, fewer than one optimizer step needs ({needed})"
        raise ArgumentError("accum_iter", message)
    return steps


def announce(name: str, settings: TrainSettings, images: int, state: TrainState) -> None:
    """Log what is trained, and where its loss should start."""
    model, levels = state.model, state.model.config.quant_levels
    logger.info(
        "%s: %.2f M parameters, %d tokens x %d dimensions x %d levels; %d images, global batch %d, lr %.3g, %d epochs "
        "of %d steps, %s on %s",
        *(name, sum(p.numel() for p in model.parameters()) / 1e6, model.num_tokens, model.token_dim, levels),
        *(images, settings.images_per_step, settings.lr, settings.epochs, settings.steps_per_epoch),
        *(settings.precision, state.device),
    )
    for line in settings.schedule_warnings():
        warn_once("%s", line)
    chance = math.log(levels)
    start = initial_loss(levels, model.config.channel_embed_dim)
    logger.info("chance level is ln %d = %.3f; the loss of an untrained model is about %.2f", levels, chance, start)
    if state.step >= settings.total_steps:
        logger.info("nothing to do: %d of %d steps are done", state.step, settings.total_steps)


def sample_grid(
    model: TokenBridge, vae: AutoencoderKL, settings: GenerationSettings, path: Path, device: torch.device
) -> Tensor | None:
    """Write a grid of up to 16 evenly spaced classes, with the same seeds each time; returns it (3, H, W) on rank 0."""
    count = min(16, model.class_num)
    labels = [i * model.class_num // count for i in range(count)]
    batches = generate_batches(model, vae, labels, range(dist.rank(), count, dist.world_size()), settings, device)
    own = {n: image.cpu() for numbers, images in batches for n, image in zip(numbers, images, strict=True)}
    parts = dist.gather_objects(own)
    if not dist.is_main():
        return None
    images = {number: image for part in parts for number, image in part.items()}
    save_grid(path, torch.stack([images[i] for i in range(count)]), math.ceil(count**0.5))
    return to_tensor(read_image(path))
