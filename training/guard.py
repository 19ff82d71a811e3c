"""No broken checkpoint takes the place of a good one: what every training asks before it writes one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from training.sharding import local
from util import dist
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()


def may_save(
    step: int, bad_in_row: int, weights: Mapping[str, Tensor], lr: float, *, final: bool, saved: int | None
) -> bool:
    """Whether a training may write its checkpoint. Every process asks, and all get the same answer.

    Not while steps are being skipped, except for one at the end of the run: they changed no weight. saved: the step of
    the last checkpoint. ArgumentError if a weight or an average is not finite.
    """
    if bad_in_row and not final:
        stays = "there is none yet" if saved is None else f"that of step {saved} stays"
        logger.warning("no checkpoint at step %d: the last %d steps were skipped; %s", step, bad_in_row, stays)
        return False
    check_finite(weights, step, lr)
    return True


def stop_message(step: int, total: int, saved: int | None, folder: object) -> str:
    """How a run that a signal stopped goes on."""
    again = f"the same command with --resume {folder} continues"
    if saved != step:
        again += " from the beginning" if saved is None else f" from the checkpoint of step {saved}"
    return f"stopped by a signal after step {step} of {total}; {again}"


def check_finite(weights: Mapping[str, Tensor], step: int, lr: float) -> None:
    """ArgumentError, on every process, if a value is NaN or infinite. One host sync."""
    finite = torch.stack([torch.isfinite(local(value.detach())).all() for value in weights.values()]).tolist()
    own = [name for name, good in zip(weights, finite, strict=True) if not good]
    broken = list(dict.fromkeys(name for names in dist.gather_objects(own) for name in names))
    if broken:
        raise ArgumentError(
            "lr",
            f"{len(broken)} weights are NaN or infinite at step {step} with lr {lr:.3g}, first: {broken[0]}; the files "
            "written so far are as they were. Lower the learning rate",
        )
