"""main_tokenbridge.py with stand-in features. DIE=rank: it kills itself at its third batch; FAIL: an error."""

import os
import signal
import sys
from collections.abc import Iterator

import main_tokenbridge
from evaluation import evaluator
from tests.stand_ins import FewColours, small_reference
from util.cli import run_cli

rank, generate_batches, count = os.environ.get("RANK", "0"), evaluator.generate_batches, 0


def counted(*arguments: object) -> Iterator:
    """As `generate_batches`, with a line of output for each batch."""
    global count
    count += 1
    if os.environ.get("DIE") == rank and count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("FAIL") == rank and count == 2:
        raise ValueError("this process has failed")
    print("made a batch\n", end="", flush=True)
    return generate_batches(*arguments)


evaluator.generate_batches, evaluator.InceptionFeatures = counted, FewColours
evaluator.load_references = lambda *_, **__: small_reference()
sys.exit(run_cli(main_tokenbridge.main))
