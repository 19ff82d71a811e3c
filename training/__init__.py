"""One training step, its settings, state, averages, learning rate and outputs."""
