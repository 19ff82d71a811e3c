"""make_reference.py FOLDER OUT: a reference of the folder's images with stand-in features."""

import sys

from evaluation.reference import make_reference, save_reference
from tests.stand_ins import Colours
from util import dist

dist.init("cpu")
made = make_reference(sys.argv[1], Colours(), img_size=24, keep_features=7, batch_size=3)
print(f"features {len(made.features)}\n", end="", flush=True)
if dist.is_main():
    save_reference(sys.argv[2], made)
dist.shutdown()
