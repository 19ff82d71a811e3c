"""Names of util.checkpoint and checkpoints.published, until their importers have moved."""

from checkpoints.published import BUFFERS, TABLES, WEIGHTS, generator_state, one_layout, structure_from_shapes
from util.checkpoint import LAST, SAFE, find_file, load_state, read_file

CHOICES = WEIGHTS
__all__ = ["BUFFERS", "LAST", "SAFE", "TABLES", "find_file", "generator_state", "load_state", "one_layout", "read_file"]
__all__ += ["structure_from_shapes"]
