"""`python -m tools.bench NAME`: one file per bench, each with `Options` and `run`."""
