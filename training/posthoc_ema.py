"""An EMA of any length, chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

  python -m tools.posthoc_ema OUT/model --sigma_rel 0.08 [--step 40000] [--output FILE.pth]

An average's profile says how much the weights after each step count in it; its length is the profile's standard
deviation over the steps trained (sigma_rel). Training with --posthoc_ema_freq N keeps two averages with power-function
profiles (training/ema.py) and writes both every N steps. A weighted sum of these snapshots is an average whose profile
is the same sum of theirs; `fit` finds the weights that bring it nearest to the profile of the wanted length. --resume
takes the file that is written, for --sample and --evaluate.

Letters: K averages in the snapshots, N wanted lengths.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.ema import SIGMA_RELS, PowerEma, power_exponent
from training.sharding import to_host
from util import dist
from util.checkpoint import atomic_save, read_file
from util.checkpoint_folder import CheckpointWriter
from util.log import get_logger

logger = get_logger()

FOLDER = "posthoc_ema"  # of the snapshots, in the run's folder
MAX_RESIDUAL = 0.1  # a profile that is off by more is another average than the one asked for
NOT_THE_COURSE = (
    *("resume", "start_epoch", "batch_size", "accum_iter", "log_freq", "save_last_freq", "save_every_steps"),
    *("keep_last", "sample_freq", "online_eval", "eval_freq", "eval_bsz", "posthoc_ema_freq", "device"),
    *("num_workers", "pin_mem", "world_size", "local_rank", "dist_on_itp", "dist_url"),
)


# ---- the fit


def inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integral of p_a p_b, where p(tau) = (gamma + 1) tau^gamma / t^(gamma+1) on [0, t] (appendix C); broadcasts."""
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    both = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * later)
    return both * (earlier / later) ** np.where(t_a < t_b, gamma_b, gamma_a)


def fit(
    steps: Sequence[int], sigma_rels: Sequence[float], step: int, wanted: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, N) that add averages of `sigma_rels` at `steps` (K) up to lengths `wanted` (N) at `step`; residuals.

    Least squares over the profiles. The weights of each sum add up to 1, as every profile's integral does (the paper
    leaves that free). Residual: ||sum - wanted profile|| / ||wanted profile||, in L2.
    """
    t, gamma = np.array(steps, dtype=np.float64)[:, None], np.array([[power_exponent(s)] for s in sigma_rels])  # (K, 1)
    end, target = np.full((1, len(wanted)), float(step)), np.array([[power_exponent(s) for s in wanted]])  # (1, N)
    a, b = inner_product(t, gamma, t.T, gamma.T), inner_product(t, gamma, end, target)  # (K, K), (K, N)
    c = inner_product(end, target, end, target)  # (1, N)
    scale = 1 / np.sqrt(np.diag(a))[:, None]  # to profiles of norm 1, better conditioned
    system = np.block([[a * scale * scale.T, scale], [scale.T, np.zeros((1, 1))]])  # with Lagrange's multiplier
    weights = np.linalg.lstsq(system, np.vstack([b * scale, np.ones_like(c)]), rcond=1e-13)[0][:-1] * scale  # (K, N)
    squared = (weights * (a @ weights - 2 * b)).sum(0) + c[0]
    return weights, np.sqrt(np.maximum(squared, 0) / c[0])


def possible(steps: Sequence[int], sigma_rels: Sequence[float], step: int) -> str:
    """In words, which lengths these averages can be added up to."""
    wanted = np.linspace(0.005, 12**-0.5, 200)
    good = wanted[fit(steps, sigma_rels, step, wanted)[1] <= MAX_RESIDUAL]
    return f"from {good.min():.3f} to {good.max():.3f}"


# ---- snapshots of a run


def snapshot_path(folder: Path, step: int) -> Path:
    """Where the snapshot of a step stands."""
    return folder / f"step-{step:08d}.pth"


def snapshot_files(run_folder: Path) -> dict[int, Path]:
    """{step: file} of the snapshots in a run's folder, oldest first."""
    return {int(path.stem[5:]): path for path in sorted((run_folder / FOLDER).glob("step-" + "[0-9]" * 8 + ".pth"))}


def run_name(config: dict, data: dict) -> str:
    """Names a run by all that decides its course: the same command, started anew, makes the same run."""
    arguments = {key: value for key, value in config["args"].items() if key not in NOT_THE_COURSE}
    course = config | {"args": arguments, "data": data}
    return hashlib.sha256(json.dumps(course, sort_keys=True, default=str).encode()).hexdigest()[:16]


def choose_run(output_dir: str, config: dict, data: dict, content: dict | None) -> str:
    """The name of a run: its checkpoint's, or a new one. ValueError if the folder holds snapshots of another run."""
    run = ((content or {}).get("config") or {}).get("run") or run_name(config, data)
    check_run(Path(output_dir), run)
    return run


def read_snapshot(path: Path, run: str | None, whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """{sigma_rel as text: {name: float16}} of one file, tensors left on the disk until they are used.

    ValueError if it is none of this run's, or (whole) a checksum is wrong.
    """
    content = read_file(path, mmap=True, unchecked=() if whole else ["averages"])
    averages = content.get("averages")
    if not isinstance(averages, dict) or not all(isinstance(averages.get(f"{s:g}"), dict) for s in SIGMA_RELS):
        raise ValueError(f"{path} is no snapshot of --posthoc_ema_freq: it lacks averages; move it away")
    if content.get("run") != run:
        other = f"another run (named {content.get('run')}, this one is {run})"
        advice = f"move that run's {FOLDER} away, or use another folder (--output_dir)"
        raise ValueError(f"{path} belongs to {other}: {advice}")
    return averages


def check_run(run_folder: Path, run: str) -> None:
    """ValueError, on every process, if there are snapshots of another run; every process must call it."""
    error = None
    try:
        for path in snapshot_files(run_folder).values() if dist.is_main() else ():
            read_snapshot(path, run)
    except (ValueError, OSError) as problem:
        error = problem
    dist.agree(error)


class SnapshotWriter(CheckpointWriter):
    """Writes snapshots in the background; removes those later than `step`, where the run begins again."""

    def __init__(self, run_folder: Path, run: str, step: int):
        super().__init__(run_folder / FOLDER)
        self.run, self.taken = run, None
        for later in [path for at, path in snapshot_files(run_folder).items() if at > step and dist.is_main()]:
            logger.info("%s is later than step %d, where training goes on: removed", later, step)
            later.unlink()

    def take(self, step: int, averages: Sequence[PowerEma], sharded: bool) -> None:
        """Begin to write both averages in float16, once for each step; every process must call it."""
        if step == self.taken:
            return
        self.taken = step
        if not (dist.is_main() or sharded):
            return
        halves: dict[str, dict] = {}
        for average in averages:  # one tensor after the other: no device holds all of them in float16 too
            values = {name: to_host(x.half(), keep=dist.is_main()) for name, x in average.state_dict().items()}
            halves[f"{average.sigma_rel:g}"] = values
        if dist.is_main():
            self.save({"step": step, "run": self.run, "averages": halves})

    def _write(self, content: dict) -> None:
        atomic_save(content, snapshot_path(self.folder, content["step"]))


# ---- adding up


def add_up(files: Sequence[Path], run: str, weights: np.ndarray, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of weights (len(files), len(SIGMA_RELS)) x averages, float32, with the names and shapes of `like`."""
    total = {name: torch.zeros(value.shape) for name, value in like.items()}
    for path, row in zip(files, weights, strict=True):
        averages = read_snapshot(path, run, whole=True)
        for sigma_rel, weight in zip(SIGMA_RELS, row, strict=True):
            average = averages[f"{sigma_rel:g}"]
            bad = [name for name, value in total.items() if getattr(average.get(name), "shape", None) != value.shape]
            if bad:
                what = f"{len(bad)} parameters of the run's model: {', '.join(bad[:3])}"
                raise ValueError(f"{path} lacks or misshapes {what}; move it away")
            for name, value in total.items():
                value.add_(average[name].float(), alpha=float(weight))
    not_finite = [name for name, value in total.items() if not torch.isfinite(value).all()]
    if not_finite:
        where = ", ".join(not_finite[:3])
        raise ValueError(
            f"the snapshots in {files[0].parent} hold NaN or values too large for float16, first in {where}"
        )
    return total


def reconstruct(source: Path, sigma_rel: float, step: int | None = None) -> dict:
    """A checkpoint whose model and model_ema are the average of length `sigma_rel` of the run of `source`.

    step: the one at which the average ends, by default the last snapshot's. "fit" in it says how near the average is.
    ValueError if there are no snapshots, they are another run's, or cannot be added up to that length.
    """
    content = read_file(source, mmap=True)
    config, last = content["config"] if isinstance(content.get("config"), dict) else {}, content.get("step", 0)
    folder = source.parent / FOLDER
    files = {at: path for at, path in snapshot_files(source.parent).items() if at <= last}
    if not files:
        advice = "they are written by training with --posthoc_ema_freq N, from its first step on"
        raise ValueError(f"{folder} holds no snapshots up to step {last} of {source}: {advice}")
    for path in files.values():
        read_snapshot(path, config.get("run"))
    step = max(files) if step is None else step
    if step not in files:
        raise ValueError(f"--step {step}: {folder} has no snapshot of that step, it has {', '.join(map(str, files))}")
    files = {at: path for at, path in files.items() if at <= step}
    steps, sigma_rels = np.repeat(list(files), len(SIGMA_RELS)), SIGMA_RELS * len(files)
    weights, (residual,) = fit(steps, sigma_rels, step, [sigma_rel])
    if residual > MAX_RESIDUAL:
        what = f"--sigma_rel {sigma_rel:g} cannot be fitted with the {len(files)} snapshots up to step {step}"
        off = f"the profile would be off by {100 * residual:.0f} %"
        advice = f"choose {possible(steps, sigma_rels, step)}, or train with a smaller --posthoc_ema_freq"
        raise ValueError(f"{what}: {off}; {advice}")
    weights = weights.reshape(len(files), len(SIGMA_RELS))
    average = add_up(list(files.values()), config["run"], weights, content["model_ema"])
    described = config | {"args": config["args"] | {"ema_rate": None, "ema_warmup": False}}  # no rate made this average
    quality = {"sigma_rel": sigma_rel, "residual": float(residual), "snapshots": len(files)}
    models = {"model": content["model"] | average, "model_ema": average, "weights": "ema"}
    return models | {"config": described, "step": step, "fit": quality}
