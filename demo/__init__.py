"""The demo on handwritten digits, its web page and its studies."""

import util.start  # noqa: F401  (first: see there)
