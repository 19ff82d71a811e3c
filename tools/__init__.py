"""Command lines beside the main scripts: `python -m tools.NAME`."""
