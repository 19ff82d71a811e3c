"""Command lines beside the main scripts: `python -m tools.NAME`."""

import util.start  # noqa: F401  (first: see there)
